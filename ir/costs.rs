//! What kernels were measured to take, against what the roofline says: by what they compute, format and range of tokens.
//!
//! ```text
//! contract q4_1 [add matmul quantize]  t 1..=8     1.2 us + 1.12 x roofline
//! attend   f16  [attend]               t 65..=512  3.0 us + 2.3 x roofline
//! ```
//!
//! The search prices by them. What is missing costs as the mean of its like does: the kind over that format, the same ops
//! over any, the kind, at last all kernels of such steps; so that what was measured is never compared with what was not.

use crate::graph::TokenRange;
use crate::{Error, Kind, Result, bail};
use serde::{Deserialize, Serialize};

/// Measured costs; empty: the roofline's.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Costs {
    /// In order of measurement.
    pub factors: Vec<Factor>,
}

/// What a cost is filed under.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Filed {
    /// `contract`, `attend`, `rows`...
    pub kind: String,
    /// The format of its weights or of its cache; empty where it reads neither.
    pub format: String,
    /// Names of all its ops, sorted, with spaces between.
    pub ops: String,
}

/// What such kernels cost in steps of so many tokens.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Factor {
    /// Which kernels.
    pub of: Filed,
    /// The steps it was measured in.
    pub tokens: TokenRange,
    /// Microseconds of a launch, however little there is to do.
    pub launch_us: f64,
    /// Seconds beyond that over the roofline's.
    pub factor: f64,
}

impl Factor {
    /// The cost through samples of predicted and measured seconds of a launch: least squares of relative errors, neither part
    /// of it negative. `None` without a sample.
    pub fn fit(of: Filed, tokens: TokenRange, samples: &[(f64, f64)]) -> Option<Factor> {
        let sum = |term: fn(f64, f64) -> f64| samples.iter().map(|(p, m)| term(1.0 / m, p / m)).sum::<f64>();
        // (launch + factor p) / m = 1 for every sample.
        let [ll, lf, ff, l, f] =
            [sum(|l, _| l * l), sum(|l, f| l * f), sum(|_, f| f * f), sum(|l, _| l), sum(|_, f| f)];
        if samples.is_empty() {
            return None;
        }
        let determinant = ll * ff - lf * lf;
        let both = ((l * ff - f * lf) / determinant, (f * ll - l * lf) / determinant);
        // Sizes that hardly differ do not tell one from the other.
        let (launch, factor) = match determinant > 1e-3 * ll * ff {
            true if both.0 > 0.0 && both.1 > 0.0 => both,
            _ => (0.0, f / ff),
        };
        Some(Factor { of, tokens, launch_us: launch * 1e6, factor: factor.clamp(SMALLEST, LARGEST) })
    }
}

/// Factors that measurements give.
const SMALLEST: f64 = 1e-3;
const LARGEST: f64 = 1e3;

impl Costs {
    /// Nothing was measured.
    pub fn is_empty(&self) -> bool {
        self.factors.is_empty()
    }

    /// Seconds of a launch in steps of so many tokens, for which the roofline says `seconds`.
    pub fn price(&self, of: &Filed, tokens: f64, seconds: f64) -> f64 {
        let away = |r: &TokenRange| (r.min as f64 / tokens).max(tokens / r.max as f64).max(1.0);
        let nearest = self.factors.iter().map(|f| away(&f.tokens)).fold(f64::INFINITY, f64::min);
        let here: Vec<&Factor> = self.factors.iter().filter(|f| away(&f.tokens) <= nearest).collect();
        let mean = |like: &dyn Fn(&Filed) -> bool| {
            let prices = here.iter().filter(|f| like(&f.of)).map(|f| (f.launch_us * 1e-6 + f.factor * seconds).ln());
            let count = prices.clone().count() as f64;
            (count > 0.0).then(|| (prices.sum::<f64>() / count).exp())
        };
        mean(&|f| f == of)
            .or_else(|| mean(&|f| f.kind == of.kind && f.format == of.format))
            .or_else(|| mean(&|f| f.kind == of.kind && f.ops == of.ops))
            .or_else(|| mean(&|f| f.kind == of.kind))
            .or_else(|| mean(&|_| true))
            .unwrap_or(seconds)
    }

    /// Reads what [`Costs::to_json`] gives.
    ///
    /// # Errors
    /// Where it is something else, or a figure is absurd.
    pub fn from_json(json: &str) -> Result<Costs> {
        let costs: Costs =
            serde_json::from_str(json).map_err(|e| Error::new(Kind::Input, format!("expected measured costs: {e}")))?;
        costs.check().map(|()| costs)
    }

