//! Checks, trains, publishes and verifies what a FineTuneJob asks for.
//!
//! The way of one run: [`preflight`] reads the [`inputs`] (the base [`model`] and the [`data`]) from the [`store`] or the
//! [`hub`]; [`train`] makes the steps and checkpoints, [`publish`] the version, [`verify`] compares it with its manifest.
//! [`exam`] measures recall. [`pod`] is the frame of these in a cluster, [`local`] that of all of them on a laptop.

mod adapter;
pub mod chat;
pub mod cli;
pub mod convert;
pub mod copy;
pub mod data;
pub mod digest;
pub mod error;
pub mod evaluate;
pub mod exam;
pub mod generate;
pub mod history;
pub mod hub;
pub mod inputs;
mod json_file;
mod layout;
pub mod local;
pub mod merge;
pub mod method;
pub mod model;
pub mod pod;
pub mod preflight;
pub mod progress;
pub mod publish;
pub mod stop;
pub mod store;
pub mod tensors;
pub mod train;
pub mod untrusted;
pub mod verify;

#[cfg(test)]
#[allow(dead_code, missing_docs)]
#[path = "../examples/tiny_model.rs"]
mod tiny_model;
