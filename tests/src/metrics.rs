//! A parser for `/metrics`: the Prometheus text format.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail};

use crate::http;

/// One scrape.
#[derive(Clone, Debug, Default)]
pub struct Scrape {
    samples: Vec<Sample>,
}

#[derive(Clone, PartialEq, Debug)]
struct Sample {
    name: String,
    labels: BTreeMap<String, String>,
    value: f64,
}

impl Sample {
    fn is(&self, name: &str, labels: &[(&str, &str)]) -> bool {
        self.name == name
            && labels.iter().all(|(label, value)| self.labels.get(*label).is_some_and(|own| own == value))
    }
}

impl Scrape {
    /// Scrapes `url` (`http://127.0.0.1:7089/metrics`).
    pub fn get(url: &str) -> Result<Self> {
        let answer = http::Client::new().get(url)?;
        if answer.status != 200 {
            bail!("{url} answered {}: {}", answer.status, answer.text);
        }
        Self::parse(&answer.text).with_context(|| format!("reading {url}"))
    }

    /// Reads the text format.
    pub fn parse(text: &str) -> Result<Self> {
        let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
        let sample = |line| parse_sample(line).with_context(|| format!("this is not a sample: {line}"));
        Ok(Self { samples: lines.map(sample).collect::<Result<_>>()? })
    }

    /// Returns the sum of all series of `name` that have at least these `labels`. `None` if there is no such series,
    /// which is not the same as zero.
    pub fn value(&self, name: &str, labels: &[(&str, &str)]) -> Option<f64> {
        let mut values =
            self.samples.iter().filter(|sample| sample.is(name, labels)).map(|sample| sample.value);
        let first = values.next()?;
        Some(values.fold(first, |sum, value| sum + value))
    }

    /// Returns the histogram `name`, summed over all series that have at least these `labels`.
    pub fn histogram(&self, name: &str, labels: &[(&str, &str)]) -> Option<Histogram> {
        let bucket_name = format!("{name}_bucket");
        let mut buckets: Vec<(f64, f64)> = Vec::new();
        for sample in self.samples.iter().filter(|sample| sample.is(&bucket_name, labels)) {
            let edge = sample.labels.get("le").and_then(|edge| parse_value(edge))?;
            match buckets.iter_mut().find(|(known, _)| known.total_cmp(&edge).is_eq()) {
                Some((_, count)) => *count += sample.value,
                None => buckets.push((edge, sample.value)),
            }
        }
        buckets.sort_by(|(one, _), (other, _)| one.total_cmp(other));
        Some(Histogram {
            buckets,
            sum: self.value(&format!("{name}_sum"), labels)?,
            count: self.value(&format!("{name}_count"), labels)?,
        })
    }
}

/// A histogram at one moment.
#[derive(Clone, PartialEq, Debug)]
pub struct Histogram {
    /// Upper edge and count of all observations up to it, by rising edge; the last edge is infinite.
    pub buckets: Vec<(f64, f64)>,
    /// The sum of all observations.
    pub sum: f64,
    /// How many observations there were.
    pub count: f64,
}

impl Histogram {
    /// Estimates the `q`-quantile (0 to 1) as Prometheus' `histogram_quantile` does: linear inside a
    /// bucket, the highest finite edge beyond it. `None` if nothing was observed.
    pub fn quantile(&self, q: f64) -> Option<f64> {
        let rank = q * self.count;
        let (mut lower_edge, mut below) = (0.0, 0.0);
        for &(edge, count) in &self.buckets {
            if count > 0.0 && count >= rank {
                let inside = (rank - below) / (count - below);
                return Some(if edge.is_infinite() {
                    lower_edge
                } else {
                    lower_edge + (edge - lower_edge) * inside
                });
            }
            (lower_edge, below) = (edge, count);
        }
        None
    }

    /// Returns how many observations were at most `edge`, which must be an edge of a bucket.
    pub fn at_most(&self, edge: f64) -> Option<f64> {
        self.buckets.iter().find(|(own, _)| own.total_cmp(&edge).is_eq()).map(|&(_, count)| count)
    }
}

