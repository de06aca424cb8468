//! docs/unkey-compatibility.md agrees with the code, and names existing tests.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use evictd_core::record::Verdict;
use evictd_wire::api::error::ErrorKind;
use evictd_wire::api::requests;

use crate::table::{Characters, ENDPOINTS, FieldRow, RuleRow};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn page() -> String {
    fs::read_to_string(root().join("docs/unkey-compatibility.md")).unwrap()
}

/// The start of the row about `field`.
fn row(field: &FieldRow) -> String {
    let need = match (field.required, field.nullable) {
        (true, _) => "required",
        (false, false) => "optional",
        (false, true) => "optional, `null` clears",
    };
    format!("| `{}` | {need} | {} |", field.name, taken(field.rule))
}

fn taken(rule: RuleRow) -> String {
    let characters = |of| match of {
        Characters::Any => String::new(),
        Characters::Stored => ", no NUL".to_owned(),
        // A minus between two others would be a range.
        Characters::LettersDigitsAnd(others) => {
            let minus = if others.contains('-') { "-" } else { "" };
            format!(" of `[a-zA-Z0-9{}{minus}]`", others.replace('-', ""))
        }
    };
    match rule {
        RuleRow::Text { min, max: usize::MAX, of } => {
            format!("text, {min} or more characters{}", characters(of))
        }
        RuleRow::Text { min, max, of } => format!("text, {min} to {max} characters{}", characters(of)),
        RuleRow::List { max_items, min, max, of } => {
            format!("list of at most {max_items} texts, each {min} to {max} characters{}", characters(of))
        }
        RuleRow::Integer { min, max } => format!("whole number, {min} to {max}"),
        RuleRow::Flag => "`true` or `false`".to_owned(),
        RuleRow::Object => "object, at most 100 properties and 16 KiB".to_owned(),
        RuleRow::LeftOut { harmless: [] } => "left out".to_owned(),
        RuleRow::LeftOut { harmless } => {
            let values: Vec<_> = harmless.iter().map(|value| format!("`{value}`")).collect();
            format!("left out: only {} is taken", values.join(" or "))
        }
    }
}

/// The names of tests on the page: in backticks, with at least three underscores.
fn named_tests(page: &str) -> BTreeSet<&str> {
    let sentence = |code: &&str| {
        code.matches('_').count() >= 3
            && code.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_')
    };
    page.split('`').skip(1).step_by(2).filter(sentence).collect()
}

/// The names of all tests: of the Rust sources, of the stores' conformance suite, and of Unkey's Python client.
/// Another test checks that the suite of its TypeScript client is the same.
fn existing_tests() -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    for folder in ["crates", "tests/tests"] {
        tests_below(&root().join(folder), &mut names);
    }
    let conformance = fs::read_to_string(root().join("crates/evictd-store/tests/it/conformance.rs")).unwrap();
    names.extend(conformance_tests(&conformance).into_iter().map(str::to_owned));
    let suite = fs::read_to_string(root().join("tests/sdk/python/suite.py")).unwrap();
    let after_def = suite.split("    def test_").skip(1);
    names.extend(after_def.filter_map(|text| text.split_once('(')).map(|(name, _)| format!("test_{name}")));
    names
}

/// The rows of the tables that name tests in their last two columns, as cells.
fn rows_with_tests(page: &str) -> Vec<Vec<&str>> {
    let mut rows = Vec::new();
    let mut in_table = false;
    for line in page.lines() {
        let Some(row) = line.strip_prefix('|').and_then(|line| line.strip_suffix('|')) else {
            in_table = false;
            continue;
        };
        if row.ends_with(" test | end to end ") {
            in_table = true;
        } else if in_table && !row.starts_with("---") {
            rows.push(row.split('|').map(str::trim).collect());
        }
    }
    rows
}

/// The names of all tests in the Rust sources below `folder`.
fn tests_below(folder: &Path, names: &mut BTreeSet<String>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            tests_below(&path, names);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let source = fs::read_to_string(&path).unwrap();
            names.extend(tests_of(&source).into_iter().map(str::to_owned));
        }
    }
}

/// The functions of a Rust source with a test attribute. Only further attributes and comments may follow it.
fn tests_of(source: &str) -> Vec<&str> {
    let mut names = Vec::new();
    let mut is_test = false;
    for line in source.lines().map(str::trim) {
        if line == "#[test]" || line == "#[tokio::test]" || line.starts_with("#[tokio::test(") {
            is_test = true;
        } else if let Some(name) = function(line) {
            if is_test {
                names.push(name);
            }
            is_test = false;
        } else if !(line.is_empty() || line.starts_with("#[") || line.starts_with("//")) {
            is_test = false;
        }
    }
    names
}

