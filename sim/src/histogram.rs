//! Spans of time, counted in buckets of a thirty-second of their size.

use std::collections::BTreeMap;

use crate::time::Micros;

#[derive(Clone, Debug, Default)]
pub struct SpanHistogram {
    /// By the longest span of each bucket.
    counts: BTreeMap<Micros, u64>,
    max: Micros,
}

impl SpanHistogram {
    pub fn add(&mut self, span: Micros) {
        *self.counts.entry(bucket(span)).or_default() += 1;
        self.max = self.max.max(span);
    }

    pub fn merge(&mut self, other: &Self) {
        for (bucket, count) in &other.counts {
            *self.counts.entry(*bucket).or_default() += count;
        }
        self.max = self.max.max(other.max);
    }

    pub fn max(&self) -> Micros {
        self.max
    }

    /// What `permyriad` of 10,000 don't exceed, up to a bucket's width.
    pub fn quantile(&self, permyriad: u64) -> Micros {
        let wanted = (self.counts.values().sum::<u64>() * permyriad).div_ceil(10_000);
        let mut seen = 0;
        let reaches = |(_, count): &(&Micros, &u64)| {
            seen += **count;
            seen >= wanted
        };
        self.counts.iter().find(reaches).map_or(self.max, |(bucket, _)| self.max.min(*bucket))
    }
}

/// The longest span of the bucket of `span`: its first six bits count, up to 32 all.
fn bucket(span: Micros) -> Micros {
    span | ((1 << (span | 1).ilog2().saturating_sub(5)) - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_span_lies_in_its_bucket() {
        for span in (0..2_000).chain([30_000_000, 123_456_789]) {
            let top = bucket(span);
            assert!(top >= span && top <= span + span / 16, "{span}: {top}");
        }
    }

    #[test]
    fn quantiles_are_never_too_low() {
        let mut histogram = SpanHistogram::default();
        (1..=1_000).for_each(|span| histogram.add(span));
        assert!((500..=520).contains(&histogram.quantile(5_000)));
        assert_eq!((histogram.quantile(10_000), histogram.max()), (1_000, 1_000));
    }
}
