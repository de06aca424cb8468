//! The trace of a run, line by line, if it is wanted.

use std::collections::VecDeque;
use std::fmt;

use crate::time::Moment;

/// The destination of lines.
#[derive(Debug, Default)]
pub enum SimTrace {
    #[default]
    Off,
    /// Keeps the last lines.
    Last(usize, VecDeque<String>),
    Print,
    /// Adds every line to a digest, for comparing runs.
    Digest(Box<Digest>),
}

/// The digest of a whole trace.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Digest {
    pub lines: u64,
    pub bytes: u64,
    state: u64,
    /// The state after each 4,096 lines, to find where two runs begin to differ.
    marks: Vec<u64>,
}

impl Default for Digest {
    fn default() -> Self {
        Self { lines: 0, bytes: 0, state: 0xcbf2_9ce4_8422_2325, marks: Vec::new() }
    }
}

impl Digest {
    fn add(&mut self, line: &str) {
        for byte in line.bytes().chain([b'\n']) {
            self.state = (self.state ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
        self.lines += 1;
        self.bytes += line.len() as u64 + 1;
        if self.lines.is_multiple_of(4_096) {
            self.marks.push(self.state);
        }
    }

    /// Returns a line before which the two differ.
    pub fn differs_before(&self, other: &Self) -> u64 {
        let same = self.marks.iter().zip(&other.marks).take_while(|(one, other)| one == other).count();
        (same as u64 + 1) * 4_096
    }
}

impl SimTrace {
    /// Keeps the last `lines`.
    pub fn last(lines: usize) -> Self {
        Self::Last(lines, VecDeque::with_capacity(lines))
    }

    /// Whether lines are wanted. To be checked before one is formatted.
    pub fn is_on(&self) -> bool {
        !matches!(self, Self::Off)
    }

    pub fn line(&mut self, now: Moment, what: fmt::Arguments<'_>) {
        match self {
            Self::Off => {}
            Self::Last(limit, lines) => {
                if lines.len() == *limit {
                    lines.pop_front();
                }
                lines.push_back(format!("{now} {what}"));
            }
            Self::Print => println!("{now} {what}"),
            Self::Digest(digest) => digest.add(&format!("{now} {what}")),
        }
    }

    pub fn kept(&self) -> Vec<String> {
        match self {
            Self::Last(_, lines) => lines.iter().cloned().collect(),
            _ => Vec::new(),
        }
    }
}

/// Traces a line. It is formatted only if it is wanted.
macro_rules! trace {
    ($ctx:expr, $($what:tt)*) => {
        if $ctx.trace.is_on() {
            $ctx.trace.line($ctx.now, format_args!($($what)*));
        }
    };
}
pub(crate) use trace;
