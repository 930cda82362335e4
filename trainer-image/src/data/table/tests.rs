//! Tables as Parquet and Arrow have them, in all the types in which data sets are stored.

use std::{fs::File, io::Write, path::Path, sync::Arc};

use ::parquet::{arrow::ArrowWriter, basic::Compression, file::properties::WriterProperties};
use arrow::{
    array::*,
    datatypes::{DataType, Field, Fields, Int8Type},
    ipc::{
        CompressionType,
        writer::{FileWriter, IpcWriteOptions, StreamWriter},
    },
};
use serde_json::{Value, json};

use super::super::{DataFile, container::Container};

use crate::data::columns::{BadRow, RawRow, Wanted};

/// Writes a table as one of the kinds of files that hold tables.
type Write1 = fn(&RecordBatch) -> Vec<u8>;

pub(crate) fn parquet(batch: &RecordBatch) -> Vec<u8> {
    parquet_with(batch, Compression::SNAPPY)
}

fn parquet_with(batch: &RecordBatch, compression: Compression) -> Vec<u8> {
    let properties = WriterProperties::builder().set_compression(compression).build();
    let mut writer = ArrowWriter::try_new(Vec::new(), batch.schema(), Some(properties)).unwrap();
    writer.write(batch).unwrap();
    writer.into_inner().unwrap()
}

pub(crate) fn stream(batch: &RecordBatch) -> Vec<u8> {
    let mut writer = StreamWriter::try_new(Vec::new(), &batch.schema()).unwrap();
    writer.write(batch).unwrap();
    writer.finish().unwrap();
    writer.into_inner().unwrap()
}

pub(crate) fn compressed_file(batch: &RecordBatch) -> Vec<u8> {
    let options = IpcWriteOptions::default().try_with_compression(Some(CompressionType::ZSTD)).unwrap();
    let mut writer = FileWriter::try_new_with_options(Vec::new(), &batch.schema(), options).unwrap();
    writer.write(batch).unwrap();
    writer.finish().unwrap();
    writer.into_inner().unwrap()
}

const KINDS: [Write1; 3] = [parquet, stream, compressed_file];

/// A table of these columns.
pub(crate) fn table(columns: Vec<(&str, ArrayRef)>) -> RecordBatch {
    RecordBatch::try_from_iter_with_nullable(columns.into_iter().map(|(name, array)| (name, array, true))).unwrap()
}

/// A column of one row of turns, whose contents these are; a null is a turn without.
pub(crate) fn turns(turns: &[(&str, Option<&str>)]) -> ArrayRef {
    let roles: ArrayRef = Arc::new(StringArray::from_iter_values(turns.iter().map(|(role, _)| role)));
    let contents: ArrayRef = Arc::new(LargeStringArray::from_iter(turns.iter().map(|(_, content)| *content)));
    let names: ArrayRef = Arc::new(StringArray::new_null(turns.len()));
    let fields = [("role", &roles), ("content", &contents), ("name", &names)];
    let fields: Fields =
        fields.iter().map(|(name, array)| Field::new(*name, array.data_type().clone(), true)).collect();
    let structs = StructArray::new(fields, vec![roles, contents, names], None);
    list(Arc::new(structs))
}

/// A row that is a list.
fn list(items: ArrayRef) -> ArrayRef {
    let offsets = arrow::buffer::OffsetBuffer::from_lengths([items.len()]);
    Arc::new(ListArray::new(Arc::new(Field::new("item", items.data_type().clone(), true)), offsets, items, None))
}

fn strings(values: &[&str]) -> ArrayRef {
    Arc::new(StringArray::from_iter_values(values))
}

fn open(content: &[u8], wanted: &[&str]) -> Result<Container, String> {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(content).unwrap();
    let wanted: Wanted = wanted.iter().map(|name| (*name).to_owned()).collect();
    Container::open(&DataFile::new(file.path()), &wanted)
}

fn read(content: &[u8], wanted: &[&str]) -> Result<Vec<RawRow>, BadRow> {
    let mut container = open(content, wanted).map_err(|problem| BadRow::fatal(0, problem))?;
    std::iter::from_fn(|| container.next_row().transpose()).collect()
}

/// The one value of a column, in every kind of file.
fn value(array: ArrayRef) -> Result<Value, String> {
    let table = table(vec![("a", array)]);
    let mut values: Vec<Result<Value, String>> = Vec::new();
    for write in KINDS {
        let rows = read(&write(&table), &["a"]).unwrap();
        let RawRow { columns, unreadable, .. } = rows.into_iter().next().unwrap();
        values.push(match unreadable.get("a") {
            Some(problem) => Err(problem.clone()),
            None => Ok(columns.get("a").cloned().unwrap_or_default()),
        });
    }
    values.dedup();
    assert_eq!(values.len(), 1, "{values:?}");
    values.remove(0)
}

