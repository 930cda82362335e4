//! Asks a training pod how far it is.

use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use http_body_util::{BodyExt, Empty, Limited};
use hyper::{Request, body::Bytes, client::conn::http1::handshake};
use hyper_util::rt::TokioIo;
use tokio::{net::TcpStream, time::timeout};
use tunesmith_crds::{names::TRAINER_PORT, run::LiveProgress};

/// A pod that takes longer is asked again at the next reconcile.
const TIMEOUT: Duration = Duration::from_millis(500);
/// Far more than the answer needs.
const MAX_BYTES: usize = 64 << 10;

/// Why a pod did not tell its progress.
#[derive(Debug, thiserror::Error)]
enum PollError {
    #[error("no answer within {TIMEOUT:?}")]
    Timeout(#[from] tokio::time::error::Elapsed),
    #[error(transparent)]
    Connect(#[from] std::io::Error),
    #[error(transparent)]
    Http(#[from] hyper::Error),
    #[error(transparent)]
    Request(#[from] hyper::http::Error),
    #[error("body: {0}")]
    Body(Box<dyn std::error::Error + Send + Sync>),
    #[error("not a progress: {0}")]
    Json(#[from] serde_json::Error),
}

/// What the pod at `address` says of its progress; None if it doesn't (yet, or any more).
pub async fn poll(address: IpAddr) -> Option<LiveProgress> {
    let answer = async { timeout(TIMEOUT, get(SocketAddr::new(address, TRAINER_PORT))).await? };
    answer.await.inspect_err(|error: &PollError| tracing::debug!(%address, %error, "no progress")).ok()
}

async fn get(address: SocketAddr) -> Result<LiveProgress, PollError> {
    let (mut sender, connection) = handshake(TokioIo::new(TcpStream::connect(address).await?)).await?;
    let connection = tokio::spawn(connection);
    let request = Request::get("/progress").header("host", address.to_string()).body(Empty::<Bytes>::new())?;
    let answer = sender.send_request(request).await?;
    let body = Limited::new(answer.into_body(), MAX_BYTES).collect().await.map_err(PollError::Body);
    connection.abort();
    Ok(serde_json::from_slice(&body?.to_bytes())?)
}

#[cfg(test)]
mod tests {
    use axum::{Router, routing::get as route};

    use super::*;

    async fn serve(body: String) -> SocketAddr {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let app = Router::new().route("/progress", route(move || async move { body }));
        tokio::spawn(async move { axum::serve(listener, app).await });
        address
    }

    #[tokio::test]
    async fn a_pod_tells_its_progress() {
        let mut progress = LiveProgress::default();
        progress.progress.step = 7;
        let address = serve(serde_json::to_string(&progress).unwrap()).await;
        assert_eq!(get(address).await.unwrap(), progress);
    }

    #[tokio::test]
    async fn an_endless_answer_is_cut() {
        let address = serve("x".repeat(MAX_BYTES + 1)).await;
        assert!(matches!(get(address).await, Err(PollError::Body(_))));
    }

    #[tokio::test]
    async fn nobody_there_is_no_progress() {
        assert_eq!(poll([127, 0, 0, 1].into()).await, None);
    }
}
