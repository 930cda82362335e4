//! What is done to the operator, one file a question.

mod change;
mod fail_over;
mod idle;
mod life;
mod restart;

pub(super) use self::fail_over::End;
