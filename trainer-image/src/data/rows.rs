//! Rows of one data file after the other, whatever its container and format, and what can be wrong with them.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;
use tunesmith_crds::fine_tune_job::{DataFormat, Dataset, OnBadRow};

use super::{
    DataError, DataFile,
    columns::{BadRow, RawRow, Wanted},
    container::Container,
    formats::{COLUMNS, Row, detect, other_columns, parse, refuse_other_kinds, unused, uses},
    notes::Notes,
};

/// How rows are read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RowOptions {
    /// Shape of a row.
    pub format: DataFormat,
    /// The files' names of columns, by those of the format.
    pub columns: BTreeMap<String, String>,
    /// What becomes of rows that can't be used.
    pub on_bad_row: OnBadRow,
}

impl RowOptions {
    /// What a job says of its rows.
    ///
    /// # Errors
    /// Its columns name what no format has, or one column twice.
    pub fn new(Dataset { format, columns, on_bad_row, .. }: &Dataset) -> Result<Self, String> {
        if let Some(unknown) = columns.keys().find(|name| !COLUMNS.contains(&name.as_str())) {
            return Err(format!(
                "dataset.columns: {unknown:?} is no column of a format; on the left stands one of {}, and on the right the \
                 files' name for it",
                COLUMNS.join(", ")
            ));
        }
        let mut names = BTreeSet::new();
        if let Some(twice) = columns.values().find(|column| !names.insert(*column)) {
            return Err(format!("dataset.columns: {twice:?} stands for two columns; name it once"));
        }
        Ok(Self { format: *format, columns: columns.clone(), on_bad_row: *on_bad_row })
    }

    /// Names of all columns that are looked at.
    fn wanted(&self) -> Wanted {
        let known = COLUMNS.into_iter().chain(other_columns()).map(str::to_owned);
        known.chain(self.columns.values().cloned()).collect()
    }

    /// Gives columns the names that the format has for them.
    fn rename(&self, row: &mut RawRow, found: &mut BTreeSet<String>) {
        if self.columns.is_empty() {
            return;
        }
        let renamed: Vec<_> = self
            .columns
            .iter()
            .map(|(name, column)| {
                let value = row.columns.shift_remove(column);
                let problem = row.unreadable.remove(column);
                (name, column, value, problem)
            })
            .collect();
        for (name, column, value, problem) in renamed {
            if value.is_some() || problem.is_some() {
                found.insert(name.clone());
            }
            // A column that has the format's name, and that the user has not named, is another.
            let displaced = row.columns.shift_remove(name).map(|other| (format!("{name} (not {column})"), other));
            row.columns.extend(displaced);
            row.columns.extend(value.map(|value| (name.clone(), value)));
            if let Some(problem) = problem {
                row.unreadable.insert(name.clone(), problem);
            }
        }
    }

    /// Adds the files' name of a column to a problem that begins with the format's.
    fn in_the_files_words(&self, problem: String) -> String {
        let first = problem.split(|c: char| !(c.is_alphanumeric() || c == '_')).next().unwrap_or_default();
        match self.columns.get(first) {
            Some(column) => format!("{problem} (dataset.columns: {first} is {column:?} in the file)"),
            None => problem,
        }
    }
}

/// What comes next in a file.
#[derive(Debug, PartialEq)]
pub enum Next {
    /// A row and its number.
    Row(u64, Row),
    /// A row that can't be used: its number, and what is wrong with which field.
    Bad(u64, String),
}

/// Reads the rows of a file one after the other.
pub struct Reader<'a> {
    file: &'a DataFile,
    container: Container,
    options: &'a RowOptions,
    /// The format, once a row has told it.
    format: DataFormat,
    /// Names of dataset.columns that some row has.
    found: BTreeSet<String>,
}

