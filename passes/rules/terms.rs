//! What rules say beside terms: conditions, and functions that make attributes.
//!
//! ```text
//! unshared ?w                     condition: nothing else in the model reads the matrix ?w
//! (scale (product ?a ?b) ?x)      function: the factors of ?a and ?b multiplied
//! ```
//!
//! A function that has no answer keeps its rule from applying.

use crate::egraph::{Classes, Fact, Leaf, Tag, value_type};
use egg::Id;
use ir::{Attr, Attrs, DType, Dim, Op, Type, attrs};

/// A named condition.
pub struct Condition {
    /// Its name.
    pub name: &'static str,
    /// What it is about: how many variables follow the name.
    pub variables: usize,
    /// When it holds, for the reference page.
    pub meaning: &'static str,
    /// Whether it holds for the classes its variables are bound to.
    pub holds: fn(&Classes, &[Id]) -> bool,
}

/// Every condition.
pub static CONDITIONS: &[Condition] = &[
    Condition {
        name: "f32",
        variables: 1,
        meaning: "the weight is stored as f32: into a narrower format its values would be rounded again",
        holds: |classes, ids| matches!(value_type(classes, ids[0]).and_then(|t| t.as_tensor()), Some((DType::F32, _))),
    },
    Condition {
        name: "unshared",
        variables: 1,
        meaning: "matrices it is made of are read by nothing else in the model: what is folded in is packed once",
        holds: |classes, ids| unshared(classes, ids[0], 8),
    },
    Condition {
        name: "positive",
        variables: 1,
        meaning: "the factor is above zero",
        holds: |classes, ids| factor(classes, ids[0]).is_some_and(|by| by > 0.0),
    },
    Condition {
        name: "power",
        variables: 1,
        meaning: "the factor is a power of two, of either sign: it changes exponents only",
        holds: |classes, ids| {
            factor(classes, ids[0]).is_some_and(|by| by.to_bits() << 12 == 0 && (1e-18..=1e18).contains(&by.abs()))
        },
    },
    Condition {
        name: "inverse",
        variables: 2,
        meaning: "the two factors multiply to one",
        holds: |classes, ids| match (factor(classes, ids[0]), factor(classes, ids[1])) {
            (Some(a), Some(b)) => (a * b - 1.0).abs() < 1e-12,
            _ => false,
        },
    },
];

/// The attribute `by` of a list.
fn factor(classes: &Classes, id: Id) -> Option<f64> {
    match &classes[id].data {
        Fact::Attrs(leaf) => number(&leaf.attrs(), "by"),
        Fact::Value(_) => None,
    }
}

/// Some form of the weight is made of matrices that nothing else reads, within so many ops.
fn unshared(classes: &Classes, id: Id, depth: usize) -> bool {
    let matrix = value_type(classes, id).and_then(|ty| ty.as_tensor()).is_some_and(|(_, shape)| shape.len() > 1);
    let form = |node: &crate::egraph::ENode| match node.tag {
        Tag::Op(Op::WEIGHT) => !classes.analysis.shared.contains(node.attrs(classes).str("name")),
        Tag::Op(_) => {
            let (last, operands) = (depth == 0, node.operands());
            // what is rotated or made of nothing stays: x = x H H would be folded forever
            !last && !operands.is_empty() && operands.iter().all(|o| unshared(classes, *o, depth - 1))
        }
        _ => false,
    };
    !matrix || classes[id].nodes.iter().any(form)
}

/// What a function is given: attributes, or the type of a value.
#[derive(Clone, Debug, PartialEq)]
pub enum Argument {
    /// An attribute list.
    Attrs(Attrs),
    /// A value's type.
    Type(Type),
}

/// A named function that makes attributes.
pub struct Function {
    /// Its name.
    pub name: &'static str,
    /// How many arguments it takes.
    pub arguments: usize,
    /// What it gives, for the reference page.
    pub meaning: &'static str,
    /// Its value; `None`: the rule does not apply.
    pub value: fn(&[Argument]) -> Option<Attrs>,
}

