//! What a fine-tuning run takes and where it fits: pure arithmetic, no cluster and no clock.
//!
//! [`estimate`] turns a model's shape and a training's options into memory and file sizes; [`place`] picks the
//! smallest [`GpuClass`](tunesmith_crds::GpuClass) that fits and lays the run out over pods.

mod estimate;
mod place;
mod quantity;

pub use estimate::{Device, Estimate, Workload, estimate};
pub use place::{NoPlacement, Offer, Placement, Request, place};
pub use quantity::{format_bytes, parse_bytes};
