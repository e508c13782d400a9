//! Graph to e-graph: one generic e-node for every op, attributes as a leaf child, the type as e-class analysis.
//!
//! ```text
//! %y = scale %x {by = 2.0}       ->       (scale {by=2.0} ?x)
//! ```
//!
//! An op with attributes has them as its first child, so that a pattern's variable binds or ignores them and a literal
//! tests them; attributes compare by content. Two classes of different type never become one: `merge` asserts it, so an
//! unsound rule is caught at the moment it lies. Fusion adds no nodes here: that a value may stay inside a kernel is a
//! choice of the extraction ([`crate::extract`]), and any set of e-nodes that makes a legal kernel is open to it.

use crate::rules::terms;
use egg::{Analysis, DidMerge, EGraph, FromOp, FromOpError, Id, Language, Symbol};
use ir::{Attr, Attrs, Graph, Op, Type};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

/// What an e-node is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Tag {
    /// Attributes of the parent.
    Attrs,
    /// An input of the graph.
    Input,
    /// In right-hand sides only: a function of the rule language, by number, that makes attributes.
    Function(u8),
    /// A row of the op table.
    Op(Op),
}

/// An attribute's value, comparable and hashable by content.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
enum Literal {
    Int(i64),
    Float(u64),
    Bool(bool),
    Str(String),
}

/// Attributes, or an input's number under the name `index`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Leaf(Vec<(String, Literal)>);

/// An e-node. Fields in this order: egg binary-searches the sorted nodes of a large class by discriminant, so the
/// discriminant comes first and is exactly `tag`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ENode {
    /// What it is.
    pub tag: Tag,
    /// For `Attrs` and `Input`.
    pub leaf: Leaf,
    /// Attributes first, where the op has any; then the operands.
    pub children: Vec<Id>,
}

/// The e-graph of one graph.
pub type Classes = EGraph<ENode, Facts>;

/// The type rule's surroundings.
#[derive(Clone, Default, Debug)]
pub struct Facts {
    /// Types of the graph's inputs.
    pub inputs: Vec<Type>,
    /// Types of its weights, by name in the graph.
    pub weights: BTreeMap<String, Type>,
    /// Weights that something else reads too: folding anything into one would pack it twice.
    pub shared: BTreeSet<String>,
    /// E-nodes that rules brought, as they were then, and the rule of each; in order.
    pub origins: Vec<(ENode, Symbol)>,
}

/// What is known of a class.
#[derive(Clone, PartialEq, Debug)]
pub enum Fact {
    /// It is an attribute list.
    Attrs(Leaf),
    /// It is a value.
    Value(Type),
}

impl Leaf {
    /// From attributes.
    pub fn of(attrs: &Attrs) -> Leaf {
        let literal = |a: &Attr| match a {
            Attr::Int(i) => Literal::Int(*i),
            Attr::Float(x) => Literal::Float(x.to_bits()),
            Attr::Bool(b) => Literal::Bool(*b),
            Attr::Str(s) => Literal::Str(s.clone()),
        };
        Leaf(attrs.iter().map(|(n, a)| (n.to_string(), literal(a))).collect())
    }

    /// Back to attributes.
    pub fn attrs(&self) -> Attrs {
        let attr = |l: &Literal| match l {
            Literal::Int(i) => Attr::Int(*i),
            Literal::Float(x) => Attr::Float(f64::from_bits(*x)),
            Literal::Bool(b) => Attr::Bool(*b),
            Literal::Str(s) => Attr::Str(s.clone()),
        };
        Attrs::new(self.0.iter().map(|(n, l)| (n.as_str(), attr(l))).collect::<Vec<_>>())
    }

    fn index(index: usize) -> Leaf {
        Leaf(vec![("index".into(), Literal::Int(index as i64))])
    }

    /// The number of an input.
    pub fn input(&self) -> Option<usize> {
        match self.0.as_slice() {
            [(_, Literal::Int(i))] => usize::try_from(*i).ok(),
            _ => None,
        }
    }

    fn parse(text: &str) -> Option<Leaf> {
        let pairs = text.strip_prefix('{')?.strip_suffix('}')?.split(',').filter(|p| !p.is_empty());
        let literal = |v: &str| {
            if let Ok(i) = v.parse() {
                return Some(Literal::Int(i));
            }
            match v {
                "true" | "false" => Some(Literal::Bool(v == "true")),
                _ => v.parse::<f64>().ok().map(|x| Literal::Float(x.to_bits())),
            }
        };
        let pair = |p: &str| p.split_once('=').and_then(|(k, v)| Some((k.to_string(), literal(v)?)));
        let mut list = pairs.map(pair).collect::<Option<Vec<_>>>()?;
        list.sort();
        Some(Leaf(list))
    }
}

impl ENode {
    fn leaf(tag: Tag, leaf: Leaf) -> ENode {
        ENode { tag, leaf, children: vec![] }
    }

    /// Operand classes, without the attributes.
    pub fn operands(&self) -> &[Id] {
        match self.tag {
            Tag::Op(op) if !op.row().attrs.is_empty() => &self.children[1..],
            _ => &self.children,
        }
    }

