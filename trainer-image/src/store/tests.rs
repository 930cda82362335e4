//! S3's own answers, from a server of this process: no test leaves the machine.

use std::{collections::BTreeMap, fs, net::Ipv4Addr, path::Path, sync::Arc};

use axum::{
    Router,
    extract::State,
    http::{Method, StatusCode, Uri as HttpUri},
    response::{IntoResponse, Response},
};
use percent_encoding::percent_decode_str;
use tempfile::TempDir;
use tokio::{net::TcpListener, runtime::Runtime};
use tunesmith_crds::names::exit_code;

use super::*;

/// A bucket's objects by their keys.
type Bucket = BTreeMap<&'static str, &'static str>;

/// `GET /bucket/key` and `GET /bucket?list-type=2&prefix=…`.
async fn answer(State(bucket): State<Arc<Bucket>>, method: Method, uri: HttpUri) -> Response {
    assert_eq!(method, Method::GET);
    let decoded = |text: &str| percent_decode_str(text).decode_utf8().unwrap().into_owned();
    let query = uri.query().unwrap_or_default();
    if query.contains("list-type=2") {
        let prefix = query.split('&').find_map(|part| part.strip_prefix("prefix=")).unwrap_or_default();
        let prefix = decoded(&prefix.replace('+', " "));
        return listing(&bucket, &prefix).into_response();
    }
    let key = decoded(uri.path().strip_prefix("/data/").unwrap_or_default());
    let headers = [("last-modified", "Fri, 27 Nov 2026 00:00:00 GMT"), ("etag", "\"e\"")];
    match bucket.get(key.as_str()) {
        Some(content) => (headers, *content).into_response(),
        None => (StatusCode::NOT_FOUND, "<Error><Code>NoSuchKey</Code></Error>").into_response(),
    }
}

fn listing(bucket: &Bucket, prefix: &str) -> String {
    let contents = bucket.iter().filter(|(key, _)| key.starts_with(prefix)).map(|(key, content)| {
        let key: String = key.chars().map(|c| if c.is_alphanumeric() { c.into() } else { format!("&#{};", c as u32) }).collect();
        format!(
            "<Contents><Key>{key}</Key><LastModified>2026-11-27T00:00:00.000Z</LastModified><ETag>e</ETag><Size>{}</Size>\
             </Contents>",
            content.len()
        )
    });
    let contents: String = contents.collect();
    format!("<?xml version=\"1.0\"?><ListBucketResult><Name>data</Name>{contents}</ListBucketResult>")
}

struct Bench {
    _runtime: Runtime,
    folder: TempDir,
    stores: Stores,
}

impl Bench {
    fn new(objects: &[(&'static str, &'static str)]) -> Self {
        let runtime = Runtime::new().unwrap();
        let routes = Router::new().fallback(answer).with_state(Arc::new(objects.iter().copied().collect::<Bucket>()));
        let listener = runtime.block_on(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))).unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        runtime.spawn(async { axum::serve(listener, routes).await });
        let stores = Stores::from_environment(runtime.handle().clone());
        let stores = [("ENDPOINT_URL", endpoint.as_str()), ("ACCESS_KEY_ID", "k"), ("SECRET_ACCESS_KEY", "s")]
            .iter()
            .fold(stores, |stores, (name, value)| {
                stores.with_variable(&format!("TUNESMITH_DATASET_AWS_{name}"), value)
            });
        Self { _runtime: runtime, folder: tempfile::tempdir().unwrap(), stores }
    }

    /// Names and contents of what a URI means.
    fn read(&self, uri: &str) -> Result<Vec<(String, String)>, StoreError> {
        let objects = self.stores.expand(Role::Dataset, &uri.parse().unwrap())?;
        let to = self.folder.path().join("copy");
        let read = |object: Object| {
            object.location.download(&to)?;
            Ok((object.name, fs::read_to_string(&to).unwrap()))
        };
        objects.into_iter().map(read).collect()
    }
}

