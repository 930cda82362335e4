//! An API server that expects certain requests, for tests.

use http::{Request, Response};
use kube::{Client, client::Body};
use serde_json::{Value, json};
use tower_test::mock::{self, Handle};

/// A request that the API server has got.
#[derive(Debug, PartialEq)]
pub struct Call {
    /// Method and path with query, such as `DELETE /apis/batch/v1/namespaces/team/jobs/j?`.
    pub line: String,
    /// Its JSON, null if it has none.
    pub body: Value,
}

/// Answers requests in order.
pub struct ApiServer(Handle<Request<Body>, Response<Body>>);

/// A client, and the API server that it talks to.
pub fn api_server() -> (Client, ApiServer) {
    let (service, handle) = mock::pair::<Request<Body>, Response<Body>>();
    (Client::new(service, "default"), ApiServer(handle))
}

impl ApiServer {
    /// Waits for the next request and answers it with this code and JSON.
    pub async fn answer(&mut self, code: u16, answer: Value) -> Call {
        let (request, send) = self.0.next_request().await.expect("no request came");
        let line = format!("{} {}", request.method(), request.uri().path_and_query().map_or("", |path| path.as_str()));
        let body = request.into_body().collect_bytes().await.unwrap();
        let body = serde_json::from_slice(&body).unwrap_or(Value::Null);
        send.send_response(Response::builder().status(code).body(Body::from(answer.to_string().into_bytes())).unwrap());
        Call { line, body }
    }

    /// Answers with an error, as the API server words it.
    pub async fn refuse(&mut self, code: u16, reason: &str, message: &str) -> Call {
        let status = json!({
            "apiVersion": "v1", "kind": "Status", "metadata": {}, "status": "Failure",
            "code": code, "reason": reason, "message": message,
        });
        self.answer(code, status).await
    }
}
