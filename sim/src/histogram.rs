//! Spans of time, counted in buckets of a thirty-second of their size.

use crate::time::Micros;

const STEPS: u64 = 32;

#[derive(Clone, Debug, Default)]
pub struct SpanHistogram {
    counts: Vec<u64>,
    total: u64,
    max: Micros,
}

impl SpanHistogram {
    pub fn add(&mut self, span: Micros) {
        let bucket = bucket(span);
        if bucket >= self.counts.len() {
            self.counts.resize(bucket + 1, 0);
        }
        self.counts[bucket] += 1;
        self.total += 1;
        self.max = self.max.max(span);
    }

    pub fn merge(&mut self, other: &Self) {
        self.counts.resize(self.counts.len().max(other.counts.len()), 0);
        for (count, more) in self.counts.iter_mut().zip(&other.counts) {
            *count += more;
        }
        self.total += other.total;
        self.max = self.max.max(other.max);
    }

    pub fn total(&self) -> u64 {
        self.total
    }

    pub fn max(&self) -> Micros {
        self.max
    }

    /// What `permyriad` of 10,000 don't exceed, up to a bucket's width.
    pub fn quantile(&self, permyriad: u64) -> Micros {
        let wanted = (self.total * permyriad).div_ceil(10_000);
        let mut seen = 0;
        for (bucket, count) in self.counts.iter().enumerate() {
            seen += count;
            if seen >= wanted && *count > 0 {
                return upper(bucket as u64).min(self.max);
            }
        }
        self.max
    }
}

fn bucket(span: Micros) -> usize {
    if span < STEPS {
        return span as usize;
    }
    let doublings = u64::from(span.ilog2() - STEPS.ilog2());
    ((doublings + 1) * STEPS + (span >> doublings) - STEPS) as usize
}

fn upper(bucket: u64) -> Micros {
    if bucket < STEPS {
        return bucket;
    }
    let (doublings, step) = (bucket / STEPS - 1, bucket % STEPS);
    ((STEPS + step + 1) << doublings) - 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_span_lies_in_its_bucket() {
        for span in (0..2_000).chain([30_000_000, 123_456_789]) {
            let top = upper(bucket(span) as u64);
            assert!(top >= span && top <= span + span / 16, "{span}: {top}");
        }
    }

    #[test]
    fn quantiles_are_never_too_low() {
        let mut histogram = SpanHistogram::default();
        (1..=1_000).for_each(|span| histogram.add(span));
        assert!((500..=520).contains(&histogram.quantile(5_000)));
        assert_eq!((histogram.quantile(10_000), histogram.max(), histogram.total()), (1_000, 1_000, 1_000));
    }
}
