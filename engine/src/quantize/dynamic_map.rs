//! The signed dynamic map of 8 bits (Dettmers, 2016), in which bitsandbytes stores the scales of 4-bit blocks: the more
//! leading zeros, the smaller the number and the shorter its fraction.

use std::sync::OnceLock;

/// The 256 values, ascending.
pub(super) fn dynamic_map() -> &'static [f32; 256] {
    static MAP: OnceLock<[f32; 256]> = OnceLock::new();
    MAP.get_or_init(|| {
        let mut values = vec![0.0, 1.0];
        for exponent in 0..7 {
            let boundaries = linspace(0.1, 1.0, (1 << exponent) + 1);
            for pair in boundaries.windows(2) {
                let mean = f64::from((pair[0] + pair[1]) / 2.0);
                let value = (10f64.powi(exponent - 6) * mean) as f32;
                values.extend([value, -value]);
            }
        }
        values.sort_by(f32::total_cmp);
        values.try_into().expect("2 + 2 · (1 + 2 + … + 64) values")
    })
}

/// As torch computes it: from either end to the middle.
fn linspace(start: f32, end: f32, steps: usize) -> Vec<f32> {
    let step = (end - start) / (steps - 1) as f32;
    (0..steps)
        .map(|i| if i < steps / 2 { start + step * i as f32 } else { end - step * (steps - i - 1) as f32 })
        .collect()
}

/// The code whose value is nearest; a tie goes to the lower.
pub(super) fn nearest(map: &[f32; 256], x: f32) -> u8 {
    let above = map.partition_point(|value| *value < x).clamp(1, 255);
    let (low, high) = (map[above - 1], map[above]);
    if x > (low + high) / 2.0 { above as u8 } else { (above - 1) as u8 }
}
