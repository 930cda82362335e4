//! Tunesmith's Kubernetes API types and the contract between operator and trainer.
