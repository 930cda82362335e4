//! Files to rows on disk, and back into batches.

use std::{fs, path::PathBuf};

use proptest::prelude::*;
use tunesmith_crds::fine_tune_job::{OnBadRow, Overflow, Training};
use tunesmith_engine::IGNORE;

use super::{encode, encoder};
use crate::data::{
    DataError, DataFile, Encoder, Example, Overview, RowOptions, Rows,
    batches::{Batches, micro_batch},
    formats::Row,
    overview::{Marking, Totals},
};

/// Files with these texts, one row each, and their rows.
fn load(files: &[&[&str]], encoder: &Encoder) -> Result<Rows, DataError> {
    let folder = tempfile::tempdir().unwrap();
    let write = |(i, texts): (usize, &&[&str])| -> DataFile {
        let path: PathBuf = folder.path().join(format!("part-{i}.jsonl"));
        let lines: String = texts.iter().map(|text| format!("{}\n", serde_json::json!({"text": text}))).collect();
        fs::write(&path, lines).unwrap();
        DataFile::new(&path)
    };
    let files: Vec<DataFile> = files.iter().enumerate().map(write).collect();
    Rows::load(&files, &RowOptions::default(), encoder, &folder.path().join("work"))
}

fn examples(rows: &Rows) -> Vec<Example> {
    (0..rows.len()).map(|row| rows.example(row).unwrap()).collect()
}

#[test]
fn rows_of_several_files_come_in_order_and_know_where_they_are_from() {
    let encoder = encoder(1024);
    let rows = load(&[&["first", "second"], &[], &["third"]], &encoder).unwrap();
    let expected = ["first", "second", "third"].map(|text| encode(&encoder, &Row::Text(text.into())));
    assert_eq!(examples(&rows), expected);
    assert_eq!(rows.describe(&[2, 0, 1]).unwrap(), "row 1 of part-2.jsonl and rows 1, 2 of part-0.jsonl");
}

#[test]
fn a_bad_row_is_named_with_its_own_file_and_number() {
    let error = load(&[&["good"], &["good", ""]], &encoder(1024)).err().unwrap();
    assert_eq!(error.to_string(), "part-1.jsonl row 2: text is empty");
    let error = load(&[&[], &[]], &encoder(1024)).err().unwrap();
    assert!(error.to_string().starts_with("part-0.jsonl and 1 more has no rows"), "{error}");
}

/// Rows of one file.
fn load_lines(lines: &[&str], options: &RowOptions) -> Result<Rows, DataError> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("train.jsonl");
    fs::write(&path, lines.join("\n")).unwrap();
    Rows::load(&[DataFile::new(&path)], options, &encoder(1024), &folder.path().join("work"))
}

#[test]
fn all_bad_rows_are_counted_and_the_first_ten_named() {
    let bad: Vec<&str> = ["{\"text\": \"\"}", "{", "{\"text\": 4}"].into_iter().cycle().take(12).collect();
    let lines = [&["{\"text\": \"good\"}"][..], &bad].concat();
    let error = load_lines(&lines, &RowOptions::default()).err().unwrap().to_string();
    assert!(error.starts_with("12 rows can't be used"), "{error}");
    assert!(error.contains("train.jsonl row 2: text is empty") && error.contains("row 11: text is empty"), "{error}");
    assert!(!error.contains("row 12") && error.ends_with("and 2 more"), "{error}");
}

