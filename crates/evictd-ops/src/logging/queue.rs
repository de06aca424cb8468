//! The queue between all that log and standard error.
//!
//! A log line is never worth a verification: no thread waits for the log's reader, and none fails with it. Lines that
//! find the queue full, or that can't be written, are dropped and counted. `tracing-appender` has such a queue. It isn't
//! used because it prints to standard output at its end, which can panic, and because it counts no failed writes and
//! limits lines instead of bytes.

use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::thread;
use std::time::Duration;

/// The memory that queued lines may take: some ten thousand lines.
const QUEUE_BYTES_MAX: usize = 4 * 1024 * 1024;

/// What a line takes besides its text.
const LINE_OVERHEAD: usize = 64;

/// The pause before a log that is not ready (a non-blocking pipe that is full) is tried again.
const RETRY_EVERY: Duration = Duration::from_millis(5);

enum QueuedLog {
    Line(Vec<u8>),
    /// Answered when all lines before it were written or dropped.
    Flush(SyncSender<()>),
}

#[derive(Debug)]
pub(super) struct LogQueue {
    sender: Sender<QueuedLog>,
    counts: Arc<LogCounts>,
}

#[derive(Default, Debug)]
struct LogCounts {
    queued_bytes: AtomicUsize,
    dropped: AtomicU64,
}

impl LogQueue {
    /// Starts the thread that writes to `to`. `on_dropped` is called with the number of lost lines when a line could be
    /// written again.
    pub(super) fn start(to: impl Write + Send + 'static, on_dropped: impl Fn(u64) + Send + 'static) -> Self {
        let (sender, receiver) = channel();
        let counts = Arc::<LogCounts>::default();
        let queue = Self { sender, counts: counts.clone() };
        let writing = move || write_queued(&receiver, to, &counts, on_dropped);
        // Without the thread, all lines are dropped and counted.
        drop(thread::Builder::new().name("log".to_owned()).spawn(writing));
        queue
    }

    /// Queues a line, or drops it. Never waits.
    pub(super) fn push(&self, line: Vec<u8>) {
        let cost = line.len() + LINE_OVERHEAD;
        let queued = self.counts.queued_bytes.fetch_add(cost, Ordering::Relaxed) + cost;
        if queued > QUEUE_BYTES_MAX || self.sender.send(QueuedLog::Line(line)).is_err() {
            self.counts.queued_bytes.fetch_sub(cost, Ordering::Relaxed);
            self.counts.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Returns the number of lines dropped so far.
    pub(super) fn dropped(&self) -> u64 {
        self.counts.dropped.load(Ordering::Relaxed)
    }

    /// Waits until all queued lines are written, for `limit` at most.
    pub(super) fn flush(&self, limit: Duration) {
        let (done, flushed) = sync_channel(1);
        if self.sender.send(QueuedLog::Flush(done)).is_ok() {
            // Lines that can't be written in time are lost.
            let _ = flushed.recv_timeout(limit);
        }
    }
}

fn write_queued(
    queue: &Receiver<QueuedLog>,
    mut to: impl Write,
    counts: &LogCounts,
    on_dropped: impl Fn(u64),
) {
    let mut reported = 0;
    for message in queue {
        let line = match message {
            QueuedLog::Line(line) => line,
            QueuedLog::Flush(done) => {
                let _ = done.send(());
                continue;
            }
        };
        let written = write_all(&mut to, &line);
        let cost = line.len() + LINE_OVERHEAD;
        let left = counts.queued_bytes.fetch_sub(cost, Ordering::Relaxed) - cost;
        if written.is_err() {
            counts.dropped.fetch_add(1, Ordering::Relaxed);
            continue;
        }
        let dropped = counts.dropped.load(Ordering::Relaxed);
        if left == 0 && dropped > reported {
            on_dropped(dropped - reported);
            reported = dropped;
        }
    }
}

/// As [`Write::write_all`], and waits for a log that another process has made non-blocking.
fn write_all(to: &mut impl Write, mut line: &[u8]) -> io::Result<()> {
    while !line.is_empty() {
        match to.write(line) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => line = &line[written..],
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => thread::sleep(RETRY_EVERY),
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    const SOON: Duration = Duration::from_secs(20);

    /// Keeps what is written. Each write takes a permit, and fails if the permit says so.
    struct FakeLog {
        permits: Receiver<io::Result<()>>,
        written: Arc<Mutex<Vec<u8>>>,
    }

    impl Write for FakeLog {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.permits.recv().unwrap_or(Ok(()))?;
            self.written.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// A queue before a log that is blocked until it gets permits, and works when their sender is dropped.
    struct Blocked {
        queue: LogQueue,
        permits: Sender<io::Result<()>>,
        written: Arc<Mutex<Vec<u8>>>,
        reported: Receiver<u64>,
    }

    fn blocked() -> Blocked {
        let ((permits, taken), written) = (channel(), Arc::<Mutex<Vec<u8>>>::default());
        let (report, reported) = channel();
        let log = FakeLog { permits: taken, written: written.clone() };
        let queue = LogQueue::start(log, move |dropped| report.send(dropped).unwrap_or_default());
        Blocked { queue, permits, written, reported }
    }

    #[test]
    fn full_queue_drops_and_counts_without_waiting() {
        let Blocked { queue, permits, written, reported } = blocked();
        let line = vec![b'x'; 1024 * 1024];
        for _ in 0..10 {
            queue.push(line.clone());
        }
        assert_eq!(queue.dropped(), 7, "three lines of a mebibyte fit with their overhead");
        drop(permits);
        queue.flush(SOON);
        assert_eq!(written.lock().unwrap().len(), 3 * line.len());
        assert_eq!(reported.recv_timeout(SOON), Ok(7));
    }

    #[test]
    fn failed_writes_are_counted_and_the_log_goes_on() {
        let Blocked { queue, permits, written, reported } = blocked();
        for error in [io::ErrorKind::StorageFull, io::ErrorKind::BrokenPipe] {
            permits.send(Err(error.into())).unwrap();
        }
        permits.send(Err(io::ErrorKind::WouldBlock.into())).unwrap();
        for line in ["one\n", "two\n", "three\n"] {
            queue.push(line.as_bytes().to_vec());
        }
        drop(permits);
        queue.flush(SOON);
        assert_eq!(*written.lock().unwrap(), b"three\n");
        assert_eq!((queue.dropped(), reported.recv_timeout(SOON)), (2, Ok(2)));
    }

    #[test]
    fn flush_of_a_blocked_log_ends() {
        let Blocked { queue, permits, .. } = blocked();
        queue.push(b"one\n".to_vec());
        queue.flush(Duration::from_millis(1));
        assert_eq!(queue.dropped(), 0, "it still waits");
        drop(permits);
    }
}
