//! Checks, trains, publishes and verifies what a FineTuneJob asks for.

pub mod cli;
pub mod convert;
pub mod error;
