//! Texts that lie in memory compressed. Those of a kind are much alike: the first one is the dictionary of all others, which
//! then take a tenth of their room.

use std::{
    borrow::Cow,
    io,
    sync::{Mutex, OnceLock, PoisonError},
};

use zstd::bulk::{Compressor, Decompressor};

/// Fast; the next ones save little more.
const LEVEL: i32 = 1;

/// Packs the texts of a kind.
#[derive(Default)]
pub struct Packer(OnceLock<Option<Tools>>);

/// Both know the dictionary.
struct Tools {
    compressor: Mutex<Compressor<'static>>,
    decompressor: Mutex<Decompressor<'static>>,
}

impl Tools {
    fn new(dictionary: &[u8]) -> io::Result<Self> {
        Ok(Self {
            compressor: Mutex::new(Compressor::with_dictionary(LEVEL, dictionary)?),
            decompressor: Mutex::new(Decompressor::with_dictionary(dictionary)?),
        })
    }
}

/// A text that was packed.
pub struct Packed {
    bytes: Box<[u8]>,
    /// Bytes of the text, if it was worth while to compress it.
    length: Option<usize>,
}

impl Packer {
    /// Packs a text.
    pub fn pack(&self, text: &[u8]) -> Packed {
        let tools = self.0.get_or_init(|| Tools::new(text).ok());
        let compress = |tools: &Tools| {
            let mut compressor = tools.compressor.lock().unwrap_or_else(PoisonError::into_inner);
            compressor.compress(text).ok().filter(|bytes| bytes.len() < text.len())
        };
        match tools.as_ref().and_then(compress) {
            Some(bytes) => Packed { bytes: bytes.into(), length: Some(text.len()) },
            None => Packed { bytes: text.into(), length: None },
        }
    }

    /// The text.
    pub fn unpack<'a>(&self, packed: &'a Packed) -> Cow<'a, [u8]> {
        let (Some(length), Some(Some(tools))) = (packed.length, self.0.get()) else {
            return Cow::Borrowed(&packed.bytes);
        };
        let mut decompressor = tools.decompressor.lock().unwrap_or_else(PoisonError::into_inner);
        // Only memory can be short here; an empty text is an object that can't be read, which says so.
        Cow::Owned(decompressor.decompress(&packed.bytes, length).unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_comes_back_as_it_was_whatever_came_first() {
        let long = (0..200).map(|number| format!("\"key-{number}\": {}, ", number * 7919)).collect::<String>();
        for first in ["", "x", &long] {
            let packer = Packer::default();
            packer.pack(first.as_bytes());
            for text in ["", "x", &long, &long.replace("key-7", "other")] {
                let packed = packer.pack(text.as_bytes());
                assert_eq!(packer.unpack(&packed), text.as_bytes());
                assert!(packed.bytes.len() <= text.len());
            }
        }
    }

    #[test]
    fn what_is_like_the_first_takes_little() {
        let (packer, text) =
            (Packer::default(), (0..200).map(|number| format!("{}", number * 7919)).collect::<String>());
        packer.pack(text.as_bytes());
        assert!(packer.pack(text.replace("79", "97").as_bytes()).bytes.len() < text.len() / 4);
    }
}
