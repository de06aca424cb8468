//! Points in time and spans as people write them on a command line, and points in time as they read them.

use std::str::FromStr;
use std::time::Duration;

use anyhow::anyhow;
use evictd_core::time::StoreTime;
use evictd_ops::config::HumanDuration;
use jiff::Timestamp;

const DAY: Duration = Duration::from_hours(24);

/// A point in time, said outright or as its distance from now.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum When {
    /// `2027-01-31T12:00:00Z`, or milliseconds since 1970, as Unkey writes it.
    At(StoreTime),
    /// `90d`: so far from now.
    Away(Duration),
}

/// A span: `90d`, `12h`, `30s`, or milliseconds, as Unkey writes it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Span(pub(crate) Duration);

impl When {
    /// The point in time, where a span counts from `now` into the future.
    pub(crate) fn after(self, now: StoreTime) -> StoreTime {
        match self {
            Self::At(time) => time,
            Self::Away(span) => now.after(span),
        }
    }

    /// As [`Self::after`], of something that is to end, later than now.
    pub(crate) fn in_the_future(self, now: StoreTime) -> anyhow::Result<StoreTime> {
        let end = self.after(now);
        anyhow::ensure!(
            end > now,
            "--expires lies in the past: it means {}. A number alone is milliseconds since 1970; a span from now has a \
             unit, such as 90d",
            written(end)
        );
        Ok(end)
    }

    /// The point in time, where a span counts from `now` into the past.
    pub(crate) fn before(self, now: StoreTime) -> StoreTime {
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
                "write it as 2027-01-31T12:00:00Z, as milliseconds since 1970, or as a span such as 90d or 12h"
            )
        })
    }
}

impl FromStr for Span {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        let millis = whole_number(text).map(|millis| Duration::from_millis(millis.unsigned_abs()));
        millis.or_else(|| with_unit(text)).map(Self).ok_or_else(|| {
            anyhow!("write a whole number and a unit, such as 90d, 12h or 30s, or milliseconds")
        })
    }
}

/// Digits and nothing else.
fn whole_number(text: &str) -> Option<i64> {
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok())?
}

/// Days, besides the units of the configuration.
fn with_unit(text: &str) -> Option<Duration> {
    match text.strip_suffix('d') {
        Some(days) => DAY.checked_mul(days.trim_end().parse().ok()?),
        None => text.parse::<HumanDuration>().ok().map(Duration::from),
    }
}

/// `2026-08-21T12:34:56.789Z`; what lies beyond the year 9999 is written as milliseconds.
pub(crate) fn written(time: StoreTime) -> String {
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
    fn a_time_is_read_in_every_form() {
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
    fn an_end_in_the_past_is_refused_with_what_was_understood() {
        let end = |text: &str| text.parse::<When>().unwrap().in_the_future(NOON);
        assert_eq!(end("90d").unwrap(), StoreTime(NOON.0 + 90 * 86_400_000_000));
        for (text, understood) in [
            ("90", "1970-01-01T00:00:00.090Z"),
            ("2020-01-01T00:00:00Z", "2020-01-01T00:00:00.000Z"),
            ("0s", "2026-01-31T12:00:00.000Z"),
        ] {
            let error = end(text).unwrap_err().to_string();
            assert!(error.contains(understood) && error.contains("90d"), "{error}");
        }
    }

    #[test]
    fn what_is_no_time_is_refused_with_examples() {
        for text in
            ["", "-5", "d", "1.5d", "tomorrow", "2026-01-31", "99999999999999999999", "99999999999999999d"]
        {
            let error = text.parse::<When>().unwrap_err().to_string();
            assert!(error.contains("2027-01-31T12:00:00Z") && error.contains("90d"), "{error}");
        }
    }

    #[test]
    fn a_span_without_a_unit_is_milliseconds() {
        for (text, millis) in [("0", 0), ("3600000", 3_600_000), ("7d", 604_800_000), ("250ms", 250)] {
            assert_eq!(text.parse::<Span>().unwrap(), Span(Duration::from_millis(millis)), "{text}");
        }
        for text in ["", "-1", "1y", "soon"] {
            assert!(text.parse::<Span>().unwrap_err().to_string().contains("12h"));
        }
    }

    #[test]
    fn a_time_is_written_to_the_millisecond() {
        assert_eq!(written(NOON), "2026-01-31T12:00:00.000Z");
        assert_eq!(written(StoreTime(1_234)), "1970-01-01T00:00:00.001Z");
        assert_eq!(written(StoreTime(i64::MAX)), "9223372036854775 ms");
    }
}
