//! Kubernetes quantities of bytes.

const BINARY: [(&str, u64); 6] =
    [("Ki", 1 << 10), ("Mi", 1 << 20), ("Gi", 1 << 30), ("Ti", 1 << 40), ("Pi", 1 << 50), ("Ei", 1 << 60)];
const DECIMAL: [(&str, f64); 8] =
    [("m", 1e-3), ("k", 1e3), ("M", 1e6), ("G", 1e9), ("T", 1e12), ("P", 1e15), ("E", 1e18), ("", 1.0)];

/// Bytes of a quantity such as `24Gi`, `1.5G` or `1073741824`; None if it is no quantity of bytes.
pub fn parse_bytes(quantity: &str) -> Option<u64> {
    let binary = BINARY.iter().map(|(suffix, unit)| (*suffix, *unit as f64));
    let (number, unit) =
        binary.chain(DECIMAL).find_map(|(suffix, unit)| Some((quantity.strip_suffix(suffix)?, unit)))?;
    let (digits, exponent) = match number.split_once(['e', 'E']) {
        Some((digits, exponent)) => (digits, exponent),
        None => (number, "0"),
    };
    let is_number = |text: &str, others: &str| text.chars().all(|c| c.is_ascii_digit() || others.contains(c));
    let value: f64 = format!("{digits}e{exponent}").parse().ok()?;
    (is_number(digits, ".") && is_number(exponent, "") && value.is_finite()).then_some((value * unit) as u64)
}

/// The largest binary unit that leaves a readable number, rounded up: 8_400_000 bytes are `9Mi`.
pub fn format_bytes(bytes: u64) -> String {
    let (suffix, unit) = BINARY.iter().rev().find(|(_, unit)| bytes >= 8 * unit).unwrap_or(&("", 1));
    format!("{}{suffix}", bytes.div_ceil(*unit))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_are_read_as_kubernetes_does() {
        assert_eq!(parse_bytes("24Gi"), Some(24 << 30));
        assert_eq!(parse_bytes("1.5G"), Some(1_500_000_000));
        assert_eq!(parse_bytes("512"), Some(512));
        assert_eq!(parse_bytes("0"), Some(0));
        assert_eq!((parse_bytes("1e9"), parse_bytes("1.5E3")), (Some(1_000_000_000), Some(1500)));
        assert_eq!((parse_bytes("1E"), parse_bytes("2Ei")), (Some(1_000_000_000_000_000_000), Some(2 << 60)));
        assert_eq!(parse_bytes("2500m"), Some(2));
        for text in ["", "Gi", "-1Gi", "1e3x", "lots", "1 Gi", "infGi", "e3", "1e", "1e-3", "1e3Gi "] {
            assert_eq!(parse_bytes(text), None, "{text}");
        }
    }

    #[test]
    fn sizes_are_rounded_up_to_a_readable_unit() {
        assert_eq!(format_bytes(8_400_000), "9Mi");
        assert_eq!(format_bytes(100), "100");
        assert_eq!(format_bytes(80 << 30), "80Gi");
        assert!(parse_bytes(&format_bytes(123_456_789)).unwrap() >= 123_456_789);
    }
}
