//! Typed reading of a GGUF file's metadata and tensors; parsing and dequantization are candle's.

use std::{
    fs::File,
    io::{self, BufReader, Read, Seek, SeekFrom},
    ops::Range,
    path::{Path, PathBuf},
};

use candle_core::{
    Device,
    quantized::{
        GgmlDType,
        gguf_file::{Content, TensorInfo, Value},
    },
};

use super::{ConvertError, names::CONFIGURING};

/// An open GGUF file.
pub struct Gguf {
    path: PathBuf,
    file: BufReader<File>,
    content: Content,
}

impl Gguf {
    /// Opens a file and reads its header. Lengths in it are checked against the file's size.
    ///
    /// # Errors
    /// The file is missing or is no GGUF file.
    pub fn open(path: &Path) -> Result<Self, ConvertError> {
        let mut file = BufReader::new(File::open(path).map_err(ConvertError::io(path))?);
        // A damaged file is the parser's to refuse, but for this, by which it would divide.
        if aligns_to_zero(&mut file).unwrap_or(false) {
            return Err(ConvertError::UnsupportedKey {
                key: ALIGNMENT.into(),
                found: "0".into(),
                supported: "at least 1".into(),
            });
        }
        file.rewind().map_err(ConvertError::io(path))?;
        let content = Content::read(&mut file).map_err(|error| unreadable(path, error))?;
        Ok(Self { path: path.to_owned(), file, content })
    }

    fn get(&self, key: &str) -> Result<&Value, ConvertError> {
        self.content.metadata.get(key).ok_or_else(|| ConvertError::MissingKey(key.to_owned()))
    }

    /// A text.
    pub(super) fn text(&self, key: &str) -> Result<&str, ConvertError> {
        match self.get(key)? {
            Value::String(text) => Ok(text),
            other => Err(unsupported(key, other, "a string")),
        }
    }

    /// A whole number.
    pub(super) fn number(&self, key: &str) -> Result<usize, ConvertError> {
        let value = self.get(key)?;
        number(value).ok_or_else(|| unsupported(key, value, "a whole number"))
    }

    /// A whole number, or none if the key is missing.
    pub(super) fn optional_number(&self, key: &str) -> Result<Option<usize>, ConvertError> {
        self.has(key).then(|| self.number(key)).transpose()
    }

    /// A float as the shortest decimal that stands for it (GGUF stores 1e-5 in f32).
    pub(super) fn float(&self, key: &str) -> Result<f64, ConvertError> {
        match self.get(key)? {
            Value::F32(x) => Ok(x.to_string().parse().unwrap_or(f64::from(*x))),
            Value::F64(x) => Ok(*x),
            other => Err(unsupported(key, other, "a number")),
        }
    }

