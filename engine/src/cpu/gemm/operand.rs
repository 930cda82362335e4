//! The right side of a product, wherever and however it lies, and what becomes of what C holds.

use super::super::view::View;
use super::super::weight::Matrix;

/// The right side of a product.
#[derive(Clone, Copy)]
pub(crate) enum Operand<'a> {
    /// Packed from where it lies.
    View(View<'a>),
    /// A row-major matrix that is not packed: for products of so few rows that packing would not pay.
    InPlace(View<'a>),
    /// B = W, widened as it is packed.
    Stored(Matrix<'a>),
    /// B = Wᵀ, widened as it is packed.
    StoredTransposed(Matrix<'a>),
}

impl<'a> From<View<'a>> for Operand<'a> {
    fn from(view: View<'a>) -> Self {
        Operand::View(view)
    }
}

impl<'a> Operand<'a> {
    /// B = W.
    pub(crate) fn new(w: Matrix<'a>) -> Self {
        w.view().map_or(Operand::Stored(w), Operand::View)
    }

    /// B = Wᵀ.
    pub(crate) fn transposed(w: Matrix<'a>) -> Self {
        w.view().map_or(Operand::StoredTransposed(w), |view| Operand::View(view.t()))
    }

    pub(super) fn rows(&self) -> usize {
        match self {
            Operand::View(view) | Operand::InPlace(view) => view.rows,
            Operand::Stored(w) => w.rows,
            Operand::StoredTransposed(w) => w.cols,
        }
    }

    pub(super) fn cols(&self) -> usize {
        match self {
            Operand::View(view) | Operand::InPlace(view) => view.cols,
            Operand::Stored(w) => w.cols,
            Operand::StoredTransposed(w) => w.rows,
        }
    }
}

/// What becomes of the values that C holds.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Output {
    /// They are overwritten.
    Set,
    /// The product is added to them.
    Add,
}
