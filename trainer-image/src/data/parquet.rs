//! Rows of Parquet files: columns of strings, and lists of structs, as JSON would have them.

use std::{fs::File, sync::Arc};

use ::parquet::{
    errors::ParquetError,
    file::reader::{FileReader, SerializedFileReader},
    record::{Field, Row, reader::RowIter},
    schema::types::Type,
};
use serde_json::Value;

use super::{
    container::{BadRow, Columns},
    formats::COLUMNS,
};

/// Reads a table row by row.
pub(super) struct Table {
    rows: RowIter<'static>,
    row: u64,
}

impl Table {
    /// Opens a table. Of its columns only those that a format knows are read, if there are any.
    ///
    /// # Errors
    /// The file is not whole.
    pub fn open(file: File) -> Result<Self, String> {
        let damaged = |error: ParquetError| format!("not a whole Parquet file: {error}; upload it again");
        let reader = SerializedFileReader::new(file).map_err(damaged)?;
        let schema = reader.metadata().file_metadata().schema();
        let known = schema.get_fields().iter().filter(|column| COLUMNS.contains(&column.name()));
        let known: Vec<Arc<Type>> = known.cloned().collect();
        let projection = match known.is_empty() {
            true => None,
            false => Some(Type::group_type_builder(schema.name()).with_fields(known).build().map_err(damaged)?),
        };
        let rows = RowIter::from_file_into(Box::new(reader)).project(projection).map_err(damaged)?;
        Ok(Self { rows, row: 0 })
    }

    /// The next row's number and columns; a null column is none.
    ///
    /// # Errors
    /// The file is damaged.
    pub fn next_row(&mut self) -> Result<Option<(u64, Columns)>, BadRow> {
        self.row += 1;
        match self.rows.next() {
            None => Ok(None),
            Some(Ok(row)) => Ok(Some((self.row, columns(&row)))),
            Some(Err(error)) => Err(BadRow {
                row: self.row,
                problem: format!(
                    "can't be read: {error}; upload the file again, written with snappy, zstd, gzip or lz4"
                ),
            }),
        }
    }
}

/// The fields of a struct that are not null: Parquet has every field of a schema in every row.
fn columns(row: &Row) -> Columns {
    let fields = row.get_column_iter().filter(|(_, field)| !matches!(field, Field::Null));
    fields.map(|(name, field)| (name.clone(), value(field))).collect()
}

fn value(field: &Field) -> Value {
    match field {
        Field::Null => Value::Null,
        Field::Bool(flag) => Value::from(*flag),
        Field::Str(text) => Value::from(text.as_str()),
        // Strings of writers that do not annotate them.
        Field::Bytes(bytes) => bytes.as_utf8().map(Value::from).unwrap_or_default(),
        Field::Group(row) => Value::Object(columns(row)),
        Field::ListInternal(list) => list.elements().iter().map(value).collect(),
        // Numbers; no format takes maps and dates.
        other => serde_json::from_str(&other.to_string()).unwrap_or_default(),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::path::Path;

    use ::parquet::{
        basic::Compression,
        data_type::{ByteArray, ByteArrayType},
        file::{properties::WriterProperties, writer::SerializedFileWriter},
        schema::parser::parse_message_type,
    };
    use serde_json::json;

    use super::*;

    /// Values of a leaf column with their definition and repetition levels.
    type Leaf<'a> = (&'a [&'a str], &'a [i16], &'a [i16]);

    /// Writes a table of string columns.
    pub(in crate::data) fn write(path: &Path, schema: &str, compression: Compression, leaves: &[Leaf<'_>]) {
        let schema = Arc::new(parse_message_type(schema).unwrap());
        let properties = Arc::new(WriterProperties::builder().set_compression(compression).build());
        let mut writer = SerializedFileWriter::new(File::create(path).unwrap(), schema, properties).unwrap();
        let mut group = writer.next_row_group().unwrap();
        for (values, definitions, repetitions) in leaves {
            let values: Vec<ByteArray> = values.iter().map(|&value| value.into()).collect();
            let mut column = group.next_column().unwrap().unwrap();
            let typed = column.typed::<ByteArrayType>();
            // Columns that are always there have no levels.
            let (definitions, repetitions) = match definitions.is_empty() {
                true => (None, None),
                false => (Some(*definitions), Some(*repetitions)),
            };
            typed.write_batch(&values, definitions, repetitions).unwrap();
            column.close().unwrap();
        }
        group.close().unwrap();
        writer.close().unwrap();
    }

    /// As datasets and pandas write a column of messages.
    pub(in crate::data) const MESSAGES: &str = "message schema { optional group messages (LIST) { repeated group list { \
        optional group element { optional binary role (STRING); optional binary content (STRING); } } } }";

    fn read(path: &Path) -> Vec<(u64, Columns)> {
        let mut table = Table::open(File::open(path).unwrap()).unwrap();
        std::iter::from_fn(|| table.next_row().unwrap()).collect()
    }

    #[test]
    fn lists_of_structs_become_messages_whatever_the_compression() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("t.parquet");
        for compression in [
            Compression::UNCOMPRESSED,
            Compression::SNAPPY,
            Compression::ZSTD(Default::default()),
            Compression::LZ4_RAW,
        ] {
            // Two turns, then one whose content is null.
            let roles: Leaf<'_> = (&["user", "assistant", "user"], &[4, 4, 4], &[0, 1, 0]);
            let contents: Leaf<'_> = (&["hi", "yes"], &[4, 4, 3], &[0, 1, 0]);
            write(&path, MESSAGES, compression, &[roles, contents]);
            let rows = read(&path);
            let turns = json!([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]);
            assert_eq!(rows[0], (1, json!({"messages": turns}).as_object().unwrap().clone()));
            assert_eq!(rows[1], (2, json!({"messages": [{"role": "user"}]}).as_object().unwrap().clone()));
            assert_eq!(rows.len(), 2);
        }
    }

    #[test]
    fn strings_without_annotation_are_read_and_unknown_columns_are_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("t.parquet");
        let schema = "message schema { required binary text; required binary source (STRING); }";
        write(&path, schema, Compression::UNCOMPRESSED, &[(&["a é"], &[], &[]), (&["web"], &[], &[])]);
        assert_eq!(read(&path), [(1, json!({"text": "a é"}).as_object().unwrap().clone())]);
    }

    #[test]
    fn a_table_that_was_cut_short_says_so() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("t.parquet");
        std::fs::write(&path, b"PAR1 and then nothing").unwrap();
        let error = Table::open(File::open(&path).unwrap()).err().unwrap();
        assert!(error.starts_with("not a whole Parquet file: "), "{error}");
    }
}
