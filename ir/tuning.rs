//! What a backend may choose for a kernel beside its formulas, and what was found faster by measuring.
//!
//! ```text
//! key        what the kernel computes, for which steps, on which processor (BLAKE3)
//! choice     a register tile of 8 tokens x 1 strip; 262144 bytes of weights in a cache tile; prefetch 8192 bytes ahead
//! measured   t = 8: 41200 ns with that choice, 45100 ns with the formulas'
//! ```
//!
//! A [`Tuning`] is part of an artifact's provenance, and as JSON a file of its own. It changes no value that a kernel
//! computes, only how fast. Invariant: it holds each key once; whether a choice is one that a kernel has, its emitter says.

use crate::plan::Kernel;
use crate::target::Target;
use crate::{Error, Kind, Result, bail, text};
use serde::{Deserialize, Serialize};

/// Version of the JSON form.
const VERSION: u32 = 1;

/// The loops of a contraction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Choice {
    /// Activation rows of a full register tile.
    pub tokens: usize,
    /// Strips of 16 output rows of a register tile.
    pub strips: usize,
    /// Bytes of weights that a cache tile may hold: they stay in the second-level cache while all tokens pass.
    pub cache_bytes: usize,
    /// Bytes by which integer weights are asked for ahead of their use; 0: not at all.
    pub ahead: usize,
}

/// Nanoseconds that a step's launches of a kernel took.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Measured {
    /// Tokens of the step.
    pub tokens: usize,
    /// With the choice.
    pub nanoseconds: u64,
    /// With the formulas' choice, in the same run.
    pub formula_nanoseconds: u64,
}

/// A kernel's choice.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tuned {
    /// Its name, for people.
    pub kernel: String,
    /// Name of the target, for people.
    pub target: String,
    /// [`key`].
    pub key: String,
    /// What was chosen.
    pub choice: Choice,
    /// What it took.
    pub measured: Vec<Measured>,
}

/// The choices of some kernels; all others have their formulas'.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Tuning {
    /// In the order of targets and kernels.
    pub kernels: Vec<Tuned>,
}

/// The JSON form.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    mansard_tuning: u32,
    kernels: Vec<Tuned>,
}

/// Names what a kernel computes, for which steps and on which processor, whatever model it is of: 32 hexadecimal digits.
pub fn key(kernel: &Kernel, target: &Target) -> String {
    let mut body = kernel.body.clone();
    body.name.clear();
    let Target { arch, cpu, features, registers, vector_bytes, .. } = target;
    let machine = format!("{arch} {cpu} {} {registers} {vector_bytes}", features.join("+"));
    let range = (kernel.range.min, kernel.range.max);
    let text = format!("{machine}\n{range:?}\n{}", text::print_graph(&body));
    blake3::hash(text.as_bytes()).to_hex()[..32].to_string()
}

impl Tuned {
    /// A choice that nothing was measured of yet.
    pub fn new(kernel: &Kernel, target: &Target, choice: Choice) -> Tuned {
        let (name, key) = (kernel.name.clone(), key(kernel, target));
        Tuned { kernel: name, target: target.name.clone(), key, choice, measured: vec![] }
    }
}

impl Tuning {
    /// Nothing is chosen.
    pub fn is_empty(&self) -> bool {
        self.kernels.is_empty()
    }

    /// What was chosen for a kernel.
    pub fn choice(&self, kernel: &Kernel, target: &Target) -> Option<Choice> {
        if self.is_empty() {
            return None; // saves the hash
        }
        let key = key(kernel, target);
        self.kernels.iter().find(|k| k.key == key).map(|k| k.choice)
    }

    /// Splits off what is for none of these.
    pub fn known(self, kernels: &[Kernel], targets: &[Target]) -> (Tuning, Tuning) {
        let keys: Vec<String> = targets.iter().flat_map(|t| kernels.iter().map(|k| key(k, t))).collect();
        let (known, unknown) = self.kernels.into_iter().partition(|k| keys.contains(&k.key));
        (Tuning { kernels: known }, Tuning { kernels: unknown })
    }

    /// As JSON, for a file.
    ///
    /// # Errors
    /// None that is expected.
    pub fn to_json(&self) -> Result<String> {
        let file = File { mansard_tuning: VERSION, kernels: self.kernels.clone() };
        let json = serde_json::to_string_pretty(&file);
        Ok(json.map_err(|e| Error::new(Kind::Internal, format!("tuning: {e}")))? + "\n")
    }

