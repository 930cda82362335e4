//! Writing tokens one at a time with a key-value cache.

use crate::backend::{Backend, Row};
use crate::block::KvCache;
use crate::cpu::Cpu;
use crate::error::{Error, Result};
use crate::model::Model;
use crate::random;

/// How the next token is chosen from the logits; in the order and with the meaning of transformers' processors.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// 0 takes the likeliest token.
    pub temperature: f64,
    /// Smallest set of tokens whose probability reaches this; 1 keeps all.
    pub top_p: f64,
    /// Above 1 makes tokens that were seen less likely.
    pub repetition_penalty: f64,
    /// Seed of the draws.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Sampling { temperature: 0.0, top_p: 1.0, repetition_penalty: 1.0, seed: 0 }
    }
}

/// Room for this many more tokens is made in the caches when they are full.
const CACHE_STEP: usize = 256;

/// A row that is being written.
pub struct Generator<'m, B: Backend = Cpu> {
    model: &'m Model<B>,
    sampling: Sampling,
    stop: Vec<u32>,
    tokens: Vec<u32>,
    /// Tokens whose keys and values are in the caches.
    cached: usize,
    capacity: usize,
    caches: Vec<KvCache<B>>,
    ended: bool,
}

impl<'m, B: Backend> Generator<'m, B> {
    /// A row that begins with `prompt` and ends at a token of `stop`, or at the model's longest row.
    ///
    /// # Errors
    /// The prompt is empty, too long, or has tokens outside the vocabulary; the sampling is out of range.
    pub fn new(model: &'m Model<B>, prompt: &[u32], sampling: Sampling, stop: &[u32]) -> Result<Self> {
        model.check_tokens(prompt)?;
        let longest = model.config().max_position_embeddings;
        if prompt.len() >= longest {
            return Err(Error::Batch(format!(
                "the prompt has {} tokens, and the model's longest row {longest}",
                prompt.len()
            )));
        }
        let Sampling { temperature, top_p, repetition_penalty, .. } = sampling;
        if !(temperature >= 0.0 && repetition_penalty > 0.0 && top_p > 0.0 && top_p <= 1.0) {
            return Err(Error::Batch(format!(
                "temperature {temperature} must be 0 or more, top_p {top_p} in (0, 1], \
                 repetition_penalty {repetition_penalty} above 0"
            )));
        }
        Ok(Generator {
            model,
            sampling,
            stop: stop.to_vec(),
            tokens: prompt.to_vec(),
            cached: 0,
            capacity: 0,
            caches: Vec::new(),
            ended: false,
        })
    }

    /// The next token, or `None` at the end; the stop token itself is not returned.
    ///
    /// # Errors
    /// The logits are NaN.
    pub fn next_token(&mut self) -> Result<Option<u32>> {
        if self.ended || self.tokens.len() >= self.model.config().max_position_embeddings {
            return Ok(None);
        }
        let mut logits = B::run(|| self.logits());
        let draw = random::unit(random::philox(self.tokens.len() as u64, self.sampling.seed)[0]);
        let token = self.sampling.choose(&mut logits, &self.tokens, draw)?;
        self.ended = self.stop.contains(&token);
        self.tokens.push(token);
        Ok((!self.ended).then_some(token))
    }

    /// The logits after the last token.
    fn logits(&mut self) -> Vec<f32> {
        self.reserve();
        let Model { backend, blocks, config, .. } = self.model;
        if config.ropes.iter().any(|rope| rope.changes_between(self.cached, self.tokens.len())) {
            // Keys that were turned by other frequencies are of no use: all are computed again, as transformers does.
            self.cached = 0;
        }
        let new = &self.tokens[self.cached..];
        let rows = backend.rows(&[Row::new(new.len())], self.cached, &config.ropes);
        let mut x = self.model.embed(new);
        for ((i, block), cache) in blocks.iter().enumerate().zip(&mut self.caches) {
            x = block.forward_cached(&self.model.pass(i, &rows), x, cache, self.cached);
        }
        let last = backend.gather_rows(&x, &[new.len() as u32 - 1]);
        self.cached = self.tokens.len();
        backend.download(&self.model.output(&last))
    }

    /// Makes room for all tokens in the caches.
    fn reserve(&mut self) {
        if self.tokens.len() <= self.capacity {
            return;
        }
        let backend = &self.model.backend;
        let width = self.model.config().key_value_size();
        self.capacity = (self.tokens.len() + 1).next_multiple_of(CACHE_STEP);
        let grow = |old: Option<&B::Tensor>| {
            let mut cache = backend.zeros(self.capacity, width);
            if let Some(old) = old {
                backend.write_rows(&mut cache, old, 0);
            }
            cache
        };
        let blocks = 0..self.model.blocks.len();
        self.caches = blocks
            .map(|i| {
                let old = self.caches.get(i);
                KvCache { keys: grow(old.map(|c| &c.keys)), values: grow(old.map(|c| &c.values)) }
            })
            .collect();
    }
}

