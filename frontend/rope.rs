//! Rope frequencies from settings: one angle per pair of dims and position, and the factor on cosines and sines.
//!
//! | type | frequency `f_i = theta^(-2i / r)` becomes |
//! |---|---|
//! | `default` | itself |
//! | `linear` | `f / factor` |
//! | `dynamic` | itself: within the trained context it equals `default`, and the context ends there |
//! | `llama3` | itself where the wavelength is short, `f / factor` where long, blended between |
//! | `yarn` | likewise, blended over dims; cosines and sines times the attention factor |
//!
//! `r` is the rotated part of a head (`partial_rotary_factor`). Settings come in the old spelling (`rope_theta` beside
//! `rope_scaling`) or the new one (`rope_parameters`, flat or by type of layer).

use crate::config::Config;
use mansard_ir::{Error, Kind, Result, bail};
use std::f64::consts::TAU;

/// A rope table's recipe.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Rope {
    /// Angle per position of each pair: `r / 2` of them.
    pub frequencies: Vec<f32>,
    /// Multiplies cosines and sines.
    pub scale: f64,
}

/// What a family knows before reading rope settings.
pub(crate) struct Defaults<'a> {
    /// Width of a head.
    pub head_dim: usize,
    /// Base where the settings have none.
    pub theta: f64,
    /// Trained positions.
    pub context: usize,
    /// Type of layer to look up in `rope_parameters`.
    pub layer_type: Option<&'a str>,
}

/// Names of the supported scalings.
const TYPES: &str = "default, linear, dynamic, llama3, yarn";

impl Rope {
    /// Reads `rope_parameters`, or `rope_theta` with `rope_scaling`.
    ///
    /// # Errors
    /// Where a setting is missing, out of range or not supported.
    pub fn read(config: &Config, defaults: &Defaults<'_>) -> Result<Rope> {
        // The settings of local layers alone do not take the global base.
        let global = defaults.layer_type != Some("sliding_attention");
        let base = config.positive_or("rope_theta", defaults.theta)?;
        let theta = if global { base } else { defaults.theta };
        let partial = config.positive_or("partial_rotary_factor", 1.0)?;
        let old = config.section("rope_scaling")?;
        match config.section("rope_parameters")? {
            Some(all) => {
                let of_type = match defaults.layer_type {
                    Some(layer_type) => all.section(layer_type)?,
                    None => None,
                };
                if of_type.is_none() {
                    return Rope::scaled(Some(&all), theta, partial, defaults);
                }
                all.accept(&["full_attention", "sliding_attention"]);
                all.finish()?;
                Rope::scaled(of_type.as_ref(), theta, partial, defaults)
            }
            None => Rope::scaled(old.as_ref(), theta, partial, defaults),
        }
    }

    /// Unscaled frequencies.
    ///
    /// # Errors
    /// Where fewer than two dims of a head would be rotated, or an odd number.
    pub fn unscaled(theta: f64, partial: f64, head_dim: usize) -> Result<Rope> {
        Rope::scaled(None, theta, partial, &Defaults { head_dim, theta, context: 1, layer_type: None })
    }

    fn scaled(section: Option<&Config>, theta: f64, partial: f64, defaults: &Defaults<'_>) -> Result<Rope> {
        let (theta, partial) = match section {
            None => (theta, partial),
            Some(s) => (s.positive_or("rope_theta", theta)?, s.positive_or("partial_rotary_factor", partial)?),
        };
        // The tiny summand undoes the rounding of a factor that is itself a quotient of dims.
        let dims = (defaults.head_dim as f64 * partial + 1e-6) as usize;
        if dims < 2 || !dims.is_multiple_of(2) || dims > defaults.head_dim {
            bail!(
                Unsupported,
                "rope over {dims} of {} dims of a head; supported: an even part of it",
                defaults.head_dim
            );
        }
        let plain: Vec<f64> = (0..dims / 2).map(|i| theta.powf(-2.0 * i as f64 / dims as f64)).collect();
        let Some(section) = section else { return Ok(Rope::new(plain, 1.0)) };
        let kind = section.text("rope_type")?.or(section.text("type")?).unwrap_or("default");
        let rope = match kind {
            "default" | "dynamic" => {
                section.accept(&["factor", "original_max_position_embeddings"]);
                Rope::new(plain, 1.0)
            }
            "linear" => {
                section.accept(&["original_max_position_embeddings"]);
                let factor = factor(section)?;
                Rope::new(plain.into_iter().map(|f| f / factor).collect(), 1.0)
            }
            "llama3" => llama3(section, plain)?,
            "yarn" => yarn(section, plain, theta, defaults)?,
            other => {
                let message = format!("rope scaling of type `{other}`");
                return Err(Error::new(Kind::Unsupported, message).help(format!("supported: {TYPES}")));
            }
        };
        section.finish()?;
        Ok(rope)
    }

    fn new(frequencies: Vec<f64>, scale: f64) -> Rope {
        Rope { frequencies: frequencies.into_iter().map(|f| f as f32).collect(), scale }
    }

    /// Divides every frequency by its factor (a GGUF file's `rope_freqs.weight`).
    pub fn divide(&mut self, factors: &[f32]) -> Result<()> {
        if factors.iter().any(|f| !(f.is_finite() && *f > 0.0)) {
            bail!(Input, "rope factors must be positive numbers");
        }
        for (frequency, factor) in self.frequencies.iter_mut().zip(factors) {
            *frequency /= factor;
        }
        Ok(())
    }
}

fn factor(section: &Config) -> Result<f64> {
    match section.opt_float("factor")? {
        Some(factor) if factor >= 1.0 => Ok(factor),
        found => bail!(Input, "setting `factor` of rope scaling: expected a number of at least 1, found {found:?}"),
    }
}

