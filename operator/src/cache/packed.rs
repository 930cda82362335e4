//! Texts that lie in memory compressed.

use std::borrow::Cow;

/// Fast; the next ones save little more.
const LEVEL: i32 = 1;

/// A text that was packed.
pub struct Packed {
    bytes: Box<[u8]>,
    /// Bytes of the text, if it was worth while to compress it.
    length: Option<usize>,
}

impl Packed {
    /// Packs a text.
    pub fn new(text: &[u8]) -> Self {
        match zstd::bulk::compress(text, LEVEL) {
            Ok(bytes) if bytes.len() < text.len() => Self { bytes: bytes.into(), length: Some(text.len()) },
            _ => Self { bytes: text.into(), length: None },
        }
    }

    /// The text.
    pub fn text(&self) -> Cow<'_, [u8]> {
        match self.length {
            None => Cow::Borrowed(&self.bytes),
            // Only memory can be short here; an empty text is an object that can't be read, which says so.
            Some(length) => Cow::Owned(zstd::bulk::decompress(&self.bytes, length).unwrap_or_default()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_comes_back_as_it_was() {
        for text in ["", "x", &"{\"name\": \"value\"}".repeat(100)] {
            let packed = Packed::new(text.as_bytes());
            assert_eq!(packed.text(), text.as_bytes());
            assert!(packed.bytes.len() <= text.len());
        }
        assert!(Packed::new(&[b'x'; 1000]).bytes.len() < 100);
    }
}
