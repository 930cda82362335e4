//! A way to the API server that counts the operator's writes, and holds back the answer to each: whoever is killed then never
//! learns that it was heard.

use std::future::pending;
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
        Ok(Self::serve(TcpListener::from_std(socket)?, client))
    }

    fn serve(listener: TcpListener, client: Client) -> Self {
        let (sender, heard) = unbounded_channel();
        let writes = Arc::<Mutex<Vec<Write>>>::default();
        let way = Way { client, writes: writes.clone(), heard: sender };
        tokio::spawn(async move { axum::serve(listener, Router::new().fallback(forward).with_state(way)).await });
        Self { writes, heard }
    }

    /// Resolves when the API server has taken another write, whose author waits for the answer in vain.
    pub(crate) async fn written(&mut self) {
        // The server holds a sender.
        let _ = self.heard.recv().await;
    }

    /// Forgets that something was written: its author is gone.
    pub(crate) fn forget(&mut self) {
        while self.heard.try_recv().is_ok() {}
    }

    /// All writes, in their order.
    pub(crate) fn writes(&self) -> Vec<Write> {
        self.writes.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

async fn forward(State(way): State<Way>, request: Request) -> Response {
    // In a task of its own: two controllers may write at once, and the API server takes what one of them has sent before the
    // operator is killed for the other's.
    let answered = tokio::spawn(async move { answer(&way, request).await }).await;
    match answered.map_err(Into::into).flatten() {
        Ok(Answer::Read(response)) => response,
        Ok(Answer::Written) => pending().await,
        Err(error) => (StatusCode::BAD_GATEWAY, format!("{error:#}")).into_response(),
    }
}

/// What the API server said.
enum Answer {
    Read(Response),
    /// It has taken a write: nobody is to hear of that.
    Written,
}

async fn answer(way: &Way, request: Request) -> Result<Answer> {
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
        return Ok(Answer::Written);
    }
    Ok(Answer::Read(answer.map(Body::new)))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::io::AsyncWriteExt;
    use tokio::net::TcpStream;
    use tokio::time::{sleep, timeout};

    use super::*;

    #[tokio::test]
    async fn a_write_counts_whose_author_was_killed_before_the_api_server_answered() {
        let slow = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let uri = format!("http://{}", slow.local_addr().unwrap()).parse().unwrap();
        let answers = Router::new().fallback(async || sleep(Duration::from_millis(300)).await);
        tokio::spawn(async move { axum::serve(slow, answers).await });
        let _ = rustls::crypto::ring::default_provider().install_default();
        let client = Client::try_from(kube::Config::new(uri)).unwrap();

        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let mut proxy = Proxy::serve(listener, client);
        let mut author = TcpStream::connect(address).await.unwrap();
        author.write_all(b"POST /jobs HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}").await.unwrap();
        sleep(Duration::from_millis(100)).await;
        drop(author);
        timeout(Duration::from_secs(5), proxy.written()).await.unwrap();
        assert_eq!(proxy.writes()[0].path, "/jobs");
    }
}