    /// A flag, or none if the key is missing.
    pub(super) fn optional_flag(&self, key: &str) -> Result<Option<bool>, ConvertError> {
        match self.content.metadata.get(key) {
            None => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(*flag)),
            Some(other) => Err(unsupported(key, other, "true or false")),
        }
    }

    /// A list of texts.
    pub(super) fn texts(&self, key: &str) -> Result<Vec<&str>, ConvertError> {
        self.list(key, text, "a list of strings")
    }

    /// A list of whole numbers.
    pub(super) fn numbers(&self, key: &str) -> Result<Vec<usize>, ConvertError> {
        self.list(key, number, "a list of whole numbers")
    }

    /// A list of f32.
    pub(super) fn floats(&self, key: &str) -> Result<Vec<f32>, ConvertError> {
        self.list(key, |value| value.to_f32().ok(), "a list of numbers")
    }

    fn list<'a, T>(
        &'a self,
        key: &str,
        item: impl Fn(&'a Value) -> Option<T>,
        supported: &str,
    ) -> Result<Vec<T>, ConvertError> {
        match self.get(key)? {
            Value::Array(values) => {
                let item = |value: &'a Value| item(value).ok_or_else(|| unsupported(key, value, supported));
                values.iter().map(item).collect()
            }
            other => Err(unsupported(key, other, supported)),
        }
    }

    /// Whether the metadata has this key.
    pub(super) fn has(&self, key: &str) -> bool {
        self.content.metadata.contains_key(key)
    }

    /// All keys of the metadata.
    pub(super) fn keys(&self) -> impl Iterator<Item = &str> {
        self.content.metadata.keys().map(String::as_str)
    }

    /// Whether a key is missing, or its value is false, 0 or empty.
    pub(super) fn is_empty(&self, key: &str) -> bool {
        match self.content.metadata.get(key) {
            None | Some(Value::Bool(false)) => true,
            Some(Value::String(text)) => text.is_empty(),
            Some(Value::Array(values)) => values.is_empty(),
            Some(Value::F32(x)) => *x == 0.0,
            Some(Value::F64(x)) => *x == 0.0,
            Some(other) => number(other) == Some(0),
        }
    }

    /// Whether there is a tensor of this name.
    pub(super) fn has_tensor(&self, name: &str) -> bool {
        self.content.tensor_infos.contains_key(name)
    }

    /// The names of all tensors.
    pub(super) fn tensor_names(&self) -> impl Iterator<Item = &str> {
        self.content.tensor_infos.keys().map(String::as_str)
    }

    /// Checks that a tensor is there, with this shape ([out, in]).
    pub(super) fn check_tensor(&self, name: &str, expected: &[usize]) -> Result<(), ConvertError> {
        let info = self.content.tensor_infos.get(name);
        let info = info.ok_or_else(|| ConvertError::MissingTensor(name.to_owned()))?;
        match info.shape.dims() == expected {
            true => Ok(()),
            false => Err(ConvertError::Shape {
                name: name.to_owned(),
                found: info.shape.dims().to_vec(),
                expected: expected.to_vec(),
            }),
        }
    }

    /// Where the bytes of each tensor are in the file, and in what type; those that no type could have are left out.
    pub(super) fn places(&self) -> impl Iterator<Item = (&str, GgmlDType, Range<u64>)> {
        self.content.tensor_infos.iter().filter_map(|(name, info)| {
            let start = self.content.tensor_data_offset.checked_add(info.offset)?;
            Some((name.as_str(), info.ggml_dtype, start..start.checked_add(size_of_data(info)?)?))
        })
    }

    /// Where the tensors are that the configuration is made from.
    pub(crate) fn configuring_tensors(&self) -> Vec<Range<u64>> {
        let places = self.places().filter(|(name, ..)| CONFIGURING.contains(name));
        places.map(|(_, _, place)| place).collect()
    }

    /// Checks that a tensor's bytes are all in the file and of a type that can be dequantized, without reading them.
    pub(super) fn check_data(&mut self, name: &str) -> Result<(), ConvertError> {
        let content = &self.content;
        let info = content.tensor_infos.get(name).ok_or_else(|| ConvertError::MissingTensor(name.to_owned()))?;
        let damaged = |problem| Err(ConvertError::Damaged { path: self.path.clone(), problem });
        let (start, type_of) = (content.tensor_data_offset.saturating_add(info.offset), info.ggml_dtype);
        let Some(bytes) = size_of_data(info) else {
            return damaged(format!("{name} does not divide into blocks of {}", type_of.block_size()));
        };
        let end = self.file.seek(SeekFrom::End(0)).map_err(ConvertError::io(&self.path))?;
        let remaining = end.saturating_sub(start);
        if bytes > remaining {
            return damaged(format!(
                "tensor needs {bytes} bytes at offset {start}, only {remaining} remaining in file"
            ));
        }
        // One row says whether its type can be read.
        let row = info.shape.dims().last().copied().unwrap_or(1);
        let row = TensorInfo { ggml_dtype: type_of, shape: row.into(), offset: info.offset };
        let row = row.read(&mut self.file, content.tensor_data_offset, &Device::Cpu);
        row.map(drop).map_err(|error| unreadable(&self.path, error))
    }

    /// The values of a tensor that is there, in f32, row-major.
    pub(super) fn dequantize(&mut self, name: &str) -> Result<Vec<f32>, ConvertError> {
        let tensor = self.content.tensor(&mut self.file, name, &Device::Cpu);
        tensor
            .and_then(|tensor| tensor.dequantize(&Device::Cpu)?.flatten_all()?.to_vec1())
            .map_err(|error| unreadable(&self.path, error))
    }
}

