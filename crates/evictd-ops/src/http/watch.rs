//! Ends connections that send their headers too slowly or nothing at all, or whose place others need.
//!
//! hyper has a header timeout, but it also runs while a connection is idle (so that it would cut off
//! kept-alive connections after the time that is meant for headers), and it arms a new timer for each
//! request. Here each connection has one timer, and a request costs one store and at most two clock reads.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio::time::Instant;

use super::HttpLimits;

/// What a connection is doing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    /// Between requests.
    Idle,
    /// A request has begun to arrive.
    Head,
    /// A request is being answered; its handler knows its own limits.
    Busy,
}

/// What a connection is doing, and since when. All who write it live in the connection's own task, and
/// whoever reads it from outside may see it a moment late.
#[derive(Debug)]
pub(super) struct Watch {
    opened: Instant,
    /// Microseconds since `opened`, and the phase in the low two bits.
    state: AtomicU64,
    /// Somebody else needs the place.
    wanted: Notify,
}

impl Watch {
    pub(super) fn new() -> Self {
        Self { opened: Instant::now(), state: AtomicU64::new(Phase::Idle as u64), wanted: Notify::new() }
    }

    /// Since when the connection has waited for a whole request; `None` while one is being answered.
    pub(super) fn waiting_since(&self) -> Option<Instant> {
        let (phase, since) = self.phase();
        (phase != Phase::Busy).then_some(since)
    }

    /// Somebody else needs the place: the connection ends, unless a request has come meanwhile.
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

    /// Bytes have arrived.
    fn received(&self) {
        if self.phase().0 == Phase::Idle {
            self.enter(Phase::Head);
        }
    }

    fn enter(&self, phase: Phase) {
        let since = self.opened.elapsed().as_micros() as u64;
        self.state.store(since << 2 | phase as u64, Ordering::Relaxed);
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

    /// Returns when the connection has overstayed one of `limits`, or waits while somebody else needs its place.
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

/// A TCP stream that tells its [`Watch`] when bytes arrive.
#[derive(Debug)]
pub(super) struct WatchedStream {
    pub(super) stream: TcpStream,
    pub(super) watch: Arc<Watch>,
}

impl AsyncRead for WatchedStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(cx, buffer);
        if buffer.filled().len() > before {
            self.watch.received();
        }
        read
    }
}

impl AsyncWrite for WatchedStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits() -> HttpLimits {
        HttpLimits {
            header_timeout: Duration::from_secs(10),
            idle_timeout: Duration::from_secs(75),
            ..HttpLimits::default()
        }
    }

    /// Paused time makes these exact: nothing but the watch's own timer runs.
    async fn seconds_until_overstayed(watch: &Watch) -> u64 {
        let before = Instant::now();
        watch.overstayed(&limits()).await;
        before.elapsed().as_secs()
    }

    #[tokio::test(start_paused = true)]
    async fn an_idle_connection_ends_after_the_idle_timeout() {
        assert_eq!(seconds_until_overstayed(&Watch::new()).await, 75);
    }

    #[tokio::test(start_paused = true)]
    async fn headers_that_begin_and_never_end_are_cut_off_at_the_header_timeout() {
        let watch = Watch::new();
        tokio::time::advance(Duration::from_secs(33)).await;
        watch.received();
        tokio::time::advance(Duration::from_secs(4)).await;
        watch.received();
        assert_eq!(seconds_until_overstayed(&watch).await, 6);
    }

    #[tokio::test(start_paused = true)]
    async fn headers_that_begin_while_the_watch_sleeps_are_seen_in_time() {
        let watch = Arc::new(Watch::new());
        tokio::spawn({
            let watch = Arc::clone(&watch);
            async move {
                tokio::time::sleep(Duration::from_secs(33)).await;
                watch.received();
            }
        });
        assert_eq!(seconds_until_overstayed(&watch).await, 43);
    }

    #[tokio::test(start_paused = true)]
    async fn whoever_waits_for_a_request_makes_room_and_whoever_is_answered_does_not() {
        let watch = Watch::new();
        watch.make_room();
        assert_eq!(seconds_until_overstayed(&watch).await, 0);
        tokio::time::advance(Duration::from_secs(5)).await;
        watch.received();
        assert_eq!(watch.waiting_since().unwrap().elapsed().as_secs(), 0);
        watch.make_room();
        assert_eq!(seconds_until_overstayed(&watch).await, 0, "half a request is none");

        watch.begin();
        assert_eq!(watch.waiting_since(), None);
        watch.make_room();
        let limits = limits();
        let answering = tokio::time::timeout(Duration::from_hours(1), watch.overstayed(&limits));
        assert!(answering.await.is_err());
        watch.finish();
        assert_eq!(seconds_until_overstayed(&watch).await, 75, "it was asked then, not now");
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_in_flight_is_left_alone_and_then_the_connection_is_idle() {
        let watch = Arc::new(Watch::new());
        watch.received();
        watch.begin();
        watch.received();
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
