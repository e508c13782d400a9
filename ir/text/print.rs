//! Nouns to text. Any graph prints, legal or not; legal ones parse back to themselves.

use super::lex::is_word;
use crate::graph::{Attr, Attrs, Graph, TokenRange, ValueId};
use crate::model::{Call, Model, ModelInfo};
use crate::ops::Op;
use crate::plan::{Arg, Plan, Program};
use std::fmt::Write;

/// Column where the comments with types begin.
const COMMENT_COLUMN: usize = 56;

/// Writes formatted text; a string takes everything.
macro_rules! put {
    ($out:expr, $($arg:tt)*) => { _ = write!($out, $($arg)*) };
}

/// The graph as text.
pub fn print_graph(graph: &Graph) -> String {
    let mut out = String::new();
    let input = |v: ValueId| format!("{}: {}", value(graph, v), graph.ty(v));
    let inputs: Vec<String> = graph.values().take(graph.inputs.len()).map(input).collect();
    put!(out, "graph @{}({}) stage {}", name(&graph.name), inputs.join(", "), graph.stage);
    if let Some(range) = graph.range {
        put!(out, " when t = {}", span(range));
    }
    out.push_str(" {\n");
    print_nodes(graph, &mut out);
    let result = |(n, v): &(String, ValueId)| format!("{} = {}", name(n), value(graph, *v));
    let results: Vec<String> = graph.results.iter().map(result).collect();
    out.push_str(format!("  return {}", results.join(", ")).trim_end());
    out.push_str("\n}\n");
    out
}

fn print_nodes(graph: &Graph, out: &mut String) {
    let mut kernel_of = vec![None; graph.len()];
    for (k, kernel) in graph.kernels.iter().enumerate() {
        for v in &kernel.values {
            if let Some(of) = kernel_of.get_mut(v.0 as usize) {
                *of = Some(k);
            }
        }
    }
    let mut open = None;
    for index in 0..graph.nodes.len() {
        let v = graph.value_of(index);
        let kernel = kernel_of[v.0 as usize];
        if kernel.is_some() && kernel != open {
            out.push_str("  kernel {\n");
            open = kernel;
        }
        let indent = if open.is_some() { "    " } else { "  " };
        out.push_str(&print_node(graph, v, indent));
        let next = kernel_of[v.0 as usize + 1..].iter().flatten().next();
        if open.is_some() && next != open.as_ref() {
            out.push_str("  }\n");
            open = None;
        }
    }
}

fn print_node(graph: &Graph, v: ValueId, indent: &str) -> String {
    let mut line = format!("{indent}{v} = ");
    let Some(node) = graph.node(v) else { return line };
    if let (true, Some(Attr::Str(weight))) = (node.op == Op::WEIGHT, node.attrs.get("name")) {
        put!(line, "{} {weight:?} : {}\n", node.op, node.ty);
        return line;
    }
    let operands: Vec<String> = node.operands.iter().map(|v| value(graph, *v)).collect();
    put!(line, "{}", node.op);
    if !operands.is_empty() {
        put!(line, " {}", operands.join(", "));
    }
    if !node.attrs.is_empty() {
        put!(line, " {}", attrs(&node.attrs));
    }
    put!(line, "{:pad$} # {}\n", "", node.ty, pad = COMMENT_COLUMN.saturating_sub(line.chars().count()));
    line
}

/// `{eps = 1e-5, heads = 9}`.
fn attrs(attrs: &Attrs) -> String {
    let list: Vec<String> = attrs.iter().map(|(n, a)| format!("{n} = {}", attr(a))).collect();
    format!("{{{}}}", list.join(", "))
}

fn attr(attr: &Attr) -> String {
    match attr {
        Attr::Int(i) => i.to_string(),
        Attr::Float(x) => format!("{x:?}"), // the shortest text that reads back as the same number
        Attr::Bool(b) => b.to_string(),
        Attr::Str(s) => format!("{s:?}"),
    }
}

/// `%x` for inputs, `%7` for nodes.
fn value(graph: &Graph, v: ValueId) -> String {
    match graph.inputs.get(v.0 as usize) {
        Some(input) => format!("%{}", name(&input.name)),
        None => v.to_string(),
    }
}

/// Bare where it can be, else as a string.
fn name(name: &str) -> String {
    if is_word(name) { name.into() } else { format!("{name:?}") }
}

fn span(range: TokenRange) -> String {
    format!("{}..{}", range.min, range.max)
}

/// The model as text: its graphs, then its calls and outputs. Weights and tokenizer are no part of it.
pub fn print_model(model: &Model) -> String {
    let mut out = String::new();
    for graph in &model.graphs {
        out.push_str(&print_graph(graph));
        out.push('\n');
    }
    put!(out, "model @{} {{\n{}", name(&model.name), info(&model.info));
    let mut calls = model.calls.as_slice();
    while let Some(first) = calls.first() {
        let run = longest_run(calls);
        put!(out, "  call @{}", name(&first.graph));
        match run {
            Some(Run { count, start, template }) => {
                put!(out, " x {count}");
                if start > 0 {
                    put!(out, " from {start}");
                }
                put!(out, " with {template:?}\n");
                calls = &calls[count..];
            }
            None => {
                if !first.prefix.is_empty() {
                    put!(out, " with {:?}", first.prefix);
                }
                out.push('\n');
                calls = &calls[1..];
            }
        }
    }
    if !model.outputs.is_empty() {
        let outputs: Vec<String> = model.outputs.iter().map(|o| name(o)).collect();
        put!(out, "  output {}\n", outputs.join(", "));
    }
    out.push_str("}\n");
    out
}

