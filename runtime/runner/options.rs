//! Words of the command line -> what to do.

use lexopt::prelude::*;
use mansard_ir::{Error, Kind, Result};
use mansard_runtime::{GenerateOptions, SamplerOptions};

/// What `--help` prints.
pub const HELP: &str = "\
Answers a prompt with the model inside: ANSWER -p \"Why is the sky blue?\"

  -p, --prompt TEXT      The prompt, or a text to embed [default: standard input]
      --tokens IDS       Token ids instead of text: 1,2,3
      --system TEXT      What the system says before the prompt
      --raw              Continue the plain text: no chat template
  -n, --max-tokens N     Most tokens to generate [default: 256]
      --temp X           Divides logits; 0 takes the likeliest token [default: 0.8]
      --top-k N          Likeliest tokens kept; 0 keeps all [default: 40]
      --top-p X          Mass kept [default: 0.95]
      --min-p X          Least probability kept, as a share of the likeliest's [default: 0.05]
      --seed N           Start of the random numbers [default: 0]
      --ignore-end       Go on where the model would end
  -t, --threads N        Worker threads [default: physical cores]
      --no-verify        Trust the weights: do not check their hashes
      --about            What this holds
  -h, --help             This text

Exit codes: 0 done, 2 a request that makes no sense, 3 damaged, 4 not for this machine, 5 the system refused, 70 a bug
";

/// What to do.
#[derive(Debug, Default)]
pub struct Options {
    /// Text given as such.
    pub prompt: Option<String>,
    /// Token ids given instead.
    pub tokens: Option<Vec<u32>>,
    /// What the system says.
    pub system: Option<String>,
    /// No chat template.
    pub raw: bool,
    /// What to generate.
    pub generate: GenerateOptions,
    /// Workers.
    pub threads: Option<usize>,
    /// Do not hash weights.
    pub trust: bool,
    /// Say what is inside.
    pub about: bool,
    /// Print the help.
    pub help: bool,
}

impl Options {
    /// Those of a command line.
    ///
    /// # Errors
    /// Where a word is unknown, or has no value or one of another kind.
    pub fn parse(parser: lexopt::Parser) -> Result<Options> {
        read(parser).map_err(|e| Error::new(Kind::Usage, e.to_string()).help("--help lists what can be said"))
    }
}

fn read(mut parser: lexopt::Parser) -> Result<Options, lexopt::Error> {
    let mut options = Options::default();
    let mut sampler = SamplerOptions::default();
    while let Some(word) = parser.next()? {
        match word {
            Short('p') | Long("prompt") => options.prompt = Some(parser.value()?.string()?),
            Long("tokens") => options.tokens = Some(parser.value()?.parse_with(ids)?),
            Long("system") => options.system = Some(parser.value()?.string()?),
            Long("raw") => options.raw = true,
            Short('n') | Long("max-tokens") => options.generate.max_tokens = parser.value()?.parse()?,
            Long("temp") => sampler.temperature = parser.value()?.parse()?,
            Long("top-k") => sampler.top_k = parser.value()?.parse()?,
            Long("top-p") => sampler.top_p = parser.value()?.parse()?,
            Long("min-p") => sampler.min_p = parser.value()?.parse()?,
            Long("seed") => sampler.seed = parser.value()?.parse()?,
            Long("ignore-end") => options.generate.stop_tokens = Some(vec![]),
            Short('t') | Long("threads") => options.threads = Some(parser.value()?.parse()?),
            Long("no-verify") => options.trust = true,
            Long("about") => options.about = true,
            Short('h') | Long("help") => options.help = true,
            _ => return Err(word.unexpected()),
        }
    }
    options.generate.sampler = sampler;
    Ok(options)
}

fn ids(list: &str) -> Result<Vec<u32>, std::num::ParseIntError> {
    list.split(',').map(|word| word.trim().parse()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(words: &[&str]) -> Result<Options> {
        Options::parse(lexopt::Parser::from_args(words))
    }

    #[test]
    fn words_are_understood_or_refused() {
        let options =
            parsed(&["-p", "Why?", "-n3", "--temp=0", "--seed", "7", "--tokens", "1, 2", "--ignore-end"]).unwrap();
        assert_eq!((options.prompt.as_deref(), options.tokens), (Some("Why?"), Some(vec![1, 2])));
        let GenerateOptions { max_tokens, sampler, stop_tokens, .. } = options.generate;
        assert_eq!((max_tokens, sampler.temperature, sampler.seed, stop_tokens), (3, 0.0, 7, Some(vec![])));
        for words in [&["-x"][..], &["--temp", "hot"], &["-p"], &["word"], &["--tokens", "1,x"], &["-n", "-1"]] {
            assert_eq!(parsed(words).unwrap_err().exit_code(), 2, "{words:?}");
        }
    }

    #[test]
    fn the_help_names_every_default() {
        let GenerateOptions { max_tokens, sampler, .. } = GenerateOptions::default();
        let SamplerOptions { temperature, top_k, top_p, min_p, seed, .. } = sampler;
        for figure in [max_tokens as f32, temperature, top_k as f32, top_p, min_p, seed as f32] {
            assert!(HELP.contains(&format!("[default: {figure}]")), "{figure}");
        }
    }
}
