//! Text to tokens, one at a time, each with the byte where it starts.
//!
//! ```text
//! %4 = rms_normalize %x {eps = 1e-5}
//! Value("4") Mark("=") Word("rms_normalize") Value("x") Mark("{") Word("eps") Mark("=") Number("1e-5") Mark("}")
//! ```

use crate::{Error, Kind, Result};

/// A token; what it is in the text is in its span.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Token {
    /// `graph`, `f32`, `rms_normalize`, `mlp.up`.
    Word(String),
    /// `%x`.
    Value(String),
    /// `@layer`.
    Callee(String),
    /// `"..."` with its escapes resolved.
    Text(String),
    /// As written.
    Number(String),
    /// Punctuation.
    Mark(&'static str),
    /// Nothing is left.
    End,
}

impl Token {
    /// How messages call it.
    pub fn describe(&self) -> String {
        match self {
            Token::Word(w) | Token::Number(w) => format!("`{}`", w.escape_debug()),
            Token::Value(w) => format!("`%{}`", w.escape_debug()),
            Token::Callee(w) => format!("`@{}`", w.escape_debug()),
            Token::Text(w) => format!("{w:?}"),
            Token::Mark(m) => format!("`{m}`"),
            Token::End => "the end".into(),
        }
    }
}

/// Punctuation; longer marks first.
const MARKS: [&str; 12] = ["..", "(", ")", "{", "}", "[", "]", "<", ">", "=", ",", ":"];

/// Reads tokens from text.
pub struct Lexer<'a> {
    name: &'a str,
    text: &'a str,
    at: usize,
}

/// A character of a word after its first.
fn inner(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_'
}

/// Length of the word `text` begins with; dots and hyphens only inside it.
fn word_len(text: &str) -> usize {
    let bytes = text.as_bytes();
    let continues = |i: usize| {
        inner(bytes[i] as char)
            || (matches!(bytes[i], b'.' | b'-') && i > 0 && bytes.get(i + 1).is_some_and(|c| inner(*c as char)))
    };
    (0..bytes.len()).find(|i| !continues(*i)).unwrap_or(bytes.len())
}

/// The whole text is one word that is no number: it can be printed bare.
pub fn is_word(text: &str) -> bool {
    !text.is_empty() && word_len(text) == text.len() && !text.starts_with(|c: char| c.is_ascii_digit())
}

/// Length of the number `text` begins with: `-1`, `0.5`, `1e-5`; the dots of `1..8` are no part of it.
fn number_len(text: &str) -> usize {
    let bytes = text.as_bytes();
    let digits = |mut i: usize| {
        while bytes.get(i).is_some_and(u8::is_ascii_digit) {
            i += 1;
        }
        i
    };
    let is_digit = |i: usize| bytes.get(i).is_some_and(u8::is_ascii_digit);
    let mut end = digits((bytes.first() == Some(&b'-')) as usize);
    if bytes.get(end) == Some(&b'.') && is_digit(end + 1) {
        end = digits(end + 1);
    }
    if matches!(bytes.get(end), Some(b'e' | b'E')) {
        let sign = matches!(bytes.get(end + 1), Some(b'-' | b'+')) as usize;
        if is_digit(end + 1 + sign) {
            end = digits(end + 1 + sign);
        }
    }
    end
}

