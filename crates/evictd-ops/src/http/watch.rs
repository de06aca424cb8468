//! Ends connections that are idle, that send their headers too slowly, or whose place others need.
//!
//! hyper has a header timeout, but it also runs while a connection is idle, and it arms a new timer for each
//! request. Here each connection has one timer, and a request costs one store and at most two clock reads.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use evictd_core::time::micros;
use tokio::sync::Notify;
use tokio::time::Instant;

use super::HttpLimits;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    /// Between requests.
    Idle,
    /// A request has begun to arrive.
    Head,
    /// A request is being answered. Its handler has limits of its own.
    Busy,
}

/// What a connection is doing, and since when. Only the connection's own task writes it; others may read it a moment
/// late.
#[derive(Debug)]
pub(super) struct ConnectionWatch {
    opened: Instant,
    /// Microseconds since `opened`, and the phase in the low two bits.
    state: AtomicU64,
    /// Another connection needs the place.
    wanted: Notify,
}

impl ConnectionWatch {
    pub(super) fn new() -> Self {
        Self { opened: Instant::now(), state: AtomicU64::new(Phase::Idle as u64), wanted: Notify::new() }
    }

    /// Returns since when the connection has waited for a whole request; `None` while one is being answered.
    pub(super) fn waiting_since(&self) -> Option<Instant> {
        let (phase, since) = self.phase();
        (phase != Phase::Busy).then_some(since)
    }

    /// Ends the connection, unless a request has come meanwhile.
    pub(super) fn make_room(&self) {
        self.wanted.notify_one();
    }

    /// A request's headers are complete.
    pub(super) fn begin(&self) {
        self.state.store(Phase::Busy as u64, Ordering::Relaxed);
    }

    /// The answer is ready to be sent.
    pub(super) fn finish(&self) {
        self.enter(Phase::Idle);
    }

    /// The client has sent these, or has shut down its side if there are none.
    pub(super) fn received(&self, bytes: &[u8]) {
        if !bytes.is_empty() && self.phase().0 == Phase::Idle {
            self.enter(Phase::Head);
        }
    }

    fn enter(&self, phase: Phase) {
        self.state.store(micros(self.opened.elapsed()) << 2 | phase as u64, Ordering::Relaxed);
    }

    fn phase(&self) -> (Phase, Instant) {
        let state = self.state.load(Ordering::Relaxed);
        let since = self.opened + Duration::from_micros(state >> 2);
        match state & 3 {
            0 => (Phase::Idle, since),
            1 => (Phase::Head, since),
            _ => (Phase::Busy, since),
        }
    }

    /// Returns when the connection has exceeded one of `limits`, or waits while another connection needs its place.
    ///
    /// Never sleeps longer than the header timeout, so that no change of phase is seen too late.
    pub(super) async fn overstayed(&self, limits: &HttpLimits) {
        loop {
            let now = Instant::now();
            let wake = match self.phase() {
                (Phase::Idle, since) => since + limits.idle_timeout,
                (Phase::Head, since) => since + limits.header_timeout,
                (Phase::Busy, _) => now + limits.header_timeout.max(Duration::from_millis(1)),
            };
            if wake <= now {
                return;
            }
            tokio::select! {
                () = tokio::time::sleep_until(wake.min(now + limits.header_timeout)) => {}
                () = self.wanted.notified() => {
                    if self.waiting_since().is_some() {
                        return;
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    fn limits() -> HttpLimits {
        HttpLimits {
            header_timeout: Duration::from_secs(10),
            idle_timeout: Duration::from_secs(75),
            ..HttpLimits::default()
        }
    }

    /// Paused time makes these exact: nothing but the watch's own timer runs.
    async fn seconds_until_overstayed(watch: &ConnectionWatch) -> u64 {
        let before = Instant::now();
        watch.overstayed(&limits()).await;
        before.elapsed().as_secs()
    }

    #[tokio::test(start_paused = true)]
    async fn idle_connection_ends_after_the_idle_timeout() {
        assert_eq!(seconds_until_overstayed(&ConnectionWatch::new()).await, 75);
    }

    #[tokio::test(start_paused = true)]
    async fn unfinished_headers_end_at_the_header_timeout() {
        let watch = ConnectionWatch::new();
        tokio::time::advance(Duration::from_secs(33)).await;
        watch.received(b"G");
        tokio::time::advance(Duration::from_secs(4)).await;
        watch.received(b"G");
        assert_eq!(seconds_until_overstayed(&watch).await, 6);
    }

    #[tokio::test(start_paused = true)]
    async fn headers_that_begin_during_a_sleep_are_seen_in_time() {
        let watch = Arc::new(ConnectionWatch::new());
        tokio::spawn({
            let watch = Arc::clone(&watch);
            async move {
                tokio::time::sleep(Duration::from_secs(33)).await;
                watch.received(b"G");
            }
        });
        assert_eq!(seconds_until_overstayed(&watch).await, 43);
    }

    #[tokio::test(start_paused = true)]
    async fn idle_connection_makes_room_and_busy_one_does_not() {
        let watch = ConnectionWatch::new();
        watch.make_room();
        assert_eq!(seconds_until_overstayed(&watch).await, 0);
        tokio::time::advance(Duration::from_secs(5)).await;
        watch.received(b"G");
        assert_eq!(watch.waiting_since().unwrap().elapsed().as_secs(), 0);
        watch.make_room();
        assert_eq!(seconds_until_overstayed(&watch).await, 0, "half a request doesn't count");

        watch.begin();
        assert_eq!(watch.waiting_since(), None);
        watch.make_room();
        let limits = limits();
        let answering = tokio::time::timeout(Duration::from_hours(1), watch.overstayed(&limits));
        assert!(answering.await.is_err());
        watch.finish();
        assert_eq!(seconds_until_overstayed(&watch).await, 75, "the request to make room was for then");
    }

    #[tokio::test(start_paused = true)]
    async fn busy_connection_is_left_alone_and_then_is_idle() {
        let watch = Arc::new(ConnectionWatch::new());
        watch.received(b"G");
        watch.begin();
        watch.received(b"G");
        tokio::spawn({
            let watch = Arc::clone(&watch);
            async move {
                tokio::time::sleep(Duration::from_secs(1_000)).await;
                watch.finish();
            }
        });
        assert_eq!(seconds_until_overstayed(&watch).await, 1_075);
    }
}
