//! How similar caches have failed, according to bug reports and incident reports, and the tests that show that evictd
//! doesn't. Each row names its tests as `module::test` of this crate.
//!
//! 1. *A load that began before a deletion ends after it and restores the old record.*
//!    `loads::load_read_before_a_deletion_does_not_restore_the_key`,
//!    `loads::load_read_before_an_erasure_does_not_restore_the_key`,
//!    `loads::load_read_before_an_api_deletion_does_not_restore_its_key`,
//!    `loads::abandoned_load_does_not_restore_a_deleted_key`,
//!    `loads::repeated_load_does_not_restore_a_deleted_key`
//! 2. *A subscriber reconnects and silently keeps entries whose invalidation it missed.*
//!    `partitions::cut_off_region_denies_within_the_bound_and_recovers`,
//!    `partitions::region_whose_server_is_cut_off_denies_and_recovers`,
//!    `partitions::cuts_shorter_than_a_heartbeat_lose_nothing`,
//!    `restarts::deletions_succeed_without_nats_and_arrive_when_it_is_back`,
//!    `half_alive::deletions_over_a_150_ms_wire_take_as_long_without_flaps`
//! 3. *A connection is half open: no data, no error, no log.* The tests break each direction, both, and once with the
//!    bound of 30 seconds.
//!    `partitions::cut_off_region_denies_within_the_bound_and_recovers`,
//!    `partitions::with_the_default_configuration_the_bound_is_30_seconds`,
//!    `half_alive::a_connection_on_which_only_pings_pass_proves_nothing`
//! 4. *A heartbeat isn't tied to what was delivered.* Only ticks pass, or proofs, or deletions. Or everything arrives,
//!    but the agent's process is frozen.
//!    `half_alive::ticks_and_proofs_renew_no_lease_while_rows_are_missing`,
//!    `half_alive::received_deletions_do_not_prove_that_none_is_missing`,
//!    `half_alive::expired_agent_with_working_loads_caches_for_the_bound`,
//!    `partitions::paused_agent_serves_nothing_deleted_during_the_pause`
//! 5. *Messages are lost, duplicated or reordered, or a late subscriber misses the first ones.*
//!    `live_feed::only_the_lost_message_of_2000_deletions_is_repaired`,
//!    `live_feed::duplicated_and_shuffled_messages_change_nothing`,
//!    `live_feed::duplicated_messages_change_nothing`,
//!    `live_feed::reordered_messages_change_nothing`
//! 6. *The log is truncated, the stream restarts, or an acknowledged write is lost.* NATS stores nothing here. Rows
//!    older than `retention.log` are purged. The publisher refuses to replay purged rows, and the requesting agent
//!    flushes. The publisher of a restored store is silent until the operator declares a new epoch. Then all agents
//!    flush.
//!    `erasure::agent_cut_off_across_a_purge_flushes_once`,
//!    `home_store::wiped_nats_and_restored_store_cost_one_flush`,
//!    `home_store::restored_store_is_silent_until_an_epoch_is_declared`,
//!    `home_store::restored_store_that_caught_up_is_still_detected`,
//!    `restarts::answered_deletions_survive_a_kill_of_the_publisher`,
//!    `postgres::failover::a_fail_over_that_loses_nothing_costs_one_flush`,
//!    `postgres::failover::commits_in_the_place_of_lost_ones_are_applied`,
//!    `postgres::failover::a_fail_over_that_lost_an_epoch_begins_another`,
//!    `postgres::failover::fail_overs_under_load_lose_no_answered_change`
//! 7. *The wall clock decides.*
//!    `clocks::agents_with_wrong_wall_clocks_keep_every_guarantee`,
//!    `clocks::publisher_with_a_wrong_wall_clock_keeps_every_guarantee`,
//!    `clocks::wall_clocks_set_during_deletions_change_nothing`
//! 8. *An older answer replaces a newer one.* It was late (the tests of row 1), or came from a lagging replica or a
//!    demoted primary. Here each answer states the position of its read.
//!    `loads::load_that_found_nothing_does_not_hide_a_restored_key`,
//!    `postgres::replicas::a_lagging_replica_answers_only_what_has_not_changed`,
//!    `postgres::replicas::an_agent_cut_off_with_its_replica_denies_within_the_bound`,
//!    `postgres::replicas::readers_of_the_demoted_primary_reject_deleted_keys`,
//!    `postgres::failover::a_publisher_on_the_demoted_primary_falls_silent`
//! 9. *A short outage causes a storm, or leaks something each time.*
//!    `storms::ten_agents_that_flap_fifty_times_leave_nothing_behind`,
//!    `storms::cache_is_reloaded_with_bounded_loads_after_a_flush`,
//!    `storms::cache_is_filled_with_bounded_loads_after_a_cold_start`,
//!    `loads::verifications_of_one_key_share_one_load`
//! 10. *A subscription dies or never worked, and the process stays "healthy".*
//!     `live_feed::silent_feed_is_reported_and_deletions_still_arrive`,
//!     `misconfigured::agent_without_the_live_feed_permission_is_not_ready`,
//!     `misconfigured::agent_without_the_probe_permission_is_not_ready`,
//!     `misconfigured::agent_without_the_lookup_permission_is_not_ready_and_denies`,
//!     `misconfigured::permission_revoked_at_runtime_is_a_warning`,
//!     `misconfigured::publisher_that_may_not_publish_the_live_feed_is_not_ready`,
//!     `misconfigured::publisher_that_may_not_receive_probes_is_not_ready`,
//!     `restarts::agent_paused_during_a_nats_restart_receives_the_feed_again`
//! 11. *Two copies of the store are active at once, and each recovers at the other's cost.*
//!     `rivals::old_copy_that_returns_beside_the_restored_one_stays_silent`,
//!     `rivals::staging_on_productions_bus_yields_and_production_goes_on`,
//!     `rivals::copies_that_start_together_fall_silent_until_one_is_stopped`,
//!     `rivals::resumed_publisher_checks_for_rivals_before_it_serves`,
//!     `rivals::copies_that_meet_after_a_partition_both_fall_silent`,
//!     `rivals::unfollowed_copy_needs_a_declaration_after_a_partition`,
//!     `rivals::agents_report_a_rival_and_keep_their_own_history`,
//!     `rivals::old_copy_booted_during_the_restored_ones_restart_is_behind`,
//!     `rivals::used_up_epochs_fail_closed_with_the_way_out`
//!
//! Further failures:
//!
//! * An erased record can still be read from a disk:
//!   `erasure::only_the_id_of_an_erased_key_is_left_after_a_purge`,
//!   `postgres::erasure::only_the_id_of_an_erased_key_is_left_after_a_purge`
//! * A deletion misses dependent keys:
//!   `deletions::an_api_with_500_cached_keys_is_gone_by_one_row_and_one_floor`
//! * A "not found" outlives the key's restoration:
//!   `home_store::change_by_sql_reaches_every_region`
//! * A broker disconnects a slow consumer:
//!   `restarts::agent_disconnected_as_a_slow_consumer_misses_nothing`
//! * Several of these happen at once:
//!   `crashes::guarantees_hold_when_everything_is_killed_in_any_order`

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};

