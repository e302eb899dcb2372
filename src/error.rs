//! The crate's one error type. Every message says what was expected and what came.

use std::fmt;

/// What can go wrong. Each variant carries the offending numbers, so that the text can name them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Error {
    /// A tensor or slice has the wrong shape or length.
    Shape {
        /// The argument's name.
        what: String,
        /// What would have been accepted.
        expected: String,
        /// What was passed.
        got: String,
    },
    /// A parameter has a value outside its domain.
    Value {
        /// The parameter's name.
        what: String,
        /// What would have been accepted.
        expected: String,
        /// What was passed.
        got: String,
    },
    /// A tensor has an element type that the operation does not take.
    Dtype {
        /// The argument's name.
        what: String,
        /// What would have been accepted.
        expected: String,
        /// What was passed.
        got: String,
    },
    /// A tensor lives on a device, or in memory, that the operation cannot use.
    Memory {
        /// The argument's name.
        what: String,
        /// What would have been accepted.
        expected: String,
        /// What was passed.
        got: String,
    },
    /// An input holds a NaN or an infinity. Nothing was written.
    NonFinite {
        /// The argument's name.
        what: String,
        /// Row-major index of the first offending element.
        index: usize,
        /// The element, printed.
        got: String,
    },
    /// The pool has fewer free rows than the call needs. Nothing was written.
    Exhausted {
        /// Rows that the call needs.
        needed: usize,
        /// Rows that are free.
        free: usize,
    },
    /// The CUDA driver refused a call, or is not there.
    Cuda {
        /// What was tried.
        what: String,
        /// What the driver said, and what to do about it.
        why: String,
    },
    /// A saved cache that cannot be read back: truncated, damaged, foreign, newer, or of another model.
    File {
        /// What is wrong with it.
        why: String,
    },
    /// A combination that this version does not implement.
    Unsupported {
        /// What was asked for.
        what: String,
        /// Why it is refused, and what to use instead.
        why: String,
    },
}

/// `Result` with the crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// A [`Error::Shape`].
    pub fn shape(what: impl Into<String>, expected: impl fmt::Display, got: impl fmt::Display) -> Self {
        Self::Shape { what: what.into(), expected: expected.to_string(), got: got.to_string() }
    }

    /// A [`Error::Value`].
    pub fn value(what: impl Into<String>, expected: impl fmt::Display, got: impl fmt::Display) -> Self {
        Self::Value { what: what.into(), expected: expected.to_string(), got: got.to_string() }
    }

    /// A [`Error::Dtype`].
    pub fn dtype(what: impl Into<String>, expected: impl fmt::Display, got: impl fmt::Display) -> Self {
        Self::Dtype { what: what.into(), expected: expected.to_string(), got: got.to_string() }
    }

    /// A [`Error::Memory`].
    pub fn memory(what: impl Into<String>, expected: impl fmt::Display, got: impl fmt::Display) -> Self {
        Self::Memory { what: what.into(), expected: expected.to_string(), got: got.to_string() }
    }

    /// A [`Error::Cuda`].
    pub fn cuda(what: impl Into<String>, why: impl fmt::Display) -> Self {
        Self::Cuda { what: what.into(), why: why.to_string() }
    }

    /// A [`Error::File`].
    pub fn file(why: impl Into<String>) -> Self {
        Self::File { why: why.into() }
    }

    /// A [`Error::Unsupported`].
    pub fn unsupported(what: impl Into<String>, why: impl fmt::Display) -> Self {
        Self::Unsupported { what: what.into(), why: why.to_string() }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Shape { what, expected, got } => write!(f, "{what}: expected shape {expected}, got {got}"),
            Self::Value { what, expected, got } => write!(f, "{what}: expected {expected}, got {got}"),
            Self::Dtype { what, expected, got } => write!(f, "{what}: expected dtype {expected}, got {got}"),
            Self::Memory { what, expected, got } => write!(f, "{what}: expected {expected}, got {got}"),
            Self::NonFinite { what, index, got } => {
                write!(f, "{what}: expected finite numbers, got {got} at row-major index {index}; nothing was written")
            }
            Self::Exhausted { needed, free } => {
                write!(f, "pool: expected at least {needed} free rows, got {free}; nothing was written")
            }
            Self::Cuda { what, why } => write!(f, "CUDA: {what}: {why}"),
            Self::File { why } => write!(f, "saved cache: {why}"),
            Self::Unsupported { what, why } => write!(f, "{what} is not supported: {why}"),
        }
    }
}

impl std::error::Error for Error {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_name_what_was_expected_and_what_came() {
        assert_eq!(Error::shape("k", "[2, 8]", "[3]").to_string(), "k: expected shape [2, 8], got [3]");
        let e = Error::NonFinite { what: "v".into(), index: 7, got: "NaN".into() };
        assert!(e.to_string().contains("NaN at row-major index 7"));
    }
}
