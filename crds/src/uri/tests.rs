//! URIs, and strings that are none.

use proptest::prelude::*;

use super::*;

#[test]
fn slashes_at_the_end_do_not_matter() {
    let uri: Uri = "s3://models/llama-2-7b/".parse().unwrap();
    assert_eq!(uri.to_string(), "s3://models/llama-2-7b");
    assert_eq!(uri.join("config.json").to_string(), "s3://models/llama-2-7b/config.json");
    assert_eq!("s3://models".parse::<Uri>().unwrap().join("a").to_string(), "s3://models/a");
    assert_eq!("file:///data/m/".parse::<Uri>().unwrap().file_name(), "m");
}

#[test]
fn repositories_and_volumes_have_their_parts() {
    let hub = |repo: &str, revision: Option<&str>, path: &str| Uri::Hub {
        repo: repo.into(),
        revision: revision.map(Into::into),
        path: path.into(),
    };
    let claim = |claim: &str, path: &str| Uri::Claim { claim: claim.into(), path: path.into() };
    let data = |revision: Option<&str>, path: &str| Uri::HubDataset {
        repo: "a/b".into(),
        revision: revision.map(Into::into),
        path: path.into(),
    };
    for (text, uri) in [
        ("hf://datasets/a/b", data(None, "")),
        ("hf://datasets/a/b@v1/data/x.parquet", data(Some("v1"), "data/x.parquet")),
        ("hf://HuggingFaceTB/SmolLM2-135M-Instruct", hub("HuggingFaceTB/SmolLM2-135M-Instruct", None, "")),
        ("hf://a/b@v1.0", hub("a/b", Some("v1.0"), "")),
        ("hf://a/b@refs%2Fpr%2F1/m.gguf", hub("a/b", Some("refs%2Fpr%2F1"), "m.gguf")),
        ("pvc://models/llama/8b", claim("models", "llama/8b")),
        ("pvc://models", claim("models", "")),
    ] {
        assert_eq!(text.parse::<Uri>().unwrap(), uri);
        assert_eq!(uri.to_string(), text);
        assert_eq!(uri.join("config.json").file_name(), "config.json");
    }
    let name = |text: &str| text.parse::<Uri>().unwrap().model_name().0;
    assert_eq!((name("hf://a/b@v1.0"), name("pvc://models")), ("a/b".into(), "pvc://models".into()));
    assert_eq!("pvc://models/".parse::<Uri>().unwrap().join("m").to_string(), "pvc://models/m");
}

/// Strings, and whether each is a URI.
const VERDICTS: &[(&str, bool)] = &[
    ("s3://models/llama", true),
    ("s3://models", true),
    ("s3://models/", true),
    ("s3://models//", true),
    ("s3://models//a//b", true),
    ("s3://models/a b/c d.jsonl", true),
    ("s3://models/a /b", true),
    ("s3://models/50%25 off+more&less=x?y#z.jsonl", true),
    ("s3://models/données/列.jsonl", true),
    ("s3://models/a\\b'c\"d[1]{2}.jsonl", true),
    ("s3://models/ a", false),
    ("s3://models/a ", false),
    ("s3://models/a /", false),
    ("s3://models/ ", false),
    ("s3://models /a", false),
    (" s3://models/a", false),
    ("s3://models/a\u{a0}b", false),
    ("s3://models/a\u{a0}", false),
    ("s3://models/a\u{2003}b", false),
    ("s3://models/a\u{2028}b", false),
    ("s3://models/a\u{3000}b", false),
    ("s3://models/a\tb", false),
    ("s3://models/a\nb", false),
    ("s3://models/a\n", false),
    ("s3://models/a\u{7f}b", false),
    ("s3://models/a\u{85}b", false),
    ("s3://models/a\0b", false),
    ("s3://models/a/../b", false),
    ("s3://models/./b", false),
    ("s3://models/..b", true),
    ("s3://a", false),
    ("s3://", false),
    ("s3:///key", false),
    ("S3://models/a", false),
    ("gs://models/llama", true),
    ("gs://models", true),
    ("gs://models//a b//", true),
    ("gs://my_models.example.com/a", true),
    ("gs://models_/a", false),
    ("gs://_models/a", false),
    ("gs://Models/a", false),
    ("gs://ab", false),
    ("gs://", false),
    ("gs:///a", false),
    ("gs://models/../a", false),
    ("gs://models/a ", false),
    ("gcs://models/a", false),
    ("az://models/llama", true),
    ("az://models", true),
    ("az://models/a?b#c%20d", true),
    ("az://my-models/a", true),
    ("az://my_models/a", false),
    ("az://my.models/a", false),
    ("az://-models/a", false),
    ("az://models@account/a", false),
    ("az://account.blob.core.windows.net/models", false),
    ("az://ab/c", false),
    ("az://models/a/..", false),
    ("abfss://models@account.dfs.core.windows.net/a", false),
    ("hf://a/b", true),
    ("hf://a/b/", true),
    ("hf://a/b@main/c.gguf", true),
    ("hf://a/b@main/c d.gguf", true),
    ("hf://a", false),
    ("hf://a/b@", false),
    ("hf://a/b/..", false),
    ("hf://a/b/./c", false),
    ("hf://a/..b", false),
    ("hf://a/b/..c", true),
    ("hf://-a/b", false),
    ("hf://datasets/a/b", true),
    ("hf://datasets/a/b/", true),
    ("hf://datasets/a/b@v1/data/train-*.parquet", true),
    ("hf://datasets/a/b/../c", false),
    ("hf://datasets/a", false),
    ("hf://datasets/a/", false),
    ("hf://datasets/", false),
    ("hf://datasets//a/b", false),
    ("hf://datasets/a@v1", false),
    ("hf://datasets/a/@", false),
    ("hf://datasets/a/b c", false),
    ("pvc://c", true),
    ("pvc://c/", true),
    ("pvc://c/a b", true),
    ("pvc://c/ ", false),
    ("pvc://c/..", false),
    ("pvc://c/a/../b", false),
    ("pvc://-c", false),
    ("pvc://c-/x", false),
    ("pvc://c/.hidden", true),
    ("pvc://c/x\u{a0}", false),
    ("file://x", true),
    ("file://x y/z", true),
    ("file:///x/../y", true),
    ("file:////x", true),
    ("file://", false),
    ("file:///", false),
    ("file:////", false),
    ("file:///x\u{a0}y", false),
    ("file:/// ", false),
    ("file:///x ", false),
    ("file:/x", false),
    ("ftp://x/y", false),
    ("", false),
];