impl<'a> Reader<'a> {
    /// Opens a file.
    ///
    /// # Errors
    /// It can't be read.
    pub fn open(file: &'a DataFile, options: &'a RowOptions) -> Result<Self, DataError> {
        let unreadable = |problem| DataError::Unreadable { file: file.name.clone(), problem };
        let container = Container::open(file, &options.wanted()).map_err(unreadable)?;
        Ok(Self { file, container, options, format: options.format, found: BTreeSet::new() })
    }

    /// The next row. `notes` counts what of it is not used.
    ///
    /// # Errors
    /// The file can't be read on.
    pub fn next_row(&mut self, notes: &mut Notes) -> Result<Option<Next>, DataError> {
        let raw = match self.container.next_row() {
            Ok(Some(raw)) => raw,
            Ok(None) => return Ok(None),
            Err(BadRow { row, problem, is_fatal: false }) => return Ok(Some(Next::Bad(row, problem))),
            Err(BadRow { row, problem, is_fatal: true }) => {
                return Err(DataError::Row { file: self.file.name.clone(), row, problem });
            }
        };
        let (number, mut of_row) = (raw.number, Notes::default());
        Ok(Some(match self.row(raw, &mut of_row) {
            Ok(row) => {
                notes.extend(of_row);
                Next::Row(number, row)
            }
            Err(problem) => Next::Bad(number, self.options.in_the_files_words(problem)),
        }))
    }

    fn row(&mut self, mut raw: RawRow, notes: &mut Notes) -> Result<Row, String> {
        self.options.rename(&mut raw, &mut self.found);
        let RawRow { mut columns, unreadable, unread, .. } = raw;
        // A column whose value JSON can't hold is there all the same.
        columns.extend(unreadable.keys().map(|name| (name.clone(), Value::from("?"))));
        refuse_other_kinds(&columns, |column| self.options.columns.values().any(|mapped| mapped == column))?;
        let format = match self.format {
            DataFormat::Auto => detect(&columns, &unread)?,
            format => format,
        };
        if let Some((_, problem)) = unreadable.iter().find(|(name, _)| uses(format, name)) {
            return Err(problem.clone());
        }
        self.format = format;
        unread.iter().for_each(|name| notes.add(unused(name)));
        parse(format, columns, notes)
    }

    /// The columns of dataset.columns that some row has, by the format's names.
    pub(super) fn found(&self) -> &BTreeSet<String> {
        &self.found
    }
}

#[cfg(test)]
mod tests {
    use std::{io::Write, path::Path, sync::Arc};

    use arrow::array::{Date32Array, StringArray};
    use flate2::write::GzEncoder;
    use serde_json::json;

    use super::{super::tables, *};

    fn read_file(path: &Path) -> Result<Vec<(u64, Row)>, String> {
        let file = DataFile::new(path);
        read_as(&file, &RowOptions::default()).map(|(rows, _)| rows)
    }

    fn read_as(file: &DataFile, options: &RowOptions) -> Result<(Vec<(u64, Row)>, Notes), String> {
        let mut reader = Reader::open(file, options).map_err(|error| error.to_string())?;
        let (mut rows, mut notes) = (Vec::new(), Notes::default());
        while let Some(next) = reader.next_row(&mut notes).map_err(|error| error.to_string())? {
            match next {
                Next::Row(number, row) => rows.push((number, row)),
                Next::Bad(number, problem) => return Err(format!("{} row {number}: {problem}", file.name)),
            }
        }
        Ok((rows, notes))
    }

