//! The machine that a daemon runs on.

/// Its name, as it calls itself.
pub fn host_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}
