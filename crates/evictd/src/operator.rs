//! What the commands share that open the home store directly. They work while a publisher runs, too.

use clap::Args;
use evictd_cli::print::OutputFormat;
use evictd_store::operator::Operator;
use evictd_wire::api::ids;

use crate::config_args::ConfigArgs;
use crate::home_store::ConfiguredStore;

#[derive(Args, Debug)]
pub(crate) struct OperatorArgs {
    #[command(flatten)]
    pub(crate) config: ConfigArgs,
    /// `json` prints JSON, for scripts.
    #[arg(long, value_name = "FORMAT", default_value = "text")]
    pub(crate) output: OutputFormat,
}

impl OperatorArgs {
    /// Returns the store, which must exist.
    pub(crate) fn store(&self) -> anyhow::Result<ConfiguredStore> {
        ConfiguredStore::existing(&self.config)
    }
}

/// Returns who makes a change, for the audit records.
pub(crate) fn operator() -> Operator {
    let user = ["SUDO_USER", "USER", "LOGNAME"].into_iter().find_map(|name| std::env::var(name).ok());
    let name = user.filter(|user| !user.is_empty()).unwrap_or_else(|| "operator".to_owned());
    Operator { name, request_id: ids::new_id(ids::REQUEST) }
}

#[cfg(test)]
pub(crate) fn test_args(path: &std::path::Path) -> OperatorArgs {
    let config = ConfigArgs::default().and_set("store.path", path.display().to_string());
    OperatorArgs { config, output: OutputFormat::Json }
}
