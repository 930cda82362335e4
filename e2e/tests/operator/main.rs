//! The operator alone, against a real API server: nodes, kubelets and trainers are played.

mod kills;
