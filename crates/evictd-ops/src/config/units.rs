//! Durations and sizes as people write them: `30s`, `64KiB`.

use std::fmt;
use std::ops::Deref;
use std::str::FromStr;
use std::time::Duration;

use evictd_core::time::micros;
use serde::{Deserialize, Serialize};

/// A duration written as a whole number and a unit: `250ms`, `30s`, `5m`, `1h`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default, Deserialize, Serialize)]
#[serde(try_from = "String", into = "String")]
pub struct HumanDuration(pub Duration);

/// A number of bytes written as a whole number and a unit: `512B`, `64KiB`, `512MiB`, `4GiB`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default, Deserialize, Serialize)]
#[serde(try_from = "String", into = "String")]
pub struct ByteSize(pub u64);

#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum UnitError {
    #[error("`{0}` isn't a duration; write a whole number and a unit, such as 250ms, 30s, 5m or 1h")]
    Duration(String),
    #[error("`{0}` isn't a size; write a whole number and a unit, such as 512B, 64KiB, 512MiB or 4GiB")]
    Size(String),
}

/// Units of time in microseconds, largest first.
const TIMES: [(&str, u64); 5] =
    [("h", 3_600_000_000), ("m", 60_000_000), ("s", 1_000_000), ("ms", 1_000), ("us", 1)];

/// Units of size in bytes, largest first.
const SIZES: [(&str, u64); 5] =
    [("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10), ("B", 1)];

/// Parses a whole number followed by one of `units`.
fn parse(text: &str, units: &[(&str, u64)]) -> Option<u64> {
    let text = text.trim();
    let (number, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit())?);
    let (_, factor) = units.iter().find(|(name, _)| *name == unit.trim_start())?;
    number.parse::<u64>().ok()?.checked_mul(*factor)
}

/// Writes `amount` in the largest of `units` that needs no fraction, and zero as `zero`.
fn print(amount: u64, units: &[(&str, u64)], zero: &str, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    let exact = |(_, factor): &&(&str, u64)| amount >= *factor && amount.is_multiple_of(*factor);
    match units.iter().find(exact) {
        Some((unit, factor)) => write!(f, "{}{unit}", amount / factor),
        // Only zero fits no unit, because the smallest unit is 1.
        None => f.write_str(zero),
    }
}

impl FromStr for HumanDuration {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<Self, UnitError> {
        let micros = parse(text, &TIMES).ok_or_else(|| UnitError::Duration(text.to_owned()))?;
        Ok(Self(Duration::from_micros(micros)))
    }
}

impl fmt::Display for HumanDuration {
    /// Truncates to microseconds.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        print(micros(self.0), &TIMES, "0s", f)
    }
}

impl Deref for HumanDuration {
    type Target = Duration;

    fn deref(&self) -> &Duration {
        &self.0
    }
}

impl From<HumanDuration> for Duration {
    fn from(duration: HumanDuration) -> Self {
        duration.0
    }
}

impl From<Duration> for HumanDuration {
    fn from(duration: Duration) -> Self {
        Self(duration)
    }
}

impl ByteSize {
    /// As a length in memory, saturating.
    pub fn as_usize(self) -> usize {
        usize::try_from(self.0).unwrap_or(usize::MAX)
    }
}

impl FromStr for ByteSize {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<Self, UnitError> {
        parse(text, &SIZES).map(Self).ok_or_else(|| UnitError::Size(text.to_owned()))
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        print(self.0, &SIZES, "0B", f)
    }
}

impl Deref for ByteSize {
    type Target = u64;

    fn deref(&self) -> &u64 {
        &self.0
    }
}

impl From<ByteSize> for u64 {
    fn from(size: ByteSize) -> Self {
        size.0
    }
}

macro_rules! as_string {
    ($name:ident) => {
        impl TryFrom<String> for $name {
            type Error = UnitError;

            fn try_from(text: String) -> Result<Self, UnitError> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(value: $name) -> Self {
                value.to_string()
            }
        }
    };
}

as_string!(HumanDuration);
as_string!(ByteSize);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_round_trip() {
        for text in ["250ms", "30s", "5m", "1h", "90s", "1500us", "0s"] {
            let duration: HumanDuration = text.parse().unwrap();
            assert_eq!(duration.to_string(), text);
        }
        assert_eq!("5 m".parse(), Ok(HumanDuration(Duration::from_mins(5))));
        assert_eq!(HumanDuration(Duration::from_hours(2)).to_string(), "2h");
    }

    #[test]
    fn sizes_round_trip() {
        for text in ["512B", "64KiB", "512MiB", "4GiB", "2TiB", "1025B", "0B"] {
            let size: ByteSize = text.parse().unwrap();
            assert_eq!(size.to_string(), text);
        }
        assert_eq!("64KiB".parse(), Ok(ByteSize(65_536)));
        assert_eq!(ByteSize(65_536).as_usize(), 65_536);
    }

    #[test]
    fn invalid_text_is_refused_with_examples() {
        for text in ["", "30", "s", "1.5s", "-1s", "30 seconds", "99999999999999999h"] {
            let error = text.parse::<HumanDuration>().unwrap_err();
            assert!(error.to_string().ends_with("such as 250ms, 30s, 5m or 1h"), "{error}");
        }
        for text in ["64", "64KB", "64kib", "99999999999TiB"] {
            let error = text.parse::<ByteSize>().unwrap_err();
            assert!(error.to_string().ends_with("such as 512B, 64KiB, 512MiB or 4GiB"), "{error}");
        }
    }
}