#[test]
fn every_type_that_json_has_a_value_for_is_read_alike_from_every_kind_of_file() {
    let dictionary: DictionaryArray<Int8Type> = ["x", "y"].into_iter().collect();
    let mut map = MapBuilder::new(None, StringBuilder::new(), Int64Builder::new());
    map.keys().append_value("k");
    map.values().append_value(7);
    map.append(true).unwrap();
    let decimal = |value: i128, scale| Decimal128Array::from(vec![value]).with_precision_and_scale(38, scale).unwrap();
    let arrays: Vec<(ArrayRef, Value)> = vec![
        (strings(&["é"]), json!("é")),
        (Arc::new(LargeStringArray::from(vec!["é"])), json!("é")),
        (Arc::new(StringViewArray::from(vec!["longer than twelve bytes"])), json!("longer than twelve bytes")),
        (Arc::new(BinaryArray::from(vec!["é".as_bytes()])), json!("é")),
        (Arc::new(dictionary.slice(1, 1)), json!("y")),
        (Arc::new(BooleanArray::from(vec![true])), json!(true)),
        (Arc::new(Int8Array::from(vec![-7])), json!(-7)),
        (Arc::new(UInt64Array::from(vec![u64::MAX])), json!(u64::MAX)),
        (Arc::new(Float32Array::from(vec![0.1])), json!(0.1)),
        (Arc::new(Float64Array::from(vec![1e300])), json!(1e300)),
        (Arc::new(decimal(1250, 2)), json!(12.5)),
        (Arc::new(decimal(1200, 2)), json!(12)),
        (Arc::new(map.finish()), json!({"k": 7})),
        (list(strings(&["a", "b"])), json!(["a", "b"])),
        (
            turns(&[("user", Some("hi")), ("assistant", None)]),
            json!([
                {"role": "user", "content": "hi"}, {"role": "assistant", "content": null},
            ]),
        ),
        (Arc::new(StringArray::new_null(1)), Value::Null),
    ];
    for (array, expected) in arrays {
        assert_eq!(value(Arc::clone(&array)), Ok(expected), "{}", array.data_type());
    }
}

#[test]
fn a_value_that_json_has_not_is_refused_with_its_column_and_type() {
    let time = || -> ArrayRef { Arc::new(TimestampMillisecondArray::from(vec![7])) };
    let in_struct = StructArray::from(vec![(Arc::new(Field::new("time", time().data_type().clone(), true)), time())]);
    let huge = Decimal128Array::from(vec![i128::MAX / 10]).with_precision_and_scale(38, 2).unwrap();
    let arrays: Vec<(ArrayRef, &str)> = vec![
        (Arc::new(Date32Array::from(vec![7])), "a is of type Date32, which JSON has no value for; write it as text"),
        (time(), "a is of type Timestamp(ms), which JSON has no value for"),
        (Arc::new(Time64MicrosecondArray::from(vec![7])), "a is of type Time64"),
        (Arc::new(BinaryArray::from(vec![&b"caf\xe9"[..]])), "a holds bytes that are not UTF-8 (type Binary)"),
        (Arc::new(Float64Array::from(vec![f64::NAN])), "a is NaN, which JSON has no number for"),
        (Arc::new(Float32Array::from(vec![f32::NEG_INFINITY])), "a is -inf"),
        (Arc::new(huge), "which has more digits than a number of JSON holds"),
        (list(Arc::new(in_struct)), "a[0].time is of type Timestamp(ms)"),
    ];
    for (array, expected) in arrays {
        let problem = value(Arc::clone(&array)).unwrap_err();
        assert!(problem.contains(expected), "{}: {problem}", array.data_type());
    }
}

#[test]
fn columns_that_are_not_wanted_are_named_and_not_looked_at() {
    let date: ArrayRef = Arc::new(Date32Array::from(vec![7, 8]));
    let table = table(vec![("made", date), ("text", strings(&["a", "b"])), ("source", strings(&["c", "d"]))]);
    for write in KINDS {
        let rows = read(&write(&table), &["text", "other"]).unwrap();
        assert_eq!(rows.len(), 2);
        for (row, number) in rows.iter().zip(1..) {
            assert_eq!((row.number, row.columns.len(), row.unreadable.len()), (number, 1, 0));
            assert_eq!(*row.unread, ["made".to_owned(), "source".to_owned()]);
        }
    }
}

#[test]
fn every_compression_of_parquet_is_read() {
    let table = table(vec![("text", strings(&["a"; 300]))]);
    for compression in [
        Compression::UNCOMPRESSED,
        Compression::SNAPPY,
        Compression::ZSTD(Default::default()),
        Compression::LZ4_RAW,
        Compression::GZIP(Default::default()),
    ] {
        let rows = read(&parquet_with(&table, compression), &["text"]).unwrap();
        assert_eq!(rows.len(), 300);
        assert_eq!(rows[299].number, 300);
    }
}

#[test]
fn a_table_that_was_cut_short_says_so() {
    let table = table(vec![("text", strings(&["a", "b"]))]);
    for (write, expected) in
        KINDS.into_iter().zip(["not a whole Parquet file", "is the file whole?", "not a whole Arrow file"])
    {
        let whole = write(&table);
        for length in [whole.len() - 8, whole.len() / 2, 9] {
            let error = read(&whole[..length], &["text"]).unwrap_err();
            assert!(error.is_fatal && error.problem.contains(expected), "{length}: {error:?}");
        }
    }
}

#[test]
fn a_table_with_two_columns_of_one_name_is_refused() {
    let fields = [Field::new("text", DataType::Utf8, true), Field::new("text", DataType::Utf8, true)];
    let schema = Arc::new(arrow::datatypes::Schema::new(fields.to_vec()));
    let twice = RecordBatch::try_new(schema, vec![strings(&["a"]), strings(&["b"])]).unwrap();
    for write in KINDS {
        let error = read(&write(&twice), &["text"]).unwrap_err();
        assert!(error.problem.contains("two columns \"text\""), "{error:?}");
    }
}

/// A file of a table.
pub(crate) fn write(path: &Path, table: &RecordBatch) {
    File::create(path).unwrap().write_all(&parquet(table)).unwrap();
}
