//! `/metrics` for Prometheus, `/healthz` and `/readyz` for the kubelet.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use axum::{Router, http::StatusCode, http::header::CONTENT_TYPE, routing::get};
use tokio::net::TcpListener;

use crate::metrics::Metrics;

const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Whether the operator can do its work: its caches have listed all that they watch. So have those of a replica that waits
/// for the lease.
#[derive(Clone, Default)]
pub struct Readiness(Arc<AtomicBool>);

impl Readiness {
    /// The caches have listed all that they watch.
    pub fn synced(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    fn status(&self) -> StatusCode {
        if self.0.load(Ordering::Relaxed) { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }
    }
}

/// Serves until the process ends.
///
/// # Errors
/// If the address can't be listened on.
pub async fn serve(address: SocketAddr, metrics: Metrics, readiness: Readiness) -> std::io::Result<()> {
    let listener = TcpListener::bind(address).await?;
    axum::serve(listener, router(metrics, readiness)).await
}

fn router(metrics: Metrics, readiness: Readiness) -> Router {
    Router::new()
        .route("/metrics", get(move || async move { ([(CONTENT_TYPE, OPENMETRICS)], metrics.text()) }))
        .route("/healthz", get(|| async { "ok" }))
        .route("/readyz", get(move || async move { readiness.status() }))
}
