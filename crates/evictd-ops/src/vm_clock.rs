//! Whether this virtual machine was stopped, copied or moved behind its back (R8).
//!
//! A machine that is restored from a snapshot continues where it was, and its lease clock hasn't counted the time
//! between. Only the hypervisor knows. Linux shows its report as `/dev/vmclock0` (the driver ptp_vmclock): a small
//! structure with a *disruption marker*, which changes when the clocks may have jumped, and a *generation*, which changes
//! when the machine was restored.
//!
//! A process that relies on its clock must watch this and exit when it changes. It is read every [`INTERVAL`], so for
//! that long after a restore old answers remain possible. Without such a device, evictd's guarantees don't cover a
//! machine whose clock its hypervisor stops.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::time::every;

/// Where Linux shows the first such device.
pub const DEVICE: &str = "/dev/vmclock0";

/// How often it is read: some 100 bytes are copied each time.
pub const INTERVAL: Duration = Duration::from_millis(100);

/// `VCLK`, as stored.
const MAGIC: [u8; 4] = *b"VCLK";

/// Little-endian fields of `struct vmclock_abi` by their offset, from Linux' uapi/linux/vmclock-abi.h. Fields behind
/// `flags` exist only if a flag says so.
const SEQUENCE: usize = 0x0c;
const DISRUPTION_MARKER: usize = 0x10;
const FLAGS: usize = 0x18;
const GENERATION: usize = 0x68;
const SIZE: usize = 0x70;

/// The flag of a device that counts restores.
const HAS_GENERATION: u64 = 1 << 8;

/// Why the device can't be watched.
#[derive(Debug, thiserror::Error)]
pub enum VmClockError {
    #[error("can't read the machine's clock device {}; let this user read it, or configure an empty path", .path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{} isn't a clock device of a virtual machine", .path.display())]
    Strange { path: PathBuf },
}

/// The hypervisor's report. Only its changes mean anything.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Continuity {
    disruption_marker: u64,
    generation: Option<u64>,
}

/// An interruption that the machine's own clocks didn't count.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Disruption {
    /// It was restored from a snapshot, perhaps as one of several copies.
    Restored,
    /// Its clocks may have jumped: it was moved to another host, or stopped.
    Clocks,
}

impl fmt::Display for Disruption {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Restored => "this machine was restored from a snapshot",
            Self::Clocks => "this machine was stopped or moved to another host",
        })
    }
}

/// A device that is being watched.
#[derive(Debug)]
pub struct VmClock {
    path: PathBuf,
    device: File,
    at_start: Continuity,
}

impl VmClock {
    /// Opens the device and reads its first report; `None` if there is no such device.
    pub fn open(path: &Path) -> Result<Option<Self>, VmClockError> {
        let read = |source| VmClockError::Read { path: path.to_owned(), source };
        let device = match File::open(path) {
            Ok(device) => device,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(read(error)),
        };
        match continuity(&device).map_err(read)? {
            Some(at_start) => Ok(Some(Self { path: path.to_owned(), device, at_start })),
            None => Err(VmClockError::Strange { path: path.to_owned() }),
        }
    }

    /// Waits for a disruption, on which the caller must end the process.
    ///
    /// A read that fails proves nothing, and is tried again.
    pub async fn disrupted(&self) -> Disruption {
        let mut interval = every(INTERVAL);
        let mut failure_logged = false;
        loop {
            interval.tick().await;
            match continuity(&self.device) {
                Ok(Some(now)) => {
                    failure_logged = false;
                    if let Some(disruption) = self.at_start.broken_by(now) {
                        return disruption;
                    }
                }
                // The hypervisor is writing it.
                Ok(None) => {}
                Err(error) => {
                    if !std::mem::replace(&mut failure_logged, true) {
                        let path = self.path.display();
                        tracing::error!(%path, %error, "cannot read the machine's clock device; retrying");
                    }
                }
            }
        }
    }
}

impl Continuity {
    fn broken_by(self, now: Self) -> Option<Disruption> {
        if now.generation != self.generation {
            Some(Disruption::Restored)
        } else if now.disruption_marker != self.disruption_marker {
            Some(Disruption::Clocks)
        } else {
            None
        }
    }
}

