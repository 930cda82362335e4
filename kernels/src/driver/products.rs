//! Products of matrices by cuBLASLt. Its heuristic is asked once for each shape, and what it chose stays and can be given again: the same
//! input gives the same bits. Sums are of f32, also between the parts of a split product.

use std::{collections::BTreeMap, env, error::Error as _, ffi::c_void, path::Path};

use cudarc::{
    cublaslt::{result, result::CublasError, sys},
    driver::sys::CUstream,
};

use crate::{
    device::{Chosen, Gemm, Matrix, Number},
    error::Error,
    memory::Address,
};

const NAME: &str = "cuBLASLt";
/// The file, as the library calls itself.
const FILE: &str = "libcublasLt.so.13";
/// The major version that we are compiled for.
const MAJOR: usize = 13;
/// Of memory that a product may use beside its matrices: what NVIDIA advises for Hopper.
const WORKSPACE_BYTES: usize = 32 << 20;
/// The alignment of addresses beyond which no algorithm asks.
const MOST_ALIGNMENT: u64 = 256;

/// A matrix, but for where it lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Shape {
    rows: usize,
    columns: usize,
    stride: usize,
    is_bf16: bool,
    transposed: bool,
    alignment: u32,
}

impl Shape {
    fn of(matrix: &Matrix) -> Self {
        let &Matrix { at, rows, columns, stride, number, transposed } = matrix;
        let alignment = 1 << at.0.trailing_zeros().min(MOST_ALIGNMENT.trailing_zeros());
        Self { rows, columns, stride, is_bf16: number == Number::Bf16, transposed, alignment }
    }
}

impl std::fmt::Display for Shape {
    fn fmt(&self, to: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { rows, columns, stride, is_bf16, transposed, alignment } = self;
        let (number, turned) = (if *is_bf16 { "bf16" } else { "f32" }, if *transposed { "ᵀ" } else { "" });
        write!(to, "{rows}×{columns}/{stride} {number}{turned} @{alignment}")
    }
}

/// What algorithms are chosen by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Key {
    a: Shape,
    b: Shape,
    c: Option<Shape>,
    d: Shape,
}

impl Key {
    fn of(gemm: &Gemm) -> Self {
        let c = gemm.c.as_ref().map(Shape::of);
        Self { a: Shape::of(&gemm.a), b: Shape::of(&gemm.b), c, d: Shape::of(&gemm.d) }
    }

    fn name(&self) -> String {
        let c = self.c.map_or_else(String::new, |c| format!(" + {c}"));
        format!("{} · {}{c} = {}", self.a, self.b, self.d)
    }
}

/// The library, and what it chose.
pub(super) struct Products {
    handle: sys::cublasLtHandle_t,
    version: usize,
    workspace: Address,
    plans: BTreeMap<Key, Plan>,
}

impl Products {
    /// Looks for the library, in TUNESMITH_CUDA_LIBS first.
    pub(super) fn open(workspace: impl FnOnce(usize) -> Result<Address, Error>) -> Result<Self, Error> {
        let problem = |reason: String| Error::Library { name: NAME, reason };
        if let Some(folder) = env::var_os("TUNESMITH_CUDA_LIBS") {
            let file = Path::new(&folder).join(FILE);
            // SAFETY: the library has no initialisers that matter to us. It stays: whoever asks for the name later gets it.
            let library = unsafe { libloading::Library::new(file) };
            // What the loader said is the source of the error.
            let said = |error: libloading::Error| error.source().map_or_else(|| error.to_string(), ToString::to_string);
            std::mem::forget(library.map_err(|error| problem(said(error)))?);
        }
        // SAFETY: it only asks the loader. Anything else would panic without the library.
        if !unsafe { sys::is_culib_present() } {
            return Err(problem(format!("{FILE} is not there")));
        }
        // SAFETY: it returns a number.
        let version = unsafe { sys::cublasLtGetVersion() };
        // 13.0.2 is 130002.
        if version / 10_000 != MAJOR {
            return Err(problem(format!("it is of version {}, and {MAJOR} is needed", version / 10_000)));
        }
        let handle = result::create_handle().map_err(|error| problem(format!("cublasLtCreate: {:?}", error.0)))?;
        let mut products = Self { handle, version, workspace: Address::NONE, plans: BTreeMap::new() };
        products.workspace = workspace(WORKSPACE_BYTES)?;
        Ok(products)
    }

    pub(super) fn version(&self) -> usize {
        self.version
    }

    pub(super) fn chosen(&self) -> Vec<Chosen> {
        let chosen = |(key, plan): (&Key, &Plan)| Chosen {
            version: self.version,
            product: key.name(),
            algorithm: plan.algorithm.data,
        };
        self.plans.iter().map(chosen).collect()
    }

