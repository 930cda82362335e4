//! Tensors with names, as they go into files and come from them.

/// A tensor with a name, in row-major f32.
#[derive(Debug, Clone, PartialEq)]
pub struct NamedTensor {
    /// As the checkpoint writes it.
    pub name: String,
    /// Row-major.
    pub shape: Vec<usize>,
    /// The values.
    pub data: Vec<f32>,
}

/// A tensor of a trainer that is read when it is wanted: all of them at once would take as much memory again.
pub struct LazyTensor<'a> {
    /// As the file names it.
    pub name: String,
    /// Row-major.
    pub shape: Vec<usize>,
    /// Whether its values are codes: whole numbers from 0 to 255, for which 8 bits are enough.
    pub is_codes: bool,
    values: Box<dyn Fn() -> Vec<f32> + 'a>,
}

impl<'a> LazyTensor<'a> {
    pub(crate) fn new(name: String, shape: Vec<usize>, values: impl Fn() -> Vec<f32> + 'a) -> Self {
        LazyTensor { name, shape, is_codes: false, values: Box::new(values) }
    }

    /// The values, row-major.
    pub fn values(&self) -> Vec<f32> {
        (self.values)()
    }

    /// The tensor with its values.
    pub fn read(self) -> NamedTensor {
        NamedTensor { data: self.values(), name: self.name, shape: self.shape }
    }
}

impl<'a> From<&'a NamedTensor> for LazyTensor<'a> {
    fn from(tensor: &'a NamedTensor) -> Self {
        Self::new(tensor.name.clone(), tensor.shape.clone(), || tensor.data.clone())
    }
}
