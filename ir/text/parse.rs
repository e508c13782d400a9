//! Text to nouns, by recursive descent without recursion: the grammar nests three deep and no deeper.
//!
//! ```text
//! file   = { graph | model }
//! graph  = "graph" @name "(" [%name ":" type {"," ..}] ")" "stage" stage ["when" "t" "=" int ".." int]
//!          "{" { node | "kernel" "{" {node} "}" } "return" [name "=" %name {"," ..}] "}"
//! node   = %name "=" op [%name {"," ..}] [string] ["{" name "=" attr {"," ..} "}"] [":" type]
//! model  = "model" @name "{" ["info" "{" .. "}"]
//!          { "call" @name ["x" int ["from" int]] ["with" string] } ["output" name {"," ..}] "}"
//! ```
//!
//! Types are inferred while parsing, so an ill-typed node is reported where it stands.

use super::lex::{Lexer, Token};
use crate::formats::{CACHED, DType};
use crate::graph::{Attr, Attrs, Fused, Graph, Stage, TokenRange, ValueId};
use crate::model::{Call, Model, ModelInfo, WeightTable};
use crate::ops::{AttrKind, Class, Op};
use crate::types::{CacheRole, Dim, Type};
use crate::{Error, Result, bail};
use std::collections::HashMap;

/// Calls a model may have: `x 1000000000` must not fill the memory.
const MOST_CALLS: usize = 1 << 16;

/// Elements a row or weight may have, so that sizes in bytes cannot overflow.
const MOST_ELEMENTS: usize = 1 << 44;

/// Reads a model from text; `name` is where the text comes from. Text with no `model` calls its graphs in turn. The model
/// has no weights.
///
/// # Errors
/// With line and column, the line, and what was expected.
pub fn parse(name: &str, text: &str) -> Result<Model> {
    let mut parser = Parser::new(name, text)?;
    let (mut graphs, mut model) = (vec![], None);
    loop {
        match &parser.token {
            Token::Word(w) if w == "graph" => graphs.push(parser.graph()?),
            Token::Word(w) if w == "model" && model.is_none() => model = Some(parser.model()?),
            Token::End if !graphs.is_empty() || model.is_some() => break,
            _ => return Err(parser.expected("`graph`, or one `model`")),
        }
    }
    let mut model = model.unwrap_or_else(|| calls_of(&graphs));
    model.graphs = graphs;
    Ok(model)
}

/// Reads a type, as [`Type`]'s `Display` prints it.
///
/// # Errors
/// Where the text is no type.
pub fn parse_type(text: &str) -> Result<Type> {
    let mut parser = Parser::new("type", text)?;
    let ty = parser.ty()?;
    match parser.token {
        Token::End => Ok(ty),
        _ => Err(parser.expected("nothing after the type")),
    }
}

/// A model that calls each graph (its variants once) with no prefix and returns all they return.
fn calls_of(graphs: &[Graph]) -> Model {
    let mut model = Model {
        name: graphs.first().map_or("", |g| &g.name).into(),
        graphs: vec![],
        calls: vec![],
        outputs: vec![],
        weights: WeightTable::default(),
        info: ModelInfo::default(),
    };
    for graph in graphs {
        if model.calls.iter().all(|c| c.graph != graph.name) {
            model.calls.push(Call { graph: graph.name.clone(), prefix: String::new() });
        }
        for (name, v) in &graph.results {
            if !matches!(graph.ty(*v), Type::Cache { .. }) && !model.outputs.contains(name) {
                model.outputs.push(name.clone());
            }
        }
    }
    model
}

struct Parser<'a> {
    lexer: Lexer<'a>,
    /// The next token and the byte where it starts.
    token: Token,
    at: usize,
}

/// Values seen so far, by the name the text gives them.
type Names = HashMap<String, ValueId>;

