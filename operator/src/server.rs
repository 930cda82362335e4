//! `/metrics` for Prometheus, `/healthz` and `/readyz` for the kubelet.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use axum::{Router, http::StatusCode, http::header::CONTENT_TYPE, routing::get};
use tokio::net::TcpListener;

use crate::metrics::Metrics;

const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Whether the operator can do its work: a leader once its caches have listed all that they watch, another replica once it
/// has reached the API server.
#[derive(Clone, Default)]
pub struct Readiness(Arc<State>);

#[derive(Default)]
struct State {
    is_ready: AtomicBool,
    /// Scopes whose caches have not listed yet.
    unknown: AtomicUsize,
}

impl Readiness {
    /// The API server has answered, and another replica leads.
    pub fn waits(&self) {
        self.0.is_ready.store(true, Ordering::Relaxed);
    }

    /// This replica works from now on, and knows nothing yet of so many scopes.
    pub fn begins(&self, scopes: usize) {
        self.0.unknown.store(scopes, Ordering::Relaxed);
        self.0.is_ready.store(false, Ordering::Relaxed);
    }

    /// The caches of a scope have listed all that they watch.
    pub fn synced(&self) {
        if self.0.unknown.fetch_sub(1, Ordering::Relaxed) <= 1 {
            self.0.is_ready.store(true, Ordering::Relaxed);
        }
    }

    fn status(&self) -> StatusCode {
        if self.0.is_ready.load(Ordering::Relaxed) { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }
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
