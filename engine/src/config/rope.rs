//! Rotary frequencies (Su et al., 2021) and how they are stretched for long rows; as transformers computes them, in f32.

use std::f64::consts::PI;

use serde_json::Value;

use super::fields::Fields;
use super::known::{refuse_unknown_in, shown};

/// The rotary embedding of some of a model's layers.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// Base of the frequencies.
    pub theta: f64,
    /// Features of a head that are rotated; the first ones.
    pub dim: usize,
    /// How the frequencies are stretched for long rows.
    pub scaling: RopeScaling,
    /// Factor of what is rotated, queries and keys alike (yarn, longrope).
    pub attention_factor: f32,
}

/// How rotary frequencies are changed for rows longer than those of pre-training.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// As pre-trained.
    None,
    /// All frequencies are divided by `factor`.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// The base grows with a row's length beyond `original_max_position_embeddings` ("NTK").
    Dynamic {
        /// How fast it grows.
        factor: f64,
        /// Longest row of pre-training, in tokens.
        original_max_position_embeddings: f64,
    },
    /// Llama 3.1: low frequencies are divided by `factor`, high ones kept, and those between blended.
    Llama3 {
        /// The divisor of the low frequencies.
        factor: f64,
        /// Wavelengths above `original / low_freq_factor` are low frequencies.
        low_freq_factor: f64,
        /// Wavelengths below `original / high_freq_factor` are high frequencies.
        high_freq_factor: f64,
        /// Longest row of pre-training, in tokens.
        original_max_position_embeddings: f64,
    },
    /// YaRN (Peng et al., 2023): as Llama 3.1, but blended by the number of a frequency.
    Yarn {
        /// The divisor of the low frequencies.
        factor: f64,
        /// Frequencies up to this number are kept.
        low: f64,
        /// Frequencies from this number on are divided.
        high: f64,
    },
    /// LongRoPE (Ding et al., 2024): each frequency has a divisor for short rows, and one for long ones.
    LongRope {
        /// Divisors for rows of up to `original_max_position_embeddings` tokens.
        short_factor: Vec<f32>,
        /// Divisors for longer rows.
        long_factor: Vec<f32>,
        /// Longest row of pre-training, in tokens.
        original_max_position_embeddings: f64,
    },
}

/// What a model says of rotary embedding outside of the object that holds `rope_type`.
#[derive(Clone, Copy)]
pub(super) struct RopeContext {
    /// The base, unless the object names one.
    pub(super) theta: f64,
    pub(super) head_dim: usize,
    pub(super) max_position_embeddings: usize,
    /// Longest row of pre-training, if it is named at the top.
    pub(super) original_max_position_embeddings: Option<f64>,
    /// Whether a part of a head may be rotated (Phi 3).
    pub(super) may_be_partial: bool,
}

/// Fields that every `rope_type` has.
const COMMON: [&str; 5] = ["partial_rotary_factor", "rope_theta", "rope_type", "type", ORIGINAL];
const ORIGINAL: &str = "original_max_position_embeddings";

/// Every `rope_type`.
const KINDS: [&str; 6] = ["default", "linear", "dynamic", "llama3", "yarn", "longrope"];

/// The fields of this `rope_type`, besides those that all have.
fn fields_of(kind: &str) -> &'static [&'static str] {
    match kind {
        "linear" | "dynamic" => &["factor"],
        "llama3" => &["factor", "low_freq_factor", "high_freq_factor"],
        "yarn" => &[
            "factor",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
            "finetuned",
        ],
        "longrope" => &["factor", "attention_factor", "short_factor", "long_factor"],
        _ => &[],
    }
}

