//! Tokens -> text as it may be shown: what could be the beginning of a stop string is held back.
//!
//! ```text
//!  stop at "END"     tokens  a  E  N  x  E  N  D        text  a  .  .  ENx  .  .  (stopped)
//! ```

use crate::tokens::{Decoder, Tokens};
use mansard_ir::{Error, Kind, Result};
use std::sync::Arc;

/// A stream of text that stop strings end.
#[derive(Debug)]
pub(crate) struct Text {
    /// Without a tokenizer there is no text.
    decoder: Option<Decoder>,
    stops: Arc<[String]>,
    /// Decoded, but not shown yet.
    held: String,
}

/// What a token brought.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Shown {
    /// Text that nothing can take back.
    pub text: String,
    /// A stop string came; the text ends before it.
    pub stopped: bool,
}

impl Text {
    /// An empty stream.
    ///
    /// # Errors
    /// Where a stop string is empty, or there is no tokenizer to find any.
    pub fn new(tokens: Option<&Arc<Tokens>>, stops: Arc<[String]>) -> Result<Text> {
        let wrong = |message: &str| Err(Error::new(Kind::Usage, message));
        if stops.iter().any(String::is_empty) {
            return wrong("expected stop strings of at least one character, found an empty one");
        }
        if tokens.is_none() && !stops.is_empty() {
            return wrong("stop strings need a tokenizer, and the model came without one");
        }
        Ok(Text { decoder: tokens.map(Tokens::decoder), stops, held: String::new() })
    }

    /// An empty stream with the same stop strings.
    pub fn anew(&self, tokens: Option<&Arc<Tokens>>) -> Text {
        Text { decoder: tokens.map(Tokens::decoder), stops: self.stops.clone(), held: String::new() }
    }

    /// One more token.
    ///
    /// # Errors
    /// Where it cannot be decoded.
    pub fn push(&mut self, token: u32) -> Result<Shown> {
        let Some(decoder) = &mut self.decoder else { return Ok(Shown { text: String::new(), stopped: false }) };
        let piece = decoder.push(token)?;
        Ok(self.take(&piece))
    }

    /// The end: what was held back, and characters that were never finished.
    ///
    /// # Errors
    /// Where they cannot be decoded.
    pub fn finish(&mut self) -> Result<Shown> {
        let rest = self.decoder.take().map_or_else(|| Ok(String::new()), Decoder::finish)?;
        let shown = self.take(&rest);
        let held = if shown.stopped { String::new() } else { std::mem::take(&mut self.held) };
        Ok(Shown { text: shown.text + &held, ..shown })
    }

    fn take(&mut self, piece: &str) -> Shown {
        self.held += piece;
        let found = self.stops.iter().filter_map(|stop| self.held.find(stop.as_str())).min();
        let stopped = found.is_some();
        let end = found.unwrap_or(self.held.len() - self.beginning());
        let rest = self.held.split_off(end);
        let text = std::mem::replace(&mut self.held, rest);
        Shown { text, stopped }
    }

    /// Bytes at the end that a stop string may begin with.
    fn beginning(&self) -> usize {
        let most = self.stops.iter().map(|stop| stop.len() - 1).max().unwrap_or(0).min(self.held.len());
        let begins = |tail: &str| self.stops.iter().any(|stop| stop.starts_with(tail));
        let cut = |length: &usize| self.held.is_char_boundary(self.held.len() - length);
        (1..=most).rev().filter(cut).find(|length| begins(&self.held[self.held.len() - length..])).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is shown after each piece, up to the stop, and at the end.
    fn shown(stops: &[&str], pieces: &[&str]) -> Vec<String> {
        let stops = stops.iter().map(|s| s.to_string()).collect();
        let mut text = Text { decoder: None, stops, held: String::new() };
        let mut out = vec![];
        for piece in pieces {
            let Shown { text, stopped } = text.take(piece);
            out.push(text);
            if stopped {
                return out;
            }
        }
        out.push(text.finish().unwrap().text);
        out
    }

    #[test]
    fn text_comes_at_once_where_nothing_can_stop_it() {
        assert_eq!(shown(&[], &["a", "bc"]), ["a", "bc", ""]);
        assert_eq!(shown(&["xyz"], &["a", "bc"]), ["a", "bc", ""]);
    }

    #[test]
    fn what_may_be_a_stop_string_is_held_back() {
        assert_eq!(shown(&["END"], &["a", "E", "N", "x", "bE", "ND", "never"]), ["a", "", "", "ENx", "b", ""]);
        assert_eq!(shown(&["END"], &["aEN"]), ["a", "EN"]);
        assert_eq!(shown(&["aab"], &["a", "a", "a", "b"]), ["", "", "a", ""]);
        assert_eq!(shown(&["\n\n", "\nUser:"], &["hi\n", "Us", "ee\n", "User: x"]), ["hi", "", "\nUsee", ""]);
    }

    #[test]
    fn the_first_stop_string_counts() {
        assert_eq!(shown(&["later", "so"], &["and so on until later"]), ["and "]);
        assert_eq!(shown(&["世界"], &["a世", "界b"]), ["a", ""]);
        assert_eq!(shown(&["世界"], &["a世", "間"]), ["a", "世間", ""]);
    }

    #[test]
    fn stop_strings_that_make_no_sense_are_refused() {
        for stops in [[""], ["a"]] {
            let stops = stops.map(String::from).into();
            assert_eq!(Text::new(None, stops).unwrap_err().exit_code(), 2);
        }
    }
}