    /// From [`Tuning::to_json`].
    ///
    /// # Errors
    /// Where the text is something else, of a later version, or holds a key twice.
    pub fn from_json(json: &str) -> Result<Tuning> {
        let File { mansard_tuning: version, kernels } = serde_json::from_str(json)
            .map_err(|e| Error::new(Kind::Input, format!("expected the JSON of `mansard inspect --tuning`: {e}")))?;
        if version != VERSION {
            bail!(Unsupported, "expected a tuning of version {VERSION}, found {version}");
        }
        let tuning = Tuning { kernels };
        tuning.check().map(|()| tuning)
    }

    /// Each key is there once.
    ///
    /// # Errors
    /// Names the kernel of one that is there twice.
    pub fn check(&self) -> Result<()> {
        for (i, tuned) in self.kernels.iter().enumerate() {
            if self.kernels[..i].iter().any(|k| k.key == tuned.key) {
                bail!(Input, "kernel `{}` (key {}): expected one choice, found two", tuned.kernel, tuned.key);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::TokenRange;

    fn kernel(name: &str, n: usize, max: usize) -> Kernel {
        let body = format!(
            "graph @{name}(%x: f32[t, 64], %w: f32[{n}, 64]) stage planned {{ %y = matmul %x, %w return y = %y }}"
        );
        let body = text::parse("k", &body).unwrap().graphs.remove(0);
        Kernel { name: name.into(), body, range: TokenRange { min: 1, max }, groups: vec![] }
    }

    fn target(features: &[&str]) -> Target {
        let machine = crate::Machine {
            threads: 1,
            bandwidth: 1.0,
            near_bandwidth: 0.0,
            near_bytes: 0.0,
            cache_bandwidth: 1.0,
            cache_bytes: 1.0,
            peak_f32: 1.0,
            peak_i8: 1.0,
            peak_bf16: 1.0,
            barrier: 1.0,
        };
        let features = features.iter().map(|f| f.to_string()).collect();
        let (name, arch, cpu) = ("native".into(), "x86_64".into(), "any".into());
        Target { name, arch, cpu, features, registers: 16, vector_bytes: 32, machine }
    }

    fn tuned(key: String) -> Tuned {
        let choice = Choice { tokens: 4, strips: 2, cache_bytes: 1 << 18, ahead: 0 };
        let measured = vec![Measured { tokens: 8, nanoseconds: 3, formula_nanoseconds: 4 }];
        Tuned { kernel: "k".into(), target: "native".into(), key, choice, measured }
    }

    #[test]
    fn a_key_is_of_work_steps_and_processor_not_of_names() {
        let (here, there) = (target(&["avx2"]), target(&["avx2", "avxvnni"]));
        let one = key(&kernel("a", 16, 8), &here);
        assert_eq!(one, key(&kernel("b", 16, 8), &Target { name: "x86-64-v3".into(), ..here.clone() }));
        for other in
            [key(&kernel("a", 32, 8), &here), key(&kernel("a", 16, 9), &here), key(&kernel("a", 16, 8), &there)]
        {
            assert_ne!(one, other);
        }
        let tuning = Tuning { kernels: vec![tuned(one), tuned("0".repeat(32))] };
        assert_eq!(tuning.choice(&kernel("c", 16, 8), &here).map(|c| c.strips), Some(2));
        assert_eq!(tuning.choice(&kernel("a", 16, 8), &there), None);
        let (known, unknown) = tuning.known(&[kernel("a", 16, 8)], &[there, here]);
        assert_eq!((known.kernels.len(), unknown.kernels.len()), (1, 1));
    }

    #[test]
    fn json_comes_back_and_damage_is_named() {
        let tuning = Tuning { kernels: vec![tuned("1".repeat(32))] };
        let json = tuning.to_json().unwrap();
        assert_eq!(Tuning::from_json(&json).unwrap(), tuning);
        let says = |json: &str, code: u8, word: &str| {
            let error = Tuning::from_json(json).unwrap_err();
            assert!(error.exit_code() == code && error.to_string().contains(word), "{error}");
        };
        says(&json[..json.len() / 2], 3, "EOF");
        says(&json.replace("\"strips\": 2", "\"strips\": -2"), 3, "-2");
        says(&json.replace("\"strips\"", "\"stripes\""), 3, "stripes");
        says(&json.replace("\"mansard_tuning\": 1", "\"mansard_tuning\": 2"), 4, "version 1, found 2");
        let twice = Tuning { kernels: vec![tuning.kernels[0].clone(); 2] };
        says(&twice.to_json().unwrap(), 3, "expected one choice, found two");
    }
}