impl<'a> Lexer<'a> {
    /// `name` is where the text comes from, for messages.
    pub fn new(name: &'a str, text: &'a str) -> Lexer<'a> {
        Lexer { name, text, at: 0 }
    }

    /// The next token and the byte where it starts.
    pub fn next(&mut self) -> Result<(usize, Token)> {
        self.skip();
        let (start, rest) = (self.at, &self.text[self.at..]);
        let token = match rest.chars().next() {
            None => Token::End,
            Some('"') => Token::Text(self.string()?),
            Some('%') => Token::Value(self.name()?),
            Some('@') => Token::Callee(self.name()?),
            Some(c) if c.is_ascii_alphabetic() || c == '_' => Token::Word(self.take(word_len(rest))),
            Some(c) if c.is_ascii_digit() || c == '-' && rest[1..].starts_with(|c: char| c.is_ascii_digit()) => {
                Token::Number(self.take(number_len(rest)))
            }
            Some(c) => match MARKS.iter().find(|m| rest.starts_with(**m)) {
                Some(mark) => {
                    self.at += mark.len();
                    Token::Mark(mark)
                }
                None => return Err(self.error(start, format!("expected a word or a mark, found {c:?}"))),
            },
        };
        Ok((start, token))
    }

    /// An error at byte `at`: its line and column, and the line with a caret under it.
    pub fn error(&self, at: usize, message: impl std::fmt::Display) -> Error {
        let before = &self.text[..at];
        let first = before.rfind('\n').map_or(0, |i| i + 1);
        let line = self.text[first..].lines().next().unwrap_or("");
        let (row, column) = (before.matches('\n').count() + 1, before[first..].chars().count() + 1);
        // Long lines are shown around the place; control characters would garble a terminal.
        let skip = column.saturating_sub(80);
        let shown: String = line.chars().skip(skip).take(120).map(|c| if c.is_control() { ' ' } else { c }).collect();
        let caret = " ".repeat(column - 1 - skip);
        let place = format!("{}:{row}:{column}", self.name);
        Error::new(Kind::Input, format!("{message}\n  | {shown}\n  | {caret}^")).at(place)
    }

    fn skip(&mut self) {
        loop {
            let rest = &self.text[self.at..];
            self.at += rest.len() - rest.trim_start().len();
            if !self.text[self.at..].starts_with('#') {
                return;
            }
            let rest = &self.text[self.at..];
            self.at += rest.find('\n').unwrap_or(rest.len());
        }
    }

    fn take(&mut self, len: usize) -> String {
        let taken = &self.text[self.at..self.at + len];
        self.at += len;
        taken.into()
    }

    /// What follows `%` or `@`: a word, a number or a string.
    fn name(&mut self) -> Result<String> {
        let start = self.at;
        self.at += 1;
        let rest = &self.text[self.at..];
        if rest.starts_with('"') {
            return self.string();
        }
        match word_len(rest) {
            0 => Err(self.error(start, "expected a name here")),
            len => Ok(self.take(len)),
        }
    }

    /// A string with the escapes of Rust's: `\"`, `\\`, `\n`, `\t`, `\r`, `\0`, `\'`, `\u{1f}`.
    fn string(&mut self) -> Result<String> {
        let start = self.at;
        let mut out = String::new();
        let mut rest = self.text[start + 1..].char_indices();
        while let Some((i, c)) = rest.next() {
            match c {
                '"' => {
                    self.at = start + 1 + i + 1;
                    return Ok(out);
                }
                '\n' => break,
                '\\' => match escape(&mut rest) {
                    Some(c) => out.push(c),
                    None => return Err(self.error(start + 1 + i, "no such escape in a string")),
                },
                c => out.push(c),
            }
        }
        Err(self.error(start, "this string does not end on its line"))
    }
}

/// The character that follows a backslash stands for.
fn escape(rest: &mut std::str::CharIndices<'_>) -> Option<char> {
    match rest.next()?.1 {
        c @ ('"' | '\\' | '\'') => Some(c),
        'n' => Some('\n'),
        't' => Some('\t'),
        'r' => Some('\r'),
        '0' => Some('\0'),
        'u' => {
            rest.next().filter(|(_, c)| *c == '{')?;
            let mut code = 0u32;
            for _ in 0..7 {
                match rest.next()?.1 {
                    '}' => return char::from_u32(code),
                    c => code = code.checked_mul(16)? + c.to_digit(16)?,
                }
            }
            None
        }
        _ => None,
    }
}