/// The name of the function that begins on this line, `async` or not.
fn function(line: &str) -> Option<&str> {
    let rest = line.strip_prefix("async ").unwrap_or(line).strip_prefix("fn ")?;
    rest.split_once(['(', '<']).map(|(name, _)| name)
}

/// The names on the list of the stores' conformance suite.
fn conformance_tests(source: &str) -> Vec<&str> {
    let (_, list) = source.split_once("\nconformance!(").expect("the list");
    let (list, _) = list.split_once(");").expect("its end");
    list.split(',').map(str::trim).filter(|name| !name.is_empty()).collect()
}

#[test]
fn every_test_that_the_page_names_exists() {
    let existing = existing_tests();
    let page = page();
    let named = named_tests(&page);
    assert!(named.len() > 150, "the page names {} tests only", named.len());
    let missing: Vec<_> = named.iter().filter(|name| !existing.contains(**name)).collect();
    assert!(missing.is_empty(), "docs/unkey-compatibility.md names tests that don't exist: {missing:#?}");
}

#[test]
fn only_what_runs_as_a_test_counts_as_one() {
    let source = "
        #[test]
        fn a_plain_one() {}

        // A comment between them.
        #[tokio::test(flavor = \"multi_thread\")]
        #[expect(clippy::too_many_lines, reason = \"many cases\")]
        async fn one_with_more_attributes() {}

        #[tokio::test]
        /// Says what for.
        async fn one_with_words() {}

        fn a_function_that_tests_call() {}

        // #[test]
        fn one_that_was_switched_off() {}

        // fn one_in_a_comment() {}
        #[test]
        mod not_a_function {}
        fn one_whose_attribute_belongs_elsewhere() {}
    ";
    assert_eq!(tests_of(source), ["a_plain_one", "one_with_more_attributes", "one_with_words"]);
    let list = "macro_rules! conformance {}\nconformance!(\n    one_test,\n    another,\n);\nfn helper() {}";
    assert_eq!(conformance_tests(list), ["one_test", "another"]);
    assert!(!existing_tests().contains("existing_tests"), "a helper isn't a test");
}

#[test]
fn every_line_of_the_page_names_a_test() {
    let page = page();
    let rows = rows_with_tests(&page);
    assert!(rows.len() > 200, "{} lines only name tests", rows.len());
    for row in rows {
        let [.., test, end_to_end] = row[..] else { panic!("too few cells: {row:?}") };
        assert!(!named_tests(test).is_empty(), "no test is named: {row:?}");
        assert!(end_to_end == "-" || !named_tests(end_to_end).is_empty(), "neither `-` nor a test: {row:?}");
    }
}

#[test]
fn the_page_has_every_endpoint() {
    let page = page();
    for endpoint in requests::Endpoint::ALL {
        let method = if endpoint.is_open() { "GET" } else { "POST" };
        let heading = format!("\n## `{method} {}`\n", endpoint.path());
        assert!(page.contains(&heading), "no section {heading}");
    }
}

#[test]
fn the_page_has_every_field_with_its_limits() {
    let page = page();
    for endpoint in ENDPOINTS {
        let heading = format!("\n## `POST {}`\n", endpoint.path);
        let (_, rest) = page.split_once(&heading).unwrap_or_else(|| panic!("no section {heading}"));
        let section = rest.split("\n## ").next().unwrap_or_default();
        for field in endpoint.fields {
            let row = row(field);
            let has = section.lines().any(|line| line.starts_with(&row));
            assert!(has, "the section of {} needs a row that begins {row}", endpoint.path);
        }
        let rows = section.lines().filter(|line| line.contains("_enforces_the_limits_of_each_field")).count();
        assert_eq!(rows, endpoint.fields.len(), "rows about fields that {} doesn't have", endpoint.path);
    }
}

#[test]
fn the_page_has_every_error_and_every_verdict() {
    let page = page();
    for kind in ErrorKind::ALL {
        let url = kind.type_url();
        let r#type = url.trim_start_matches("https://unkey.com/docs/errors/");
        let status = kind.status().to_string();
        let r#type = format!("`{type}`");
        let rows = rows_with_tests(&page);
        let has = rows.iter().any(|row| row[..2] == [status.as_str(), r#type.as_str()]);
        assert!(has, "the page needs a row that begins | {status} | {type} | and names tests");
    }
    for verdict in Verdict::ALL {
        let row = format!("\n| `{}` | {} |", verdict.code(), verdict == Verdict::Valid);
        assert!(page.contains(&row), "the page needs a row that begins {row}");
    }
}