fn llama3(section: &Config, plain: Vec<f64>) -> Result<Rope> {
    let factor = factor(section)?;
    let low = section.positive_or("low_freq_factor", 1.0)?;
    let high = section.positive_or("high_freq_factor", 4.0)?;
    let trained = section.size("original_max_position_embeddings")? as f64;
    if high <= low {
        bail!(Input, "rope scaling: expected `high_freq_factor` above `low_freq_factor`, found {high} and {low}");
    }
    let scaled = plain.into_iter().map(|f| {
        let wavelength = TAU / f;
        // 0 for wavelengths longer than trained / low, 1 for those shorter than trained / high.
        let kept = ((trained / wavelength - low) / (high - low)).clamp(0.0, 1.0);
        (1.0 - kept) * f / factor + kept * f
    });
    Ok(Rope::new(scaled.collect(), 1.0))
}

fn yarn(section: &Config, plain: Vec<f64>, theta: f64, defaults: &Defaults<'_>) -> Result<Rope> {
    let factor = factor(section)?;
    let trained = section.size_or("original_max_position_embeddings", defaults.context)? as f64;
    let fast = section.positive_or("beta_fast", 32.0)?;
    let slow = section.positive_or("beta_slow", 1.0)?;
    let truncate = section.flag_or("truncate", true)?;
    let magnitude = |by: f64| if factor <= 1.0 { 1.0 } else { 0.1 * by * factor.ln() + 1.0 };
    let (by, by_all) = (section.opt_float("mscale")?, section.opt_float("mscale_all_dim")?);
    let derived = match (by, by_all) {
        (Some(by), Some(all)) if by != 0.0 && all != 0.0 => magnitude(by) / magnitude(all),
        _ => magnitude(1.0),
    };
    let scale = section.positive_or("attention_factor", derived)?;
    // The pair that turns `rotations` times within the trained context.
    let dims = 2.0 * plain.len() as f64;
    let pair = |rotations: f64| dims * (trained / (rotations * TAU)).ln() / (2.0 * theta.ln());
    let (mut first, mut last) = (pair(fast), pair(slow));
    if truncate {
        (first, last) = (first.floor(), last.ceil());
    }
    (first, last) = (first.max(0.0), last.min(dims - 1.0));
    if first == last {
        last += 0.001;
    }
    if !(first.is_finite() && last.is_finite()) {
        bail!(Input, "rope scaling: `rope_theta` = {theta} leaves no frequencies to blend");
    }
    let scaled = plain.into_iter().enumerate().map(|(i, f)| {
        let interpolated = ((i as f64 - first) / (last - first)).clamp(0.0, 1.0);
        f / factor * interpolated + f * (1.0 - interpolated)
    });
    Ok(Rope::new(scaled.collect(), scale))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rope(json: &str) -> Result<Rope> {
        let config = Config::parse(json.as_bytes())?;
        Rope::read(&config, &Defaults { head_dim: 8, theta: 1e4, context: 4096, layer_type: Some("full_attention") })
    }

    #[test]
    fn old_and_new_spellings_agree() {
        let old = rope(r#"{"rope_theta": 500000.0, "rope_scaling": {"type": "linear", "factor": 4}}"#).unwrap();
        let flat = r#"{"rope_parameters": {"rope_theta": 500000.0, "rope_type": "linear", "factor": 4.0}}"#;
        let layered = r#"{"rope_parameters": {"full_attention":
            {"rope_theta": 500000.0, "rope_type": "linear", "factor": 4.0}, "sliding_attention": {"rope_theta": 1.5}}}"#;
        assert_eq!(old, rope(flat).unwrap());
        assert_eq!(old, rope(layered).unwrap());
        assert_eq!(old.frequencies[0], 0.25);
    }

    #[test]
    fn partial_rotation_counts_dims_of_the_rotated_part() {
        let half = rope(r#"{"partial_rotary_factor": 0.5}"#).unwrap();
        assert_eq!(half.frequencies, [1.0, 0.01]);
        assert!(rope(r#"{"partial_rotary_factor": 0.4}"#).is_err(), "three dims are no pairs");
    }

    // With theta 1e4 and 8 dims the wavelengths are 2 pi times 1, 10, 100 and 1000 positions.
    #[test]
    fn llama3_keeps_short_wavelengths_and_divides_long_ones() {
        let scaled = rope(
            r#"{"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 256}}"#,
        )
        .unwrap();
        assert_eq!(scaled.frequencies[0], 1.0);
        assert_eq!(scaled.frequencies[1], 0.1);
        assert_eq!(scaled.frequencies[2], 0.01 / 8.0, "one turn takes 628 positions, more than 256");
        assert_eq!(scaled.frequencies[3], 0.001 / 8.0);
    }

    #[test]
    fn yarn_blends_and_scales() {
        let scaled =
            rope(r#"{"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}}"#)
                .unwrap();
        assert!((scaled.scale - (0.1 * 4f64.ln() + 1.0)).abs() < 1e-12);
        // Pairs 1.007 (32 turns) and 2.513 (one turn) bracket the blend: floor 1, ceiling 3.
        assert_eq!(scaled.frequencies[..2], [1.0, 0.1]);
        assert!((scaled.frequencies[2] - (0.01 * 0.5 + 0.0025 * 0.5)).abs() < 1e-8);
        assert_eq!(scaled.frequencies[3], 0.00025);
    }

    #[test]
    fn unknown_scalings_are_refused() {
        let error = rope(r#"{"rope_scaling": {"type": "longrope", "factor": 4.0}}"#).unwrap_err();
        assert!(error.advice().unwrap().contains("llama3"), "{error}");
        assert!(rope(r#"{"rope_scaling": {"type": "linear", "factor": 2.0, "warp": 3}}"#).is_err());
    }
}
