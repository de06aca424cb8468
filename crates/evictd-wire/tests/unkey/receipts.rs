//! docs/receipts.md has every field of a receipt, says when it is absent, and shows the JSON that the code writes.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::time::Duration;

use evictd_core::invalidation::Cause;
use evictd_core::limits::RECEIPT_NAMES_MAX;
use evictd_core::receipts::{Measured, RegionState};
use evictd_wire::api::propagation::{
    ExposureSeen, MillisInterval, MissingInstance, Propagation, RegionPropagation,
};
use serde_json::Value;

fn page() -> String {
    let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs");
    fs::read_to_string(docs.join("receipts.md")).unwrap()
}

/// A receipt with every field. Without `..`, so that a new field must be added here and to the page.
fn full() -> Propagation {
    let confirmed = RegionPropagation {
        region: "eu".to_owned(),
        state: Cow::Borrowed("confirmed"),
        instances: 2,
        confirmed_after_ms: Some(4.25),
        missing: Vec::new(),
        missing_count: 0,
        lag_ms: Some(MillisInterval { low: 0.9, high: 2.0 }),
        exposure: Some(ExposureSeen { last_answer_after_ms: 1.5 }),
        duplicate_names: false,
    };
    let elapsed = RegionPropagation {
        missing: vec![MissingInstance { agent: "us-1".to_owned(), instance: "00c0ffee00c0ffee".to_owned() }],
        missing_count: 1,
        ..bare("us", "elapsed")
    };
    Propagation {
        request_id: "req_1a2B3c4D5e6F7g8H".to_owned(),
        state: Cow::Borrowed("elapsed"),
        r#final: true,
        position: Some(4711),
        epoch: Some(2),
        cause: Some(Cow::Borrowed("deleted")),
        committed_at: Some(1_700_000_000_123),
        measured_from: Some(Cow::Borrowed("request")),
        bound_ms: 30_000,
        final_after_ms: Some(30_004.125),
        regions: vec![confirmed, elapsed],
    }
}

/// A region without optional fields.
fn bare(region: &str, state: &'static str) -> RegionPropagation {
    RegionPropagation {
        region: region.to_owned(),
        state: Cow::Borrowed(state),
        instances: 2,
        confirmed_after_ms: None,
        missing: Vec::new(),
        missing_count: 0,
        lag_ms: None,
        exposure: None,
        duplicate_names: false,
    }
}

/// The paths of all fields in `value`, such as `regions[].region`.
fn fields(value: &Value, above: &str, found: &mut BTreeSet<String>) {
    match value {
        Value::Object(members) => {
            for (name, member) in members {
                let path = if above.is_empty() { name.clone() } else { format!("{above}.{name}") };
                fields(member, &path, found);
                found.insert(path);
            }
        }
        Value::Array(items) => items.iter().for_each(|item| fields(item, &format!("{above}[]"), found)),
        _ => {}
    }
}

fn fields_of(receipt: &Propagation) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    fields(&serde_json::to_value(receipt).unwrap(), "", &mut found);
    found
}

/// The page's table of fields: the path of each, and when it is present.
fn table(page: &str) -> Vec<(&str, &str)> {
    let (_, rest) = page.split_once("\n## Fields\n").unwrap();
    let section = rest.split("\n## ").next().unwrap();
    let rows = section.lines().filter_map(|line| line.strip_prefix("| `"));
    rows.map(|row| {
        let cells: Vec<_> = row.split(" | ").collect();
        assert_eq!(cells.len(), 4, "a row has four cells: {row}");
        (cells[0].trim_end_matches('`'), cells[2])
    })
    .collect()
}

#[test]
fn the_page_of_receipts_has_every_field_and_no_other() {
    let page = page();
    let table = table(&page);
    let on_page: BTreeSet<_> = table.iter().map(|(path, _)| (*path).to_owned()).collect();
    assert_eq!(on_page.len(), table.len(), "a field has two rows");
    assert_eq!(on_page, fields_of(&full()));
}

#[test]
fn the_page_of_receipts_says_which_fields_may_be_absent() {
    let mut least = Propagation::nothing("req_1", Duration::from_secs(30));
    least.regions.push(bare("eu", "pending"));
    let always = fields_of(&least);
    for (path, presence) in table(&page()) {
        // A field of an optional object is present whenever the object is.
        let inside_optional = ["missing[].", "lagMs.", "exposure."].iter().any(|part| path.contains(part));
        let is_always = always.contains(path) || inside_optional;
        assert_eq!(presence == "always", is_always, "{path}: {presence}");
    }
}

#[test]
fn the_page_of_receipts_shows_what_the_code_writes() {
    let page = page();
    let example = serde_json::to_string_pretty(&full()).unwrap();
    assert!(page.contains(&format!("```json\n{example}\n```")), "the page's example isn't\n{example}");
    assert_eq!(serde_json::from_str::<Propagation>(&example).unwrap(), full());
}

#[test]
fn the_page_of_receipts_has_every_word_and_the_limit() {
    let page = page();
    let states = [
        RegionState::Pending,
        RegionState::Confirmed,
        RegionState::Elapsed,
        RegionState::Unproven,
        RegionState::Absent,
    ];
    for state in states.map(RegionState::label) {
        assert!(page.contains(&format!("\n| `{state}` |")), "no row for {state}");
    }
    let causes =
        [Cause::Created, Cause::Changed, Cause::Deleted, Cause::Erased, Cause::Restored, Cause::Expired];
    let measured = [Measured::FromRequest, Measured::FromFirstSight];
    for word in causes.map(Cause::label).into_iter().chain(measured.map(Measured::label)) {
        assert!(page.contains(&format!("`{word}`")), "{word} isn't explained");
    }
    assert!(page.contains(&format!("the first {RECEIPT_NAMES_MAX}.")));
}