    /// Asks for a product.
    ///
    /// # Safety
    /// The matrices are there, and fit each other.
    pub(super) unsafe fn multiply(&mut self, gemm: &Gemm, fixed: &[Chosen], stream: CUstream) -> Result<(), Error> {
        let key = Key::of(gemm);
        if !self.plans.contains_key(&key) {
            let plan = Plan::new(self.handle, self.version, &key, fixed).map_err(|error| refused(&key, error))?;
            self.plans.insert(key, plan);
        }
        let plan = &self.plans[&key];
        let (d, beta) = (gemm.d.at, if gemm.c.is_some() { 1f32 } else { 0f32 });
        let c = gemm.c.map_or(d, |c| c.at);
        let pointer = |at: Address| at.0 as *mut c_void;
        // SAFETY: the plan's parts live as long as it does, and the caller promises the matrices.
        unsafe {
            result::matmul(
                self.handle,
                plan.description.0,
                (&raw const gemm.alpha).cast(),
                (&raw const beta).cast(),
                pointer(gemm.b.at),
                plan.b.0,
                pointer(gemm.a.at),
                plan.a.0,
                pointer(c),
                plan.c.0,
                pointer(d),
                plan.d.0,
                &plan.algorithm,
                pointer(self.workspace),
                WORKSPACE_BYTES,
                stream.cast(),
            )
        }
        .map_err(|error| refused(&key, error))
    }
}

impl Drop for Products {
    fn drop(&mut self) {
        self.plans.clear();
        // SAFETY: no plan uses it any more. A library that refuses keeps it until the process ends.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}

fn refused(key: &Key, error: CublasError) -> Error {
    let during = format!("product {}", key.name());
    Error::Driver { during, code: format!("{:?}", error.0), text: "cuBLASLt refuses it".into() }
}

/// A product that is ready to be asked for. The library's matrices go column by column: it computes dᵀ = bᵀ · aᵀ.
struct Plan {
    description: Description,
    a: Layout,
    b: Layout,
    c: Layout,
    d: Layout,
    algorithm: sys::cublasLtMatmulAlgo_t,
}

impl Plan {
    fn new(handle: sys::cublasLtHandle_t, version: usize, key: &Key, fixed: &[Chosen]) -> Result<Self, CublasError> {
        let description = Description::new(key.b.transposed, key.a.transposed)?;
        let (a, b, d) = (Layout::new(&key.a)?, Layout::new(&key.b)?, Layout::new(&key.d)?);
        let c = Layout::new(&key.c.unwrap_or(key.d))?;
        let name = key.name();
        let known = fixed.iter().find(|known| known.version == version && known.product == name);
        let algorithm = match known {
            Some(known) => sys::cublasLtMatmulAlgo_t { data: known.algorithm },
            None => {
                let preference = Preference::new(key)?;
                // SAFETY: all parts have just been made.
                unsafe {
                    result::get_matmul_algo_heuristic(handle, description.0, b.0, a.0, c.0, d.0, preference.0)?.algo
                }
            }
        };
        Ok(Self { description, a, b, c, d, algorithm })
    }
}

/// A stored matrix, whose rows are the library's columns.
struct Layout(sys::cublasLtMatrixLayout_t);

impl Layout {
    fn new(shape: &Shape) -> Result<Self, CublasError> {
        let number = if shape.is_bf16 { sys::cudaDataType_t::CUDA_R_16BF } else { sys::cudaDataType_t::CUDA_R_32F };
        result::create_matrix_layout(number, shape.columns as u64, shape.rows as u64, shape.stride as i64).map(Self)
    }
}

impl Drop for Layout {
    fn drop(&mut self) {
        // SAFETY: it was made, and nobody else knows it.
        let _ = unsafe { result::destroy_matrix_layout(self.0) };
    }
}

/// Which factors are transposed, and what sums are of.
struct Description(sys::cublasLtMatmulDesc_t);

impl Description {
    fn new(first_is_transposed: bool, second_is_transposed: bool) -> Result<Self, CublasError> {
        let (sums, scale) = (sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, sys::cudaDataType_t::CUDA_R_32F);
        let description = Self(result::create_matmul_desc(sums, scale)?);
        let attributes = sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA;
        let second = sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSB;
        for (attribute, is_transposed) in [(attributes, first_is_transposed), (second, second_is_transposed)] {
            let operation = i32::from(is_transposed);
            // SAFETY: the attribute is an int: 0 for none, 1 for the transpose.
            unsafe {
                result::set_matmul_desc_attribute(description.0, attribute, (&raw const operation).cast(), 4)?;
            }
        }
        Ok(description)
    }
}

impl Drop for Description {
    fn drop(&mut self) {
        // SAFETY: it was made, and nobody else knows it.
        let _ = unsafe { result::destroy_matmul_desc(self.0) };
    }
}

/// What an algorithm may use.
struct Preference(sys::cublasLtMatmulPreference_t);

impl Preference {
    fn new(key: &Key) -> Result<Self, CublasError> {
        use sys::cublasLtMatmulPreferenceAttributes_t as Attribute;
        let preference = Self(result::create_matmul_pref()?);
        let set = |attribute, value: *const c_void, bytes| {
            // SAFETY: the attribute is a number of so many bytes.
            unsafe { result::set_matmul_pref_attribute(preference.0, attribute, value, bytes) }
        };
        let workspace = WORKSPACE_BYTES as u64;
        set(Attribute::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, (&raw const workspace).cast(), 8)?;
        // Parts of a sum are added in f32, in their order.
        let scheme = sys::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE as u32;
        set(Attribute::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, (&raw const scheme).cast(), 4)?;
        for (attribute, shape) in [
            (Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, key.b),
            (Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, key.a),
            (Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, key.c.unwrap_or(key.d)),
            (Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, key.d),
        ] {
            set(attribute, (&raw const shape.alignment).cast(), 4)?;
        }
        Ok(preference)
    }
}

impl Drop for Preference {
    fn drop(&mut self) {
        // SAFETY: it was made, and nobody else knows it.
        let _ = unsafe { result::destroy_matmul_pref(self.0) };
    }
}
