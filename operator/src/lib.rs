//! The controllers behind FineTuneJob and AdapterVersion.