    /// The attributes of an op's e-node.
    pub fn attrs(&self, classes: &Classes) -> Attrs {
        match (self.tag, self.children.first().map(|c| &classes[*c].data)) {
            (Tag::Op(op), Some(Fact::Attrs(leaf))) if !op.row().attrs.is_empty() => leaf.attrs(),
            _ => Attrs::none(),
        }
    }
}

impl Language for ENode {
    type Discriminant = Tag;
    fn discriminant(&self) -> Tag {
        self.tag
    }
    fn matches(&self, other: &Self) -> bool {
        self.tag == other.tag && self.leaf == other.leaf && self.children.len() == other.children.len()
    }
    fn children(&self) -> &[Id] {
        &self.children
    }
    fn children_mut(&mut self) -> &mut [Id] {
        &mut self.children
    }
}

impl fmt::Display for ENode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.tag {
            Tag::Op(op) => write!(f, "{op}"),
            Tag::Function(index) => f.write_str(terms::FUNCTIONS[usize::from(index)].name),
            Tag::Attrs => write!(f, "{:?}", self.leaf.attrs()),
            Tag::Input => write!(f, "input{:?}", self.leaf.input()),
        }
    }
}

impl FromOp for ENode {
    type Error = FromOpError;

    fn from_op(name: &str, children: Vec<Id>) -> Result<Self, FromOpError> {
        if name.starts_with('{') {
            return match Leaf::parse(name) {
                Some(leaf) if children.is_empty() => Ok(ENode::leaf(Tag::Attrs, leaf)),
                _ => Err(FromOpError::new(name, children)),
            };
        }
        let (tag, arity) = match Op::named(name) {
            Some(op) => (Tag::Op(op), op.row().operands.len() + usize::from(!op.row().attrs.is_empty())),
            None => match terms::function(name) {
                Some(index) => (Tag::Function(index), terms::FUNCTIONS[usize::from(index)].arguments),
                None => return Err(FromOpError::new(name, children)),
            },
        };
        if children.len() != arity {
            return Err(FromOpError::new(name, children));
        }
        Ok(ENode { tag, leaf: Leaf::default(), children })
    }
}

impl Analysis<ENode> for Facts {
    type Data = Fact;

    fn make(classes: &mut Classes, node: &ENode, _: Id) -> Fact {
        match infer(classes, node) {
            Some(fact) => fact,
            None => panic!("e-node `{node}` does not fit its type rule"),
        }
    }

    fn merge(&mut self, a: &mut Fact, b: Fact) -> DidMerge {
        assert!(*a == b, "a rule equates values of different types: {a:?} and {b:?}");
        DidMerge(false, false)
    }
}

/// The type rule; `None` where the node is ill-typed, which rejects a right-hand side before it is added.
pub fn infer(classes: &Classes, node: &ENode) -> Option<Fact> {
    let facts = &classes.analysis;
    let op = match node.tag {
        Tag::Attrs => return Some(Fact::Attrs(node.leaf.clone())),
        Tag::Input => return facts.inputs.get(node.leaf.input()?).cloned().map(Fact::Value),
        Tag::Function(_) => return None,
        Tag::Op(op) => op,
    };
    let attrs = node.attrs(classes);
    if op == Op::WEIGHT {
        return facts.weights.get(attrs.str("name")).cloned().map(Fact::Value);
    }
    let types: Option<Vec<&Type>> = node.operands().iter().map(|c| value_type(classes, *c)).collect();
    op.infer(&types?, &attrs).ok().map(Fact::Value)
}

/// The type of a class of values.
pub fn value_type(classes: &Classes, class: Id) -> Option<&Type> {
    match &classes[class].data {
        Fact::Value(ty) => Some(ty),
        Fact::Attrs(_) => None,
    }
}

/// The e-graph that holds `graph` and nothing else, and the class of each of its values.
pub fn seed(graph: &Graph, shared: BTreeSet<String>) -> (Classes, Vec<Id>) {
    let weights = graph.nodes.iter().filter(|n| n.op == Op::WEIGHT);
    let weights = weights.map(|n| (n.attrs.str("name").to_string(), n.ty.clone())).collect();
    let inputs = graph.inputs.iter().map(|i| i.ty.clone()).collect();
    let mut classes = Classes::new(Facts { inputs, weights, shared, origins: vec![] });
    let mut ids: Vec<Id> =
        (0..graph.inputs.len()).map(|i| classes.add(ENode::leaf(Tag::Input, Leaf::index(i)))).collect();
    for node in &graph.nodes {
        let mut children = vec![];
        if !node.op.row().attrs.is_empty() {
            children.push(classes.add(ENode::leaf(Tag::Attrs, Leaf::of(&node.attrs))));
        }
        children.extend(node.operands.iter().map(|o| ids[o.0 as usize]));
        ids.push(classes.add(ENode { tag: Tag::Op(node.op), leaf: Leaf::default(), children }));
    }
    classes.rebuild();
    (classes, ids)
}