#[test]
fn bad_rows_are_left_out_and_counted_if_the_user_says_so() {
    let skipping = RowOptions { on_bad_row: OnBadRow::Skip, ..RowOptions::default() };
    let lines = ["{\"text\": \"ab\", \"id\": 1}", "{\"text\": \"\", \"id\": 2}", "not json", "{\"text\": \"cd\"}"];
    let rows = load_lines(&lines, &skipping).unwrap();
    assert_eq!((rows.len(), rows.skipped()), (2, 2));
    assert_eq!(rows.describe(&[1]).unwrap(), "row 4 of train.jsonl");
    assert_eq!(rows.notes().lines(), ["column \"id\" is not used (1 row)"], "rows that are left out are not noted");
    let overview = Overview::new(&rows, &rows, &encoder(8).vocabulary).unwrap();
    assert_eq!((overview.train.skipped_rows, overview.notes.lines().len()), (2, 1));
    let page = overview.page(Marking::Brackets);
    assert!(page.contains("\nnot used as it stands\n  column \"id\" is not used (2 rows)\n"), "{page}");
    let (train, eval) = rows.hold_out(0.5, 1).unwrap();
    assert_eq!((train.skipped(), eval.skipped()), (2, 0));
    assert_eq!((train.notes().lines().len(), eval.notes().lines().len()), (1, 0));
    let error = load_lines(&lines[1..3], &skipping).err().unwrap().to_string();
    assert!(error.starts_with("all 2 rows are bad") && error.contains("row 1: text is empty"), "{error}");
}

#[test]
fn a_file_that_breaks_off_is_never_skipped() {
    let skipping = RowOptions { on_bad_row: OnBadRow::Skip, ..RowOptions::default() };
    let error = load_lines(&["[{\"text\": \"a\"}, {\"text\": \"b\"}, {\"te"], &skipping).err().unwrap().to_string();
    assert!(error.starts_with("train.jsonl row 3: the list does not end"), "{error}");
    let pretty = ["{", "  \"text\": \"a\"", "}"];
    let error = load_lines(&pretty, &skipping).err().unwrap().to_string();
    assert!(error.contains("pretty-printed"), "{error}");
}

#[test]
fn a_column_that_no_row_has_is_refused() {
    let columns = [("text".to_owned(), "body".to_owned())].into();
    let options = RowOptions { columns, ..RowOptions::default() };
    let error = load_lines(&["{\"text\": \"a\"}"], &options).err().unwrap().to_string();
    assert_eq!(error, "dataset.columns: no row of train.jsonl has a column \"body\" (text: body); correct the name");
    assert_eq!(load_lines(&["{\"body\": \"ab\"}"], &options).unwrap().len(), 1);
}

#[test]
fn dropped_rows_are_counted_and_data_that_is_all_dropped_is_refused() {
    let dropping = Encoder { overflow: Overflow::Drop, ..encoder(8) };
    let rows = load(&[&["short", "much too long", "tiny"]], &dropping).unwrap();
    assert_eq!((rows.len(), rows.dropped()), (2, 1));
    assert_eq!(rows.describe(&[1]).unwrap(), "row 3 of part-0.jsonl");
    let error = load(&[&["much too long", "and this as well"]], &dropping).err().unwrap();
    assert!(error.to_string().contains("all 2 rows are longer than training.maxLength (8)"), "{error}");
}

#[test]
fn held_out_rows_are_the_same_rows_in_the_same_order() {
    let texts: Vec<String> = (0..20).map(|i| "x".repeat(i + 2)).collect();
    let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
    let whole = examples(&load(&[&texts], &encoder(1024)).unwrap());
    let (train, eval) = load(&[&texts], &encoder(1024)).unwrap().hold_out(0.25, 7).unwrap();
    assert_eq!((train.len(), eval.len()), (15, 5));
    for part in [&train, &eval] {
        let examples = examples(part);
        assert!(examples.is_sorted_by_key(|example| example.tokens.len()), "the file's order");
        assert!(examples.iter().all(|example| whole.contains(example)));
        let lengths: Vec<u32> = examples.iter().map(|example| example.tokens.len() as u32).collect();
        assert_eq!(part.lengths(), lengths);
    }
    let error = load(&[&["alone"]], &encoder(1024)).unwrap().hold_out(0.5, 7).err().unwrap();
    assert!(error.to_string().starts_with("part-0.jsonl has 1 row: evalFraction"), "{error}");
}

