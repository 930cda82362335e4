//! Safetensors files that are written and read tensor by tensor: no file needs to fit the memory as a whole.

use std::{
    collections::HashMap,
    io::{self, Write},
};

use safetensors::{
    Dtype,
    tensor::{Metadata, TensorInfo},
};
use tunesmith_engine::LazyTensor;

/// A file's name and what goes into it.
pub struct TensorFile<'a> {
    /// Its name.
    pub name: String,
    /// Its tensors.
    pub tensors: Vec<&'a LazyTensor<'a>>,
    /// Whether values are rounded to bf16; they are f32 otherwise. Codes are bytes in any case.
    pub bf16: bool,
}

impl TensorFile<'_> {
    fn dtype(&self, tensor: &LazyTensor<'_>) -> Dtype {
        match (tensor.is_codes, self.bf16) {
            (true, _) => Dtype::U8,
            (false, true) => Dtype::BF16,
            (false, false) => Dtype::F32,
        }
    }

    /// Writes the file, each tensor read only then.
    ///
    /// # Errors
    /// `to` can't be written.
    pub fn write(&self, to: &mut dyn Write) -> io::Result<()> {
        let shapes = self.tensors.iter().map(|tensor| (tensor.name.clone(), tensor.shape.clone(), self.dtype(tensor)));
        to.write_all(&header(shapes))?;
        for tensor in &self.tensors {
            let values = tensor.values().into_iter();
            let bytes: Vec<u8> = match self.dtype(tensor) {
                Dtype::U8 => values.map(|code| code as u8).collect(),
                Dtype::BF16 => values.flat_map(|x| half::bf16::from_f32(x).to_le_bytes()).collect(),
                _ => values.flat_map(f32::to_le_bytes).collect(),
            };
            to.write_all(&bytes)?;
        }
        Ok(())
    }
}

/// The header of a file that holds these tensors one after the other, with its length before it.
pub(crate) fn header(tensors: impl IntoIterator<Item = (String, Vec<usize>, Dtype)>) -> Vec<u8> {
    let mut end = 0;
    let info = |(name, shape, dtype): (String, Vec<usize>, Dtype)| {
        let start = end;
        end += shape.iter().product::<usize>() * dtype.bitsize() / 8;
        (name, TensorInfo { dtype, shape, data_offsets: (start, end) })
    };
    let tensors = tensors.into_iter().map(info).collect();
    // What transformers wants to see.
    let for_pytorch = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let json = Metadata::new(Some(for_pytorch), tensors).map(|metadata| serde_json::to_vec(&metadata));
    let Ok(Ok(mut json)) = json else { unreachable!("offsets follow from the shapes") };
    json.resize(json.len().next_multiple_of(size_of::<u64>()), b' ');
    [&(json.len() as u64).to_le_bytes(), json.as_slice()].concat()
}

#[cfg(test)]
mod tests {
    use safetensors::SafeTensors;
    use tunesmith_engine::NamedTensor;

    use super::*;

    #[test]
    fn codes_are_written_as_bytes_among_floats() {
        let tensors = [("state1", vec![0.0, 127.0, 255.0]), ("absmax1", vec![0.5, 1.5, 2.5])]
            .map(|(name, data)| NamedTensor { name: name.into(), shape: vec![3], data });
        let mut lazy = tensors.each_ref().map(LazyTensor::from);
        lazy[0].is_codes = true;
        let mut bytes = Vec::new();
        let file = TensorFile { name: "x".into(), tensors: lazy.iter().collect(), bf16: false };
        file.write(&mut bytes).unwrap();
        let read = SafeTensors::deserialize(&bytes).unwrap();
        let codes = read.tensor("state1").unwrap();
        assert_eq!((codes.dtype(), codes.data()), (Dtype::U8, &[0, 127, 255][..]));
        assert_eq!(read.tensor("absmax1").unwrap().data(), [0.5f32, 1.5, 2.5].map(f32::to_le_bytes).concat());
    }

    #[test]
    fn what_is_written_is_what_the_library_reads() {
        let named = |name: &str, shape: &[usize], data: &[f32]| NamedTensor {
            name: name.into(),
            shape: shape.to_vec(),
            data: data.to_vec(),
        };
        let tensors = [named("b", &[2, 1], &[1.0, -2.5]), named("a", &[0], &[]), named("c", &[1], &[3.0])];
        let lazy: Vec<LazyTensor<'_>> = tensors.iter().map(LazyTensor::from).collect();
        for bf16 in [false, true] {
            let mut bytes = Vec::new();
            let file = TensorFile { name: "x".into(), tensors: lazy.iter().collect(), bf16 };
            file.write(&mut bytes).unwrap();
            let read = SafeTensors::deserialize(&bytes).unwrap();
            assert_eq!(read.len(), 3);
            for tensor in &tensors {
                let view = read.tensor(&tensor.name).unwrap();
                let values: Vec<f32> = match bf16 {
                    true => {
                        view.data().chunks_exact(2).map(|b| half::bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect()
                    }
                    false => view.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect(),
                };
                assert_eq!((view.shape(), values), (tensor.shape.as_slice(), tensor.data.clone()));
            }
            let (_, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
            assert_eq!(metadata.metadata().as_ref().unwrap()["format"], "pt");
        }
    }
}