    /// For a file.
    ///
    /// # Errors
    /// None for costs that were checked.
    pub fn to_json(&self) -> Result<String> {
        let text = serde_json::to_string_pretty(self);
        Ok(text.map_err(|e| Error::new(Kind::Internal, format!("costs: {e}")))? + "\n")
    }

    /// Refuses figures that no measurement gives.
    ///
    /// # Errors
    /// Names the first.
    pub fn check(&self) -> Result<()> {
        for (index, f) in self.factors.iter().enumerate() {
            // Also what is no number.
            if !(SMALLEST..=LARGEST).contains(&f.factor) {
                bail!(Input, "costs[{index}]: `factor`: expected 0.001 to 1000, found {}", f.factor);
            }
            if !(0.0..=1e6).contains(&f.launch_us) {
                bail!(Input, "costs[{index}]: `launch_us`: expected 0 to a second, found {}", f.launch_us);
            }
            if f.tokens.min == 0 || f.tokens.min > f.tokens.max {
                bail!(Input, "costs[{index}]: `tokens`: expected a range, found {} to {}", f.tokens.min, f.tokens.max);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filed(kind: &str, format: &str, ops: &str) -> Filed {
        Filed { kind: kind.into(), format: format.into(), ops: ops.into() }
    }

    fn factor(of: Filed, (min, max): (usize, usize), factor: f64) -> Factor {
        Factor { of, tokens: TokenRange { min, max }, launch_us: 0.0, factor }
    }

    fn near(a: f64, b: f64) {
        assert!((a - b).abs() < 1e-9, "{a} is not {b}");
    }

    #[test]
    fn what_is_missing_is_the_mean_of_its_like() {
        let factors = vec![
            factor(filed("contract", "q4_0", "matmul"), (1, 1), 2.0),
            factor(filed("contract", "q8_0", "matmul"), (1, 1), 8.0),
            factor(filed("contract", "q8_0", "add matmul"), (1, 1), 32.0),
            factor(filed("rows", "", "add"), (1, 1), 8.0),
            factor(filed("contract", "q4_0", "matmul"), (65, 512), 3.0),
        ];
        let costs = Costs { factors };
        let price = |of: (&str, &str, &str), tokens| costs.price(&filed(of.0, of.1, of.2), tokens, 1.0);
        near(price(("contract", "q4_0", "matmul"), 1.0), 2.0);
        near(price(("contract", "f32", "matmul"), 1.0), 4.0);
        near(price(("contract", "q8_0", "matmul silu"), 1.0), 16.0);
        near(price(("contract", "f32", "matmul silu"), 1.0), 8.0);
        near(price(("attend", "f16", "attend"), 1.0), 8.0);
        near(price(("rows", "", "add"), 256.0), 3.0);
        near(price(("contract", "q8_0", "matmul"), 4.0), 8.0);
        near(Costs::default().price(&filed("rows", "", ""), 1.0, 1.5), 1.5);
        assert_eq!(Costs::from_json(&costs.to_json().unwrap()).unwrap(), costs);
    }

    #[test]
    fn costs_go_through_what_was_measured() {
        let fit = |samples: &[(f64, f64)]| {
            let found = Factor::fit(Filed::default(), TokenRange { min: 1, max: 1 }, samples).unwrap();
            (found.launch_us, found.factor)
        };
        let (launch, factor) = fit(&[(1e-6, 4e-6), (2e-6, 6e-6), (10e-6, 22e-6)]);
        near(launch, 2.0);
        near(factor, 2.0);
        // One size alone, and sizes that would have less cost nothing.
        assert_eq!(fit(&[(1e-6, 4e-6)]).0, 0.0);
        near(fit(&[(1e-6, 4e-6)]).1, 4.0);
        assert_eq!(fit(&[(1e-6, 1e-6), (2e-6, 6e-6)]).0, 0.0);
        assert!(Factor::fit(Filed::default(), TokenRange { min: 1, max: 1 }, &[]).is_none());
    }

    #[test]
    fn absurd_costs_are_refused() {
        let json = Costs { factors: vec![factor(filed("rows", "", "add"), (1, 8), 1.5)] }.to_json().unwrap();
        for (from, to, says) in
            [("1.5", "-1.5", "found -1.5"), ("1.5", "1e9", "factor"), ("kind", "sort", "unknown field")]
        {
            let error = Costs::from_json(&json.replace(from, to)).unwrap_err();
            assert!(error.exit_code() == 3 && error.to_string().contains(says), "{error}");
        }
        assert!(
            Costs::from_json(&json.replace("\"min\": 1", "\"min\": 9")).unwrap_err().to_string().contains("9 to 8")
        );
    }
}