#[test]
fn odd_keys_of_a_bucket_are_read_as_they_are_and_markers_and_notes_are_left_out() {
    let odd =
        ["a b.jsonl", "50%20off.jsonl", "q?x=1#y.jsonl", "a+b&c.jsonl", "列.jsonl", "[1]{2}~.jsonl", "/twice.jsonl"];
    let keys = odd.map(|name| format!("in/{name}").leak() as &'static str);
    let mut objects: Vec<(&'static str, &'static str)> = keys.map(|key| (key, key)).into();
    objects.extend([
        ("in/", ""),
        ("in/sub/", ""),
        ("in/_SUCCESS", ""),
        ("in/.x.crc", "c"),
        ("in/x.crc", "c"),
        ("other", "o"),
    ]);
    let bench = Bench::new(&objects);
    let mut expected: Vec<String> =
        odd.iter().filter(|name| !name.starts_with('/')).map(|name| (*name).to_owned()).collect();
    expected.sort();
    let found = bench.read("s3://data/in/*").unwrap();
    assert_eq!(found.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>(), expected);
    assert!(found.iter().all(|(name, content)| *content == format!("in/{name}")), "{found:?}");
    for name in odd {
        let [(_, content)] = &bench.read(&format!("s3://data/in/{name}")).unwrap()[..] else { panic!("{name}") };
        assert_eq!(*content, format!("in/{name}"));
    }
    assert_eq!(bench.read("s3://data/in/*/*").unwrap(), [("/twice.jsonl".into(), "in//twice.jsonl".into())]);
    assert_eq!(bench.read("s3://data/**/*.jsonl").unwrap().len(), odd.len());
}

#[test]
fn a_key_that_no_client_can_ask_for_is_refused_only_if_it_is_meant() {
    let bench =
        Bench::new(&[("in/a.jsonl", "a"), ("in/../b.jsonl", "b"), ("in/c\nd.jsonl", "c"), ("/in/e.jsonl", "e")]);
    assert_eq!(bench.read("s3://data/in/a*").unwrap(), [("a.jsonl".into(), "a".into())]);
    for (pattern, problem) in [("in/c*", "control character"), ("in/..*/b*", "`..`"), ("*/in/*", "begins with a slash")]
    {
        let error = bench.read(&format!("s3://data/{pattern}")).unwrap_err();
        assert_eq!(error.exit_code(), exit_code::BAD_INPUT);
        assert!(error.to_string().contains(problem), "{error}");
    }
}

#[test]
fn a_folder_where_a_file_is_meant_is_named_with_the_pattern_that_means_its_files() {
    let bench = Bench::new(&[("in/a.jsonl", "a")]);
    for uri in ["s3://data/in", "s3://data/in/", "s3://data"] {
        let error = bench.read(uri).unwrap_err();
        assert_eq!(error.exit_code(), exit_code::BAD_INPUT);
        assert!(error.to_string().contains("is a folder") && error.to_string().contains("/*"), "{error}");
    }
    assert!(matches!(bench.read("s3://data/absent").unwrap_err(), StoreError::Missing { .. }));
    let error = bench.read("s3://data/out/*").unwrap_err();
    assert!(error.to_string().contains("there is nothing in s3://data/out"), "{error}");
}

#[test]
fn what_can_not_be_read_on_a_disk_is_bad_input() {
    let bench = Bench::new(&[]);
    let folder = bench.folder.path();
    fs::write(folder.join("file"), "x").unwrap();
    let long = "x".repeat(300);
    let too_many_links = folder.join("loop");
    std::os::unix::fs::symlink(&too_many_links, &too_many_links).unwrap();
    for (name, problem) in [
        ("absent", "no such object"),
        ("", "is a folder"),
        ("file/below", "can't be used: Not a directory"),
        (&long, "can't be used: File name too long"),
        ("loop", "symbolic links"),
    ] {
        let uri: Uri = format!("file://{}/{name}", folder.display()).parse().unwrap();
        let location = bench.stores.open(Role::Dataset, &uri).unwrap();
        let error = location.digest_on_disk(location.on_disk().unwrap(), name).unwrap_err();
        assert_eq!(error.exit_code(), exit_code::BAD_INPUT, "{error}");
        assert!(error.to_string().contains(problem), "{error}");
    }
    let device = bench.stores.open(Role::Dataset, &"file:///dev/zero".parse().unwrap()).unwrap();
    let error = device.digest_on_disk(Path::new("/dev/zero"), "zero").unwrap_err();
    assert!(error.to_string().contains("a pipe or a device"), "{error}");
}

#[test]
fn an_output_that_can_not_be_written_is_final() {
    let bench = Bench::new(&[]);
    fs::write(bench.folder.path().join("file"), "x").unwrap();
    let uri: Uri = format!("file://{}/file/adapters", bench.folder.path().display()).parse().unwrap();
    let error = bench.stores.open(Role::Output, &uri).unwrap().join("x").write("y").unwrap_err();
    assert_eq!(error.exit_code(), exit_code::BAD_INPUT, "{error}");
}

#[test]
fn a_path_may_lead_up() {
    let bench = Bench::new(&[]);
    let folder = bench.folder.path();
    fs::create_dir_all(folder.join("a/b")).unwrap();
    fs::write(folder.join("rows.jsonl"), "x").unwrap();
    std::os::unix::fs::symlink(folder.join("a/b"), folder.join("link")).unwrap();
    fs::write(folder.join("a/inner.jsonl"), "y").unwrap();
    for (path, content) in [("a/../rows.jsonl", "x"), ("link/../inner.jsonl", "y")] {
        let uri: Uri = format!("file://{}/{path}", folder.display()).parse().unwrap();
        assert_eq!(bench.stores.open(Role::Dataset, &uri).unwrap().read().unwrap(), content);
    }
}
