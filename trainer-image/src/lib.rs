//! Checks, trains, publishes and verifies what a FineTuneJob asks for.
