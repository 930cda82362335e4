//! The Hub's protocol as far as we speak it, from a server of this process: no test leaves the machine.

use std::{
    net::Ipv4Addr,
    os::unix::fs::MetadataExt,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use axum::{
    Json, Router,
    body::{Body, Bytes},
    extract::{Path as Captured, State},
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use futures::{StreamExt, stream};
use serde_json::json;
use tempfile::TempDir;
use tokio::{net::TcpListener, runtime::Runtime};
use tunesmith_crds::names::exit_code;

use super::*;
use crate::{
    convert::tests::fixture,
    error::Error,
    model::{Keep, ModelFolder, read_header},
    tiny_model,
};

const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const TOKEN: &str = "hf_secret";

/// A repository `owner/tiny` with branch `main` and tag `v1`, `owner/gated` for whoever has the token, and
/// `owner/broken`, whose weights are not those that it promises. `owner/slow` stands still in the middle of its weights,
/// `owner/mute` at their beginning, and `owner/plain` knows no ranges; `owner/forgetful` does both, the first time.
/// `owner/rows` holds data.
struct Hub {
    folder: PathBuf,
    rows: PathBuf,
    /// How often a file was asked for.
    asked: AtomicUsize,
    /// The first byte of every request for weights.
    starts: Mutex<Vec<usize>>,
}

impl Hub {
    fn folder(&self, repo: &str) -> &Path {
        if repo == "rows" { &self.rows } else { &self.folder }
    }

    fn refuses(&self, repo: &str, headers: &HeaderMap) -> Option<StatusCode> {
        let token = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
        match repo {
            "tiny" | "broken" | "slow" | "mute" | "plain" | "forgetful" | "rows" | "renamed" | "elsewhere" => None,
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
    let files = fs::read_dir(hub.folder(&repo)).unwrap().map(|file| file.unwrap().file_name().into_string().unwrap());
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
    match repo.as_str() {
        "renamed" => {
            let location = [("location", format!("/owner/tiny/resolve/{revision}/{file}"))];
            return (StatusCode::TEMPORARY_REDIRECT, location).into_response();
        }
        "elsewhere" => {
            let host = headers[header::HOST].to_str().unwrap();
            let bytes = fs::read(hub.folder.join(&file)).unwrap();
            let headers = [
                ("location", format!("http://{host}/owner/tiny/resolve/{revision}/{file}")),
                ("x-linked-etag", format!("\"{}\"", &digest::of_bytes(&bytes)["sha256:".len()..])),
            ];
            return (StatusCode::FOUND, headers).into_response();
        }
        _ => {}
    }
    hub.asked.fetch_add(1, Ordering::Relaxed);
    assert_eq!(revision, COMMIT, "files are asked for by commit");
    let Ok(bytes) = fs::read(hub.folder(&repo).join(&file)) else { return StatusCode::NOT_FOUND.into_response() };
    let Some(range) = headers.get(header::RANGE).filter(|_| !bytes.is_empty()) else {
        let status =
            if headers.contains_key(header::RANGE) { StatusCode::RANGE_NOT_SATISFIABLE } else { StatusCode::OK };
        return (status, [("etag", "\"0123456789\"")]).into_response();
    };
    let range = range.to_str().unwrap().strip_prefix("bytes=").unwrap();
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
    let mut is_first = false;
    if file == WEIGHTS && last > 0 {
        let mut starts = hub.starts.lock().unwrap();
        is_first = starts.is_empty();
        starts.push(first);
    }
    let stalls_after = match repo.as_str() {
        _ if file != WEIGHTS || last == 0 => None,
        "slow" if first == 0 => Some(bytes.len() / 2),
        "forgetful" if is_first => Some(bytes.len() / 2),
        "mute" => Some(0),
        "plain" | "forgetful" => return (headers, Bytes::from(bytes)).into_response(),
        _ => None,
    };
    let body = match stalls_after {
        Some(sent) => {
            let start = Bytes::copy_from_slice(&bytes[..sent]);
            Body::from_stream(stream::iter([Ok::<_, std::io::Error>(start)]).chain(stream::pending()))
        }
        None => Bytes::copy_from_slice(&bytes[first..=last]).into(),
    };
    (StatusCode::PARTIAL_CONTENT, headers, body).into_response()
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
        let rows = folder.path().join("rows");
        fs::create_dir(&rows).unwrap();
        for name in
            ["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl", "test-00000-of-00001.jsonl", "README.md"]
        {
            fs::write(rows.join(name), format!("{{\"text\": \"{name}\"}}\n")).unwrap();
        }
        let hub = Hub { folder: model, rows, asked: AtomicUsize::new(0), starts: Mutex::default() };
        let hub = Arc::new(hub);
        let routes = Router::new()
            .route("/api/models/owner/{repo}/revision/{revision}", get(info))
            .route("/api/datasets/owner/{repo}/revision/{revision}", get(info))
            .route("/owner/{repo}/resolve/{revision}/{file}", get(resolve))
            .route("/datasets/owner/{repo}/resolve/{revision}/{file}", get(resolve))
            .with_state(hub.clone());
        let listener = runtime.block_on(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))).unwrap();
        let endpoint = format!("http://{}/", listener.local_addr().unwrap());
        runtime.spawn(async { axum::serve(listener, routes).await });
        let stores = Stores::from_environment(runtime.handle().clone());
        let stores = stores.with_variable("TUNESMITH_MODEL_HF_ENDPOINT", &endpoint);
        let stores = stores.with_variable("TUNESMITH_DATASET_HF_ENDPOINT", &endpoint);
        Self { _runtime: runtime, folder, stores, hub }
    }

    fn model(&self) -> PathBuf {
        self.folder.path().join("model")
    }

    fn rows(&self, uri: &str) -> Result<Vec<String>, StoreError> {
        let files = dataset::fetch(&uri.parse().unwrap(), &self.stores, &self.folder.path().join("work"))?;
        let text = |file: &Path| fs::read_to_string(file).unwrap();
        Ok(files.into_iter().map(|(file, _)| text(&file.path)).collect())
    }

    fn fetch(&self, uri: &str) -> Result<ModelFolder, Error> {
        self.bring(uri, Keep::Whole)
    }

    fn bring(&self, uri: &str, keep: Keep) -> Result<ModelFolder, Error> {
        Ok(ModelFolder::bring(&uri.parse().unwrap(), &self.stores, &self.folder.path().join("work"), keep)?)
    }

    /// The same model with its weights in a shard.
    fn shard(&self) {
        const SHARD: &str = "model-00001-of-00001.safetensors";
        let bytes = fs::read(self.model().join(WEIGHTS)).unwrap();
        let header = read_header(&mut &bytes[..], bytes.len() as u64).unwrap();
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
        for uri in [
            "hf://owner/tiny",
            "hf://owner/tiny@v1",
            &format!("hf://owner/tiny@{COMMIT}"),
            "hf://owner/renamed",
            "hf://owner/elsewhere",
        ] {
            let model = bench.fetch(uri).unwrap();
            assert_eq!(model.digest, on_disk.digest, "{uri}");
            tunesmith_engine::Model::load(&model.folder).unwrap();
        }
    }
}

#[test]
fn a_preflight_keeps_no_more_of_the_weights_than_their_headers() {
    let mut bench = Bench::new();
    bench.stores = bench.stores.with_variable("HF_HUB_DOWNLOAD_TIMEOUT", "1");
    let whole = bench.fetch(&format!("file://{}", bench.model().display())).unwrap();
    let weights = fs::metadata(bench.model().join(WEIGHTS)).unwrap();
    let half = weights.len() as usize / 2;
    for (repo, starts) in [("tiny", vec![0]), ("slow", vec![0, half]), ("plain", vec![0]), ("forgetful", vec![0, half])]
    {
        bench.hub.starts.lock().unwrap().clear();
        let checked = bench.bring(&format!("hf://owner/{repo}"), Keep::Headers).unwrap();
        assert_eq!((checked.digest, checked.shape), (whole.digest.clone(), whole.shape.clone()), "{repo}");
        assert_eq!(*bench.hub.starts.lock().unwrap(), starts, "{repo}");
        let kept = fs::metadata(checked.folder.join(WEIGHTS)).unwrap();
        assert!(kept.len() == weights.len() && kept.blocks() < weights.blocks(), "{repo}: {kept:?}");
        let files = walkdir::WalkDir::new(bench.folder.path().join("work")).into_iter();
        let largest = files.map(|file| file.unwrap().metadata().unwrap().blocks()).max();
        assert!(largest < Some(weights.blocks()), "{repo}: {largest:?}");
    }
    // Nobody takes an outline for the whole file.
    let model = bench.fetch("hf://owner/tiny").unwrap();
    assert_eq!(fs::read(model.folder.join(WEIGHTS)).unwrap(), fs::read(bench.model().join(WEIGHTS)).unwrap());
}

#[test]
fn a_preflight_sees_how_weights_in_few_bits_are_stored_and_whether_the_output_layer_is_the_embedding() {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../engine/tests/fixtures");
    for (name, sharded) in [
        ("quantized/nf4", false),
        ("quantized/fp4_as_bf16", false),
        ("quantized/int8", false),
        ("adapters/stored_apart", false),
        ("adapters/stored_apart", true),
    ] {
        let bench = Bench::new();
        for file in ["config.json", WEIGHTS] {
            fs::copy(fixtures.join(name).join(file), bench.model().join(file)).unwrap();
        }
        if sharded {
            bench.shard();
        }
        let [headers, whole] = [Keep::Headers, Keep::Whole]
            .map(|keep| bench.bring("hf://owner/tiny", keep).unwrap_or_else(|error| panic!("{name}: {error}")));
        assert_eq!((headers.shape, headers.config), (whole.shape, whole.config), "{name}");
        assert_eq!((headers.digest, headers.warnings), (whole.digest, whole.warnings), "{name}");
    }
}

#[test]
fn a_preflight_fails_over_weights_as_a_download_does() {
    let mut bench = Bench::new();
    bench.stores = bench.stores.with_variable("HF_HUB_DOWNLOAD_TIMEOUT", "1");
    let refused = |bench: &Bench, uri: &str, part: &str, code| {
        for keep in [Keep::Whole, Keep::Headers] {
            let error = bench.bring(uri, keep).map(drop).unwrap_err();
            assert!(error.to_string().contains(part), "{keep:?}: {error}");
            assert_eq!(error.exit_code(), code);
        }
    };
    refused(&bench, "hf://owner/broken", "SHA-256 is not the one", exit_code::STORAGE);
    refused(&bench, "hf://owner/mute", "times in a row", exit_code::STORAGE);
    refused(&bench, "hf://owner/tiny/absent.gguf", "file", exit_code::BAD_INPUT);
    let weights = fs::read(bench.model().join(WEIGHTS)).unwrap();
    fs::write(bench.model().join(WEIGHTS), &weights[..weights.len() - 4]).unwrap();
    refused(&bench, "hf://owner/tiny", "the upload was cut short", exit_code::BAD_INPUT);
}

#[test]
fn a_gguf_file_of_the_hub_is_checked_by_its_header() {
    let bench = Bench::new();
    let bytes = fs::read(fixture("mistral.gguf")).unwrap();
    fs::write(bench.model().join("m.gguf"), &bytes).unwrap();
    let [checked, whole] =
        [Keep::Headers, Keep::Whole].map(|keep| bench.bring("hf://owner/tiny/m.gguf", keep).unwrap());
    assert_eq!((&checked.digest, &checked.shape), (&whole.digest, &whole.shape));
    assert_eq!(checked.digest, digest::of_files(&[digest::file_of_bytes("model.gguf", &bytes)]));
    let blocks = |model: &ModelFolder| fs::metadata(model.folder.join(WEIGHTS)).unwrap().blocks();
    assert!(blocks(&checked) < blocks(&whole));
    assert!(!bench.folder.path().join("work/headers/model.gguf").exists());
}

#[test]
fn a_preflight_leaves_the_cache_of_other_clients_whole() {
    let mut bench = Bench::new();
    let home = bench.folder.path().join("home");
    bench.stores = bench.stores.with_variable("HF_HOME", &home.display().to_string());
    let checked = bench.bring("hf://owner/tiny", Keep::Headers).unwrap();
    assert!(checked.folder.starts_with(&home));
    assert_eq!(fs::read(checked.folder.join(WEIGHTS)).unwrap(), fs::read(bench.model().join(WEIGHTS)).unwrap());
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

#[test]
fn a_download_that_stands_still_is_taken_up_where_it_broke_off() {
    let mut bench = Bench::new();
    bench.stores = bench.stores.with_variable("HF_HUB_DOWNLOAD_TIMEOUT", "1");
    let whole = bench.fetch("hf://owner/tiny").unwrap().digest;
    let half = fs::metadata(bench.model().join(WEIGHTS)).unwrap().len() as usize / 2;
    bench.hub.starts.lock().unwrap().clear();
    assert_eq!(bench.fetch("hf://owner/slow").unwrap().digest, whole);
    assert_eq!(*bench.hub.starts.lock().unwrap(), [0, half]);
    // Whoever knows no ranges sends everything again.
    let blobs = bench.folder.path().join("work/hub/models--owner--plain/blobs");
    fs::create_dir_all(&blobs).unwrap();
    let etag = &digest::of_bytes(&fs::read(bench.model().join(WEIGHTS)).unwrap())["sha256:".len()..];
    fs::write(blobs.join(format!("{etag}.part")), "other bytes").unwrap();
    assert_eq!(bench.fetch("hf://owner/plain").unwrap().digest, whole);
}

#[test]
fn a_download_that_brings_nothing_is_given_up_and_tried_again_later() {
    let mut bench = Bench::new();
    bench.stores = bench.stores.with_variable("HF_HUB_DOWNLOAD_TIMEOUT", "1");
    let error = bench.fetch("hf://owner/mute").map(drop).unwrap_err();
    assert_eq!(error.exit_code(), exit_code::STORAGE);
    assert!(error.to_string().contains("times in a row"), "{error}");
}

#[test]
fn a_whole_part_of_an_earlier_attempt_is_not_downloaded_again() {
    let bench = Bench::new();
    let bytes = fs::read(bench.model().join(WEIGHTS)).unwrap();
    let blobs = bench.folder.path().join("work/hub/models--owner--tiny/blobs");
    fs::create_dir_all(&blobs).unwrap();
    let etag = &digest::of_bytes(&bytes)["sha256:".len()..];
    fs::write(blobs.join(format!("{etag}.part")), &bytes[..bytes.len() - 3]).unwrap();
    bench.fetch("hf://owner/tiny").unwrap();
    assert_eq!(*bench.hub.starts.lock().unwrap(), [bytes.len() - 3]);
}

#[test]
fn a_data_set_is_its_train_split_a_file_or_a_pattern() {
    let bench = Bench::new();
    let text = |name: &str| format!("{{\"text\": \"{name}\"}}\n");
    let train = ["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl"].map(text);
    assert_eq!(bench.rows("hf://datasets/owner/rows").unwrap(), train);
    assert_eq!(bench.rows("hf://datasets/owner/rows@v1/train-*.jsonl").unwrap(), train);
    let test = "test-00000-of-00001.jsonl";
    assert_eq!(bench.rows(&format!("hf://datasets/owner/rows/{test}")).unwrap(), [text(test)]);
    fs::write(bench.hub.rows.join("empty.jsonl"), "").unwrap();
    assert_eq!(bench.rows("hf://datasets/owner/rows/empty.jsonl").unwrap(), [""]);
    fs::write(bench.hub.rows.join("README.md"), "---\nconfigs: [\n---\n").unwrap();
    fs::remove_dir_all(bench.folder.path().join("work")).unwrap();
    let error = bench.rows("hf://datasets/owner/rows").unwrap_err().to_string();
    assert!(error.contains("README.md") && error.contains("add a file or a pattern"), "{error}");
}

#[test]
fn a_data_set_that_is_not_there_is_named_with_the_fields_of_data() {
    let mut bench = Bench::new();
    for (uri, named) in [
        ("hf://datasets/owner/rows@v2", "dataset.train.uri"),
        ("hf://datasets/owner/rows/train.csv", "there are test-00000-of-00001.jsonl, train-*.jsonl"),
        ("hf://datasets/owner/absent", "dataset.secretRef"),
    ] {
        let error = bench.rows(uri).unwrap_err();
        assert_eq!(error.exit_code(), exit_code::BAD_INPUT);
        assert!(error.to_string().contains(uri) && error.to_string().contains(named), "{error}");
    }
    bench.stores = bench.stores.with_variable("TUNESMITH_DATASET_HF_TOKEN", "hf_x\ny");
    let error = bench.rows("hf://datasets/owner/rows").unwrap_err();
    assert_eq!(error.exit_code(), exit_code::BAD_SPEC);
    assert!(error.to_string().contains("TUNESMITH_DATASET_HF_TOKEN") && !error.to_string().contains("hf_x"), "{error}");
}
