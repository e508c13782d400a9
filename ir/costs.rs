//! What kernels were measured to take, as multiples of what the roofline says: by kind of kernel, format and range of tokens.
//!
//! ```text
//! contract q4_1 t 1..=8   x 1.12          attend f16 t 65..=512   x 2.3
//! ```
//!
//! The search multiplies its prices by them. A factor that is missing is that of the kind in those steps, else that of all
//! kernels there, so that what was measured is never compared with what was not.

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

/// One kind of kernel.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Factor {
    /// `contract`, `attend`, `rows`...
    pub kind: String,
    /// The format of its weights or of its cache; empty where it reads neither.
    pub format: String,
    /// The steps it was measured in.
    pub tokens: TokenRange,
    /// Measured seconds over predicted ones.
    pub factor: f64,
}

impl Costs {
    /// Nothing was measured.
    pub fn is_empty(&self) -> bool {
        self.factors.is_empty()
    }

    /// What a price is multiplied by.
    pub fn factor(&self, kind: &str, format: &str, tokens: f64) -> f64 {
        let away = |r: &TokenRange| (r.min as f64 / tokens).max(tokens / r.max as f64).max(1.0);
        let nearest = self.factors.iter().map(|f| away(&f.tokens)).fold(f64::INFINITY, f64::min);
        let here = || self.factors.iter().filter(|f| away(&f.tokens) <= nearest);
        let mean = |of: &mut dyn Iterator<Item = &Factor>| {
            let logarithms: Vec<f64> = of.map(|f| f.factor.ln()).collect();
            let count = logarithms.len() as f64;
            (count > 0.0).then(|| (logarithms.iter().sum::<f64>() / count).exp())
        };
        mean(&mut here().filter(|f| f.kind == kind && f.format == format))
            .or_else(|| mean(&mut here().filter(|f| f.kind == kind)))
            .or_else(|| mean(&mut here()))
            .unwrap_or(1.0)
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
            if !(1e-3..=1e3).contains(&f.factor) {
                bail!(Input, "costs[{index}]: `factor`: expected 0.001 to 1000, found {}", f.factor);
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

    fn factor(kind: &str, format: &str, (min, max): (usize, usize), factor: f64) -> Factor {
        Factor { kind: kind.into(), format: format.into(), tokens: TokenRange { min, max }, factor }
    }

    #[test]
    fn what_is_missing_is_the_mean_of_its_like() {
        let factors = vec![
            factor("contract", "q4_0", (1, 1), 2.0),
            factor("contract", "q8_0", (1, 1), 8.0),
            factor("rows", "", (1, 1), 4.0),
            factor("contract", "q4_0", (65, 512), 3.0),
        ];
        let costs = Costs { factors };
        let near = |a: f64, b: f64| assert!((a - b).abs() < 1e-9, "{a} is not {b}");
        near(costs.factor("contract", "q4_0", 1.0), 2.0);
        near(costs.factor("contract", "f32", 1.0), 4.0);
        near(costs.factor("attend", "f16", 1.0), 4.0);
        near(costs.factor("rows", "", 256.0), 3.0);
        near(costs.factor("contract", "q8_0", 4.0), 8.0);
        near(Costs::default().factor("rows", "", 1.0), 1.0);
        assert_eq!(Costs::from_json(&costs.to_json().unwrap()).unwrap(), costs);
    }

    #[test]
    fn absurd_costs_are_refused() {
        let json = Costs { factors: vec![factor("rows", "", (1, 8), 1.5)] }.to_json().unwrap();
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