/// `name{label="value",..} value [timestamp]`
fn parse_sample(line: &str) -> Option<Sample> {
    let name_end = line.find(|c: char| c == '{' || c.is_ascii_whitespace())?;
    let (name, mut rest) = line.split_at(name_end);
    let mut labels = BTreeMap::new();
    if let Some(inside) = rest.strip_prefix('{') {
        rest = inside;
        loop {
            rest = rest.trim_start_matches([',', ' ']);
            if let Some(after) = rest.strip_prefix('}') {
                rest = after;
                break;
            }
            let (label, quoted) = rest.split_once("=\"")?;
            let (value, after) = parse_quoted(quoted)?;
            labels.insert(label.to_owned(), value);
            rest = after;
        }
    }
    let value = parse_value(rest.split_ascii_whitespace().next()?)?;
    Some(Sample { name: name.to_owned(), labels, value })
}

/// Returns a label's value up to its closing quote, and the rest of the text.
fn parse_quoted(text: &str) -> Option<(String, &str)> {
    let mut value = String::new();
    let mut chars = text.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return Some((value, &text[at + 1..])),
            '\\' => value.push(match chars.next()?.1 {
                'n' => '\n',
                other => other,
            }),
            _ => value.push(c),
        }
    }
    None
}

fn parse_value(text: &str) -> Option<f64> {
    match text {
        "+Inf" => Some(f64::INFINITY),
        "-Inf" => Some(f64::NEG_INFINITY),
        _ => text.parse().ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = r#"
# HELP evictd_agent_verifications_total Answers by code.
# TYPE evictd_agent_verifications_total counter
evictd_agent_verifications_total{code="VALID"} 40
evictd_agent_verifications_total{code="NOT_FOUND",region="eu, \"west\" }"} 2 1700000000000
evictd_agent_lease_remaining_seconds 26.5
up{} NaN
evictd_agent_propagation_lag_seconds_bucket{scope="key",le="0.001"} 5
evictd_agent_propagation_lag_seconds_bucket{scope="key",le="0.01"} 9
evictd_agent_propagation_lag_seconds_bucket{scope="key",le="30"} 10
evictd_agent_propagation_lag_seconds_bucket{scope="key",le="+Inf"} 10
evictd_agent_propagation_lag_seconds_sum{scope="key"} 0.5
evictd_agent_propagation_lag_seconds_count{scope="key"} 10
evictd_agent_propagation_lag_seconds_bucket{scope="api",le="0.001"} 0
evictd_agent_propagation_lag_seconds_bucket{scope="api",le="0.01"} 0
evictd_agent_propagation_lag_seconds_bucket{scope="api",le="30"} 1
evictd_agent_propagation_lag_seconds_bucket{scope="api",le="+Inf"} 2
evictd_agent_propagation_lag_seconds_sum{scope="api"} 41
evictd_agent_propagation_lag_seconds_count{scope="api"} 2
"#;

    #[test]
    fn values_are_found_by_any_label_and_summed() -> Result<()> {
        let scrape = Scrape::parse(TEXT)?;
        let code = |code| scrape.value("evictd_agent_verifications_total", &[("code", code)]);
        assert_eq!((code("VALID"), code("NOT_FOUND"), code("RATE_LIMITED")), (Some(40.0), Some(2.0), None));
        assert_eq!(scrape.value("evictd_agent_verifications_total", &[]), Some(42.0));
        assert_eq!(scrape.value("evictd_agent_lease_remaining_seconds", &[]), Some(26.5));
        let west = [("region", "eu, \"west\" }")];
        assert_eq!(scrape.value("evictd_agent_verifications_total", &west), Some(2.0));
        Ok(())
    }

    #[test]
    fn a_histogram_gives_counts_and_quantiles() -> Result<()> {
        let scrape = Scrape::parse(TEXT)?;
        let name = "evictd_agent_propagation_lag_seconds";
        let keys = scrape.histogram(name, &[("scope", "key")]).context("no histogram")?;
        assert_eq!((keys.count, keys.at_most(30.0), keys.at_most(31.0)), (10.0, Some(10.0), None));
        assert_eq!(keys.quantile(0.25).map(|v| (v * 1e6).round()), Some(500.0));
        assert_eq!(keys.quantile(0.7).map(|v| (v * 1e6).round()), Some(5_500.0));

        let all = scrape.histogram(name, &[]).context("no histogram")?;
        assert_eq!((all.count, all.sum, all.at_most(30.0)), (12.0, 41.5, Some(11.0)));
        assert_eq!(all.quantile(1.0), Some(30.0));
        assert_eq!(scrape.histogram("evictd_agent_exposure_seconds", &[]), None);
        Ok(())
    }

    #[test]
    fn parse_errors_show_the_line() {
        let failure = Scrape::parse("a 1\nb{c=\"d} 1\n").unwrap_err();
        assert!(failure.to_string().contains("b{c=\"d} 1"), "{failure}");
    }
}
