//! What the pages claim about the repository is so: their links, and the tests, metrics and files that they name.

use std::collections::BTreeSet;
use std::path::Path;

use crate::steps::root;
use crate::wording::tracked_files;

fn read(file: &str) -> String {
    std::fs::read_to_string(root().join(file)).unwrap()
}

fn tracked(kind: &str) -> Vec<String> {
    let files = tracked_files(&root()).unwrap();
    files.into_iter().filter(|file| file.ends_with(kind)).collect()
}

/// The targets of the links on a page, outside of code.
fn links(page: &str) -> Vec<&str> {
    page.split("](").skip(1).filter_map(|rest| rest.split_once(')')).map(|(target, _)| target).collect()
}

/// The anchors of a page's headings, as GitHub makes them.
fn anchors(page: &str) -> BTreeSet<String> {
    let headings = page.lines().filter(|line| line.starts_with('#'));
    headings
        .map(|line| {
            let text = line.trim_start_matches('#').trim().to_lowercase();
            let kept = text.chars().filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
            kept.map(|c| if c == ' ' { '-' } else { c }).collect()
        })
        .collect()
}

/// What stands in back quotes.
fn quoted(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

/// The cells of each row of the tables on a page, without the headings.
fn rows(page: &str) -> Vec<Vec<&str>> {
    let mut rows = Vec::new();
    let mut lines_of_table = 0;
    for line in page.lines() {
        let Some(row) = line.strip_prefix('|').and_then(|line| line.strip_suffix('|')) else {
            lines_of_table = 0;
            continue;
        };
        lines_of_table += 1;
        if lines_of_table > 2 {
            rows.push(row.split('|').map(str::trim).collect());
        }
    }
    rows
}

/// The names of all tests, and those on the lists from which the stores' suites are made.
fn tests() -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    for file in tracked(".rs") {
        let mut is_test = false;
        let mut is_list = false;
        for line in read(&file).lines() {
            let begins_list = line.starts_with(|c: char| c.is_lowercase()) && line.ends_with("!(");
            let line = line.trim();
            let function = line.trim_start_matches("async ").strip_prefix("fn ");
            if line == "#[test]" || line.starts_with("#[tokio::test") {
                is_test = true;
            } else if let Some((name, _)) = function.and_then(|rest| rest.split_once(['(', '<'])) {
                if is_test {
                    names.insert(name.to_owned());
                }
                is_test = false;
            } else if begins_list {
                is_list = true;
            } else if line.starts_with(')') {
                is_list = false;
            } else if is_list {
                names.insert(line.trim_end_matches(',').to_owned());
            } else if !(line.is_empty() || line.starts_with("#[") || line.starts_with("//")) {
                is_test = false;
            }
        }
    }
    names
}

#[test]
fn links_between_pages_lead_somewhere() {
    let mut broken = Vec::new();
    for file in tracked(".md") {
        let page = read(&file);
        let dir = root().join(&file).parent().unwrap().to_owned();
        for link in links(&page).into_iter().filter(|link| !link.contains("://")) {
            let (path, anchor) = link.split_once('#').unwrap_or((link, ""));
            let target = if path.is_empty() { root().join(&file) } else { dir.join(path) };
            let has_anchor =
                || anchor.is_empty() || anchors(&std::fs::read_to_string(&target).unwrap()).contains(anchor);
            if !(target.exists() && has_anchor()) {
                broken.push(format!("{file}: {link}"));
            }
        }
    }
    assert!(broken.is_empty(), "{broken:#?}");
}

/// Each row names the fault, what happens, the metric or the place that shows it, and the tests.
#[test]
fn failure_table_names_tests_and_metrics_that_exist() {
    let (tests, metrics) = (tests(), read("docs/metrics.md"));
    let page = read("docs/failures.md");
    let rows = rows(&page);
    assert!(rows.len() > 40, "{} rows only", rows.len());
    let mut wrong = Vec::new();
    for row in rows {
        let [fault, _, shown, named] = row[..] else { panic!("a row has four cells: {row:?}") };
        let named: Vec<&str> = quoted(named).collect();
        if named.is_empty() {
            wrong.push(format!("{fault}: names no test"));
        }
        let unknown = named.into_iter().filter(|name| !tests.contains(*name));
        wrong.extend(unknown.map(|name| format!("{fault}: no test {name}")));
        let has_row = |name: &str| {
            ["evictd_", "evictd_agent_", "evictd_publisher_"]
                .iter()
                .any(|prefix| metrics.contains(&format!("| `{prefix}{name}` |")))
        };
        let shown = quoted(shown).filter(|shown| !shown.starts_with('/'));
        let shown = shown.map(|shown| shown.split('{').next().unwrap_or_default());
        wrong.extend(shown.filter(|name| !has_row(name)).map(|name| format!("{fault}: no metric {name}")));
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// Paths in ARCHITECTURE.md are relative to the root. `path.rs: name` also names something that the file defines.
#[test]
fn architecture_names_files_and_symbols_that_exist() {
    let page = read("ARCHITECTURE.md");
    let mut named = 0;
    let mut wrong = Vec::new();
    for quoted in quoted(&page).filter(|quoted| quoted.contains('/') && quoted.contains(".rs")) {
        named += 1;
        let (file, symbol) = quoted.split_once(": ").unwrap_or((quoted, ""));
        let Ok(source) = std::fs::read_to_string(root().join(file)) else {
            wrong.push(format!("no file {file}"));
            continue;
        };
        let is_defined = ["fn", "struct", "enum", "trait", "const", "type"].iter().any(|keyword| {
            let definition = format!("{keyword} {symbol}");
            source.match_indices(&definition).any(|(at, _)| {
                !source[at + definition.len()..].starts_with(|c: char| c.is_alphanumeric() || c == '_')
            })
        });
        if !(symbol.is_empty() || is_defined) {
            wrong.push(format!("{file} defines no {symbol}"));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert!(named >= 10, "{named} files only");
}

#[test]
fn page_of_tasks_has_every_task() {
    let page = read("docs/tasks.md");
    let mut on_page = BTreeSet::new();
    for row in rows(&page) {
        on_page.insert((row[0].to_owned(), row[1].trim_matches('`').to_owned()));
    }
    let mut in_code = BTreeSet::new();
    for process in ["agent", "publisher"] {
        let source = read(&format!("crates/evictd-{process}/src/lib.rs"));
        for spawn in source.replace("spawn_last(", "spawn(").split("spawn(").skip(1) {
            let name = spawn.split('"').nth(1).unwrap_or_default();
            in_code.insert((process.to_owned(), name.to_owned()));
        }
    }
    assert_eq!(on_page, in_code);
}

#[test]
fn index_of_the_documents_has_every_page() {
    let index = read("docs/README.md");
    let linked: BTreeSet<&str> = links(&index).into_iter().collect();
    for page in tracked(".md").iter().filter_map(|file| file.strip_prefix("docs/")) {
        let is_linked = linked.contains(page) || page == "README.md";
        assert!(is_linked, "docs/README.md has no link to {page}");
    }
}

#[test]
fn every_decision_begins_with_its_number() {
    for file in tracked(".md").iter().filter(|file| file.starts_with("docs/adr/")) {
        let name = Path::new(file).file_name().unwrap().to_str().unwrap();
        let number: u32 = name[..4].parse().unwrap();
        assert!(read(file).starts_with(&format!("# {number}. ")), "{file}");
    }
}
