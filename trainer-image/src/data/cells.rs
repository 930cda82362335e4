//! Values of tables as JSON. A value that JSON has no faithful form for is refused rather than changed.

use arrow::{
    array::{Array, ArrayRef, AsArray, downcast_dictionary_array, downcast_integer_array},
    datatypes::{DataType, Float16Type, Float32Type, Float64Type},
    util::display::array_value_to_string,
};
use serde_json::{Map, Number, Value};

/// A value that JSON can't hold.
#[derive(Debug, PartialEq)]
pub(super) struct Refused {
    /// Where in its column it lies: `[2].time`.
    pub path: String,
    /// What is wrong with it.
    pub problem: String,
}

impl Refused {
    fn new(problem: String) -> Self {
        Self { path: String::new(), problem }
    }

    fn of_type(kind: &DataType) -> Self {
        Self::new(format!("is of type {kind}, which JSON has no value for; write it as text"))
    }

    fn inside(self, step: &str) -> Self {
        Self { path: format!("{step}{}", self.path), ..self }
    }
}

/// A value of a column. Fields of structs that are null are left out, as a table has every field in every struct; but
/// `content` stays, as a turn of calls may say by it that it has none.
///
/// # Errors
/// JSON has no such value: dates and times, bytes that are no text, NaN, decimals of more digits than a number holds.
pub(super) fn value(array: &dyn Array, row: usize) -> Result<Value, Refused> {
    if array.is_null(row) {
        return Ok(Value::Null);
    }
    match array.data_type() {
        DataType::Null => Ok(Value::Null),
        DataType::Boolean => Ok(array.as_boolean().value(row).into()),
        kind if kind.is_integer() => Ok(integer(array, row)),
        DataType::Float16 => float(array.as_primitive::<Float16Type>().value(row).to_string()),
        DataType::Float32 => float(array.as_primitive::<Float32Type>().value(row).to_string()),
        DataType::Float64 => float(array.as_primitive::<Float64Type>().value(row).to_string()),
        DataType::Decimal32(..) | DataType::Decimal64(..) | DataType::Decimal128(..) | DataType::Decimal256(..) => {
            decimal(array, row)
        }
        DataType::Utf8 => Ok(array.as_string::<i32>().value(row).into()),
        DataType::LargeUtf8 => Ok(array.as_string::<i64>().value(row).into()),
        DataType::Utf8View => Ok(array.as_string_view().value(row).into()),
        // Strings of writers that do not annotate them.
        kind @ DataType::Binary => bytes(array.as_binary::<i32>().value(row), kind),
        kind @ DataType::LargeBinary => bytes(array.as_binary::<i64>().value(row), kind),
        kind @ DataType::BinaryView => bytes(array.as_binary_view().value(row), kind),
        kind @ DataType::FixedSizeBinary(_) => bytes(array.as_fixed_size_binary().value(row), kind),
        DataType::List(_) => items(&array.as_list::<i32>().value(row)),
        DataType::LargeList(_) => items(&array.as_list::<i64>().value(row)),
        DataType::ListView(_) => items(&array.as_list_view::<i32>().value(row)),
        DataType::LargeListView(_) => items(&array.as_list_view::<i64>().value(row)),
        DataType::FixedSizeList(..) => items(&array.as_fixed_size_list().value(row)),
        DataType::Struct(fields) => {
            let columns = fields.iter().zip(array.as_struct().columns());
            let mut object = Map::new();
            for (field, column) in columns {
                let name = field.name();
                let value = value(column, row).map_err(|refused| refused.inside(&format!(".{name}")))?;
                if !value.is_null() || name == "content" {
                    object.insert(name.clone(), value);
                }
            }
            Ok(Value::Object(object))
        }
        DataType::Map(..) => map(&array.as_map().value(row)),
        kind @ DataType::Dictionary(..) => downcast_dictionary_array!(
            array => match array.key(row) {
                Some(key) if key < array.values().len() => value(array.values(), key),
                _ => Err(Refused::of_type(kind)),
            },
            kind => Err(Refused::of_type(kind)),
        ),
        kind => Err(Refused::of_type(kind)),
    }
}

fn integer(array: &dyn Array, row: usize) -> Value {
    downcast_integer_array!(
        array => array.value(row).into(),
        _ => Value::Null,
    )
}

/// The number with the fewest digits that is this float, as JSON writers have it.
fn float(text: String) -> Result<Value, Refused> {
    let number = text.parse::<f64>().ok().and_then(Number::from_f64);
    number.map(Value::Number).ok_or_else(|| Refused::new(format!("is {text}, which JSON has no number for")))
}

fn decimal(array: &dyn Array, row: usize) -> Result<Value, Refused> {
    let text = array_value_to_string(array, row).map_err(|error| Refused::new(error.to_string()))?;
    let shortest = match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.'),
        false => &text,
    };
    let number: Option<Number> = match shortest.parse::<i64>() {
        Ok(integer) => Some(integer.into()),
        Err(_) => {
            let float = shortest.parse::<f64>().ok().filter(|float| float.to_string() == shortest);
            float.and_then(Number::from_f64)
        }
    };
    number
        .map(Value::Number)
        .ok_or_else(|| Refused::new(format!("is {text}, which has more digits than a number of JSON holds")))
}

fn bytes(bytes: &[u8], kind: &DataType) -> Result<Value, Refused> {
    match std::str::from_utf8(bytes) {
        Ok(text) => Ok(text.into()),
        Err(_) => Err(Refused::new(format!("holds bytes that are not UTF-8 (type {kind}); write it as a string"))),
    }
}

fn items(list: &ArrayRef) -> Result<Value, Refused> {
    let item = |i| value(list, i).map_err(|refused| refused.inside(&format!("[{i}]")));
    (0..list.len()).map(item).collect::<Result<Vec<_>, _>>().map(Value::Array)
}

/// Keys and values, as an object.
fn map(entries: &arrow::array::StructArray) -> Result<Value, Refused> {
    let [keys, values] = entries.columns() else { return Err(Refused::of_type(entries.data_type())) };
    let mut object = Map::new();
    for i in 0..entries.len() {
        let Value::String(key) = value(keys, i)? else { return Err(Refused::of_type(entries.data_type())) };
        let value = value(values, i).map_err(|refused| refused.inside(&format!(".{key}")))?;
        object.insert(key, value);
    }
    Ok(Value::Object(object))
}
