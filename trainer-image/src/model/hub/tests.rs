//! The Hub's protocol as far as hf-hub speaks it, from a server of this process: no test leaves the machine.

use std::{
    net::Ipv4Addr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use axum::{
    Json, Router,
    body::Bytes,
    extract::{Path as Captured, State},
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use serde_json::json;
use tempfile::TempDir;
use tokio::{net::TcpListener, runtime::Runtime};
use tunesmith_crds::names::exit_code;

use super::*;
use crate::{
    error::Error,
    model::{INDEX, ModelFolder, WEIGHTS, header},
    tiny_model,
};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const TOKEN: &str = "hf_secret";

/// A repository `owner/tiny` with branch `main` and tag `v1`, `owner/gated` for whoever has the token, and
/// `owner/broken`, whose weights are not those that it promises.
struct Hub {
    folder: PathBuf,
    /// How often a file was asked for.
    asked: AtomicUsize,
}

impl Hub {
    fn refuses(&self, repo: &str, headers: &HeaderMap) -> Option<StatusCode> {
        let token = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
        match repo {
            "tiny" | "broken" => None,
            "gated" if token == Some(&format!("Bearer {TOKEN}")) => None,
            // What the real one says to strangers, too.
            _ => Some(StatusCode::UNAUTHORIZED),
        }
    }
}

type Shared = State<Arc<Hub>>;

async fn info(hub: Shared, Captured((repo, revision)): Captured<(String, String)>, headers: HeaderMap) -> Response {
    if let Some(status) = hub.refuses(&repo, &headers) {
        return status.into_response();
    }
    if !["main", "v1", COMMIT].contains(&revision.as_str()) {
        return StatusCode::NOT_FOUND.into_response();
    }
    let files = fs::read_dir(&hub.folder).unwrap().map(|file| file.unwrap().file_name().into_string().unwrap());
    let siblings: Vec<_> = files.map(|name| json!({"rfilename": name})).collect();
    Json(json!({"sha": COMMIT, "siblings": siblings})).into_response()
}

async fn resolve(
    hub: Shared,
    Captured((repo, revision, file)): Captured<(String, String, String)>,
    headers: HeaderMap,
) -> Response {
    if let Some(status) = hub.refuses(&repo, &headers) {
        return status.into_response();
    }
    hub.asked.fetch_add(1, Ordering::Relaxed);
    assert_eq!(revision, COMMIT, "files are asked for by commit");
    let Ok(bytes) = fs::read(hub.folder.join(&file)) else { return StatusCode::NOT_FOUND.into_response() };
    let range = headers[header::RANGE].to_str().unwrap().strip_prefix("bytes=").unwrap();
    let (first, last) = range.split_once('-').unwrap();
    let (first, last) = (first.parse::<usize>().unwrap(), last.parse().unwrap_or(bytes.len() - 1));
    let etag = match repo.as_str() {
        "broken" if file == WEIGHTS => "0".repeat(64),
        // Small files have the digest that git gives them; any 40 digits do here.
        _ if file != WEIGHTS => digest::of_bytes(&bytes)["sha256:".len()..][..40].to_owned(),
        _ => digest::of_bytes(&bytes)["sha256:".len()..].to_owned(),
    };
    let headers = [
        ("etag", format!("\"{etag}\"")),
        ("x-repo-commit", COMMIT.to_owned()),
        ("content-range", format!("bytes {first}-{last}/{}", bytes.len())),
    ];
    (StatusCode::PARTIAL_CONTENT, headers, Bytes::copy_from_slice(&bytes[first..=last])).into_response()
}

/// A folder with a model; a Hub that serves it, and stores that read from there.
struct Bench {
    _runtime: Runtime,
    folder: TempDir,
    stores: Stores,
    hub: Arc<Hub>,
}

impl Bench {
    fn new() -> Self {
        let (runtime, folder) = (Runtime::new().unwrap(), tempfile::tempdir().unwrap());
        let model = folder.path().join("model");
        tiny_model::write(&model).unwrap();
        let hub = Arc::new(Hub { folder: model, asked: AtomicUsize::new(0) });
        let routes = Router::new()
            .route("/api/models/owner/{repo}/revision/{revision}", get(info))
            .route("/owner/{repo}/resolve/{revision}/{file}", get(resolve))
            .with_state(hub.clone());
        let listener = runtime.block_on(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))).unwrap();
        let endpoint = format!("http://{}/", listener.local_addr().unwrap());
        runtime.spawn(async { axum::serve(listener, routes).await });
        let stores = Stores::from_environment(runtime.handle().clone());
        let stores = stores.with_variable("TUNESMITH_MODEL_HF_ENDPOINT", &endpoint);
        Self { _runtime: runtime, folder, stores, hub }
    }

    fn model(&self) -> PathBuf {
        self.folder.path().join("model")
    }

    fn fetch(&self, uri: &str) -> Result<ModelFolder, Error> {
        Ok(ModelFolder::fetch(&uri.parse().unwrap(), &self.stores, &self.folder.path().join("work"))?)
    }

    /// The same model with its weights in a shard.
    fn shard(&self) {
        const SHARD: &str = "model-00001-of-00001.safetensors";
        let header = header(&self.model().join(WEIGHTS)).unwrap();
        let map: serde_json::Map<_, _> = header.into_keys().map(|name| (name, json!(SHARD))).collect();
        fs::rename(self.model().join(WEIGHTS), self.model().join(SHARD)).unwrap();
        fs::write(self.model().join(INDEX), json!({"weight_map": map}).to_string()).unwrap();
    }
}

