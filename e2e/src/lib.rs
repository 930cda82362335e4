//! A real local Kubernetes cluster, the demo, and the tests that run on it.