impl Rope {
    /// Reads the object `object` that holds `rope_type` and its numbers.
    pub(super) fn read(object: &str, rope: &Fields<'_>, context: RopeContext) -> Result<Self, String> {
        let theta = rope.optional_number("rope_theta")?.unwrap_or(context.theta);
        if !(theta.is_finite() && theta > 0.0) {
            return Err(format!("rope_theta is {theta}; it must be above 0"));
        }
        let kind = kind(rope)?;
        let known: Vec<&str> = COMMON.iter().chain(fields_of(kind)).copied().collect();
        refuse_unknown_in(object, rope.0, &known)?;
        let dim = context.rotated(rope.optional_number("partial_rotary_factor")?.unwrap_or(1.0))?;
        let (scaling, attention_factor) = context.scaling(kind, rope, theta, dim)?;
        let rope = Rope { theta, dim, scaling, attention_factor: attention_factor as f32 };
        let lengths = [1, context.max_position_embeddings];
        let is_sound = |frequency: &f32| frequency.is_finite() && *frequency > 0.0;
        let is_sound = lengths.into_iter().all(|length| rope.frequencies(length).iter().all(is_sound));
        match is_sound && rope.attention_factor.is_finite() && rope.attention_factor > 0.0 {
            true => Ok(rope),
            false => Err(format!("{object}: its numbers give no rotary frequencies above 0")),
        }
    }

    /// Frequencies for a row of this length, `dim / 2` of them, in radians per position.
    pub fn frequencies(&self, row_length: usize) -> Vec<f32> {
        // transformers computes the exponent and the power in f32.
        let theta = self.theta_for(row_length) as f32;
        let wavelengths = (0..self.dim / 2).map(|i| theta.powf((2 * i) as f32 / self.dim as f32));
        wavelengths.enumerate().map(|(i, wavelength)| self.scaling.apply(i, wavelength, row_length)).collect()
    }

    /// Whether a row's length changes the angles of its tokens.
    pub fn depends_on_length(&self) -> bool {
        matches!(self.scaling, RopeScaling::Dynamic { .. } | RopeScaling::LongRope { .. })
    }

    /// Whether a row that grows from one length to another needs other frequencies for all of its tokens.
    pub(crate) fn changes_between(&self, from: usize, to: usize) -> bool {
        match &self.scaling {
            RopeScaling::LongRope { original_max_position_embeddings: original, .. } => {
                from as f64 <= *original && to as f64 > *original
            }
            _ => false,
        }
    }

    fn theta_for(&self, row_length: usize) -> f64 {
        match self.scaling {
            RopeScaling::Dynamic { factor, original_max_position_embeddings: original } => {
                let length = (row_length as f64).max(original);
                let dim = self.dim as f64;
                self.theta * (factor * length / original - (factor - 1.0)).powf(dim / (dim - 2.0))
            }
            _ => self.theta,
        }
    }
}

/// The `rope_type`, which older files call `type`.
fn kind<'a>(rope: &Fields<'a>) -> Result<&'a str, String> {
    let (newer, older) = (rope.optional_text("rope_type")?, rope.optional_text("type")?);
    // Phi 3's first name of it.
    let current = |kind: &'a str| if kind == "su" { "longrope" } else { kind };
    match (newer.map(current), older.map(current)) {
        (Some(newer), Some(older)) if newer != older => {
            Err(format!("rope_type is {newer:?}, and type {older:?}: remove the one that does not hold"))
        }
        (newer, older) => match newer.or(older).unwrap_or("default") {
            kind if KINDS.contains(&kind) => Ok(kind),
            other => Err(format!("rope_type is {other:?}; supported: {}", KINDS.join(", "))),
        },
    }
}

impl RopeContext {
    /// Features of a head that are rotated, if it is this share.
    fn rotated(self, share: f64) -> Result<usize, String> {
        let head_dim = self.head_dim;
        if share != 1.0 && !self.may_be_partial {
            return Err(format!(
                "partial_rotary_factor is {share}; supported: 1, and others for model_type phi3 alone"
            ));
        }
        let dim = (head_dim as f64 * share) as usize;
        match dim.is_multiple_of(2) && (1..=head_dim).contains(&dim) {
            true => Ok(dim),
            false => Err(format!(
                "head_dim {head_dim} and partial_rotary_factor {share} rotate {dim} features; \
                 rotary embedding needs an even number"
            )),
        }
    }

