//! Rows of Parquet and Arrow files: batches of columns, as JSON would have them.

#[cfg(test)]
pub(crate) mod tests;

use std::{
    collections::BTreeSet,
    panic::{AssertUnwindSafe, catch_unwind},
    rc::Rc,
};

use arrow::{array::RecordBatch, datatypes::Schema};

use super::{
    cells,
    columns::{BadRow, RawRow, Wanted},
};

/// Gives one batch of rows after the other.
pub(super) trait Batches {
    /// The next batch.
    ///
    /// # Errors
    /// The file is damaged.
    fn next_batch(&mut self) -> Result<Option<RecordBatch>, String>;
}

/// Reads a table row by row.
pub(super) struct Table {
    batches: Box<dyn Batches>,
    wanted: Wanted,
    batch: Option<RecordBatch>,
    /// Rows of the batch that were read.
    at: usize,
    row: u64,
    unread: Rc<[String]>,
}

impl Table {
    /// The table that these batches make; of its columns, only those that are wanted are looked at.
    pub fn new(batches: impl Batches + 'static, wanted: &Wanted) -> Self {
        Self { batches: Box::new(batches), wanted: wanted.clone(), batch: None, at: 0, row: 0, unread: Rc::default() }
    }

    /// Columns that the batches leave out.
    pub fn without(self, unread: Vec<String>) -> Self {
        Self { unread: unread.into(), ..self }
    }

    /// The next row.
    ///
    /// # Errors
    /// The file is damaged, or has two columns of one name.
    pub fn next_row(&mut self) -> Result<Option<RawRow>, BadRow> {
        self.row += 1;
        loop {
            match &self.batch {
                Some(batch) if self.at < batch.num_rows() => break,
                _ => {}
            }
            self.at = 0;
            let next = guarded(|| self.batches.next_batch());
            self.batch = next.map_err(|problem| BadRow::fatal(self.row, problem))?;
            match &self.batch {
                None => return Ok(None),
                Some(batch) => self.look_at(&batch.schema()).map_err(|problem| BadRow::fatal(self.row, problem))?,
            }
        }
        let Some(batch) = &self.batch else { return Ok(None) };
        let mut row = RawRow { number: self.row, unread: Rc::clone(&self.unread), ..RawRow::default() };
        let schema = batch.schema();
        for (field, column) in schema.fields().iter().zip(batch.columns()) {
            let name = field.name();
            if !self.wanted.contains(name) {
                continue;
            }
            match cells::value(column, self.at) {
                Ok(value) if value.is_null() => {}
                Ok(value) => {
                    row.columns.insert(name.clone(), value);
                }
                Err(refused) => {
                    let problem = format!("{name}{} {}", refused.path, refused.problem);
                    row.unreadable.insert(name.clone(), problem);
                }
            }
        }
        self.at += 1;
        Ok(Some(row))
    }

    /// Notes the columns that are not wanted.
    fn look_at(&mut self, schema: &Schema) -> Result<(), String> {
        let mut names = BTreeSet::new();
        for field in schema.fields() {
            if !names.insert(field.name()) {
                return Err(format!("the file has two columns {:?}; rename one", field.name()));
            }
        }
        let left_out = self.unread.iter();
        let all: BTreeSet<&String> =
            left_out.chain(names.into_iter().filter(|name| !self.wanted.contains(*name))).collect();
        self.unread = all.into_iter().cloned().collect();
        Ok(())
    }
}

/// Readers of tables panic on some damaged files, which must not end the program.
pub(super) fn guarded<T>(read: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
    let damaged = |_| Err("the file is damaged; upload it again".to_owned());
    catch_unwind(AssertUnwindSafe(read)).unwrap_or_else(damaged)
}
