//! The async runtime of the daemons and of the commands that open the home store.

use anyhow::Context;
use tokio::runtime::{Builder, Runtime};

pub(crate) fn new() -> anyhow::Result<Runtime> {
    Builder::new_multi_thread().enable_all().build().context("cannot start the async runtime")
}