#[test]
fn totals_are_those_of_the_rows_that_were_picked() {
    let encoder = encoder(8);
    let texts = ["ab", "abcdefghijk", "abc", "abcd"];
    let totals = |rows: &Rows, other: &Rows| Overview::new(rows, other, &encoder.vocabulary).unwrap();
    let rows = load(&[&texts], &encoder).unwrap();
    // An end token each but for the truncated one; the first token of a row is not predicted.
    let expected = Totals {
        rows: 4,
        tokens: 3 + 8 + 4 + 5,
        trained_tokens: 2 + 7 + 3 + 4,
        truncated_rows: 1,
        ..Totals::default()
    };
    assert_eq!(totals(&rows, &rows).train, expected);
    let (train, eval) = rows.hold_out(0.25, 1).unwrap();
    let Overview { train: of_train, eval: of_eval, .. } = totals(&train, &eval);
    assert_eq!((of_train.rows, of_eval.rows), (3, 1));
    assert_eq!(of_train.tokens + of_eval.tokens, expected.tokens);
    assert_eq!(of_train.trained_tokens + of_eval.trained_tokens, expected.trained_tokens);
    let lengths: u64 = train.lengths().iter().map(|&length| u64::from(length)).sum();
    assert_eq!(of_train.tokens, lengths);
}

#[test]
fn the_overview_shows_the_first_row_with_its_mask() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("train.jsonl");
    let turns = r#"[{"role": "user", "content": "hé?"}, {"role": "assistant", "content": "yes ☕"}]"#;
    fs::write(&path, format!("{{\"messages\": {turns}}}\n")).unwrap();
    let encoder = encoder(1024);
    let rows = Rows::load(&[DataFile::new(&path)], &RowOptions::default(), &encoder, folder.path()).unwrap();
    let page = Overview::new(&rows, &rows, &encoder.vocabulary).unwrap().page(Marking::Brackets);
    assert!(
        page.starts_with("                rows        tokens       trained   truncated     dropped     skipped\n"),
        "{page}"
    );
    let example = "row 1 of train.jsonl, what is trained between ⟦ and ⟧:\n<|im_start|>user\nhé?<|im_end|>\n\
        <|im_start|>assistant\n⟦yes ☕<|im_end|>⟧\n";
    assert!(page.ends_with(example), "{page}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    #[test]
    fn an_epoch_trains_every_token_once_and_splits_no_row(
        texts in prop::collection::vec("[a-z]{2,30}", 1..40), batch in 1u32..4, accumulation in 1u32..4, packing: bool,
    ) {
        let encoder = encoder(32);
        let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
        let rows = load(&[&texts], &encoder).unwrap();
        let training = Training {
            per_device_train_batch_size: batch,
            gradient_accumulation_steps: accumulation,
            max_length: 32,
            packing,
            num_train_epochs: 1.0,
            ..Training::default()
        };
        let batches = Batches::new(rows.lengths(), &training);
        let mut seen = Vec::new();
        for micro in (0..batches.total_steps()).flat_map(|step| batches.step(step)) {
            let micro = micro_batch(&rows, micro).unwrap();
            let (mut tokens, mut targets) = (micro.tokens.as_slice(), micro.targets.as_slice());
            for length in micro.row_lengths {
                let (row, rest) = tokens.split_at(length);
                let (row_targets, rest_targets) = targets.split_at(length);
                prop_assert_eq!(row_targets.last(), Some(&IGNORE), "no row predicts the next one's first token");
                seen.push((row.to_vec(), row_targets.to_vec()));
                (tokens, targets) = (rest, rest_targets);
            }
            prop_assert!(tokens.is_empty() && targets.is_empty());
        }
        let encoded = texts.iter().map(|text| encode(&encoder, &Row::Text((*text).into())));
        let mut expected: Vec<_> = encoded.map(|example| (example.tokens, example.targets)).collect();
        seen.sort();
        expected.sort();
        prop_assert_eq!(seen, expected);
    }
}