/// Every function.
pub static FUNCTIONS: &[Function] = &[
    Function {
        name: "product",
        arguments: 2,
        meaning: "both factors multiplied",
        value: |a| Some(attrs! { by = by(&a[0])? * by(&a[1])? }),
    },
    Function {
        name: "sum",
        arguments: 2,
        meaning: "both summands added",
        value: |a| Some(attrs! { by = by(&a[0])? + by(&a[1])? }),
    },
    Function {
        name: "scores",
        arguments: 2,
        meaning: "settings of attention, its scale multiplied by a factor",
        value: |a| with(&a[0], "scale", |scale| Some(scale * by(&a[1])?)),
    },
    Function {
        name: "over",
        arguments: 2,
        meaning: "a settings list with its one number divided by a factor",
        value: |a| {
            let name = ["eps", "cap"].into_iter().find(|name| get(&a[0], name).is_some())?;
            with(&a[0], name, |x| Some(x / by(&a[1])?))
        },
    },
    Function {
        name: "over_square",
        arguments: 2,
        meaning: "an eps divided by the square of a factor",
        value: |a| with(&a[0], "eps", |eps| Some(eps / by(&a[1])?.powi(2))),
    },
    Function {
        name: "bound",
        arguments: 1,
        meaning: "a factor as the bound of a softcap",
        value: |a| Some(attrs! { cap = by(&a[0])? }),
    },
    Function {
        name: "within",
        arguments: 2,
        meaning: "the columns that a slice of a slice takes",
        value: |a| Some(attrs! { from = int(&a[0], "from")? + int(&a[1], "from")?, count = int(&a[0], "count")? }),
    },
    Function {
        name: "left",
        arguments: 2,
        meaning: "a slice, where it lies within the first of two values side by side",
        value: |a| {
            let (from, count) = (int(&a[0], "from")?, int(&a[0], "count")?);
            (from + count <= width(&a[1])?).then(|| attrs! { from = from, count = count })
        },
    },
    Function {
        name: "right",
        arguments: 2,
        meaning: "a slice, where it lies beyond the first of two values side by side, counted from there",
        value: |a| {
            let (from, count) = (int(&a[0], "from")?.checked_sub(width(&a[1])?)?, int(&a[0], "count")?);
            (from >= 0).then(|| attrs! { from = from, count = count })
        },
    },
    Function {
        name: "joined",
        arguments: 2,
        meaning: "the columns of a slice and of the one that begins where it ends",
        value: |a| {
            let (from, count) = (int(&a[0], "from")?, int(&a[0], "count")?);
            let next = int(&a[1], "from")? == from + count;
            next.then_some(attrs! { from = from, count = count + int(&a[1], "count")? })
        },
    },
];

/// The number of the function of that name.
pub fn function(name: &str) -> Option<u8> {
    FUNCTIONS.iter().position(|f| f.name == name).map(|i| i as u8)
}

/// What function `index` makes of the classes `ids`.
pub fn apply(classes: &Classes, index: u8, ids: &[Id]) -> Option<Leaf> {
    let argument = |id: &Id| match &classes[*id].data {
        Fact::Attrs(leaf) => Argument::Attrs(leaf.attrs()),
        Fact::Value(ty) => Argument::Type(ty.clone()),
    };
    let arguments: Vec<Argument> = ids.iter().map(argument).collect();
    FUNCTIONS.get(usize::from(index)).and_then(|f| (f.value)(&arguments)).map(|attrs| Leaf::of(&attrs))
}

fn get<'a>(argument: &'a Argument, name: &str) -> Option<&'a Attr> {
    match argument {
        Argument::Attrs(attrs) => attrs.get(name),
        Argument::Type(_) => None,
    }
}

fn number(attrs: &Attrs, name: &str) -> Option<f64> {
    match attrs.get(name) {
        Some(Attr::Float(x)) => Some(*x),
        _ => None,
    }
}

fn by(argument: &Argument) -> Option<f64> {
    match argument {
        Argument::Attrs(attrs) => number(attrs, "by"),
        Argument::Type(_) => None,
    }
}

fn int(argument: &Argument, name: &str) -> Option<i64> {
    match get(argument, name) {
        Some(Attr::Int(i)) => Some(*i),
        _ => None,
    }
}

/// Extent of the last axis of a value.
fn width(argument: &Argument) -> Option<i64> {
    match argument {
        Argument::Type(ty) => match ty.as_tensor()?.1.last()? {
            Dim::N(n) => i64::try_from(*n).ok(),
            _ => None,
        },
        Argument::Attrs(_) => None,
    }
}

/// The list with one of its numbers changed.
fn with(argument: &Argument, name: &str, change: impl Fn(f64) -> Option<f64>) -> Option<Attrs> {
    let Argument::Attrs(attrs) = argument else { return None };
    let changed = change(number(attrs, name)?)?;
    let value = |(n, a): (&str, &Attr)| (n.to_string(), if n == name { Attr::Float(changed) } else { a.clone() });
    Some(Attrs::new(attrs.iter().map(value).collect::<Vec<_>>()))
}
