//! A graph: one straight-line SSA program over tensors.
//!
//! Values are numbered: the inputs first, then one per node, in order, so a definition always precedes its uses. There are
//! no blocks and no regions. At the `optimized` stage every node belongs to one kernel; the node order is unchanged, so
//! the interpreter evaluates an optimized graph like any other.

use crate::ops::Op;
use crate::types::Type;
use std::fmt;

/// A value of a graph, printed `%3`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ValueId(pub u32);

/// A compile-time constant of a node.
#[derive(Clone, Debug, PartialEq, PartialOrd)]
#[allow(missing_docs)]
pub enum Attr {
    Int(i64),
    Float(f64),
    Bool(bool),
    Str(String),
}

/// As names of constants and reports have it.
impl fmt::Display for Attr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Attr::Int(i) => write!(f, "{i}"),
            Attr::Float(x) => write!(f, "{x}"),
            Attr::Bool(b) => write!(f, "{b}"),
            Attr::Str(s) => f.write_str(s),
        }
    }
}

/// A node's attributes, sorted by name.
#[derive(Clone, Debug, Default, PartialEq, PartialOrd)]
pub struct Attrs(Vec<(String, Attr)>);

/// One use of an op; defines one value.
#[derive(Clone, Debug, PartialEq)]
pub struct Node {
    /// The row of the op table.
    pub op: Op,
    /// Attributes, as the row's schema says.
    pub attrs: Attrs,
    /// Values read.
    pub operands: Vec<ValueId>,
    /// Type of the value defined.
    pub ty: Type,
}

/// An input of a graph; its name is what calls bind.
#[derive(Clone, Debug, PartialEq)]
pub struct Input {
    /// `x`, `tokens`, `step`, `keys`...
    pub name: String,
    /// Its type.
    pub ty: Type,
}

/// Which legality rules a graph has passed; see [`crate::verify`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Stage {
    /// As the importer built it.
    Imported,
    /// One spelling for equal things.
    Canonical,
    /// Every node belongs to a kernel.
    Optimized,
    /// One kernel's body: inputs and results are buffers.
    Planned,
}

/// Steps a variant of a graph is meant for, by their number of tokens, both ends included.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
pub struct TokenRange {
    /// Fewest tokens.
    pub min: usize,
    /// Most tokens.
    pub max: usize,
}

impl TokenRange {
    /// So many tokens are in it.
    pub fn contains(self, tokens: usize) -> bool {
        (self.min..=self.max).contains(&tokens)
    }
}

/// The kernel a run of nodes becomes. What kind of kernel it is follows from the classes of its ops.
#[derive(Clone, Debug, PartialEq)]
pub struct Fused {
    /// The values defined inside, ascending.
    pub values: Vec<ValueId>,
}

/// One SSA program over tensors.
#[derive(Clone, Debug, PartialEq)]
pub struct Graph {
    /// `embed`, `layer`, `head`...
    pub name: String,
    /// The rules it obeys.
    pub stage: Stage,
    /// The steps it is meant for; `None` for all.
    pub range: Option<TokenRange>,
    /// Inputs; value `i` is input `i`.
    pub inputs: Vec<Input>,
    /// Nodes; value `inputs.len() + i` is node `i`.
    pub nodes: Vec<Node>,
    /// Named results.
    pub results: Vec<(String, ValueId)>,
    /// Kernels, at the `optimized` stage only; together they hold every node but weights and folds of weights once, in
    /// launch order, which is ascending.
    pub kernels: Vec<Fused>,
}

impl Graph {
    /// An empty graph at the `imported` stage.
    pub fn new(name: impl Into<String>) -> Graph {
        Graph {
            name: name.into(),
            stage: Stage::Imported,
            range: None,
            inputs: vec![],
            nodes: vec![],
            results: vec![],
            kernels: vec![],
        }
    }

    /// Number of values.
    pub fn len(&self) -> usize {
        self.inputs.len() + self.nodes.len()
    }

    /// No inputs and no nodes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Every value, in definition order.
    pub fn values(&self) -> impl DoubleEndedIterator<Item = ValueId> + use<> {
        (0..self.len() as u32).map(ValueId)
    }

    /// The type of a value.
    pub fn ty(&self, value: ValueId) -> &Type {
        match self.node(value) {
            Some(node) => &node.ty,
            None => &self.inputs[value.0 as usize].ty,
        }
    }

    /// The node that defines a value; `None` for inputs.
    pub fn node(&self, value: ValueId) -> Option<&Node> {
        self.nodes.get((value.0 as usize).checked_sub(self.inputs.len())?)
    }

    /// Every value that a node defines, in order.
    pub fn computed(&self) -> Vec<ValueId> {
        (0..self.nodes.len()).map(|index| self.value_of(index)).collect()
    }

    /// Where a kernel's launch has an input's argument; `None` for the step, which is no argument, and for nodes.
    pub fn argument(&self, value: ValueId) -> Option<usize> {
        let index = value.0 as usize;
        self.inputs.get(index).filter(|input| input.ty != Type::Step)?;
        Some(self.inputs[..index].iter().filter(|input| input.ty != Type::Step).count())
    }

    /// How many arguments of a kernel's launch are inputs; results follow them.
    pub fn arguments(&self) -> usize {
        self.inputs.iter().filter(|input| input.ty != Type::Step).count()
    }

    /// What a value was made of by changing it in place: first operands, back to an input.
    pub fn root(&self, mut value: ValueId) -> ValueId {
        while let Some(node) = self.node(value) {
            value = node.operands[0];
        }
        value
    }

    /// It is for steps of so many tokens.
    pub fn suits(&self, tokens: usize) -> bool {
        self.range.is_none_or(|range| range.contains(tokens))
    }

