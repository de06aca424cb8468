//! What a command of `evictd api` does, and the flags that commands share.

use std::convert::Infallible;
use std::str::FromStr;
use std::time::Duration;

use clap::Args;
use evictd_ops::config::HumanDuration;
use serde::Serialize;

use crate::bulk::BulkDeletion;
use crate::call::{ApiCall, Repeat};

/// The flag of every command that changes something.
#[derive(Args, Debug)]
pub(super) struct WaitArgs {
    /// Shows each region's confirmation as it arrives, for at most this long (default 30s). Exits with 3 if by then
    /// a region has neither confirmed nor elapsed; the change is committed in any case.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "30s", value_name = "DURATION")]
    pub(super) wait: Option<HumanDuration>,
}

/// Text between commas; an empty text has none. A flag of this type may be repeated: the lists are joined.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub(super) struct CommaList(pub(super) Vec<String>);

impl CommaList {
    pub(super) fn joined(lists: Vec<Self>) -> Vec<String> {
        lists.into_iter().flat_map(|list| list.0).collect()
    }
}

impl FromStr for CommaList {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Infallible> {
        let items = text.split(',').map(str::trim).filter(|item| !item.is_empty());
        Ok(Self(items.map(str::to_owned).collect()))
    }
}

/// What a command does.
#[derive(Debug)]
pub(crate) enum ApiAction {
    /// Sends one request. After a change, waits this long for the regions.
    Call { call: ApiCall, wait: Option<Duration> },
    /// Deletes all keys whose ids are on standard input.
    DeleteKeys(BulkDeletion),
}

pub(super) fn query(path: &'static str, request: &impl Serialize) -> anyhow::Result<ApiAction> {
    Ok(ApiAction::Call { call: ApiCall::new(path, request, Repeat::Harmless)?, wait: None })
}

pub(super) fn change(
    path: &'static str,
    request: &impl Serialize,
    repeat: Repeat,
    wait: &WaitArgs,
) -> anyhow::Result<ApiAction> {
    let wait = wait.wait.map(Duration::from);
    // The answer contains what is known at once; the rest is queried, so that regions show one by one.
    let prefer = wait.map(|_| Duration::ZERO);
    Ok(ApiAction::Call { call: ApiCall { prefer, ..ApiCall::new(path, request, repeat)? }, wait })
}
