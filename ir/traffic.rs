//! The workload that a program is meant for, and the steps it consists of.
//!
//! ```text
//! prompt=512,generate=128,batch=4   ->   1 step of 512 tokens ... for each of 4 prompts, context 256 on average
//!                                        128 steps of 4 tokens, context 576 on average
//! ```
//!
//! Decisions are priced on these steps: kernels for each range of `t`, and formats by the time of all steps together.

use crate::cost::Workload;
use crate::{Error, Kind, Result};
use std::fmt;
use std::str::FromStr;

/// What each of some sequences does, side by side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Traffic {
    /// Tokens of a prompt.
    pub prompt: usize,
    /// Tokens generated after it.
    pub generate: usize,
    /// Sequences that generate side by side.
    pub batch: usize,
    /// Positions each sequence has before its prompt.
    pub context: usize,
}

impl Default for Traffic {
    /// A chat with one person.
    fn default() -> Traffic {
        Traffic { prompt: 512, generate: 128, batch: 1, context: 0 }
    }
}

/// Equal steps.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Steps {
    /// How many.
    pub count: f64,
    /// What each does.
    pub step: Workload,
}

impl Traffic {
    /// Positions a sequence has in the end.
    pub fn positions(&self) -> usize {
        self.context + self.prompt + self.generate
    }

    /// The steps that read prompts, one sequence after the other in steps of at most `most` tokens; `None` without prompts.
    pub fn reading(&self, most: usize) -> Option<Steps> {
        let steps = self.prompt.div_ceil(most.max(1)) as f64;
        let context = self.context as f64 + self.prompt as f64 / 2.0;
        let step = Workload { tokens: self.prompt as f64 / steps, sequences: 1.0, rows: 1.0, context, candidates: 1 };
        (self.prompt > 0).then_some(Steps { count: steps * self.batch as f64, step })
    }

    /// The steps that generate one token for each sequence; `None` where none is.
    pub fn writing(&self) -> Option<Steps> {
        let (batch, context) = (self.batch as f64, (self.context + self.prompt) as f64 + self.generate as f64 / 2.0);
        let step = Workload { tokens: batch, sequences: batch, rows: batch, context, candidates: 1 };
        (self.generate > 0).then_some(Steps { count: self.generate as f64, step })
    }

    /// All steps, where one may have `most` tokens.
    pub fn steps(&self, most: usize) -> Vec<Steps> {
        self.reading(most).into_iter().chain(self.writing()).collect()
    }

    /// Refuses what a program cannot do that takes so many sequences a step, and so many positions of each.
    ///
    /// # Errors
    /// Usage, with both figures.
    pub fn fits(&self, sequences: usize, positions: usize) -> Result<()> {
        let error = |message: String| Error::new(Kind::Usage, format!("--workload: {message}"));
        if self.batch > sequences {
            return Err(error(format!("expected at most {sequences} sequences side by side, found {}", self.batch)));
        }
        if self.positions() > positions {
            let message = format!("expected at most {positions} positions of a sequence, found {}", self.positions());
            return Err(error(message).help("the model's context, or --context, bounds them"));
        }
        Ok(())
    }
}

impl FromStr for Traffic {
    type Err = Error;

    /// `prompt=512,generate=128,batch=1` in any order; `context=4096` where there is something before the prompt.
    fn from_str(text: &str) -> Result<Traffic> {
        let error = |message: String| Error::new(Kind::Usage, format!("--workload: {message}"));
        let form = "prompt=512,generate=128,batch=1, and context=4096 where something is before the prompt";
        let (mut traffic, mut seen) = (Traffic { prompt: 0, generate: 0, batch: 1, context: 0 }, vec![]);
        for part in text.split(',') {
            let Some((key, value)) = part.split_once('=') else {
                return Err(error(format!("expected NAME=NUMBER, found `{part}`")).help(format!("for example {form}")));
            };
            let (key, value) = (key.trim(), value.trim());
            let field = match key {
                "prompt" => &mut traffic.prompt,
                "generate" => &mut traffic.generate,
                "batch" => &mut traffic.batch,
                "context" => &mut traffic.context,
                _ => return Err(error(format!("nothing is called `{key}`")).help(format!("for example {form}"))),
            };
            if seen.contains(&key) {
                return Err(error(format!("`{key}` is given twice")));
            }
            seen.push(key);
            *field = match value.parse() {
                Ok(figure) if figure <= MOST => figure,
                _ => return Err(error(format!("{key}: expected a number up to {MOST}, found `{value}`"))),
            };
        }
        if traffic.batch == 0 {
            return Err(error("batch: expected at least 1, found 0".into()));
        }
        if traffic.prompt + traffic.generate == 0 {
            return Err(error("expected tokens to read (prompt) or to write (generate), found none".into()));
        }
        Ok(traffic)
    }
}

/// Larger figures are slips.
const MOST: usize = 1 << 30;

impl fmt::Display for Traffic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "prompt={},generate={},batch={}", self.prompt, self.generate, self.batch)?;
        if self.context > 0 { write!(f, ",context={}", self.context) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_and_back() {
        for text in ["prompt=512,generate=128,batch=1", "prompt=0,generate=7,batch=16,context=4096"] {
            assert_eq!(text.parse::<Traffic>().unwrap().to_string(), text);
        }
        assert_eq!("generate=3".parse::<Traffic>().unwrap(), Traffic { prompt: 0, generate: 3, batch: 1, context: 0 });
    }

    #[test]
    fn nonsense_is_refused() {
        let cases = [
            ("", "NAME=NUMBER"),
            ("prompt", "NAME=NUMBER"),
            ("prompt=1,tokens=2", "nothing is called"),
            ("prompt=1,prompt=1", "twice"),
            ("prompt=-1", "expected a number"),
            ("prompt=99999999999999999999", "expected a number"),
            ("prompt=1,batch=0", "at least 1"),
            ("prompt=0,generate=0", "found none"),
        ];
        for (text, says) in cases {
            let error = text.parse::<Traffic>().unwrap_err();
            assert!(error.kind() == Kind::Usage && error.to_string().contains(says), "{text}: {error}");
        }
        let traffic: Traffic = "prompt=10,generate=5,batch=3".parse().unwrap();
        assert!(traffic.fits(3, 15).is_ok() && traffic.fits(2, 15).is_err() && traffic.fits(3, 14).is_err());
    }

    #[test]
    fn steps_cover_every_token() {
        let traffic: Traffic = "prompt=1000,generate=10,batch=2,context=100".parse().unwrap();
        let [reading, writing] = traffic.steps(512)[..] else { panic!("two kinds of steps") };
        assert_eq!((reading.count, reading.step.tokens, reading.step.context), (4.0, 500.0, 600.0));
        assert_eq!((writing.count, writing.step.tokens, writing.step.context), (10.0, 2.0, 1105.0));
        assert_eq!("prompt=5".parse::<Traffic>().unwrap().steps(512).len(), 1);
        assert_eq!("generate=5".parse::<Traffic>().unwrap().steps(512).len(), 1);
    }
}
