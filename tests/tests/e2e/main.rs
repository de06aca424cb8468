//! The end-to-end tests: real NATS servers and real `evictd` processes, asserted on as a user sees them,
//! through the HTTP APIs, `/status`, `/readyz` and `/metrics`.
//!
//! Each test has a deployment of its own. In reading order:
//!
//! * [`failure_modes`]: how such caches fail, and which test shows that this one doesn't.
//! * [`world`]: the deployment, and sentences about it.
//! * [`deletions`]: keys and APIs that everybody has cached are gone everywhere.
//! * [`live_feed`]: messages of the live feed are lost, doubled, swapped, jumbled.
//! * [`loads`]: a load that is under way while its key is deleted.
//! * [`restarts`]: daemons and servers are killed, stopped and started around deletions.
//! * [`partitions`]: an agent that is cut off, or stands still, for longer than the bound.
//! * [`half_alive`]: some things pass on a wire and others don't.
//! * [`clocks`]: wall clocks that are wrong, and that are set.
//! * [`storms`]: many agents at once, and caches that are empty all of a sudden.
//! * [`crashes`]: everything is killed in any order.
//! * [`misconfigured`]: permissions that are wrong from the start.
//! * [`agents`]: several agents of a region, and one that starts before it can be of use.
//! * [`receipts`]: what deletions are said to have become, and what clients see.
//! * [`bad_days`]: disks, locks, outages, crowds, slow clients and shutdowns, in the middle of deletions.
//! * [`home_store`]: the database is changed, or put back, behind the publisher's back.
//! * [`erasure`]: what is left of a key that was erased, and of a log that was purged.
//! * [`rivals`]: two copies of a home store on one bus.
//! * [`postgres`]: all of that on PostgreSQL, which several publishers share and another server may take over.
//! * [`malformed_http`], [`malformed_nats`]: what nobody should send.
//! * [`secrets`]: nothing secret is written anywhere.
//! * [`command_line`], [`dev`]: `evictd api`, `check-config`, `root-key`, and `evictd dev`.
//! * [`cli_keys`], [`cli_bulk`], [`cli_operator`]: each call of the APIs, many deletions at once, and what operators
//!   do on the home store.
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
mod restarts;
mod rivals;
mod sdk;
mod secrets;
mod storms;
mod world;
