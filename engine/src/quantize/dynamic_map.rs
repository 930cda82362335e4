//! The dynamic maps of 8 bits (Dettmers, 2016), in which bitsandbytes stores the scales of 4-bit blocks and the state of
//! optimizers: the more leading zeros, the smaller the number and the shorter its fraction.

use std::sync::OnceLock;

/// The 256 values, ascending; without a sign, fractions are one bit longer.
pub(crate) fn dynamic_map(signed: bool) -> &'static [f32; 256] {
    static SIGNED: OnceLock<[f32; 256]> = OnceLock::new();
    static UNSIGNED: OnceLock<[f32; 256]> = OnceLock::new();
    let map = if signed { &SIGNED } else { &UNSIGNED };
    map.get_or_init(|| {
        let mut values = vec![0.0, 1.0];
        for exponent in 0..7 {
            let fractions = 1 << if signed { exponent } else { exponent + 1 };
            let boundaries = linspace(0.1, 1.0, fractions + 1);
            for pair in boundaries.windows(2) {
                let value = 10f64.powi(exponent - 6) as f32 * ((pair[0] + pair[1]) / 2.0);
                values.push(value);
                values.extend(signed.then_some(-value));
            }
        }
        values.sort_by(f32::total_cmp);
        values.try_into().expect("2 + 2 · (1 + 2 + … + 64) values")
    })
}

/// As torch computes it: from either end to the middle, each value rounded once.
fn linspace(start: f32, end: f32, steps: usize) -> Vec<f32> {
    let step = (end - start) / (steps - 1) as f32;
    let value = |i: usize| match i < steps / 2 {
        true => step.mul_add(i as f32, start),
        false => (-step).mul_add((steps - i - 1) as f32, end),
    };
    (0..steps).map(value).collect()
}

/// The code whose value is nearest; a tie goes to the lower. So bitsandbytes' CUDA kernels search it.
pub(super) fn nearest(map: &[f32; 256], x: f32) -> u8 {
    let above = map.partition_point(|value| *value < x).clamp(1, 255);
    if x > 0.5 * (map[above - 1] + map[above]) { above as u8 } else { (above - 1) as u8 }
}

/// The same once x, in [−1, 1], is rounded to one of 65,536 steps, as bitsandbytes' CPU library does: near the middle
/// between two values, that decides. Zero is no step.
pub(super) fn nearest_to_step(map: &[f32; 256], x: f32) -> u8 {
    const STEPS: f32 = 65_535.0;
    let step = ((x.clamp(-1.0, 1.0) + 1.0) * 0.5 * STEPS + 0.5) as u16;
    nearest(map, -1.0 + 2.0 * f32::from(step) / STEPS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_is_nearest_to_its_own_code() {
        for signed in [true, false] {
            let map = dynamic_map(signed);
            for (code, value) in map.iter().enumerate() {
                assert_eq!(usize::from(nearest(map, *value)), code);
            }
            assert_eq!(map[usize::from(nearest(map, 0.0))], 0.0);
            assert_ne!(map[usize::from(nearest_to_step(map, 0.0))], 0.0, "the CPU library's steps lack zero");
        }
    }
}
