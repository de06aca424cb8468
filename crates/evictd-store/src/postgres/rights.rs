//! What the publishers' database user must be allowed to do.
//!
//! A user that lacks something answers most questions well and fails where nobody looks, such as at the audit log of
//! a deletion. So all of it is asked at the start and now and then, and what is missing is told by name.

use sqlx::Row;

use super::connections::{Lane, failed};
use crate::error::StoreError;

/// Each table, and what publishers do with it. The log is also written by triggers, with their owner's rights. Root keys
/// are made by an operator's command, and old audit records purged where `retention.audit` says so: users for these need
/// more.
const RIGHTS: [(&str, &str); 13] = [
    ("_sqlx_migrations", "SELECT"),
    ("workspaces", "SELECT"),
    ("root_keys", "SELECT, UPDATE"),
    ("apis", "SELECT, INSERT, UPDATE"),
    ("keys", "SELECT, INSERT, UPDATE, DELETE"),
    ("log_head", "SELECT, UPDATE"),
    ("history", "SELECT, INSERT"),
    ("round_tokens", "SELECT, INSERT, UPDATE"),
    ("voucher_key", "SELECT"),
    ("invalidations", "SELECT, INSERT, UPDATE, DELETE"),
    ("receipts", "SELECT, INSERT, DELETE"),
    ("roster", "SELECT, INSERT, UPDATE, DELETE"),
    ("audit_log", "SELECT, INSERT"),
];

/// All tables of a store.
pub(super) fn tables() -> Vec<&'static str> {
    RIGHTS.iter().map(|(table, _)| *table).collect()
}

/// Fails with the GRANTs that are missing.
pub(super) async fn check(log: &Lane) -> Result<(), StoreError> {
    const ACTION: &str = "look at its user's rights";
    let (tables, rights): (Vec<&str>, Vec<&str>) = RIGHTS.into_iter().unzip();
    let ask = || {
        sqlx::query(
            "SELECT format('GRANT %s ON %s TO %I', string_agg(one, ', '), relation::regclass, current_user) AS missing
             FROM unnest($1::text[], $2::text[]) AS needed (relation, several),
                  string_to_table(several, ', ') AS one
             WHERE NOT has_table_privilege(relation, one)
             GROUP BY relation ORDER BY relation",
        )
        .bind(tables.clone())
        .bind(rights.clone())
    };
    let rows = log.rows(ACTION, ask).await?;
    let missing: Vec<String> =
        rows.iter().map(|row| row.try_get("missing")).collect::<Result<_, _>>().map_err(failed(ACTION))?;
    if missing.is_empty() { Ok(()) } else { Err(StoreError::RightMissing { grants: missing.join("; ") }) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_for_operators_grants_just_this() {
        const PAGE: &str = include_str!("../../../../docs/operations.md");
        let grants = PAGE
            .lines()
            .filter_map(|line| line.trim().strip_prefix("GRANT ")?.strip_suffix(" TO publisher;"));
        let mut granted: Vec<(&str, &str)> = grants
            .filter_map(|grant| grant.split_once(" ON "))
            .flat_map(|(rights, tables)| tables.split(", ").map(move |table| (table, rights)))
            .collect();
        let mut needed = RIGHTS.to_vec();
        granted.sort_unstable();
        needed.sort_unstable();
        assert_eq!(granted, needed);
    }
}
