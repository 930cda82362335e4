//! Rotary frequencies (Su et al., 2021) and how they are stretched for long rows.

use super::fields::Fields;

/// The rotary embedding of some of a model's layers.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// Base of the frequencies.
    pub theta: f64,
    /// Features of a head that are rotated; the first ones.
    pub dim: usize,
    /// How the frequencies are stretched for long rows.
    pub scaling: RopeScaling,
}

/// How rotary frequencies are changed for rows longer than those of pre-training.
#[derive(Debug, Clone, Copy, PartialEq)]
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
}

impl Rope {
    /// Reads the object that holds `rope_type` and its numbers; `theta` is the base unless the object names one.
    pub(super) fn read(
        rope: &Fields<'_>,
        theta: f64,
        head_dim: usize,
        max_position_embeddings: usize,
    ) -> Result<Self, String> {
        let theta = rope.optional_number("rope_theta")?.unwrap_or(theta);
        if !(theta.is_finite() && theta > 0.0) {
            return Err(format!("rope_theta is {theta}; it must be above 0"));
        }
        let kind = rope.get("rope_type").or(rope.get("type"));
        let scaling = match kind.map(|kind| kind.as_str().unwrap_or_default()) {
            None | Some("default") => RopeScaling::None,
            Some("linear") => RopeScaling::Linear { factor: rope.positive("factor")? },
            Some("dynamic") => RopeScaling::Dynamic {
                factor: rope.positive("factor")?,
                original_max_position_embeddings: max_position_embeddings as f64,
            },
            Some("llama3") => RopeScaling::Llama3 {
                factor: rope.positive("factor")?,
                low_freq_factor: rope.positive("low_freq_factor")?,
                high_freq_factor: rope.positive("high_freq_factor")?,
                original_max_position_embeddings: rope.positive("original_max_position_embeddings")?,
            },
            Some(other) => {
                return Err(format!("rope_type is {other:?}; supported: default, linear, dynamic, llama3"));
            }
        };
        let share = rope.optional_number("partial_rotary_factor")?.unwrap_or(1.0);
        let dim = (head_dim as f64 * share) as usize;
        if !(dim.is_multiple_of(2) && (1..=head_dim).contains(&dim)) {
            return Err(format!(
                "head_dim {head_dim} and partial_rotary_factor {share} rotate {dim} features; \
                 rotary embedding needs an even number"
            ));
        }
        Ok(Rope { theta, dim, scaling })
    }

    /// Frequencies for a row of this length, `dim / 2` of them, in radians per position.
    pub fn frequencies(&self, row_length: usize) -> Vec<f32> {
        // transformers computes the exponent and the power in f32.
        let theta = self.theta_for(row_length) as f32;
        let frequencies = (0..self.dim / 2).map(|i| 1.0 / theta.powf((2 * i) as f32 / self.dim as f32));
        frequencies.map(|frequency| self.scaling.apply(frequency)).collect()
    }

    /// Whether a row's length changes the angles of its tokens.
    pub fn depends_on_length(&self) -> bool {
        matches!(self.scaling, RopeScaling::Dynamic { .. })
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

impl RopeScaling {
    fn apply(self, frequency: f32) -> f32 {
        match self {
            RopeScaling::None | RopeScaling::Dynamic { .. } => frequency,
            RopeScaling::Linear { factor } => frequency / factor as f32,
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings: original,
            } => {
                let f = f64::from(frequency);
                let wavelength = 2.0 * std::f64::consts::PI / f;
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
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rope(scaling: RopeScaling) -> Rope {
        Rope { theta: 500_000.0, dim: 64, scaling }
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