/// What the API server makes of [`rule`].
fn follows_the_rule(text: &str) -> bool {
    thread_local!(static RULES: [regex::Regex; 3] =
        [PATTERN, DATASET_PATTERN, DOTS].map(|rule| regex::Regex::new(rule).unwrap()));
    RULES.with(|[pattern, dataset, dots]| {
        let shape = if text.starts_with(DATASETS) { dataset } else { pattern };
        shape.is_match(text) && !dots.is_match(text)
    })
}

#[test]
fn the_schema_and_the_parser_agree() {
    for (text, verdict) in VERDICTS {
        assert_eq!(follows_the_rule(text), *verdict, "the schema of {text:?}");
        assert_eq!(text.parse::<Uri>().is_ok(), *verdict, "the parser of {text:?}");
    }
}

#[test]
fn a_buckets_name_is_as_long_as_its_store_allows() {
    for (scheme, longest) in [("s3", 63), ("gs", 222), ("az", 63)] {
        for (length, verdict) in [(2, false), (3, true), (longest, true), (longest + 1, false)] {
            let text = format!("{scheme}://{}/m", "b".repeat(length));
            assert_eq!(follows_the_rule(&text), verdict, "the schema of {text}");
            assert_eq!(text.parse::<Uri>().is_ok(), verdict, "the parser of {text}");
        }
    }
}

#[test]
fn an_accepted_uri_is_written_so_that_it_is_read_again() {
    for (text, _) in VERDICTS.iter().filter(|(_, verdict)| *verdict) {
        let uri: Uri = text.parse().unwrap();
        assert_eq!(uri.to_string().parse::<Uri>().as_ref(), Ok(&uri), "{text}");
    }
    assert_eq!("file:////x//".parse::<Uri>().unwrap().to_string(), "file:///x");
}

#[test]
fn a_character_that_nobody_sees_is_named() {
    let error = "s3://models/a\u{a0}b".parse::<Uri>().unwrap_err().to_string();
    assert!(error.contains("holds U+00A0"), "{error}");
    let error = "s3://models/a ".parse::<Uri>().unwrap_err().to_string();
    assert!(error.contains("ends in a space"), "{error}");
}

#[test]
fn a_pattern_is_split_from_the_folder_above_it() {
    for (uri, folder, pattern) in [
        ("s3://datasets/support/part-*.jsonl", "s3://datasets/support", "part-*.jsonl"),
        ("s3://datasets/*/train-*.parquet", "s3://datasets", "*/train-*.parquet"),
        ("s3://datasets/v*/train.jsonl", "s3://datasets", "v*/train.jsonl"),
        ("gs://datasets/v*/train.jsonl", "gs://datasets", "v*/train.jsonl"),
        ("az://datasets/v1/**", "az://datasets/v1", "**"),
        ("file:///data/*.jsonl", "file:///data", "*.jsonl"),
        ("file:///*.jsonl", "file:///", "*.jsonl"),
        ("file://*.jsonl", "file://.", "*.jsonl"),
    ] {
        let uri: Uri = uri.parse().unwrap();
        let (found, rest) = uri.split_pattern().unwrap();
        assert_eq!((found.to_string().as_str(), rest), (folder, pattern));
    }
    assert_eq!("s3://datasets/train.jsonl".parse::<Uri>().unwrap().split_pattern(), None);
}

#[test]
fn what_is_no_uri_is_refused_with_advice() {
    for text in [
        "",
        "models/llama",
        "s3:/models",
        "s3://",
        "s3://UPPER/x",
        "s3://a",
        "gs://a",
        "az://a.b.c/d",
        "http://h/x",
        "file://",
        "hf://gpt2",
        "hf://owner/name@",
        "hf://owner/name/../other",
        "hf:///name",
        "pvc://Claim/m",
        "pvc://claim/../../etc",
        "pvc://",
    ] {
        let error = text.parse::<Uri>().unwrap_err();
        assert!(error.to_string().contains("s3://bucket/key"), "{text}: {error}");
    }
}

proptest! {
    #[test]
    fn any_string_has_one_verdict(scheme in "(s3|gs|az|hf|pvc|file)://(aa)?", rest in "[a/@%._ \u{a0}\u{2028}\t\n?#*-]{0,12}|datasets/[a/@. ]{0,8}") {
        let text = format!("{scheme}{rest}");
        prop_assert_eq!(follows_the_rule(&text), text.parse::<Uri>().is_ok(), "{:?}", text);
    }

    #[test]
    fn display_and_parse_are_inverse(cloud in prop::sample::select(&Cloud::ALL), bucket in "[a-z0-9][a-z0-9-]{1,20}[a-z0-9]", key in "([a-z0-9_-][a-zA-Z0-9.?#% ]{0,6}[a-z0-9](/[._-]{3,8}){0,3})?") {
        let uri = Uri::Bucket { cloud, bucket, key };
        prop_assert_eq!(uri.to_string().parse::<Uri>().unwrap(), uri);
    }
}
