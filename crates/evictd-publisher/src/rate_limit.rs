//! How many requests a workspace may make in a minute, with whatever root keys.
//!
//! Each workspace that has a limit has a count, and a minute in which it holds. So the end of the minute is known in
//! advance, and Unkey's headers give it.

use std::collections::HashMap;
use std::time::Duration;

use evictd_core::ids::WorkspaceId;
use evictd_core::time::LeaseTime;
use hyper::HeaderMap;
use hyper::header::{HeaderName, HeaderValue, RETRY_AFTER};
use parking_lot::{Mutex, RwLock};

use crate::config::{RateLimitConfig, RequestLimit};

/// A workspace's minute begins with its first request.
const WINDOW: Duration = Duration::from_mins(1);

const LIMIT: HeaderName = HeaderName::from_static("ratelimit-limit");
const REMAINING: HeaderName = HeaderName::from_static("ratelimit-remaining");
const RESET: HeaderName = HeaderName::from_static("ratelimit-reset");

pub(crate) struct RateLimits {
    limits: RwLock<LimitTable>,
    windows: Mutex<Windows>,
}

struct LimitTable {
    of_each: RequestLimit,
    of_workspace: HashMap<WorkspaceId, RequestLimit>,
}

#[derive(Default)]
struct Windows {
    of_workspace: HashMap<WorkspaceId, Window>,
    /// When windows that are over were dropped last: there are never more than two minutes' worth.
    swept: LeaseTime,
}

struct Window {
    began: LeaseTime,
    requests: u32,
}

/// Whether a request may be made.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Admission {
    /// It may, and isn't counted.
    Unlimited,
    Within(Allowance),
    Over(Allowance),
    /// No request may.
    Closed,
}

/// What is left of a workspace's minute.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Allowance {
    limit: u32,
    remaining: u32,
    reset: Duration,
}

impl RateLimits {
    pub(crate) fn new(config: &RateLimitConfig) -> Self {
        Self { limits: RwLock::new(LimitTable::new(config)), windows: Mutex::default() }
    }

    /// Replaces the limits. Requests that were counted in this minute stay counted.
    pub(crate) fn configure(&self, config: &RateLimitConfig) {
        *self.limits.write() = LimitTable::new(config);
    }

    /// Counts a request of this workspace.
    pub(crate) fn admit(&self, workspace: &WorkspaceId, now: LeaseTime) -> Admission {
        let limit = match self.limits.read().of(workspace) {
            RequestLimit::Unlimited => return Admission::Unlimited,
            RequestLimit::PerMinute(0) => return Admission::Closed,
            RequestLimit::PerMinute(limit) => limit,
        };
        self.windows.lock().admit(workspace, limit, now)
    }
}

impl LimitTable {
    fn new(config: &RateLimitConfig) -> Self {
        let limit = |(workspace, limit): (&String, &RequestLimit)| (WorkspaceId::new(&**workspace), *limit);
        Self {
            of_each: config.requests_per_minute,
            of_workspace: config.workspaces.iter().map(limit).collect(),
        }
    }

    fn of(&self, workspace: &WorkspaceId) -> RequestLimit {
        self.of_workspace.get(workspace).copied().unwrap_or(self.of_each)
    }
}

impl Windows {
    fn admit(&mut self, workspace: &WorkspaceId, limit: u32, now: LeaseTime) -> Admission {
        if now.since(self.swept) >= WINDOW {
            self.swept = now;
            self.of_workspace.retain(|_, window| now.since(window.began) < WINDOW);
        }
        let window = self.of_workspace.entry(workspace.clone()).or_insert(Window { began: now, requests: 0 });
        if now.since(window.began) >= WINDOW {
            *window = Window { began: now, requests: 0 };
        }
        let is_within = window.requests < limit;
        window.requests += u32::from(is_within);
        let reset = WINDOW.saturating_sub(now.since(window.began));
        let allowance = Allowance { limit, remaining: limit.saturating_sub(window.requests), reset };
        if is_within { Admission::Within(allowance) } else { Admission::Over(allowance) }
    }
}

impl Admission {
    /// Returns the limit that refuses the request, if one does.
    pub(crate) fn refused_by(self) -> Option<u32> {
        match self {
            Self::Unlimited | Self::Within(_) => None,
            Self::Over(allowance) => Some(allowance.limit),
            Self::Closed => Some(0),
        }
    }