    /// The value node `index` defines.
    pub fn value_of(&self, index: usize) -> ValueId {
        ValueId((self.inputs.len() + index) as u32)
    }

    /// Declares an input. All inputs come before the first node.
    ///
    /// # Panics
    /// After the first node.
    pub fn input(&mut self, name: impl Into<String>, ty: Type) -> ValueId {
        assert!(self.nodes.is_empty(), "inputs come before nodes");
        self.inputs.push(Input { name: name.into(), ty });
        ValueId(self.inputs.len() as u32 - 1)
    }

    /// Appends a node; its type comes from the op's type rule.
    ///
    /// # Errors
    /// Where the operands or attributes do not fit the op's row; the message has the types.
    pub fn push(&mut self, op: &str, operands: &[ValueId], attrs: Attrs) -> crate::Result<ValueId> {
        let op = Op::named(op).ok_or_else(|| crate::Error::new(crate::Kind::Internal, format!("no op `{op}`")))?;
        self.push_op(op, operands, attrs)
    }

    /// [`Graph::push`] with the row at hand.
    pub fn push_op(&mut self, op: Op, operands: &[ValueId], attrs: Attrs) -> crate::Result<ValueId> {
        let types: Vec<&Type> = operands.iter().map(|v| self.ty(*v)).collect();
        let ty = op.infer(&types, &attrs)?;
        self.nodes.push(Node { op, attrs, operands: operands.to_vec(), ty });
        Ok(self.value_of(self.nodes.len() - 1))
    }

    /// Appends a reference to a weight by name.
    pub fn weight(&mut self, name: impl Into<String>, ty: Type) -> ValueId {
        let attrs = Attrs::new([("name", Attr::Str(name.into()))]);
        self.nodes.push(Node { op: Op::WEIGHT, attrs, operands: vec![], ty });
        self.value_of(self.nodes.len() - 1)
    }

    /// Names a result.
    pub fn result(&mut self, name: impl Into<String>, value: ValueId) {
        self.results.push((name.into(), value));
    }

    /// For every value, how many nodes and results read it.
    pub fn uses(&self) -> Vec<usize> {
        let mut uses = vec![0; self.len()];
        let operands = self.nodes.iter().flat_map(|n| &n.operands);
        for value in operands.chain(self.results.iter().map(|(_, v)| v)) {
            uses[value.0 as usize] += 1;
        }
        uses
    }
}

impl Attrs {
    /// Attributes from pairs, sorted.
    pub fn new<K: Into<String>>(pairs: impl IntoIterator<Item = (K, Attr)>) -> Attrs {
        let mut list: Vec<(String, Attr)> = pairs.into_iter().map(|(k, v)| (k.into(), v)).collect();
        list.sort_by(|a, b| a.0.cmp(&b.0));
        Attrs(list)
    }

    /// No attributes.
    pub fn none() -> Attrs {
        Attrs::default()
    }

    /// The attribute of that name.
    pub fn get(&self, name: &str) -> Option<&Attr> {
        self.0.iter().find(|(n, _)| n == name).map(|(_, a)| a)
    }

    /// In order of name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Attr)> {
        self.0.iter().map(|(n, a)| (n.as_str(), a))
    }

    /// None at all.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// An integer attribute. The verifier has checked presence and kind against the row's schema.
    ///
    /// # Panics
    /// Where it is absent or no integer.
    pub fn int(&self, name: &str) -> i64 {
        match self.get(name) {
            Some(Attr::Int(i)) => *i,
            other => panic!("integer attribute `{name}`: {other:?}"),
        }
    }

    /// [`Attrs::int`] as an extent.
    pub fn size(&self, name: &str) -> usize {
        self.int(name) as usize
    }

    /// A float attribute (panics as [`Attrs::int`] does).
    pub fn float(&self, name: &str) -> f64 {
        match self.get(name) {
            Some(Attr::Float(x)) => *x,
            other => panic!("float attribute `{name}`: {other:?}"),
        }
    }

    /// A boolean attribute (panics as [`Attrs::int`] does).
    pub fn bool(&self, name: &str) -> bool {
        match self.get(name) {
            Some(Attr::Bool(b)) => *b,
            other => panic!("boolean attribute `{name}`: {other:?}"),
        }
    }

    /// A string attribute (panics as [`Attrs::int`] does).
    pub fn str(&self, name: &str) -> &str {
        match self.get(name) {
            Some(Attr::Str(s)) => s,
            other => panic!("string attribute `{name}`: {other:?}"),
        }
    }
}

impl From<i64> for Attr {
    fn from(x: i64) -> Attr {
        Attr::Int(x)
    }
}
impl From<usize> for Attr {
    fn from(x: usize) -> Attr {
        Attr::Int(x as i64)
    }
}
impl From<f64> for Attr {
    fn from(x: f64) -> Attr {
        Attr::Float(x)
    }
}
impl From<bool> for Attr {
    fn from(x: bool) -> Attr {
        Attr::Bool(x)
    }
}
impl From<&str> for Attr {
    fn from(x: &str) -> Attr {
        Attr::Str(x.into())
    }
}

/// `attrs! { eps = 1e-5, group = 32 }`.
#[macro_export]
macro_rules! attrs {
    ($($name:ident = $value:expr),* $(,)?) => {
        $crate::Attrs::new::<&str>([$((stringify!($name), $crate::Attr::from($value))),*])
    };
}

impl fmt::Display for ValueId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "%{}", self.0)
    }
}

impl Stage {
    /// The name in text.
    pub fn name(self) -> &'static str {
        match self {
            Stage::Imported => "imported",
            Stage::Canonical => "canonical",
            Stage::Optimized => "optimized",
            Stage::Planned => "planned",
        }
    }
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