    fn read(name: &str, content: &[u8]) -> Result<Vec<(u64, Row)>, String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        std::fs::write(&path, content).unwrap();
        read_file(&path)
    }

    fn gzip(content: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), flate2::Compression::default());
        encoder.write_all(content).unwrap();
        encoder.finish().unwrap()
    }

    const TWO_ROWS: &[u8] = b"{\"text\": \"a\"}\n{\"text\": \"b\"}\n";

    #[test]
    fn a_bad_row_is_named_with_file_row_and_field() {
        let good = br#"{"messages": [{"role": "user", "content": "hi"}]}"#;
        for (bad, expected) in [
            (&br#"{"messages": [{"role": "user"}]}"#[..], "messages[0].content is missing"),
            (br#"{"text": "a"}"#, "messages is missing"),
            (br#"{"messages": ["#, "not valid JSON"),
            (b"[1]", "not a JSON object"),
            (b"{\"text\": \"\xff\"}", "not UTF-8 at byte 11"),
        ] {
            let error = read("train.jsonl", &[good, &b"\n"[..], bad].concat()).unwrap_err();
            assert!(error.starts_with("train.jsonl row 2: ") && error.contains(expected), "{error}");
        }
    }

    #[test]
    fn compressed_lines_are_told_by_their_first_bytes_whatever_the_name() {
        let expected = read("train.jsonl", TWO_ROWS).unwrap();
        assert_eq!(expected.len(), 2);
        // Concatenated parts, as `cat a.gz b.gz` makes them.
        let (first, second) = TWO_ROWS.split_at(14);
        for name in ["train.jsonl.gz", "train.jsonl"] {
            assert_eq!(read(name, &gzip(TWO_ROWS)).unwrap(), expected);
            assert_eq!(read(name, &[gzip(first), gzip(second)].concat()).unwrap(), expected);
            assert_eq!(read(name, &zstd::encode_all(TWO_ROWS, 3).unwrap()).unwrap(), expected);
        }
        assert_eq!(read("train.jsonl.gz", TWO_ROWS).unwrap(), expected, "plain, but for its name");
    }

    #[test]
    fn a_compressed_file_that_was_cut_short_names_the_row_where_it_ends() {
        let rows: String = (0_u64..2000).map(|i| format!("{{\"text\": \"row {i} {}\"}}\n", i * i * i)).collect();
        for whole in [gzip(rows.as_bytes()), zstd::encode_all(rows.as_bytes(), 3).unwrap()] {
            let error = read("train.jsonl.gz", &whole[..whole.len() / 2]).unwrap_err();
            assert!(error.starts_with("train.jsonl.gz row ") && error.contains("is the file whole?"), "{error}");
        }
    }

    #[test]
    fn a_bad_row_of_a_table_is_named_with_file_row_and_field() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("train.parquet");
        tables::write(
            &path,
            &tables::table(vec![("messages", tables::turns(&[("user", Some("a")), ("bot", Some("b"))]))]),
        );
        let error = read_file(&path).unwrap_err();
        assert!(error.starts_with("train.parquet row 1: messages[1].role is \"bot\""), "{error}");
        tables::write(&path, &tables::table(vec![("question", Arc::new(StringArray::from(vec!["a"])))]));
        let error = read_file(&path).unwrap_err();
        assert!(error.starts_with("train.parquet row 1: its columns are [question]"), "{error}");
    }

    #[test]
    fn a_value_that_json_has_not_is_refused_only_where_its_column_is_used() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("train.parquet");
        let text = || Arc::new(StringArray::from(vec!["a"]));
        let date = || Arc::new(Date32Array::from(vec![7]));
        tables::write(&path, &tables::table(vec![("instruction", text()), ("input", date()), ("output", text())]));
        let error = read_file(&path).unwrap_err();
        assert_eq!(
            error,
            "train.parquet row 1: input is of type Date32, which JSON has no value for; write it as text"
        );
        tables::write(&path, &tables::table(vec![("text", text()), ("context", date()), ("made", date())]));
        let (rows, notes) = read_as(&DataFile::new(&path), &RowOptions::default()).unwrap();
        assert_eq!(rows, [(1, Row::Text("a".into()))]);
        assert_eq!(notes.lines(), ["column \"context\" is not used (1 row)", "column \"made\" is not used (1 row)"]);
    }

    #[test]
    fn a_file_of_another_kind_is_named() {
        let error = read("train.jsonl", b"PK\x03\x04rest").unwrap_err();
        assert!(error.starts_with("train.jsonl: it is a zip archive; unpack it"), "{error}");
        let mut tar = vec![0; 512];
        tar[257..262].copy_from_slice(b"ustar");
        let error = read("train.tar.gz", &gzip(&tar)).unwrap_err();
        assert!(error.starts_with("train.tar.gz: it is a tar archive"), "{error}");
        let error = read("train.parquet.gz", &gzip(b"PAR1")).unwrap_err();
        assert!(error.contains("it is a compressed Parquet or Arrow file; decompress it"), "{error}");
        assert!(read("train.parquet", b"PAR1").unwrap_err().starts_with("train.parquet: not a whole Parquet file"));
    }

    fn options(columns: &[(&str, &str)]) -> Result<RowOptions, String> {
        let columns: Value = columns.iter().map(|(name, column)| ((*name).to_owned(), json!(column))).collect();
        let dataset = json!({"train": {"uri": "s3://data/a"}, "columns": columns});
        RowOptions::new(&serde_json::from_value(dataset).unwrap())
    }

    fn read_mapped(content: &str, columns: &[(&str, &str)]) -> Result<(Vec<(u64, Row)>, Notes), String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("train");
        std::fs::write(&path, content).unwrap();
        read_as(&DataFile::new(&path), &options(columns).unwrap())
    }

    #[test]
    fn columns_may_have_other_names() {
        let expected = Row::PromptCompletion { prompt: "a".into(), completion: "b".into() };
        let names = [("prompt", "question"), ("completion", "the answer")];
        for content in [
            "{\"question\": \"a\", \"the answer\": \"b\"}\n",
            "[{\"question\": \"a\", \"the answer\": \"b\"}]",
            "question,the answer\na,b\n",
        ] {
            assert_eq!(read_mapped(content, &names).unwrap().0[0].1, expected);
        }
        // Names may be exchanged, and a column that is not named is another.
        let exchanged = read_mapped("prompt,completion\nb,a\n", &[("prompt", "completion"), ("completion", "prompt")]);
        assert_eq!(exchanged.unwrap().0[0].1, expected);
        let (rows, notes) = read_mapped("question,prompt,completion\na,x,b\n", &[("prompt", "question")]).unwrap();
        assert_eq!(rows[0].1, expected);
        assert_eq!(notes.lines(), ["column \"prompt (not question)\" is not used (1 row)"]);
        let chosen =
            read_mapped("{\"prompt\": \"a\", \"chosen\": \"b\", \"rejected\": \"c\"}", &[("completion", "chosen")]);
        let (rows, notes) = chosen.unwrap();
        assert_eq!(rows[0].1, expected);
        assert_eq!(notes.lines(), ["column \"rejected\" is not used (1 row)"]);
    }

    #[test]
    fn a_problem_of_a_renamed_column_is_told_in_the_files_words() {
        let error = read_mapped("question,answer\na,\n", &[("prompt", "question"), ("completion", "answer")]);
        let error = error.unwrap_err();
        assert!(error.contains("its columns are [prompt]"), "{error}");
        let names = [("prompt", "question"), ("completion", "answer")];
        let error = read_mapped("{\"question\": \"a\", \"answer\": 4}", &names).unwrap_err();
        assert_eq!(
            error,
            "train row 1: completion is not a string (dataset.columns: completion is \"answer\" in the file)"
        );
    }

    #[test]
    fn columns_that_no_format_has_are_refused() {
        let error = options(&[("question", "prompt")]).unwrap_err();
        assert!(error.starts_with("dataset.columns: \"question\" is no column of a format"), "{error}");
        let error = options(&[("prompt", "a"), ("completion", "a")]).unwrap_err();
        assert!(error.contains("\"a\" stands for two columns"), "{error}");
    }
}