    /// Writes Unkey's rate limit headers.
    pub(crate) fn write_headers(self, headers: &mut HeaderMap) {
        let (Self::Within(allowance) | Self::Over(allowance)) = self else { return };
        // Whole seconds, and not a moment too early.
        let reset = HeaderValue::from(allowance.reset.as_millis().div_ceil(1_000) as u64);
        if matches!(self, Self::Over(_)) {
            headers.insert(RETRY_AFTER, reset.clone());
        }
        headers.insert(LIMIT, allowance.limit.into());
        headers.insert(REMAINING, allowance.remaining.into());
        headers.insert(RESET, reset);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: LeaseTime = LeaseTime(1 << 50);

    fn limits(of_each: RequestLimit, of_workspace: &[(&str, RequestLimit)]) -> RateLimits {
        let workspaces = of_workspace.iter().map(|(name, limit)| ((*name).to_owned(), *limit)).collect();
        RateLimits::new(&RateLimitConfig { requests_per_minute: of_each, workspaces })
    }

    fn ws(name: &str) -> WorkspaceId {
        WorkspaceId::new(name)
    }

    fn after(time: Duration) -> LeaseTime {
        START.after(time)
    }

    fn within(limit: u32, remaining: u32, reset: u64) -> Admission {
        Admission::Within(Allowance { limit, remaining, reset: Duration::from_secs(reset) })
    }

    #[test]
    fn a_minute_begins_with_the_first_request_after_the_last() {
        let limits = limits(RequestLimit::PerMinute(2), &[]);
        let admit = |seconds| limits.admit(&ws("ws_1"), after(Duration::from_secs(seconds)));
        assert_eq!(admit(0), within(2, 1, 60));
        assert_eq!(admit(20), within(2, 0, 40));
        let over =
            |reset| Admission::Over(Allowance { limit: 2, remaining: 0, reset: Duration::from_secs(reset) });
        assert_eq!([admit(20), admit(59)], [over(40), over(1)]);
        assert_eq!(admit(60), within(2, 1, 60));
        assert_eq!(admit(200), within(2, 1, 60));
    }

    #[test]
    fn each_workspace_has_its_own_count_and_may_have_its_own_limit() {
        let own = [("ws_free", RequestLimit::Unlimited), ("ws_none", RequestLimit::PerMinute(0))];
        let limits = limits(RequestLimit::PerMinute(1), &own);
        for workspace in ["ws_1", "ws_2"] {
            assert_eq!(limits.admit(&ws(workspace), START), within(1, 0, 60));
            assert_eq!(limits.admit(&ws(workspace), START).refused_by(), Some(1));
        }
        for _ in 0..10 {
            assert_eq!(limits.admit(&ws("ws_free"), START), Admission::Unlimited);
            assert_eq!(limits.admit(&ws("ws_none"), START), Admission::Closed);
        }
        assert_eq!(Admission::Closed.refused_by(), Some(0));
    }

    #[test]
    fn workspaces_that_make_no_more_requests_are_dropped() {
        let limits = limits(RequestLimit::PerMinute(1), &[]);
        for second in 0..600 {
            limits.admit(&ws(&format!("ws_{second}")), after(Duration::from_secs(second)));
            assert!(limits.windows.lock().of_workspace.len() <= 120);
        }
    }

    #[test]
    fn headers_give_whole_seconds_and_never_too_few() {
        let allowance = Allowance { limit: 100, remaining: 7, reset: Duration::from_millis(1_001) };
        let headers = |admission: Admission| {
            let mut headers = HeaderMap::new();
            admission.write_headers(&mut headers);
            let value = |name: &str| headers.get(name).map(|value| value.to_str().unwrap().to_owned());
            ["ratelimit-limit", "ratelimit-remaining", "ratelimit-reset", "retry-after"].map(value)
        };
        let expected = |values: [&str; 4]| values.map(|value| (!value.is_empty()).then(|| value.to_owned()));
        assert_eq!(headers(Admission::Within(allowance)), expected(["100", "7", "2", ""]));
        let over = Allowance { remaining: 0, ..allowance };
        assert_eq!(headers(Admission::Over(over)), expected(["100", "0", "2", "2"]));
        for admission in [Admission::Unlimited, Admission::Closed] {
            assert_eq!(headers(admission), expected(["", "", "", ""]));
        }
    }
}
