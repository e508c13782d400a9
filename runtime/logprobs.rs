//! Logits -> log probabilities of the tokens that a reader wants to see.
//!
//! They are the model's own, in nats: before temperature, penalties, biases and filters.

use mansard_ir::{Error, Kind, Result};

/// How likely a token was, and which were likeliest.
#[derive(Clone, Debug, PartialEq)]
pub struct Logprobs {
    /// The token that was chosen.
    pub token: u32,
    /// Its log probability.
    pub logprob: f32,
    /// The likeliest tokens with theirs, likeliest first.
    pub top: Vec<(u32, f32)>,
}

impl Logprobs {
    /// Those of `token` and of the `count` likeliest.
    ///
    /// # Errors
    /// Where there is no such token.
    pub fn new(logits: &[f32], token: u32, count: usize) -> Result<Logprobs> {
        let Some(chosen) = logits.get(token as usize) else {
            return Err(Error::new(Kind::Usage, format!("expected a token below {}, found {token}", logits.len())));
        };
        let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = logits.iter().map(|x| f64::from(x - most).exp()).filter(|x| x.is_finite()).sum();
        let logprob = |x: f32| (f64::from(x - most) - sum.ln()) as f32;
        if count == 0 {
            return Ok(Logprobs { token, logprob: logprob(*chosen), top: vec![] });
        }
        let mut order: Vec<u32> = (0..logits.len() as u32).filter(|i| !logits[*i as usize].is_nan()).collect();
        let by = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
        if count < order.len() {
            order.select_nth_unstable_by(count, by);
            order.truncate(count);
        }
        order.sort_unstable_by(by);
        let top = order.into_iter().map(|i| (i, logprob(logits[i as usize]))).collect();
        Ok(Logprobs { token, logprob: logprob(*chosen), top })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logarithms_of_the_softmax() {
        let logits: Vec<f32> = [0.1f32, 0.6, 0.2, 0.1].iter().map(|p| p.ln() + 5.0).collect();
        let found = Logprobs::new(&logits, 2, 2).unwrap();
        assert!((found.logprob - 0.2f32.ln()).abs() < 1e-6);
        assert_eq!(found.top.iter().map(|t| t.0).collect::<Vec<_>>(), [1, 2]);
        assert!((found.top[0].1 - 0.6f32.ln()).abs() < 1e-6);
        assert_eq!(Logprobs::new(&logits, 0, 0).unwrap().top, []);
        assert_eq!(Logprobs::new(&logits, 0, 9).unwrap().top.len(), 4);
        assert!(Logprobs::new(&logits, 4, 0).is_err());
    }
}
