//! The end-to-end tests: real NATS servers and real `evictd` processes. They assert on what users see: the HTTP APIs,
//! `/status`, `/readyz` and `/metrics`.
//!
//! Each test has a deployment of its own. In reading order:
//!
//! * [`failure_modes`]: known failures of such caches, and the tests that rule them out.
//! * [`world`]: the deployment, and the assertions on it.
//! * [`deletions`]: deletions of keys and APIs that every agent has cached.
//! * [`live_feed`]: messages of the live feed are lost, duplicated, swapped, shuffled.
//! * [`loads`]: a load is in flight while its key is deleted.
//! * [`restarts`]: daemons and servers are killed, stopped and started around deletions.
//! * [`partitions`]: an agent is cut off, or paused, for longer than the bound.
//! * [`half_alive`]: a wire passes some messages and blocks others.
//! * [`clocks`]: wall clocks that are wrong, and that are set.
//! * [`storms`]: many agents at once, and caches that are suddenly empty.
//! * [`crashes`]: all processes are killed in random order.
//! * [`misconfigured`]: permissions that are wrong from the start.
//! * [`agents`]: several agents of a region, and one that starts before the publisher is reachable.
//! * [`receipts`]: what receipts report, compared with what clients see.
//! * [`bad_days`]: disks, locks, outages, contention, slow clients and shutdowns, in the middle of deletions.
//! * [`home_store`]: the database is changed or restored without the publisher.
//! * [`erasure`]: what is left of a key that was erased, and of a log that was purged.
//! * [`rivals`]: two copies of a home store on one bus.
//! * [`reload`]: a configuration that is read again at SIGHUP.
//! * [`rotation`]: secrets change in their files while the daemons run.
//! * [`postgres`]: the home store on PostgreSQL: several publishers share it, and it can fail over.
//! * [`malformed_http`], [`malformed_nats`]: malformed and forged input.
//! * [`secrets`]: no secret is written anywhere.
//! * [`command_line`], [`dev`]: `evictd api`, `check-config`, `root-key`, and `evictd dev`.
//! * [`cli_keys`], [`cli_bulk`], [`cli_operator`]: each call of the APIs, bulk deletions, and operators' commands on the
//!   home store.
//! * [`sdk`]: Unkey's own clients.

mod agents;
mod bad_days;
mod cli_bulk;
mod cli_keys;
mod cli_operator;
mod clocks;
mod command_line;
mod crashes;
mod deletions;
mod dev;
mod erasure;
mod failure_modes;
mod half_alive;
mod home_store;
mod live_feed;
mod loads;
mod malformed_http;
mod malformed_nats;
mod misconfigured;
mod partitions;
mod postgres;
mod receipts;
mod reload;
mod restarts;
mod rivals;
mod rotation;
mod sdk;
mod secrets;
mod storms;
mod world;
