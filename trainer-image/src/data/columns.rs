//! A row as its file has it: columns by their names, before anyone looked at what they hold.

use std::{
    collections::{BTreeMap, BTreeSet},
    rc::Rc,
};

use serde_json::{Map, Value};

/// A row before anyone looked at what it holds: its columns.
pub(super) type Columns = Map<String, Value>;

/// Names of the columns that are to be read. Of tables, others are left alone.
pub(super) type Wanted = BTreeSet<String>;

/// A row as its file has it.
#[derive(Debug, Default)]
pub(super) struct RawRow {
    /// Its number, from 1: of its line, or of the row in a table or a list.
    pub number: u64,
    /// Its columns; none of a table is null.
    pub columns: Columns,
    /// Columns of a table whose values JSON can't hold, and why.
    pub unreadable: BTreeMap<String, String>,
    /// Columns of a table that were not read.
    pub unread: Rc<[String]>,
}

/// A row that can't be read.
#[derive(Debug)]
pub(super) struct BadRow {
    /// Its number.
    pub row: u64,
    /// What is wrong with it.
    pub problem: String,
    /// Whether nothing can be read after it.
    pub is_fatal: bool,
}

impl BadRow {
    /// A row that can't be read, and others after it can.
    pub fn alone(row: u64, problem: impl Into<String>) -> Self {
        Self { row, problem: problem.into(), is_fatal: false }
    }

    /// A row after which nothing can be read.
    pub fn fatal(row: u64, problem: impl Into<String>) -> Self {
        Self { row, problem: problem.into(), is_fatal: true }
    }
}
