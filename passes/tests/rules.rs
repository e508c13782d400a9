//! Every rule proves itself: for every op it stands for, operands of fitting types and several attributes, its left side is
//! built as a graph; where the rule then fires, its right side is too, and both are evaluated on the same values.

extern crate mansard_ir as ir;

mod common;

use common::{difference, evaluate};
use ir::ops::{AttrKind, AttrSpec};
use ir::{Attr, Attrs, CacheRole, DType, Dim, Graph, Op, Type, ValueId};
use mansard_passes::SearchLimits;
use mansard_passes::egraph::seed;
use mansard_passes::rules::terms::{Argument, FUNCTIONS};
use mansard_passes::rules::{Phase, Rule, RuleSet, Tolerance, saturate, table};
use std::collections::{BTreeMap, BTreeSet};

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
            Term::Variable(v) if v.starts_with('{') => {}
            Term::Variable(v) if index == 0 && !op.row().attrs.is_empty() => _ = out.insert(v.clone(), Some(op)),
            Term::Variable(v) => _ = out.entry(v.clone()).or_insert(None),
            inner => variables(inner, out),
        }
    }
}

/// Values that attributes are tried with.
fn attributes(op: Op, trial: usize) -> Attrs {
    let floats = [0.5, 2.0, 1.3, -2.0, 1.0, 0.25, 0.0];
    let value = |spec: &AttrSpec| match (spec.kind, spec.name) {
        (AttrKind::Int, "size") => Attr::Int(8),
        (AttrKind::Int, "from") => Attr::Int([0, 4, 2, 8, 3, 4, 8][trial]),
        (AttrKind::Int, "count") => Attr::Int([4, 4, 8, 4, 2, 12, 8][trial]),
        (AttrKind::Int, "window") => Attr::Int(0),
        (AttrKind::Int, _) => Attr::Int(2),
        (AttrKind::Float, "eps") => Attr::Float(0.3),
        (AttrKind::Float, "softcap") => Attr::Float(3.0),
        (AttrKind::Float, _) => Attr::Float(floats[trial]),
        (AttrKind::Bool, _) => Attr::Bool(true),
        (AttrKind::Str, _) => Attr::Str(["half", "adjacent"][trial % 2].into()),
    };
    Attrs::new(op.row().attrs.iter().map(|a| (a.name, value(a))).collect::<Vec<_>>())
}

const TRIALS: usize = 7;

/// Types that variables are tried with.
fn pool() -> Vec<Type> {
    let (t, n) = (Dim::T, Dim::N);
    let cache = |role| Type::Cache { role, heads: 1, dim: 4, dtype: DType::F32, window: 0 };
    vec![
        Type::f32([t, n(8)]),
        Type::f32([t, n(2), n(4)]),
        Type::f32([t, n(4)]),
        Type::f32([t, n(32)]),
        Type::f32([t, n(2), n(32)]),
        Type::f32([n(8)]),
        Type::f32([n(4)]),
        Type::f32([n(8), n(8)]),
        Type::f32([n(4), n(6), n(8)]),
        Type::f32([n(4), n(4), n(4)]),
        Type::tensor(DType::Q8_0, [n(3), n(32)]),
        Type::tensor(DType::Q8_0, [n(4), n(3), n(32)]),
        Type::tensor(DType::BF16, [n(3), n(32)]),
        Type::tensor(DType::BF16, [n(4), n(3), n(32)]),
        Type::tensor(DType::I32, [t]),
        Type::tensor(DType::I32, [Dim::R]),
        Type::Routing { top: 2, experts: 4 },
        cache(CacheRole::Keys),
        cache(CacheRole::Values),
        Type::Step,
    ]
}

type Types = BTreeMap<String, Type>;
type Lists = BTreeMap<String, Attrs>;

/// The type of a term: `Ok(None)` where variables of it have none yet, an error where it is ill-typed.
fn typed(term: &Term, types: &Types, lists: &Lists) -> Result<Option<Type>, ()> {
    let Term::Node(name, children) = term else {
        let Term::Variable(v) = term else { return Err(()) };
        return Ok(types.get(v).cloned());
    };
    let op = Op::named(name).ok_or(())?;
    let skip = usize::from(!op.row().attrs.is_empty());
    let operands = children[skip..].iter().map(|c| typed(c, types, lists)).collect::<Result<Vec<_>, _>>()?;
    let Some(operands) = operands.into_iter().collect::<Option<Vec<Type>>>() else { return Ok(None) };
    let own = if skip == 1 { list(&children[0], types, lists).ok_or(())? } else { Attrs::none() };
    op.infer(&operands.iter().collect::<Vec<_>>(), &own).map(Some).map_err(|_| ())
}

/// Attributes: a variable's, a literal's, or what a function makes of others.
fn list(term: &Term, types: &Types, lists: &Lists) -> Option<Attrs> {
    match term {
        Term::Variable(v) if v.starts_with('{') => {
            let (name, value) = v[1..v.len() - 1].split_once('=')?;
            Some(Attrs::new([(name, Attr::Float(value.parse().ok()?))]))
        }
        Term::Variable(v) => lists.get(v).cloned(),
        Term::Node(name, arguments) => {
            let function = FUNCTIONS.iter().find(|f| f.name == name)?;
            let argument = |term: &Term| match list(term, types, lists) {
                Some(attrs) => Some(Argument::Attrs(attrs)),
                None => typed(term, types, lists).ok()?.map(Argument::Type),
            };
            (function.value)(&arguments.iter().map(argument).collect::<Option<Vec<_>>>()?)
        }
    }
}