impl<'a> Parser<'a> {
    fn new(name: &'a str, text: &'a str) -> Result<Parser<'a>> {
        let mut lexer = Lexer::new(name, text);
        let (at, token) = lexer.next()?;
        Ok(Parser { lexer, token, at })
    }

    fn advance(&mut self) -> Result<Token> {
        let (at, next) = self.lexer.next()?;
        self.at = at;
        Ok(std::mem::replace(&mut self.token, next))
    }

    fn expected(&self, what: &str) -> Error {
        self.lexer.error(self.at, format!("expected {what}, found {}", self.token.describe()))
    }

    fn is(&self, mark: &str) -> bool {
        matches!(self.token, Token::Mark(m) if m == mark)
    }

    /// Takes the mark if it is next.
    fn accept(&mut self, mark: &str) -> Result<bool> {
        let is = self.is(mark);
        if is {
            self.advance()?;
        }
        Ok(is)
    }

    fn mark(&mut self, mark: &str) -> Result<()> {
        if self.accept(mark)? { Ok(()) } else { Err(self.expected(&format!("`{mark}`"))) }
    }

    /// Takes the word if it is next.
    fn accept_word(&mut self, word: &str) -> Result<bool> {
        let is = matches!(&self.token, Token::Word(w) if w == word);
        if is {
            self.advance()?;
        }
        Ok(is)
    }

    fn keyword(&mut self, word: &str) -> Result<()> {
        if self.accept_word(word)? { Ok(()) } else { Err(self.expected(&format!("`{word}`"))) }
    }

    fn word(&mut self, what: &str) -> Result<String> {
        match self.token {
            Token::Word(_) | Token::Text(_) => match self.advance()? {
                Token::Word(w) | Token::Text(w) => Ok(w),
                _ => Err(self.expected(what)),
            },
            _ => Err(self.expected(what)),
        }
    }

    fn callee(&mut self) -> Result<String> {
        match self.token {
            Token::Callee(_) => match self.advance()? {
                Token::Callee(w) => Ok(w),
                _ => Err(self.expected("a graph's name such as `@layer`")),
            },
            _ => Err(self.expected("a graph's name such as `@layer`")),
        }
    }

    fn value_name(&mut self) -> Result<String> {
        match self.token {
            Token::Value(_) => match self.advance()? {
                Token::Value(w) => Ok(w),
                _ => Err(self.expected("a value such as `%x`")),
            },
            _ => Err(self.expected("a value such as `%x`")),
        }
    }

    fn operand(&mut self, names: &Names) -> Result<ValueId> {
        let at = self.at;
        let name = self.value_name()?;
        let unknown = || self.lexer.error(at, format!("`%{}` is not defined before this", name.escape_debug()));
        names.get(&name).copied().ok_or_else(unknown)
    }

    fn size(&mut self, what: &str) -> Result<usize> {
        let parsed = match &self.token {
            Token::Number(n) => n.parse::<usize>().ok().filter(|n| *n <= MOST_ELEMENTS),
            _ => None,
        };
        let Some(n) = parsed else { return Err(self.expected(what)) };
        self.advance()?;
        Ok(n)
    }

    fn ty(&mut self) -> Result<Type> {
        let at = self.at;
        let what = "a type such as `f32[t, 576]`, `keys<f16>[c, 3, 64]` or `step[s]`";
        let kind = match &self.token {
            Token::Word(_) => self.word(what)?,
            _ => return Err(self.expected(what)),
        };
        let ty = match kind.as_str() {
            "keys" => self.cache(CacheRole::Keys)?,
            "values" => self.cache(CacheRole::Values)?,
            "step" => {
                self.mark("[")?;
                self.keyword("s")?;
                self.mark("]")?;
                Type::Step
            }
            "routing" => {
                self.mark("[")?;
                self.keyword("t")?;
                let (top, experts) = self.two_extents()?;
                Type::Routing { top, experts }
            }
            name => match DType::parse(name) {
                Some(dtype) => Type::Tensor { dtype, shape: self.shape()? },
                None => return Err(self.lexer.error(at, format!("expected {what}; there is no type `{name}`"))),
            },
        };
        // Rows of quantized formats fill whole groups, else their sizes in bytes mean nothing.
        if let Type::Tensor { dtype, shape } = &ty {
            let group = dtype.format().block;
            if group > 1 && !matches!(shape.last(), Some(Dim::N(k)) if k % group == 0) {
                return Err(self.lexer.error(at, format!("expected a last axis in multiples of {group}, found {ty}")));
            }
        }
        Ok(ty)
    }

    fn cache(&mut self, role: CacheRole) -> Result<Type> {
        self.mark("<")?;
        let dtype = match &self.token {
            Token::Word(w) => DType::parse(w).filter(|d| CACHED.contains(d)),
            _ => None,
        };
        let Some(dtype) = dtype else { return Err(self.expected("`f32`, `f16`, `bf16`, `i8`, `fp8` or `i4`")) };
        self.advance()?;
        let window = self.window()?;
        self.mark(">")?;
        self.mark("[")?;
        self.keyword("c")?;
        let (heads, dim) = self.two_extents()?;
        Ok(Type::Cache { role, heads, dim, dtype, window })
    }

    /// `, window = 512`, or nothing: 0.
    fn window(&mut self) -> Result<usize> {
        if !self.accept(",")? {
            return Ok(0);
        }
        self.keyword("window")?;
        self.mark("=")?;
        let at = self.at;
        match self.size("a number of positions")? {
            0 => Err(self.lexer.error(at, "expected a window of at least 1 position")),
            window => Ok(window),
        }
    }

    /// `, 3, 64]`.
    fn two_extents(&mut self) -> Result<(usize, usize)> {
        let at = self.at;
        let mut extent = || {
            self.mark(",")?;
            self.size("an extent")
        };
        let (a, b) = (extent()?, extent()?);
        if a == 0 || b == 0 || a.saturating_mul(b) > MOST_ELEMENTS {
            return Err(self.lexer.error(at, "extents must be positive and their product a size"));
        }
        self.mark("]")?;
        Ok((a, b))
    }

    /// `[t, 576]`.
    fn shape(&mut self) -> Result<Vec<Dim>> {
        self.mark("[")?;
        let (mut shape, mut elements) = (vec![], 1usize);
        while !self.is("]") {
            if !shape.is_empty() {
                self.mark(",")?;
            }
            let at = self.at;
            let dim = match &self.token {
                Token::Word(w) if w == "t" => Dim::T,
                Token::Word(w) if w == "s" => Dim::S,
                Token::Word(w) if w == "r" => Dim::R,
                _ => Dim::N(self.size("an extent: a number, `t`, `s` or `r`")?),
            };
            match dim {
                Dim::N(n) => elements = elements.saturating_mul(n),
                _ => _ = self.advance()?,
            }
            if elements == 0 || elements > MOST_ELEMENTS {
                return Err(self.lexer.error(at, "extents must be positive and their product a size"));
            }
            shape.push(dim);
        }
        self.mark("]")?;
        Ok(shape)
    }

    fn graph(&mut self) -> Result<Graph> {
        self.keyword("graph")?;
        let mut graph = Graph::new(self.callee()?);
        let mut names = Names::new();
        self.mark("(")?;
        while !self.is(")") {
            if !graph.inputs.is_empty() {
                self.mark(",")?;
            }
            let at = self.at;
            let name = self.value_name()?;
            if name.starts_with(|c: char| c.is_ascii_digit()) {
                return Err(self.lexer.error(at, "the name of an input cannot begin with a digit"));
            }
            self.mark(":")?;
            let ty = self.ty()?;
            let value = graph.input(name.clone(), ty);
            self.define(&mut names, at, name, value)?;
        }
        self.mark(")")?;
        self.keyword("stage")?;
        graph.stage = self.stage()?;
        if self.accept_word("when")? {
            self.keyword("t")?;
            self.mark("=")?;
            let min = self.size("a number of tokens")?;
            self.mark("..")?;
            graph.range = Some(TokenRange { min, max: self.size("a number of tokens")? });
        }
        self.mark("{")?;
        self.body(&mut graph, &mut names)?;
        Ok(graph)
    }

    fn stage(&mut self) -> Result<Stage> {
        let all = [Stage::Imported, Stage::Canonical, Stage::Optimized, Stage::Planned];
        let found = all.into_iter().find(|s| matches!(&self.token, Token::Word(w) if w == s.name()));
        let stage = found.ok_or_else(|| self.expected("`imported`, `canonical`, `optimized` or `planned`"))?;
        self.advance()?;
        Ok(stage)
    }

    fn define(&self, names: &mut Names, at: usize, name: String, value: ValueId) -> Result<()> {
        let message = format!("`%{}` is already defined", name.escape_debug());
        match names.insert(name, value) {
            Some(_) => Err(self.lexer.error(at, message)),
            None => Ok(()),
        }
    }

    /// Nodes, kernels and results, up to the closing brace.
    fn body(&mut self, graph: &mut Graph, names: &mut Names) -> Result<()> {
        let mut kernel: Option<Fused> = None;
        loop {
            match (&self.token, &mut kernel) {
                (Token::Value(_), kernel) => {
                    let v = self.node(graph, names)?;
                    let class = graph.node(v).map(|n| n.op.class());
                    if let (Some(kernel), true) = (kernel, class != Some(Class::Weight)) {
                        kernel.values.push(v);
                    }
                }
                (Token::Word(w), None) if w == "kernel" => {
                    self.advance()?;
                    self.mark("{")?;
                    kernel = Some(Fused { values: vec![] });
                }
                (Token::Mark("}"), Some(_)) => {
                    self.advance()?;
                    graph.kernels.extend(kernel.take());
                }
                (Token::Word(w), None) if w == "return" => {
                    self.advance()?;
                    return self.results(graph, names);
                }
                (_, None) => return Err(self.expected("a node such as `%y = tanh %x`, `kernel` or `return`")),
                (_, Some(_)) => return Err(self.expected("a node such as `%y = tanh %x`, or `}`")),
            }
        }
    }

    fn results(&mut self, graph: &mut Graph, names: &Names) -> Result<()> {
        while !self.is("}") {
            if !graph.results.is_empty() {
                self.mark(",")?;
            }
            let name = self.word("a result such as `x = %3`")?;
            self.mark("=")?;
            let value = self.operand(names)?;
            graph.result(name, value);
        }
        self.mark("}")
    }

    fn node(&mut self, graph: &mut Graph, names: &mut Names) -> Result<ValueId> {
        let name_at = self.at;
        let name = self.value_name()?;
        self.mark("=")?;
        let at = self.at;
        let op = match &self.token {
            Token::Word(w) => Op::named(w).ok_or_else(|| self.expected("an op of the op table"))?,
            _ => return Err(self.expected("an op")),
        };
        self.advance()?;
        let mut attrs: Vec<(String, Attr)> = vec![];
        let mut operands = vec![];
        if matches!(self.token, Token::Text(_)) && op == Op::WEIGHT {
            attrs.push(("name".into(), Attr::Str(self.word("a weight's name")?)));
        } else if matches!(self.token, Token::Value(_)) && !op.row().operands.is_empty() {
            // An op without operands ends here: what follows is the next node.
            operands.push(self.operand(names)?);
            while self.accept(",")? {
                operands.push(self.operand(names)?);
            }
        }
        if self.accept("{")? {
            self.attrs(op, &mut attrs)?;
        }
        let declared = if self.accept(":")? { Some(self.ty()?) } else { None };
        let pushed = push(graph, op, &operands, Attrs::new(attrs), declared);
        let value = pushed.map_err(|e| self.lexer.error(at, e))?;
        self.define(names, name_at, name, value)?;
        Ok(value)
    }

    /// `eps = 1e-5, heads = 9}`.
    fn attrs(&mut self, op: Op, attrs: &mut Vec<(String, Attr)>) -> Result<()> {
        let mut first = true;
        while !self.is("}") {
            if !std::mem::take(&mut first) {
                self.mark(",")?;
            }
            let at = self.at;
            let name = self.word("an attribute such as `eps = 1e-5`")?;
            if attrs.iter().any(|(n, _)| *n == name) {
                return Err(self.lexer.error(at, format!("attribute `{name}` stands here twice")));
            }
            self.mark("=")?;
            let float = op.row().attrs.iter().any(|s| s.name == name && s.kind == AttrKind::Float);
            let value = self.attr(float)?;
            attrs.push((name, value));
        }
        self.mark("}")
    }

    /// A number, `true`, `false` or a string; `float` makes `2` a float.
    fn attr(&mut self, float: bool) -> Result<Attr> {
        let number = |n: &str| n.parse().ok().filter(|x: &f64| x.is_finite()).map(Attr::Float);
        let attr = match &self.token {
            Token::Word(w) => w.parse().ok().map(Attr::Bool),
            Token::Text(s) => Some(Attr::Str(s.clone())),
            Token::Number(n) if float => number(n),
            Token::Number(n) => n.parse().ok().map(Attr::Int).or_else(|| number(n)),
            _ => None,
        };
        let attr = attr.ok_or_else(|| self.expected("a finite number, `true`, `false` or a string"))?;
        self.advance()?;
        Ok(attr)
    }

    fn model(&mut self) -> Result<Model> {
        self.keyword("model")?;
        let mut model = calls_of(&[]);
        model.name = self.callee()?;
        self.mark("{")?;
        if self.accept_word("info")? {
            self.mark("{")?;
            self.info(&mut model.info)?;
        }
        while self.accept_word("call")? {
            self.call(&mut model.calls)?;
        }
        if self.accept_word("output")? {
            model.outputs.push(self.word("an output's name")?);
            while self.accept(",")? {
                model.outputs.push(self.word("an output's name")?);
            }
        }
        if !self.is("}") {
            return Err(self.expected("`call`, `output` or `}`"));
        }
        self.mark("}")?;
        Ok(model)
    }

    /// `@layer x 30 from 2 with "model.layers.{i}."`.
    fn call(&mut self, calls: &mut Vec<Call>) -> Result<()> {
        let graph = self.callee()?;
        let at = self.at;
        let count = if self.accept_word("x")? { Some(self.size("a number of calls")?) } else { None };
        let start = if count.is_some() && self.accept_word("from")? { self.size("the first number")? } else { 0 };
        let with = if self.accept_word("with")? { self.word("a prefix such as \"model.\"")? } else { String::new() };
        let Some(count) = count else {
            calls.push(Call { graph, prefix: with });
            return Ok(());
        };
        if count + calls.len() > MOST_CALLS || with.len() > 256 {
            return Err(self
                .lexer
                .error(at, format!("a model has at most {MOST_CALLS} calls, with prefixes of 256 bytes")));
        }
        if !with.contains("{i}") {
            return Err(self.lexer.error(at, "several calls need a prefix that counts, such as \"layers.{i}.\""));
        }
        for i in start..start + count {
            calls.push(Call { graph: graph.clone(), prefix: with.replace("{i}", &i.to_string()) });
        }
        Ok(())
    }

    fn info(&mut self, info: &mut ModelInfo) -> Result<()> {
        let mut first = true;
        while !self.is("}") {
            if !std::mem::take(&mut first) {
                self.mark(",")?;
            }
            let at = self.at;
            let name = self.word("a fact such as `context = 2048`")?;
            self.mark("=")?;
            match name.as_str() {
                "architecture" => info.architecture = self.word("an architecture's name")?,
                "context" => info.context = self.size("a number of positions")?,
                "vocab" => info.vocab = self.size("a number of tokens")?,
                "hidden" => info.hidden = self.size("a width")?,
                "encoder" => info.encoder = self.attr(false)? == Attr::Bool(true),
                "end_tokens" => info.end_tokens = self.ids()?,
                _ => return Err(self.lexer.error(at, format!("no fact `{}`", name.escape_debug()))),
            }
        }
        self.mark("}")
    }

    /// `[2, 3]`.
    fn ids(&mut self) -> Result<Vec<u32>> {
        let mut ids = vec![];
        self.mark("[")?;
        while !self.is("]") {
            if !ids.is_empty() {
                self.mark(",")?;
            }
            let at = self.at;
            let id = self.size("a token id")?;
            ids.push(u32::try_from(id).map_err(|_| self.lexer.error(at, "a token id has 32 bits"))?);
        }
        self.mark("]")?;
        Ok(ids)
    }
}

/// Appends the node; a declared type must be the inferred one, and only weights need one.
fn push(graph: &mut Graph, op: Op, operands: &[ValueId], attrs: Attrs, declared: Option<Type>) -> Result<ValueId> {
    if op != Op::WEIGHT {
        let value = graph.push_op(op, operands, attrs)?;
        return match declared {
            Some(ty) if ty != *graph.ty(value) => {
                bail!(Input, "declared as {ty}, it is {}", graph.ty(value))
            }
            _ => Ok(value),
        };
    }
    match (attrs.get("name"), declared, operands) {
        (Some(Attr::Str(name)), Some(ty), []) if ty.is_static() => Ok(graph.weight(name.clone(), ty)),
        _ => bail!(Input, "expected a weight such as `weight \"up.weight\" : f32[8, 8]`, of fixed extents"),
    }
}