    /// Longest row of pre-training, in tokens.
    fn original(self, rope: &Fields<'_>) -> Result<f64, String> {
        match (self.original_max_position_embeddings, rope.optional_positive(ORIGINAL)?) {
            (Some(top), Some(inner)) if top != inner => Err(format!(
                "{ORIGINAL} is {top} at the top of config.json (which is what Phi 3 takes if it is not there), and \
                 {inner} beside rope_type: they must be the same"
            )),
            (top, inner) => Ok(inner.or(top).unwrap_or(self.max_position_embeddings as f64)),
        }
    }

    fn scaling(self, kind: &str, rope: &Fields<'_>, theta: f64, dim: usize) -> Result<(RopeScaling, f64), String> {
        let plain = match kind {
            "linear" => RopeScaling::Linear { factor: rope.positive("factor")? },
            "dynamic" => self.dynamic(rope)?,
            "llama3" => RopeScaling::Llama3 {
                factor: rope.positive("factor")?,
                low_freq_factor: rope.positive("low_freq_factor")?,
                high_freq_factor: rope.positive("high_freq_factor")?,
                original_max_position_embeddings: self.original(rope)?,
            },
            "yarn" => return self.yarn(rope, theta, dim),
            "longrope" => return self.longrope(rope, dim),
            _ => RopeScaling::None,
        };
        Ok((plain, 1.0))
    }

    /// transformers takes the model's longest row for that of pre-training, whatever else is said.
    fn dynamic(self, rope: &Fields<'_>) -> Result<RopeScaling, String> {
        let longest = self.max_position_embeddings as f64;
        match rope.optional_number(ORIGINAL)? {
            Some(original) if original != longest => Err(format!(
                "{ORIGINAL} is {original} with rope_type dynamic, which goes by max_position_embeddings, {longest}: they \
                 must be the same"
            )),
            _ => {
                Ok(RopeScaling::Dynamic { factor: rope.positive("factor")?, original_max_position_embeddings: longest })
            }
        }
    }

    /// The factor, or how much longer the model's rows are than those of pre-training.
    fn factor(self, rope: &Fields<'_>, original: f64) -> Result<f64, String> {
        Ok(rope.optional_positive("factor")?.unwrap_or(self.max_position_embeddings as f64 / original))
    }

    fn yarn(self, rope: &Fields<'_>, theta: f64, dim: usize) -> Result<(RopeScaling, f64), String> {
        if rope.is_absent("factor") {
            return Err("factor is missing beside rope_type yarn".into());
        }
        let original = self.original(rope)?;
        let factor = self.factor(rope, original)?;
        let nonzero = |name: &str| Ok::<_, String>(rope.optional_number(name)?.filter(|number| *number != 0.0));
        let magnitude = |scale: f64| if factor <= 1.0 { 1.0 } else { 0.1 * scale * factor.ln() + 1.0 };
        let attention_factor =
            match (rope.optional_positive("attention_factor")?, nonzero("mscale")?, nonzero("mscale_all_dim")?) {
                (Some(given), _, _) => given,
                (None, Some(scale), Some(all)) => magnitude(scale) / magnitude(all),
                (None, _, _) => magnitude(1.0),
            };
        // The number of the frequency that turns so often in a row of pre-training.
        let turning = |turns: f64| dim as f64 * (original / (turns * 2.0 * PI)).ln() / (2.0 * theta.ln());
        let turns = |name: &str, default: f64| match nonzero(name)?.unwrap_or(default) {
            turns if turns > 0.0 => Ok(turning(turns)),
            other => Err(format!("{name} is {other}; it must be above 0")),
        };
        let (low, high) = (turns("beta_fast", 32.0)?, turns("beta_slow", 1.0)?);
        let (low, high) = match rope.optional_flag("truncate")?.unwrap_or(true) {
            true => (low.floor(), high.ceil()),
            false => (low, high),
        };
        let (low, high) = (low.max(0.0), high.min(dim as f64 - 1.0));
        let high = if low == high { high + 0.001 } else { high };
        Ok((RopeScaling::Yarn { factor, low, high }, attention_factor))
    }