/// Every assignment of types to `free` under which the term is well-typed, a few of each.
fn assignments(term: &Term, free: &[String], lists: &Lists, types: &mut Types, out: &mut Vec<Types>) {
    if typed(term, types, lists).is_err() || out.len() >= 12 {
        return;
    }
    let Some((first, rest)) = free.split_first() else { return out.push(types.clone()) };
    for ty in pool() {
        types.insert(first.clone(), ty);
        assignments(term, rest, lists, types, out);
    }
    types.remove(first);
}

/// A term as a graph over operands of these types, named after the variables.
fn graph(term: &Term, types: &Types, lists: &Lists) -> Option<Graph> {
    let mut g = Graph::new("rule");
    let (mut values, mut rows) = (BTreeMap::new(), BTreeMap::new());
    for (name, ty) in types.iter().filter(|(_, ty)| !ty.is_static()) {
        values.insert(name.clone(), g.input(&name[1..], ty.clone()));
        if let Type::Cache { heads, dim, .. } = ty {
            let ty = Type::f32([Dim::T, Dim::N(*heads), Dim::N(*dim)]);
            rows.insert(name[1..].to_string(), g.input(format!("{}_rows", &name[1..]), ty));
        }
    }
    for (name, ty) in types.iter().filter(|(_, ty)| ty.is_static()) {
        values.insert(name.clone(), g.weight(name.as_str(), ty.clone()));
    }
    // a token sees itself: caches are appended to
    for (name, ty) in types.iter().filter(|(_, ty)| matches!(ty, Type::Cache { .. })) {
        let step = values[types.iter().find(|(_, ty)| **ty == Type::Step)?.0];
        let appended = g.push("append", &[values[name], rows[&name[1..]], step], Attrs::none()).ok()?;
        assert_eq!(g.ty(appended), ty);
        values.insert(name.clone(), appended);
    }
    let value = build(&mut g, term, &values, (types, lists))?;
    g.result("y", value);
    Some(g)
}

fn build(g: &mut Graph, term: &Term, values: &BTreeMap<String, ValueId>, bound: (&Types, &Lists)) -> Option<ValueId> {
    let Term::Node(name, children) = term else {
        let Term::Variable(v) = term else { return None };
        return values.get(v).copied();
    };
    let op = Op::named(name)?;
    let skip = usize::from(!op.row().attrs.is_empty());
    let own = if skip == 1 { list(&children[0], bound.0, bound.1)? } else { Attrs::none() };
    let operands = children[skip..].iter().map(|c| build(g, c, values, bound)).collect::<Option<Vec<_>>>()?;
    g.push_op(op, &operands, own).ok()
}

/// Times that the rule alone finds and adds something in the graph.
fn applications(rule: &'static Rule, g: &Graph) -> usize {
    let phases = Box::leak(Box::new([Phase { name: "one", meaning: "", rules: std::slice::from_ref(rule) }]));
    let set = RuleSet { phases, first: usize::MAX };
    let limits = SearchLimits { iterations: 1, sweeps: 1, ..SearchLimits::default() };
    let (_, reports) = saturate(seed(g, BTreeSet::new()).0, &set, &limits).unwrap_or_else(|e| panic!("{e}"));
    reports.iter().flat_map(|phase| &phase.rules).map(|r| r.applied).sum()
}

/// Wherever a rule fires, both of its sides are equal; and it fires.
#[test]
fn every_rule_fires_and_holds() {
    let mut faults = vec![];
    for rule in table() {
        let tolerance = match rule.tolerance() {
            Tolerance::Exact => 0.0,
            Tolerance::Reassociates => 4e-6,
            Tolerance::Approximates => 1e-2,
        };
        for (name, left, right) in rule.instances() {
            let (left, right) = (parse(&left), parse(&right));
            let mut found = BTreeMap::new();
            variables(&left, &mut found);
            let listed: Vec<(&String, Op)> = found.iter().filter_map(|(v, op)| Some((v, (*op)?))).collect();
            let free: Vec<String> = found.iter().filter(|(_, op)| op.is_none()).map(|(v, _)| v.clone()).collect();
            let mut fired = 0;
            for trial in 0..TRIALS.pow(listed.len() as u32) {
                let own = |i: usize| trial / TRIALS.pow(i as u32) % TRIALS;
                let lists: Lists =
                    listed.iter().enumerate().map(|(i, (v, op))| ((*v).clone(), attributes(*op, own(i)))).collect();
                let mut assigned = vec![];
                assignments(&left, &free, &lists, &mut Types::new(), &mut assigned);
                for types in assigned {
                    let Some(before) = graph(&left, &types, &lists) else { continue };
                    if applications(rule, &before) == 0 {
                        continue;
                    }
                    let Some(after) = graph(&right, &types, &lists) else {
                        faults.push(format!("rule {name} over {types:?} {lists:?}: it fires without a right side"));
                        continue;
                    };
                    fired += 1;
                    for seed in 0..2 {
                        let (a, b) = (evaluate(&before, seed, (4, 2, 3)), evaluate(&after, seed, (4, 2, 3)));
                        let off = difference(&a["y"], &b["y"]);
                        if off > tolerance {
                            faults.push(format!("rule {name} over {types:?} {lists:?}: off by {off}"));
                        }
                    }
                }
                if fired >= 8 {
                    break;
                }
            }
            if fired == 0 {
                faults.push(format!("rule {name} fires nowhere"));
            }
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[test]
fn rules_state_everything() {
    let mut names = std::collections::BTreeSet::new();
    for rule in table() {
        assert_eq!(rule.text.split(" | ").count(), 5, "{}", rule.text);
        assert!(names.insert(rule.name()), "two rules named {}", rule.name());
        assert!(matches!(rule.tolerance_name(), "exact" | "reassociates" | "approximates"), "{}", rule.text);
        assert!(!rule.algebra.is_empty());
    }
}
