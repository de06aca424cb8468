//! The rights that the publishers' database user needs.
//!
//! A user that lacks a right may fail rarely, for example only at the audit record of a deletion. So all rights are checked
//! at the start and regularly after that, and the missing ones are reported.

use super::lanes::Lane;
use crate::error::StoreError;
use crate::rows::Columns;

/// The rights of publishers by table. Triggers write the log with their owner's rights. Operators' commands create root
/// keys, and `retention.audit` deletes audit records: users for these need more.
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

/// Fails with the missing GRANTs.
pub(super) async fn check(log: &Lane) -> Result<(), StoreError> {
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
    let rows = log.rows("read its user's rights", ask).await?;
    let missing: Vec<&str> = rows.iter().map(|row| row.text("missing")).collect::<Result<_, _>>()?;
    if missing.is_empty() { Ok(()) } else { Err(StoreError::RightMissing { grants: missing.join("; ") }) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operators_page_grants_exactly_these_rights() {
        const PAGE: &str = include_str!("../../../../docs/home-store.md");
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