/// Returns the module's documentation, which contains the rows.
fn table() -> String {
    let lines = include_str!("failure_modes.rs").lines();
    lines.map_while(|line| line.strip_prefix("//!")).collect::<Vec<_>>().join("\n")
}

/// Returns all names of the form `module::test` between back quotes in `text`.
fn names(text: &str) -> BTreeSet<&str> {
    text.split('`').skip(1).step_by(2).filter(|name| name.contains("::") && *name != "module::test").collect()
}

/// Failure: a test is renamed or removed, and the table still names it.
#[test]
fn every_test_that_the_table_names_exists() -> Result<()> {
    let table = table();
    let rows: Vec<&str> = table.split("Further failures").next().unwrap_or_default().split(". *").collect();
    assert_eq!(rows.len(), 12, "an introduction and eleven rows");
    for (row, text) in rows.iter().enumerate().skip(1) {
        ensure!(!names(text).is_empty(), "row {row} names no test");
    }
    for name in names(&table) {
        let (modules, test) = name.rsplit_once("::").context("no module")?;
        // Each module is declared in its parent's file, and is in the directory with the parent's name.
        let mut dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/e2e");
        let mut source = fs::read_to_string(dir.join("main.rs"))?;
        for module in modules.split("::") {
            ensure!(source.contains(&format!("\nmod {module};\n")), "{modules} isn't a module of this crate");
            source = fs::read_to_string(dir.join(format!("{module}.rs")))?;
            dir.push(module);
        }
        ensure!(
            source.contains(&format!("#[test]\nfn {test}() -> Result<()> {{\n")),
            "there is no test {name}"
        );
    }
    Ok(())
}
