//! `cargo xtask wording`: no tracked file uses a word that CONTRIBUTING.md rules out.
//!
//! The table in CONTRIBUTING.md is the only list. Identifiers are split into their words, so a function name is checked
//! like a comment. Quotations are exempt: Markdown blockquotes, and text between back quotes in one line.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, bail, ensure};

use crate::steps;

/// The section of CONTRIBUTING.md that holds the table.
const HEADING: &str = "## Words that are not used";

/// The kinds of files that people write. Lock files, licenses and test vectors are the words of others.
const CHECKED: [&str; 11] =
    ["conf", "md", "mjs", "proto", "py", "rs", "service", "sql", "toml", "yml", ".ci/run"];

pub(crate) fn run() -> anyhow::Result<()> {
    let root = steps::root();
    let page =
        std::fs::read_to_string(root.join("CONTRIBUTING.md")).context("cannot read CONTRIBUTING.md")?;
    let list = List::parse(&page)?;
    let mut findings = 0;
    for file in tracked_files(&root)? {
        if CHECKED.iter().any(|kind| file.ends_with(kind)) {
            let text =
                std::fs::read_to_string(root.join(&file)).with_context(|| format!("cannot read {file}"))?;
            for (line, phrase, instead) in list.find(&file, &text) {
                println!("{file}:{line}: `{phrase}`; write {instead}");
                findings += 1;
            }
        }
    }
    ensure!(findings == 0, "{findings} words are on the list in CONTRIBUTING.md");
    Ok(())
}

/// The paths that git tracks and that exist, relative to the root.
pub(crate) fn tracked_files(root: &Path) -> anyhow::Result<Vec<String>> {
    let output = Command::new("git").args(["ls-files", "-z"]).current_dir(root).output();
    let output = output.context("cannot run git")?;
    ensure!(output.status.success(), "`git ls-files` failed ({})", output.status);
    let names = String::from_utf8(output.stdout).context("a file name is not UTF-8")?;
    Ok(names.split_terminator('\0').filter(|name| root.join(name).is_file()).map(str::to_owned).collect())
}

/// Words and phrases, in lower case, and what to write instead.
struct List(Vec<(Vec<String>, String)>);

impl List {
    fn parse(page: &str) -> anyhow::Result<Self> {
        let Some((_, rest)) = page.split_once(HEADING) else { bail!("CONTRIBUTING.md lacks `{HEADING}`") };
        let section = rest.split("\n## ").next().unwrap_or_default();
        let mut phrases = Vec::new();
        for row in section.lines().filter_map(|line| line.strip_prefix("| `")) {
            let (ruled_out, instead) = row.split_once(" | ").context("a row lacks its second cell")?;
            for phrase in ruled_out.split('`').step_by(2).map(words).filter(|phrase| !phrase.is_empty()) {
                phrases.push((phrase, instead.trim_end_matches(['|', ' ']).to_owned()));
            }
        }
        ensure!(!phrases.is_empty(), "the table under `{HEADING}` is empty");
        Ok(Self(phrases))
    }

    /// Returns the number of each line with a phrase of the list, the phrase, and what to write instead.
    fn find(&self, file: &str, text: &str) -> Vec<(usize, String, &str)> {
        let extension = Path::new(file).extension().unwrap_or_default();
        let is_markdown = extension == "md";
        // In JavaScript, back quotes enclose code.
        let has_quotations = extension != "mjs";
        let mut findings = Vec::new();
        for (index, line) in text.lines().enumerate() {
            if is_markdown && line.trim_start().starts_with('>') {
                continue;
            }
            let words = if has_quotations { words(&without_quotations(line)) } else { words(line) };
            for at in 0..words.len() {
                let found = self.0.iter().find(|(phrase, _)| words[at..].starts_with(phrase));
                findings.extend(found.map(|(phrase, instead)| (index + 1, phrase.join(" "), &**instead)));
            }
        }
        findings
    }
}

/// Drops what stands between two back quotes. One without a partner quotes nothing.
fn without_quotations(line: &str) -> String {
    let pieces: Vec<&str> = line.split('`').collect();
    let last = pieces.len() - 1;
    let is_kept = |at: &usize| at.is_multiple_of(2) || *at == last;
    (0..=last).filter(is_kept).map(|at| pieces[at]).collect::<Vec<_>>().join(" ")
}

/// The words of a line in lower case, those of identifiers apart: `oldLog` and `old_log` both have two.
fn words(line: &str) -> Vec<String> {
    let mut words = Vec::new();
    let mut word = String::new();
    let mut before = ' ';
    for character in line.chars().chain([' ']) {
        let begins_another = before.is_ascii_lowercase() && character.is_ascii_uppercase();
        if (begins_another || !character.is_alphabetic()) && !word.is_empty() {
            words.push(std::mem::take(&mut word));
        }
        if character.is_alphabetic() {
            word.extend(character.to_lowercase());
        }
        before = character;
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: &str = "# Contributing\n\n## Words that are not used\n\n| not | instead |\n|---|---|\n\
                        | `fie`, `fol de` | shame |\n| `gad` | indeed |\n\n## Next\n\n| `fine` | x |\n";

    fn found(file: &str, text: &str) -> Vec<String> {
        let list = List::parse(PAGE).unwrap();
        list.find(file, text).iter().map(|(line, phrase, _)| format!("{line}: {phrase}")).collect()
    }

    #[test]
    fn words_on_the_list_are_found_in_text_and_names() {
        let text = "// It was fie.\nfn fie_of_it() {}\nstruct WasFie;\nconst GAD: u8 = 1;\nIt is fol de rol.";
        assert_eq!(found("a.rs", text), ["1: fie", "2: fie", "3: fie", "4: gad", "5: fol de"]);
    }

    #[test]
    fn other_words_are_not_found() {
        assert!(found("a.rs", "// Fol, a field, gadget, fine.").is_empty());
    }

    #[test]
    fn quotations_are_exempt_from_the_list() {
        assert!(found("a.md", "> He said fie.\n\nThe word `fie` and `was fie of`.").is_empty());
        assert_eq!(found("a.md", "a `b` fie"), ["1: fie"]);
        assert_eq!(found("a.rs", "> fie"), ["1: fie"]);
        assert_eq!(found("a.rs", "one ` fie"), ["1: fie"]);
        assert_eq!(found("a.mjs", "`fie`"), ["1: fie"]);
    }

    #[test]
    fn a_page_without_the_table_is_an_error() {
        assert!(List::parse("# Contributing").is_err());
        assert!(List::parse("## Words that are not used\n\nNone.").is_err());
    }

    #[test]
    fn the_list_in_contributing_can_be_read() {
        let page = std::fs::read_to_string(steps::root().join("CONTRIBUTING.md")).unwrap();
        assert!(List::parse(&page).unwrap().0.len() > 10);
    }
}