/// Bytes of a tensor, if its numbers make up whole blocks.
fn size_of_data(info: &TensorInfo) -> Option<u64> {
    let numbers = info.shape.dims().iter().try_fold(1usize, |numbers, length| numbers.checked_mul(*length))?;
    let block = info.ggml_dtype.block_size();
    let blocks = numbers.is_multiple_of(block).then(|| numbers / block)?;
    u64::try_from(blocks.checked_mul(info.ggml_dtype.type_size())?).ok()
}

/// What the parser says, without the backtrace that it brings where RUST_BACKTRACE is set.
fn unreadable(path: &Path, error: candle_core::Error) -> ConvertError {
    let path = path.to_owned();
    match error {
        candle_core::Error::WithBacktrace { inner, .. } => unreadable(&path, *inner),
        candle_core::Error::Io(source) if source.kind() != io::ErrorKind::UnexpectedEof => {
            ConvertError::Io { path, source }
        }
        error => match error.to_string() {
            problem if problem.contains("unknown dtype") => ConvertError::UnknownType { path, problem },
            problem => ConvertError::Damaged { path, problem },
        },
    }
}

/// The key that says at what multiples tensors begin.
const ALIGNMENT: &str = "general.alignment";

/// Whether the file's metadata has tensors begin at multiples of zero.
fn aligns_to_zero(file: &mut BufReader<File>) -> io::Result<bool> {
    let mut magic = [0; 4];
    file.read_exact(&mut magic)?;
    let length = if number_of(file, 4)? == 1 { 4 } else { 8 };
    let (_tensors, keys) = (number_of(file, length)?, number_of(file, length)?);
    for _ in 0..keys {
        let key_length = number_of(file, length)?;
        let mut key = [0; ALIGNMENT.len()];
        match key_length == key.len() as u64 {
            true => file.read_exact(&mut key)?,
            false => skip(file, key_length)?,
        }
        match number_of(file, 4)? {
            kind @ 0..=5 if key == ALIGNMENT.as_bytes() => return Ok(number_of(file, size_of_kind(kind))? == 0),
            9 => {
                let (kind, count) = (number_of(file, 4)?, number_of(file, length)?);
                match kind {
                    8 => (0..count).try_for_each(|_| number_of(file, length).and_then(|bytes| skip(file, bytes)))?,
                    kind => skip(file, count.saturating_mul(size_of_kind(kind) as u64))?,
                }
            }
            8 => number_of(file, length).and_then(|bytes| skip(file, bytes))?,
            kind => skip(file, size_of_kind(kind) as u64)?,
        }
    }
    Ok(false)
}

/// Bytes of a number of this kind; 0 if it is none.
fn size_of_kind(kind: u64) -> usize {
    match kind {
        0 | 1 | 7 => 1,
        2 | 3 => 2,
        4..=6 => 4,
        10..=12 => 8,
        _ => 0,
    }
}

/// A little-endian number of so many bytes, 8 at most.
fn number_of(file: &mut BufReader<File>, bytes: usize) -> io::Result<u64> {
    let mut number = [0; 8];
    file.read_exact(&mut number[..bytes])?;
    Ok(u64::from_le_bytes(number))
}

fn skip(file: &mut BufReader<File>, bytes: u64) -> io::Result<()> {
    file.seek_relative(i64::try_from(bytes).map_err(io::Error::other)?)
}

fn text(value: &Value) -> Option<&str> {
    match value {
        Value::String(text) => Some(text),
        _ => None,
    }
}

fn number(value: &Value) -> Option<usize> {
    match value {
        Value::I8(n) => usize::try_from(*n).ok(),
        Value::I16(n) => usize::try_from(*n).ok(),
        Value::I32(n) => usize::try_from(*n).ok(),
        Value::I64(n) => usize::try_from(*n).ok(),
        Value::U8(n) => Some(usize::from(*n)),
        Value::U16(n) => Some(usize::from(*n)),
        Value::U32(n) => usize::try_from(*n).ok(),
        Value::U64(n) => usize::try_from(*n).ok(),
        _ => None,
    }
}

fn unsupported(key: &str, found: &Value, supported: &str) -> ConvertError {
    let found = match found {
        Value::String(text) => format!("\"{text}\""),
        Value::Array(values) => format!("a list of {}", values.len()),
        other => format!("{other:?}"),
    };
    ConvertError::UnsupportedKey { key: key.to_owned(), found, supported: supported.to_owned() }
}