#[test]
fn a_repository_is_the_same_model_as_its_folder() {
    let bench = Bench::new();
    for sharded in [false, true] {
        if sharded {
            bench.shard();
            fs::remove_dir_all(bench.folder.path().join("work")).unwrap();
        }
        let on_disk = bench.fetch(&format!("file://{}", bench.model().display())).unwrap();
        for uri in ["hf://owner/tiny", "hf://owner/tiny@v1", &format!("hf://owner/tiny@{COMMIT}")] {
            let model = bench.fetch(uri).unwrap();
            assert_eq!(model.digest, on_disk.digest, "{uri}");
            tunesmith_engine::Model::load(&model.folder).unwrap();
        }
    }
}

#[test]
fn what_another_client_left_in_hf_home_is_not_downloaded_again() {
    let mut bench = Bench::new();
    let home = bench.folder.path().join("home");
    bench.stores = bench.stores.with_variable("HF_HOME", &home.display().to_string());
    let first = bench.fetch("hf://owner/tiny").unwrap();
    let asked = bench.hub.asked.load(Ordering::Relaxed);
    assert!(asked > 0 && first.folder.starts_with(&home));
    // Other clients keep the names of branches only.
    fs::remove_dir_all(home.join("hub/models--owner--tiny/refs")).unwrap();
    assert_eq!(bench.fetch("hf://owner/tiny").unwrap().digest, first.digest);
    assert_eq!(bench.hub.asked.load(Ordering::Relaxed), asked);
}

#[test]
fn a_gated_model_needs_its_token_which_no_message_shows() {
    let mut bench = Bench::new();
    let error = bench.fetch("hf://owner/gated").map(drop).unwrap_err();
    assert_eq!(error.exit_code(), exit_code::BAD_INPUT);
    let text = error.to_string();
    assert!(["hf://owner/gated", "HF_TOKEN", "baseModel.secretRef"].iter().all(|part| text.contains(part)), "{text}");
    bench.stores = bench.stores.with_variable("TUNESMITH_MODEL_HF_TOKEN", &format!("{TOKEN}\n"));
    bench.fetch("hf://owner/gated").unwrap();
    assert_eq!(bench.stores.redact(&format!("Bearer {TOKEN}")), "Bearer [redacted]");
}

#[test]
fn what_is_not_there_is_named_and_a_silent_hub_is_tried_again() {
    let mut bench = Bench::new();
    for (uri, named) in [
        ("hf://owner/tiny@v2", "revision"),
        ("hf://owner/tiny/model.gguf", "file"),
        ("hf://owner/tiny/onnx", "one of its .gguf files"),
    ] {
        let error = bench.fetch(uri).map(drop).unwrap_err();
        assert_eq!(error.exit_code(), exit_code::BAD_INPUT);
        assert!(error.to_string().contains(uri) && error.to_string().contains(named), "{error}");
    }
    bench.stores = bench.stores.with_variable("TUNESMITH_MODEL_HF_ENDPOINT", "http://127.0.0.1:9");
    let error = bench.fetch("hf://owner/tiny").map(drop).unwrap_err();
    assert_eq!(error.exit_code(), exit_code::STORAGE);
    assert!(error.to_string().contains("HF_ENDPOINT"), "{error}");
}

#[test]
fn bytes_that_the_hub_did_not_promise_are_not_kept() {
    let bench = Bench::new();
    for _ in 0..2 {
        let error = bench.fetch("hf://owner/broken").map(drop).unwrap_err();
        assert!(error.to_string().contains("SHA-256 is not the one"), "{error}");
        assert_eq!(error.exit_code(), exit_code::STORAGE);
    }
}