impl Sampling {
    /// Chooses a token; `draw` is uniform in [0, 1).
    fn choose(&self, logits: &mut [f32], seen: &[u32], draw: f32) -> Result<u32> {
        if let Some(token) = logits.iter().position(|x| x.is_nan()) {
            let message = format!("the logit of token {token} is NaN; the weights are damaged");
            return Err(Error::Batch(message));
        }
        self.penalise(logits, seen);
        let mut order: Vec<u32> = (0..logits.len() as u32).collect();
        let logit = |token: u32| logits[token as usize];
        if self.temperature == 0.0 {
            let best = order.into_iter().reduce(|best, t| if logit(t) > logit(best) { t } else { best });
            return best.ok_or_else(|| Error::Batch("the vocabulary is empty".into()));
        }
        order.sort_by(|&a, &b| logit(b).total_cmp(&logit(a)));
        let largest = f64::from(logit(order[0]));
        let weight = |&token: &u32| ((f64::from(logit(token)) - largest) / self.temperature).exp();
        let weights: Vec<f64> = order.iter().map(weight).collect();
        let total: f64 = weights.iter().sum();
        // The likeliest tokens, up to and with the one at which their share reaches top_p.
        let mut share = 0.0;
        let kept = weights.iter().position(|weight| {
            share += weight / total;
            share >= self.top_p
        });
        let kept = kept.map_or(weights.len(), |last| last + 1);
        let mut left = f64::from(draw) * weights[..kept].iter().sum::<f64>();
        let chosen = weights[..kept].iter().position(|weight| {
            left -= weight;
            left < 0.0
        });
        Ok(order[chosen.unwrap_or(kept - 1)])
    }

    /// Divides positive logits of seen tokens by the penalty and multiplies negative ones (Keskar et al., 2019).
    fn penalise(&self, logits: &mut [f32], seen: &[u32]) {
        let penalty = self.repetition_penalty as f32;
        let mut seen = seen.to_vec();
        seen.sort_unstable();
        seen.dedup();
        for token in seen {
            let logit = &mut logits[token as usize];
            *logit = if *logit < 0.0 { *logit * penalty } else { *logit / penalty };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::Precision;

    fn choose(sampling: Sampling, logits: &[f32], seen: &[u32], draw: f32) -> u32 {
        sampling.choose(&mut logits.to_vec(), seen, draw).unwrap()
    }

    #[test]
    fn greedy_takes_the_likeliest_that_the_penalty_leaves() {
        let greedy = Sampling { repetition_penalty: 2.0, ..Sampling::default() };
        assert_eq!(choose(greedy, &[1.0, 3.0, 2.0], &[], 0.0), 1);
        assert_eq!(choose(greedy, &[1.0, 3.0, 2.0], &[1, 1], 0.0), 2);
        assert_eq!(choose(greedy, &[-3.0, -2.0, -2.5], &[1], 0.0), 2);
    }

    #[test]
    fn draws_follow_the_probabilities_within_top_p() {
        let logits = [0.5f32.ln(), 0.3f32.ln(), 0.2f32.ln()];
        let all = Sampling { temperature: 1.0, ..Sampling::default() };
        let picks = [0.0, 0.49, 0.51, 0.79, 0.81, 0.99].map(|draw| choose(all, &logits, &[], draw));
        assert_eq!(picks, [0, 0, 1, 1, 2, 2]);
        let top = Sampling { top_p: 0.6, ..all };
        let picks = [0.0, 0.62, 0.63, 0.99].map(|draw| choose(top, &logits, &[], draw));
        assert_eq!(picks, [0, 0, 1, 1]);
        assert_eq!(choose(Sampling { top_p: 0.4, ..all }, &logits, &[], 0.99), 0);
    }

    #[test]
    fn a_low_temperature_sharpens() {
        let cold = Sampling { temperature: 0.1, ..Sampling::default() };
        assert_eq!(choose(cold, &[1.0, 2.0], &[], 0.01), 1);
    }

    /// Recall reads what training wrote: token by token in bf16, inputs are rounded as in training's whole rows.
    #[test]
    fn decoding_token_by_token_rounds_as_whole_rows_do() {
        let config = serde_json::json!({
            "model_type": "llama", "vocab_size": 200, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
            "tie_word_embeddings": false,
        });
        let load = |precision| {
            let mut model = Model::random(crate::config::ModelConfig::parse(&config.to_string()).unwrap(), 3);
            model.backend.set_precision(Precision::Bf16);
            model.round_frozen();
            model.backend.set_precision(precision);
            model
        };
        let (model, unrounded) = (load(Precision::Bf16), load(Precision::F32));
        let tokens: Vec<u32> = (0..24).map(|i| i * 37 % 200).collect();
        let apart = |a: &[f32], b: &[f32]| {
            let norm = |x: &mut dyn Iterator<Item = f32>| x.map(|x| f64::from(x).powi(2)).sum::<f64>().sqrt();
            norm(&mut a.iter().zip(b).map(|(a, b)| a - b)) / norm(&mut b.iter().copied())
        };
        let mut row_by_row = Generator::new(&model, &tokens[..1], Sampling::default(), &[]).unwrap();
        let (whole, in_f32) = (model.logits(&tokens).unwrap(), unrounded.logits(&tokens).unwrap());
        let (mut ours, mut without) = (0.0, f64::INFINITY);
        for (i, token) in tokens.iter().enumerate() {
            if i > 0 {
                row_by_row.tokens.push(*token);
            }
            let row = i * 200..(i + 1) * 200;
            ours = f64::max(ours, apart(&row_by_row.logits(), &whole[row.clone()]));
            without = without.min(apart(&in_f32[row.clone()], &whole[row]));
        }
        // Sums in another order may round a number of the next layer the other way: that is far less than not to round.
        assert!(ours < 0.1 * without, "{ours:.1e} against {without:.1e} without rounding");
    }

    #[test]
    fn nan_is_an_error() {
        assert!(Sampling::default().choose(&mut [0.0, f32::NAN], &[], 0.0).is_err());
    }
}
