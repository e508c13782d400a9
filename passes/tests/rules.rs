//! Every rule proves itself: both sides of it, for every op it stands for and for operands of every type it admits, are
//! built as graphs and evaluated on the same values.

extern crate mansard_ir as ir;

mod common;

use common::{difference, evaluate};
use ir::ops::AttrKind;
use ir::{Attr, Attrs, DType, Dim, Graph, Op, Type, ValueId};

use mansard_passes::rules::{Tolerance, table};
use std::collections::BTreeMap;

/// `(op a b)` or `?x`.
#[derive(Debug)]
enum Term {
    Variable(String),
    Node(String, Vec<Term>),
}

fn parse(text: &str) -> Term {
    let spaced = text.replace('(', " ( ").replace(')', " ) ");
    let mut tokens = spaced.split_whitespace();
    term(&mut tokens).unwrap_or_else(|| panic!("{text}"))
}

fn term<'a>(tokens: &mut impl Iterator<Item = &'a str>) -> Option<Term> {
    match tokens.next()? {
        "(" => {
            let name = tokens.next()?.to_string();
            let mut children = vec![];
            while let Some(child) = term(tokens) {
                children.push(child);
            }
            Some(Term::Node(name, children))
        }
        ")" => None,
        variable => Some(Term::Variable(variable.into())),
    }
}

/// Variables of a term: those for attributes with the op they belong to, the others with `None`.
fn variables(term: &Term, out: &mut BTreeMap<String, Option<Op>>) {
    let Term::Node(name, children) = term else { return };
    let op = Op::named(name).unwrap_or_else(|| panic!("no op {name}"));
    for (index, child) in children.iter().enumerate() {
        match child {
            Term::Variable(v) if index == 0 && !op.row().attrs.is_empty() => _ = out.insert(v.clone(), Some(op)),
            Term::Variable(v) => _ = out.entry(v.clone()).or_insert(None),
            inner => variables(inner, out),
        }
    }
}

/// Attributes that differ from variable to variable.
fn attributes(op: Op, variable: &str) -> Attrs {
    let seed = variable.bytes().fold(0u8, u8::wrapping_add) % 5;
    let value = |kind| match kind {
        AttrKind::Int => Attr::Int(2),
        AttrKind::Float => Attr::Float(0.5 + f64::from(seed) * 0.3),
        AttrKind::Bool => Attr::Bool(true),
        AttrKind::Str => Attr::Str("half".into()),
    };
    Attrs::new(op.row().attrs.iter().map(|a| (a.name, value(a.kind))).collect::<Vec<_>>())
}

/// Types that variables are tried with.
fn pool() -> Vec<Type> {
    let (t, n) = (Dim::T, Dim::N);
    vec![
        Type::f32([t, n(8)]),
        Type::f32([t, n(2), n(8)]),
        Type::f32([t, n(4)]),
        Type::f32([n(8)]),
        Type::f32([n(6), n(8)]),
        Type::f32([n(4), n(6), n(8)]),
        Type::tensor(DType::I32, [Dim::R]),
        Type::Routing { top: 2, experts: 4 },
    ]
}

type Binding = BTreeMap<String, ValueId>;

fn build(g: &mut Graph, term: &Term, values: &Binding, attrs: &BTreeMap<String, Attrs>) -> Option<ValueId> {
    let Term::Node(name, children) = term else {
        let Term::Variable(v) = term else { return None };
        return values.get(v).copied();
    };
    let op = Op::named(name)?;
    let skip = usize::from(!op.row().attrs.is_empty());
    let own = if skip == 1 { attributes_of(&children[0], attrs)? } else { Attrs::none() };
    let operands = children[skip..].iter().map(|c| build(g, c, values, attrs)).collect::<Option<Vec<_>>>()?;
    g.push_op(op, &operands, own).ok()
}

fn attributes_of(term: &Term, attrs: &BTreeMap<String, Attrs>) -> Option<Attrs> {
    match term {
        Term::Variable(v) => attrs.get(v).cloned(),
        Term::Node(_, factors) => {
            let all = factors.iter().map(|f| attributes_of(f, attrs)).collect::<Option<Vec<_>>>()?;
            Some(ir::attrs! { by = all.iter().map(|a| a.float("by")).product::<f64>() })
        }
    }
}

/// Both sides over operands of these types, or `None` where one is ill-typed.
fn sides(left: &Term, right: &Term, types: &[(String, Type)], attrs: &BTreeMap<String, Attrs>) -> Option<[Graph; 2]> {
    let side = |term: &Term| {
        let mut g = Graph::new("rule");
        let mut values = Binding::new();
        for (name, ty) in types.iter().filter(|(_, ty)| !ty.is_static()) {
            values.insert(name.clone(), g.input(&name[1..], ty.clone()));
        }
        for (name, ty) in types.iter().filter(|(_, ty)| ty.is_static()) {
            values.insert(name.clone(), g.weight(name.as_str(), ty.clone()));
        }
        let value = build(&mut g, term, &values, attrs)?;
        g.result("y", value);
        Some(g)
    };
    let sides = [side(left)?, side(right)?];
    let ty = |g: &Graph| g.ty(g.results[0].1).clone();
    assert_eq!(ty(&sides[0]), ty(&sides[1]), "sides of different types");
    Some(sides)
}

#[test]
fn every_rule_holds() {
    for rule in table() {
        let tolerance = match rule.tolerance() {
            Tolerance::Exact => 0.0,
            Tolerance::Reassociates => 2e-6,
            Tolerance::Approximates => 1e-2,
        };
        for (name, left, right) in rule.instances() {
            let (left, right) = (parse(&left), parse(&right));
            let mut found = BTreeMap::new();
            variables(&left, &mut found);
            let attrs = found.iter().filter_map(|(v, op)| Some((v.clone(), attributes((*op)?, v)))).collect();
            let free: Vec<String> = found.into_iter().filter(|(_, op)| op.is_none()).map(|(v, _)| v).collect();
            let (pool, mut tested) = (pool(), 0);
            for number in 0..pool.len().pow(free.len() as u32) {
                let digit = |i: usize| pool[number / pool.len().pow(i as u32) % pool.len()].clone();
                let types: Vec<(String, Type)> = free.iter().enumerate().map(|(i, v)| (v.clone(), digit(i))).collect();
                let Some([left, right]) = sides(&left, &right, &types, &attrs) else { continue };
                for seed in 0..3 {
                    let (a, b) = (evaluate(&left, seed, (4, 2, 3)), evaluate(&right, seed, (4, 2, 3)));
                    let off = difference(&a["y"], &b["y"]);
                    assert!(off <= tolerance, "rule {name} over {types:?}: off by {off}");
                }
                tested += 1;
            }
            assert!(tested > 0, "rule {name}: no operands of fitting types among the samples");
        }
    }
}

#[test]
fn rules_state_everything() {
    let mut names = std::collections::BTreeSet::new();
    for rule in table() {
        assert_eq!(rule.text.split('|').count(), 5, "{}", rule.text);
        assert!(names.insert(rule.name()), "two rules named {}", rule.name());
        assert!(matches!(rule.tolerance_name(), "exact" | "reassociates" | "approximates"), "{}", rule.text);
        assert!(!rule.algebra.is_empty());
    }
}
