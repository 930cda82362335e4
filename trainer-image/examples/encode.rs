//! Encodes rows with a model's tokenizer and chat template, and prints what is trained:
//! `cargo run -p tunesmith-trainer --example encode -- FOLDER ROWS.jsonl [YYYY-MM-DD]`. A line of output is a row's:
//! `{"tokens": […], "trained": […]}`, with a 1 for each token that is learned, or `{"error": "…"}`. `e2e/oracle` compares
//! them with transformers'.

use std::{error::Error, io::Write, path::Path};

use serde_json::{Value, json};
use tunesmith_crds::fine_tune_job::{DataFormat, OnBadRow, Overflow};
use tunesmith_engine::IGNORE;
use tunesmith_trainer::data::{
    DataFile, Encoder, RowOptions, Vocabulary,
    notes::Notes,
    rows::{Next, Reader},
    template::TemplateDate,
};

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [folder, rows, day @ ..] = arguments.as_slice() else {
        return Err("usage: encode FOLDER ROWS.jsonl [DAY]".into());
    };
    let date = day.first().map_or(Ok(TemplateDate::today()), |day| day.parse().map(TemplateDate::Pinned))?;
    let encoder = Encoder {
        vocabulary: Vocabulary::load_on(Path::new(folder), None, date)?,
        max_length: usize::MAX,
        overflow: Overflow::Error,
        assistant_only: true,
    };
    let options = RowOptions { format: DataFormat::Auto, columns: Default::default(), on_bad_row: OnBadRow::Skip };
    let file = DataFile::new(Path::new(rows));
    let mut reader = Reader::open(&file, &options)?;
    let (mut notes, mut out) = (Notes::default(), std::io::stdout().lock());
    while let Some(next) = reader.next_row(&mut notes)? {
        let result = match next {
            Next::Row(_, row) => encoder.encode(&row, &mut notes),
            Next::Bad(_, problem) => Err(problem),
        };
        let line: Value = match result {
            Ok(Some(example)) => {
                let learned = example.targets.iter().map(|&target| u8::from(target != IGNORE));
                // A token is predicted where the one before it stands.
                let trained: Vec<u8> = std::iter::once(0).chain(learned).take(example.tokens.len()).collect();
                json!({"tokens": example.tokens, "trained": trained})
            }
            Ok(None) => json!({"error": "dropped"}),
            Err(problem) => json!({"error": problem}),
        };
        writeln!(out, "{line}")?;
    }
    notes.lines().iter().for_each(|note| eprintln!("{note}"));
    Ok(())
}
