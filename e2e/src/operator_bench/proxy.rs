//! A way to the API server that counts the operator's writes, and holds back the answer to each: whoever is killed then never
//! learns that it was heard.

use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Result;
use axum::Router;
use axum::body::{Body, to_bytes};
use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::http::header::{AUTHORIZATION, HOST};
use axum::response::{IntoResponse, Response};
use kube::Client;
use tokio::net::TcpListener;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use crate::network::Network;

/// Far more than any object has.
const MAX_BYTES: usize = 4 << 20;

/// A write that the API server has taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Write {
    /// The HTTP method.
    pub method: String,
    /// Path, without the query.
    pub path: String,
    /// What was written.
    pub body: String,
}

/// The way.
pub(crate) struct Proxy {
    writes: Arc<Mutex<Vec<Write>>>,
    heard: UnboundedReceiver<()>,
}

#[derive(Clone)]
struct Way {
    client: Client,
    writes: Arc<Mutex<Vec<Write>>>,
    heard: UnboundedSender<()>,
}

impl Proxy {
    /// Listens on this port of the cluster's network, and asks the API server as `client`.
    pub(crate) fn start(network: &Network, port: u16, client: Client) -> Result<Self> {
        let socket = network.listen(port)?;
        socket.set_nonblocking(true)?;
        let (sender, heard) = unbounded_channel();
        let writes = Arc::<Mutex<Vec<Write>>>::default();
        let way = Way { client, writes: writes.clone(), heard: sender };
        let listener = TcpListener::from_std(socket)?;
        tokio::spawn(async move { axum::serve(listener, Router::new().fallback(forward).with_state(way)).await });
        Ok(Self { writes, heard })
    }

    /// Resolves when the API server has taken another write, whose author waits for the answer in vain.
    pub(crate) async fn written(&mut self) {
        // The server holds a sender.
        let _ = self.heard.recv().await;
    }

    /// All writes, in their order.
    pub(crate) fn writes(&self) -> Vec<Write> {
        self.writes.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

async fn forward(State(way): State<Way>, request: Request) -> Response {
    answer(&way, request).await.unwrap_or_else(|error| (StatusCode::BAD_GATEWAY, format!("{error:#}")).into_response())
}

async fn answer(way: &Way, request: Request) -> Result<Response> {
    let (mut head, body) = request.into_parts();
    head.headers.remove(HOST);
    head.headers.remove(AUTHORIZATION);
    let body = to_bytes(body, MAX_BYTES).await?;
    let write = (!head.method.is_safe()).then(|| Write {
        method: head.method.to_string(),
        path: head.uri.path().to_owned(),
        body: String::from_utf8_lossy(&body).into_owned(),
    });
    let answer = way.client.send(Request::from_parts(head, body.to_vec().into())).await?;
    if let Some(write) = write.filter(|_| answer.status().is_success()) {
        way.writes.lock().unwrap_or_else(PoisonError::into_inner).push(write);
        way.heard.send(())?;
        std::future::pending::<()>().await;
    }
    Ok(answer.map(Body::new))
}
