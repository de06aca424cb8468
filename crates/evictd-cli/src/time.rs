//! Points in time and durations, as a command line takes and prints them.

use std::str::FromStr;
use std::time::Duration;

use anyhow::anyhow;
use evictd_core::time::StoreTime;
use evictd_ops::config::HumanDuration;
use jiff::Timestamp;

const DAY: Duration = Duration::from_hours(24);

/// A point in time, absolute or relative to now.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum When {
    /// `2027-01-31T12:00:00Z`, or milliseconds since 1970, as Unkey has it.
    At(StoreTime),
    /// `90d`: a distance from now.
    Away(Duration),
}

/// A duration: `90d`, `12h`, `30s`, or milliseconds, as Unkey has it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct TimeSpan(pub(crate) Duration);

impl When {
    /// Returns the point in time; a distance counts from `now` into the future.
    fn after(self, now: StoreTime) -> StoreTime {
        match self {
            Self::At(time) => time,
            Self::Away(span) => now.after(span),
        }
    }

    /// Returns the point in time of an expiry, which must be later than `now`.
    pub fn in_the_future(self, now: StoreTime) -> anyhow::Result<StoreTime> {
        let end = self.after(now);
        anyhow::ensure!(
            end > now,
            "--expires is in the past: it means {}. A plain number is milliseconds since 1970; a duration from now \
             has a unit, such as 90d",
            format_time(end)
        );
        Ok(end)
    }

    /// Returns the point in time; a distance counts from `now` into the past.
    pub fn before(self, now: StoreTime) -> StoreTime {
        match self {
            Self::At(time) => time,
            Self::Away(span) => now.before(span),
        }
    }
}

impl FromStr for When {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        let millis = || whole_number(text).map(StoreTime::from_millis);
        let rfc_3339 = || text.parse::<Timestamp>().ok().map(|time| StoreTime(time.as_microsecond()));
        let at = || millis().or_else(rfc_3339).map(Self::At);
        with_unit(text).map(Self::Away).or_else(at).ok_or_else(|| {
            anyhow!(
                "write it as 2027-01-31T12:00:00Z, as milliseconds since 1970, or as a duration such as 90d or 12h"
            )
        })
    }
}

impl FromStr for TimeSpan {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        let millis = whole_number(text).map(|millis| Duration::from_millis(millis.unsigned_abs()));
        millis.or_else(|| with_unit(text)).map(Self).ok_or_else(|| {
            anyhow!("write a whole number and a unit, such as 90d, 12h or 30s, or milliseconds")
        })
    }
}

/// Parses digits and nothing else.
fn whole_number(text: &str) -> Option<i64> {
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok())?
}

/// Parses days, and the units of the configuration.
fn with_unit(text: &str) -> Option<Duration> {
    match text.strip_suffix('d') {
        Some(days) => DAY.checked_mul(days.trim_end().parse().ok()?),
        None => text.parse::<HumanDuration>().ok().map(Duration::from),
    }
}

/// Formats as `2026-08-21T12:34:56.789Z`, and a time after the year 9999 as milliseconds.
pub fn format_time(time: StoreTime) -> String {
    match Timestamp::from_microsecond(time.0) {
        Ok(time) => format!("{time:.3}"),
        Err(_) => format!("{} ms", time.as_millis()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOON: StoreTime = StoreTime(1_769_860_800_000_000);

    #[test]
    fn time_is_parsed_in_every_form() {
        for (text, expected) in [
            ("2026-01-31T12:00:00Z", NOON),
            ("2026-01-31T14:00:00.000+02:00", NOON),
            ("1769860800000", NOON),
            ("0", StoreTime(0)),
            ("2d", StoreTime(NOON.0 + 2 * 86_400_000_000)),
            ("90s", StoreTime(NOON.0 + 90_000_000)),
        ] {
            assert_eq!(text.parse::<When>().unwrap().after(NOON), expected, "{text}");
        }
        assert_eq!("1h".parse::<When>().unwrap().before(NOON), StoreTime(NOON.0 - 3_600_000_000));
        assert_eq!("1769860800000".parse::<When>().unwrap().before(StoreTime(0)), NOON);
    }

    #[test]
    fn past_expiry_is_refused_with_its_meaning() {
        let end = |text: &str| text.parse::<When>().unwrap().in_the_future(NOON);
        assert_eq!(end("90d").unwrap(), StoreTime(NOON.0 + 90 * 86_400_000_000));
        for (text, meaning) in [
            ("90", "1970-01-01T00:00:00.090Z"),
            ("2020-01-01T00:00:00Z", "2020-01-01T00:00:00.000Z"),
            ("0s", "2026-01-31T12:00:00.000Z"),
        ] {
            let error = end(text).unwrap_err().to_string();
            assert!(error.contains(meaning) && error.contains("90d"), "{error}");
        }
    }

    #[test]
    fn malformed_time_is_refused_with_examples() {
        for text in
            ["", "-5", "d", "1.5d", "tomorrow", "2026-01-31", "99999999999999999999", "99999999999999999d"]
        {
            let error = text.parse::<When>().unwrap_err().to_string();
            assert!(error.contains("2027-01-31T12:00:00Z") && error.contains("90d"), "{error}");
        }
    }

    #[test]
    fn duration_without_unit_is_milliseconds() {
        for (text, millis) in [("0", 0), ("3600000", 3_600_000), ("7d", 604_800_000), ("250ms", 250)] {
            assert_eq!(text.parse::<TimeSpan>().unwrap(), TimeSpan(Duration::from_millis(millis)), "{text}");
        }
        for text in ["", "-1", "1y", "soon"] {
            assert!(text.parse::<TimeSpan>().unwrap_err().to_string().contains("12h"));
        }
    }

    #[test]
    fn time_is_formatted_to_the_millisecond() {
        assert_eq!(format_time(NOON), "2026-01-31T12:00:00.000Z");
        assert_eq!(format_time(StoreTime(1_234)), "1970-01-01T00:00:00.001Z");
        assert_eq!(format_time(StoreTime(i64::MAX)), "9223372036854775 ms");
    }
}
