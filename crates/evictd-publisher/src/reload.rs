//! What a running publisher takes over when its configuration is read again.

use std::fmt;
use std::sync::Arc;

use evictd_ops::config::ConfigChanges;
use evictd_ops::logging;
use evictd_ops::metrics::ByLabel;
use evictd_ops::reload::{Reload, ReloadOutcome};
use metrics::Counter;

use crate::bus::Bus;
use crate::config::PublisherConfig;
use crate::metrics::PublisherMetrics;
use crate::rate_limit::RateLimits;
use crate::receipts::WeakReceipts;

/// Changes the settings of a running publisher.
#[derive(Clone)]
pub struct PublisherReload {
    pub(crate) limits: Arc<RateLimits>,
    pub(crate) receipts: WeakReceipts,
    pub(crate) buses: [Bus; 2],
    pub(crate) metrics: Arc<PublisherMetrics>,
}

impl fmt::Debug for PublisherReload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PublisherReload").finish_non_exhaustive()
    }
}

impl Reload for PublisherReload {
    type Config = PublisherConfig;

    const KEYS: &'static [&'static str] = &["log.filter", "rate_limit.", "receipts.regions"];

    async fn reload(&self, config: PublisherConfig, changes: &ConfigChanges) {
        logging::set_filter(&config.log.filter);
        self.limits.configure(&config.rate_limit);
        self.receipts.configure(config.receipts.regions()).await;
        // The store reads its URL's file for each connection.
        if changes.files.iter().any(|key| key.starts_with("nats.")) {
            for bus in &self.buses {
                bus.reconnect().await;
            }
        }
    }

    fn reloads(&self) -> &ByLabel<ReloadOutcome, Counter> {
        &self.metrics.config_reloads
    }
}
