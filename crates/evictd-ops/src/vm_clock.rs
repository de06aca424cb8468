//! Whether this virtual machine was stopped, copied or moved behind its back (R8).
//!
//! A machine that is restored from a snapshot goes on where it stood, and its lease clock hasn't counted the
//! time between. No clock of the machine can tell; the hypervisor can. Linux shows what it says as
//! `/dev/vmclock0` (the driver ptp_vmclock): a small structure with a *disruption marker*, which changes
//! when the clocks may have jumped, and a *generation*, which changes when the machine was restored.
//!
//! A process that trusts its clock must watch this and end when it changes. It is looked at every
//! [`INTERVAL`], so for as long after a restore old answers remain possible. Where there is no such device, a
//! machine whose clock its hypervisor stops is outside of what evictd promises.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::time::MissedTickBehavior;

/// Where Linux shows the first such device.
pub const DEVICE: &str = "/dev/vmclock0";

/// How often it is looked at: some 100 bytes are copied each time.
pub const INTERVAL: Duration = Duration::from_millis(100);

/// `VCLK`, as stored.
const MAGIC: [u8; 4] = *b"VCLK";

/// Little-endian fields of `struct vmclock_abi` by their offset, from Linux' uapi/linux/vmclock-abi.h. What
/// lies behind `flags` exists only if the device has room for it, and a flag says so.
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
    /// It is there, and can't be read.
    #[error("can't read the machine's clock device {}; let this user read it, or configure an empty path", .path.display())]
    Read {
        /// Which device.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// It holds something else.
    #[error("{} isn't a clock device of a virtual machine", .path.display())]
    Strange {
        /// Which file.
        path: PathBuf,
    },
}

/// What the hypervisor says of the machine's continuity: comparable, and nothing else.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Continuity {
    disruption_marker: u64,
    generation: Option<u64>,
}

/// The machine went on after something its own clocks didn't see.
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
    /// Opens the device and remembers what it says; `None` if there is no such device.
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

    /// Waits for a disruption. Never returns without one: whoever waits ends the process then.
    ///
    /// A read that fails changes nothing, because it says nothing; it is tried again.
    pub async fn disrupted(&self) -> Disruption {
        let mut looks = tokio::time::interval(INTERVAL);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut complained = false;
        loop {
            looks.tick().await;
            match continuity(&self.device) {
                Ok(Some(now)) => {
                    complained = false;
                    if let Some(disruption) = self.at_start.broken_by(now) {
                        return disruption;
                    }
                }
                // It is being written.
                Ok(None) => {}
                Err(error) => {
                    if !std::mem::replace(&mut complained, true) {
                        let path = self.path.display();
                        tracing::error!(%path, %error, "can't read the machine's clock device; trying on");
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

/// What the device says now; `None` if that isn't the known structure, or it is being written. The driver
/// hands out consistent readings only.
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

    /// What a watch finds within so many looks.
    async fn within_ten_looks(clock: &VmClock) -> Option<Disruption> {
        tokio::time::timeout(INTERVAL * 10, clock.disrupted()).await.ok()
    }

    #[tokio::test(start_paused = true)]
    async fn a_changed_marker_is_a_disruption_and_a_changed_generation_a_restore() {
        for (flags, field, found) in [
            (0, DISRUPTION_MARKER, Some(Disruption::Clocks)),
            (HAS_GENERATION, DISRUPTION_MARKER, Some(Disruption::Clocks)),
            (HAS_GENERATION, GENERATION, Some(Disruption::Restored)),
            (0, GENERATION, None),
        ] {
            let mut device = FakeDevice::new(flags);
            let clock = device.watch();
            assert_eq!(within_ten_looks(&clock).await, None, "nothing happened");
            device.write(field, 7);
            assert_eq!(within_ten_looks(&clock).await, found, "{flags} {field:#x}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn other_fields_may_change_all_the_time() {
        let mut device = FakeDevice::new(HAS_GENERATION);
        let clock = device.watch();
        for field in [0x28, 0x48, 0x60] {
            device.write(field, 7);
        }
        assert_eq!(within_ten_looks(&clock).await, None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_structure_that_is_being_written_is_read_when_it_is_done() {
        let mut device = FakeDevice::new(0);
        let clock = device.watch();
        device.begin(DISRUPTION_MARKER, 7);
        assert_eq!(within_ten_looks(&clock).await, None);
        device.step();
        assert_eq!(within_ten_looks(&clock).await, Some(Disruption::Clocks));
    }

    #[test]
    fn a_machine_without_the_device_is_told_from_one_with_something_else() {
        assert!(VmClock::open(Path::new("/no/such/vmclock0")).unwrap().is_none());
        let file = NamedTempFile::new().unwrap();
        for content in ["", "VCLK", "something else entirely, and long enough for every field of it"] {
            std::fs::write(file.path(), content).unwrap();
            assert!(matches!(VmClock::open(file.path()), Err(VmClockError::Strange { .. })), "{content}");
        }
    }
}