    fn longrope(self, rope: &Fields<'_>, dim: usize) -> Result<(RopeScaling, f64), String> {
        let original = self.original(rope)?;
        let factor = self.factor(rope, original)?;
        let attention_factor = match rope.optional_positive("attention_factor")? {
            Some(given) => given,
            None if factor <= 1.0 => 1.0,
            None => (1.0 + factor.ln() / original.ln()).sqrt(),
        };
        let scaling = RopeScaling::LongRope {
            short_factor: divisors(rope, "short_factor", dim / 2)?,
            long_factor: divisors(rope, "long_factor", dim / 2)?,
            original_max_position_embeddings: original,
        };
        Ok((scaling, attention_factor))
    }
}

/// A list of so many numbers above 0.
fn divisors(rope: &Fields<'_>, name: &str, count: usize) -> Result<Vec<f32>, String> {
    let value = rope.get(name).ok_or_else(|| format!("{name} is missing beside rope_type longrope"))?;
    let number = |value: &Value| value.as_f64().map(|x| x as f32).filter(|x| x.is_finite() && *x > 0.0);
    let numbers = value.as_array().filter(|items| items.len() == count);
    let numbers: Option<Vec<f32>> = numbers.and_then(|items| items.iter().map(number).collect());
    numbers.ok_or_else(|| format!("{name} is {}; expected a list of {count} numbers above 0", shown(value)))
}

impl RopeScaling {
    /// The frequency of this number, whose wavelength before scaling is 2π · `period`.
    fn apply(&self, number: usize, period: f32, row_length: usize) -> f32 {
        let frequency = 1.0 / period;
        match self {
            RopeScaling::None | RopeScaling::Dynamic { .. } => frequency,
            RopeScaling::Linear { factor } => frequency / *factor as f32,
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings: original,
            } => {
                let f = f64::from(frequency);
                let wavelength = 2.0 * PI / f;
                let scaled = if wavelength > original / low_freq_factor {
                    f / factor
                } else if wavelength < original / high_freq_factor {
                    f
                } else {
                    let smooth = (original / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor);
                    (1.0 - smooth) * f / factor + smooth * f
                };
                scaled as f32
            }
            RopeScaling::Yarn { factor, low, high } => {
                let kept = 1.0 - ((number as f32 - *low as f32) / (high - low) as f32).clamp(0.0, 1.0);
                1.0 / (*factor as f32 * period) * (1.0 - kept) + frequency * kept
            }
            RopeScaling::LongRope { short_factor, long_factor, original_max_position_embeddings: original } => {
                let is_long = row_length as f64 > *original;
                let divisor = if is_long { long_factor } else { short_factor }.get(number).copied();
                1.0 / (divisor.unwrap_or(1.0) * period)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rope(scaling: RopeScaling) -> Rope {
        Rope { theta: 500_000.0, dim: 64, scaling, attention_factor: 1.0 }
    }

    #[test]
    fn llama3_scaling_keeps_high_frequencies_and_divides_low_ones() {
        let scaled = rope(RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 8192.0,
        });
        let (plain, scaled) = (rope(RopeScaling::None).frequencies(10), scaled.frequencies(10));
        assert_eq!(scaled[0], plain[0]);
        assert!((scaled[31] - plain[31] / 8.0).abs() < 1e-12);
        assert!(scaled.iter().zip(&plain).any(|(s, p)| *s < p * 0.9 && *s > p / 7.0), "none is blended");
    }

    #[test]
    fn dynamic_scaling_begins_beyond_the_rows_of_pre_training() {
        let dynamic = rope(RopeScaling::Dynamic { factor: 2.0, original_max_position_embeddings: 128.0 });
        assert_eq!(dynamic.frequencies(128), rope(RopeScaling::None).frequencies(128));
        assert!(dynamic.frequencies(256)[31] < 0.5 * dynamic.frequencies(128)[31]);
    }
}
