//! `/progress`, `/metrics` and `/healthz` of a training pod.

use std::{fmt::Write, net::SocketAddr};

use axum::{Json, Router, http::header::CONTENT_TYPE, response::IntoResponse, routing::get};
use tokio::{net::TcpListener, runtime::Handle};
use tunesmith_crds::run::{LiveProgress, TrainStage};

use super::Progress;

/// Answers on `address` from now on, and returns the address itself (port 0 takes a free one).
///
/// # Errors
/// The address can't be listened on.
pub fn serve(runtime: &Handle, address: SocketAddr, progress: &Progress) -> std::io::Result<SocketAddr> {
    let (json, text) = (progress.clone(), progress.clone());
    let routes = Router::new()
        .route("/progress", get(|| async move { Json(json.live()) }))
        .route("/metrics", get(|| async move { metrics(&text.live()) }))
        .route("/healthz", get(|| async { "ok" }));
    let listener = runtime.block_on(TcpListener::bind(address))?;
    let address = listener.local_addr()?;
    runtime.spawn(async move {
        if let Err(error) = axum::serve(listener, routes).await {
            tracing::warn!(%error, "/progress is no longer served");
        }
    });
    Ok(address)
}

fn metrics(live: &LiveProgress) -> impl IntoResponse + use<> {
    ([(CONTENT_TYPE, "text/plain; version=0.0.4")], exposition(live))
}

/// The Prometheus text format; what is not known yet is left out.
fn exposition(live: &LiveProgress) -> String {
    let progress = &live.progress;
    let mut text = String::new();
    let mut gauge = |name: &str, help: &str, value: Option<f64>| {
        if let Some(value) = value {
            // Writing to a String can't fail.
            let _ = write!(
                text,
                "# HELP tunesmith_trainer_{name} {help}\n# TYPE tunesmith_trainer_{name} gauge\n\
                 tunesmith_trainer_{name} {value}\n"
            );
        }
    };
    gauge("training", "1 while optimizer steps are made.", Some(f64::from(live.stage == TrainStage::Training)));
    gauge("step", "Optimizer steps done.", Some(progress.step as f64));
    gauge("total_steps", "Optimizer steps in all.", Some(progress.total_steps as f64));
    gauge("epoch", "Passes over the data done.", Some(progress.epoch));
    gauge("skipped_steps", "Optimizer steps left out: NaN or infinite.", Some(progress.skipped_steps as f64));
    gauge("loss", "Mean training loss over the last logged steps, in nats a token.", progress.loss);
    gauge("eval_loss", "Mean evaluation loss, in nats a token.", progress.eval_loss);
    gauge("tokens_per_second", "Tokens worked through in a second.", progress.tokens_per_second);
    gauge("eta_seconds", "Seconds until the last step, at this speed.", progress.eta_seconds.map(|s| s as f64));
    text
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write as _};

    use tunesmith_crds::fine_tune_job::Progress as Numbers;

    use super::*;

    fn get(address: SocketAddr, path: &str) -> String {
        let mut stream = std::net::TcpStream::connect(address).unwrap();
        write!(stream, "GET {path} HTTP/1.1\r\nHost: trainer\r\nConnection: close\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }

    #[test]
    fn watchers_read_progress_and_metrics_over_http() {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let progress = Progress::new();
        let address = serve(runtime.handle(), ([127, 0, 0, 1], 0).into(), &progress).unwrap();
        progress.stage(TrainStage::Training);
        progress.update(Numbers { step: 3, total_steps: 40, loss: Some(2.5), ..Numbers::default() });

        let answer = get(address, "/progress");
        let body = answer.split_once("\r\n\r\n").unwrap().1;
        let live: LiveProgress = serde_json::from_str(body).unwrap();
        assert_eq!((live.stage, live.progress.summary.as_str()), (TrainStage::Training, "3/40"));
        assert!(get(address, "/healthz").ends_with("ok"));
        let metrics = get(address, "/metrics");
        assert!(metrics.contains("\ntunesmith_trainer_loss 2.5\n") && !metrics.contains("eval_loss"), "{metrics}");
    }
}
