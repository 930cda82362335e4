//! The whole way of a job on a real cluster: API server, scheduler, kubelet, containerd and S3, all of them real.
//!
//! Every test has a namespace of its own, so they run side by side. `make e2e` removes the cluster afterwards;
//! `make e2e KEEP=1` leaves it up, to look at it or to run the tests again sooner.

mod api;
mod bad_input;
mod chart_upgrade;
mod fields;
mod gates;
mod happy_path;
mod inspections;
mod interruptions;
mod methods;
mod policy;
mod queueing;
mod sidecars;
mod tenant;
mod testbed;
mod versions;
mod volumes;