/// Reads the device; `None` if the content isn't the known structure, or is being written. The driver returns consistent
/// readings only.
fn continuity(device: &File) -> io::Result<Option<Continuity>> {
    let mut bytes = [0; SIZE];
    let length = device.read_at(&mut bytes, 0)?;
    let known = &bytes[..length];
    let word = |at: usize| known.get(at..at + 8)?.try_into().ok().map(u64::from_le_bytes);
    let is_written = known.get(SEQUENCE).is_some_and(|sequence| sequence % 2 == 1);
    let (Some(disruption_marker), Some(flags)) = (word(DISRUPTION_MARKER), word(FLAGS)) else {
        return Ok(None);
    };
    if !known.starts_with(&MAGIC) || is_written {
        return Ok(None);
    }
    let generation = word(GENERATION).filter(|_| flags & HAS_GENERATION != 0);
    Ok(Some(Continuity { disruption_marker, generation }))
}

#[cfg(test)]
mod tests {
    use tempfile::NamedTempFile;

    use super::*;

    /// A device as a hypervisor would write it, into a file.
    struct FakeDevice {
        file: NamedTempFile,
        sequence: u32,
    }

    impl FakeDevice {
        fn new(flags: u64) -> Self {
            let file = NamedTempFile::new().unwrap();
            let mut bytes = [0; SIZE];
            bytes[..4].copy_from_slice(&MAGIC);
            bytes[FLAGS..FLAGS + 8].copy_from_slice(&flags.to_le_bytes());
            file.as_file().write_all_at(&bytes, 0).unwrap();
            Self { file, sequence: 0 }
        }

        /// The first half of a change: the sequence is odd.
        fn begin(&mut self, field: usize, value: u64) {
            self.step();
            self.file.as_file().write_all_at(&value.to_le_bytes(), field as u64).unwrap();
        }

        fn step(&mut self) {
            self.sequence += 1;
            self.file.as_file().write_all_at(&self.sequence.to_le_bytes(), SEQUENCE as u64).unwrap();
        }

        fn write(&mut self, field: usize, value: u64) {
            self.begin(field, value);
            self.step();
        }

        fn watch(&self) -> VmClock {
            VmClock::open(self.file.path()).unwrap().unwrap()
        }
    }

    /// What a watch finds within so many reads.
    async fn within_ten_reads(clock: &VmClock) -> Option<Disruption> {
        tokio::time::timeout(INTERVAL * 10, clock.disrupted()).await.ok()
    }

    #[tokio::test(start_paused = true)]
    async fn changed_marker_or_generation_is_a_disruption() {
        for (flags, field, found) in [
            (0, DISRUPTION_MARKER, Some(Disruption::Clocks)),
            (HAS_GENERATION, DISRUPTION_MARKER, Some(Disruption::Clocks)),
            (HAS_GENERATION, GENERATION, Some(Disruption::Restored)),
            (0, GENERATION, None),
        ] {
            let mut device = FakeDevice::new(flags);
            let clock = device.watch();
            assert_eq!(within_ten_reads(&clock).await, None, "nothing happened");
            device.write(field, 7);
            assert_eq!(within_ten_reads(&clock).await, found, "{flags} {field:#x}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn other_fields_may_change_all_the_time() {
        let mut device = FakeDevice::new(HAS_GENERATION);
        let clock = device.watch();
        for field in [0x28, 0x48, 0x60] {
            device.write(field, 7);
        }
        assert_eq!(within_ten_reads(&clock).await, None);
    }

    #[tokio::test(start_paused = true)]
    async fn structure_that_is_being_written_is_read_later() {
        let mut device = FakeDevice::new(0);
        let clock = device.watch();
        device.begin(DISRUPTION_MARKER, 7);
        assert_eq!(within_ten_reads(&clock).await, None);
        device.step();
        assert_eq!(within_ten_reads(&clock).await, Some(Disruption::Clocks));
    }

    #[test]
    fn missing_device_is_not_taken_for_a_strange_file() {
        assert!(VmClock::open(Path::new("/no/such/vmclock0")).unwrap().is_none());
        let file = NamedTempFile::new().unwrap();
        for content in ["", "VCLK", "something else entirely, and long enough for every field of it"] {
            std::fs::write(file.path(), content).unwrap();
            assert!(matches!(VmClock::open(file.path()), Err(VmClockError::Strange { .. })), "{content}");
        }
    }
}