fn info(info: &ModelInfo) -> String {
    let ModelInfo { architecture, context, vocab, hidden, encoder, end_tokens, tokenizer: _ } = info;
    if (ModelInfo { tokenizer: None, ..info.clone() }) == ModelInfo::default() {
        return String::new();
    }
    let mut out = format!("  info {{architecture = {architecture:?}, context = {context}, vocab = {vocab}");
    put!(out, ", hidden = {hidden}, encoder = {encoder}");
    if !end_tokens.is_empty() {
        let ids: Vec<String> = end_tokens.iter().map(u32::to_string).collect();
        put!(out, ", end_tokens = [{}]", ids.join(", "));
    }
    out + "}\n"
}

/// Calls of one graph whose prefixes count up: `template` with `{i}` from `start`.
struct Run {
    count: usize,
    start: usize,
    template: String,
}

fn longest_run(calls: &[Call]) -> Option<Run> {
    let first = calls.first()?;
    let mut best: Option<Run> = None;
    for (before, digits, after) in numbers(&first.prefix) {
        let template = format!("{before}{{i}}{after}");
        let Ok(start) = digits.parse::<u32>().map(|n| n as usize) else { continue };
        // A template of several `{i}`, or one that would not spell the first prefix again, is none.
        if start.to_string() != digits || template.matches("{i}").count() != 1 {
            continue;
        }
        let matches = |(i, call): &(usize, &Call)| {
            call.graph == first.graph && call.prefix == format!("{before}{}{after}", start + i)
        };
        let count = calls.iter().enumerate().take_while(matches).count();
        if count > best.as_ref().map_or(1, |b| b.count) {
            best = Some(Run { count, start, template });
        }
    }
    best
}

/// Every maximal run of digits in `text`, with what stands before and after it.
fn numbers(text: &str) -> impl Iterator<Item = (&str, &str, &str)> {
    let digit = |i: usize| text.as_bytes().get(i).is_some_and(u8::is_ascii_digit);
    let starts = (0..text.len()).filter(move |i| digit(*i) && (*i == 0 || !digit(i - 1)));
    starts.map(move |start| {
        let end = (start..text.len()).find(|i| !digit(*i)).unwrap_or(text.len());
        (&text[..start], &text[start..end], &text[end..])
    })
}

/// The plan as text: each kernel's body, then the program as comments, so that the bodies parse back.
pub fn print_plan(plan: &Plan) -> String {
    let mut out = String::new();
    for (k, kernel) in plan.kernels.iter().enumerate() {
        put!(out, "# k{k} {} for t = {}\n{}\n", kernel.name, span(kernel.range), print_graph(&kernel.body));
    }
    for (pack, spec) in plan.packs.iter().zip(&plan.program.weights) {
        if !pack.is_entry() {
            put!(out, "# {} is packed as\n", name(&spec.name));
            print_graph(&pack.recipe).lines().for_each(|line| put!(out, "#   {line}\n"));
        }
    }
    for line in print_program(&plan.program).lines() {
        put!(out, "# {line}\n");
    }
    out
}

/// The program as text: limits, buffers, weights, caches, kernels, launches, outputs. For people; it does not parse back.
pub fn print_program(program: &Program) -> String {
    let l = &program.limits;
    let mut out = format!(
        "program for {} tokens, {} rows, {} sequences, context {}, attention tiles of {} {{\n  arena {} bytes\n",
        l.tokens, l.rows, l.sequences, l.context, l.tile, program.arena_bytes
    );
    for (i, b) in program.buffers.iter().enumerate() {
        put!(out, "  buf{i} {:?} : {} at {}, {} bytes a row\n", b.name, b.ty, b.offset, b.row_bytes);
    }
    for (i, w) in program.weights.iter().enumerate() {
        put!(out, "  w{i} {:?} : {}, {} bytes\n", w.name, w.ty, w.bytes);
    }
    for (i, c) in program.caches.iter().enumerate() {
        let group = if program.groups.len() > 1 { format!(", cache group {}", c.group) } else { String::new() };
        put!(out, "  c{i} {:?} : {}, {} bytes a cache block{group}\n", c.name, c.ty, c.block_bytes);
    }
    for (i, k) in program.kernels.iter().enumerate() {
        let bytes = k.weight_bytes;
        put!(out, "  k{i} {}: {} FLOPs a token, {bytes} bytes of weights\n", name(&k.name), k.flops_per_token);
    }
    for variant in &program.variants {
        put!(out, "  launches when t = {} {{\n", span(variant.tokens));
        for launch in &variant.launches {
            let args: Vec<String> = launch.args.iter().map(arg).collect();
            let barrier = if launch.barrier { "barrier; " } else { "" };
            put!(out, "    {barrier}{}({})\n", launch.kernel, args.join(", "));
        }
        out.push_str("  }\n");
    }
    for output in &program.outputs {
        put!(out, "  output {} = {}, {} wide\n", name(&output.name), output.buffer, output.width);
    }
    out + "}\n"
}

fn arg(arg: &Arg) -> String {
    match arg {
        Arg::Buffer(b) => b.to_string(),
        Arg::Weight(w) => w.to_string(),
        Arg::Cache(c) => c.to_string(),
        Arg::Tokens => "tokens".into(),
        Arg::Positions => "positions".into(),
        Arg::Rows => "rows".into(),
    }
}
