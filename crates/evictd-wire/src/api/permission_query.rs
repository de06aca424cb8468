//! Permission queries of verifications: `documents.read AND (users.view OR users.*)`.
//!
//! `AND` binds tighter than `OR`, in upper or lower case; parentheses group. A permission is matched literally, `*`
//! included. Words are separated by the spaces of JSON, and by no others: as in Unkey's, a no-break space is an error.
//!
//! Queries are untrusted input on the hot path, so the parser doesn't recurse into parentheses. Later recursion is as
//! deep as the tree, which has at most as many levels as permissions: each level has at least two branches. A query of
//! [`CHARS_MAX`] has some 200 at most.

use std::fmt;
use std::mem;

use super::error::{ApiError, ErrorKind, FieldError};

/// The longest query, in characters.
pub const CHARS_MAX: usize = 1000;

/// A parsed query.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PermissionQuery<'q>(QueryNode<'q>);

/// `All` and `Any` have at least two items.
#[derive(Clone, PartialEq, Eq, Debug)]
enum QueryNode<'q> {
    Permission(&'q str),
    All(Vec<QueryNode<'q>>),
    Any(Vec<QueryNode<'q>>),
}

#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("at character {at}: expected {expected}, found {found}")]
pub struct SyntaxError {
    /// In characters, the first being 1.
    at: usize,
    expected: &'static str,
    found: String,
}

impl From<SyntaxError> for ApiError {
    fn from(error: SyntaxError) -> Self {
        let problem = FieldError {
            location: "/properties/permissions".to_owned(),
            message: error.to_string(),
            fix: Some("join permissions with AND and OR, and group them with parentheses".to_owned()),
        };
        let detail = format!("The permission query can't be read {error}");
        Self { errors: vec![problem], ..Self::new(ErrorKind::PermissionsQuerySyntax, detail) }
    }
}

impl<'q> PermissionQuery<'q> {
    /// Parses a query in time and memory linear in its length, which the caller limits.
    pub fn parse(query: &'q str) -> Result<Self, SyntaxError> {
        let mut tokens = Tokens { rest: query, at: 1 };
        let mut group = OpenGroup::default();
        let mut enclosing = Vec::new();
        loop {
            match tokens.take() {
                (_, Token::Open) => {
                    enclosing.push(mem::take(&mut group));
                    continue;
                }
                (_, Token::Permission(permission)) => group.all.push(QueryNode::Permission(permission)),
                (at, found) => return Err(unexpected(at, "a permission or '('", found)),
            }
            // The operand is complete. Closing parentheses may complete groups.
            loop {
                match (tokens.take(), enclosing.is_empty()) {
                    ((_, Token::And), _) => break,
                    ((_, Token::Or), _) => {
                        group.begin_alternative();
                        break;
                    }
                    ((_, Token::End), true) => return Ok(Self(group.into_node())),
                    ((_, Token::Close), false) => {
                        let outer = enclosing.pop().unwrap_or_default();
                        let inner = mem::replace(&mut group, outer);
                        group.all.push(inner.into_node());
                    }
                    ((at, found), true) => return Err(unexpected(at, "AND, OR or the end", found)),
                    ((at, found), false) => return Err(unexpected(at, "AND, OR or ')'", found)),
                }
            }
        }
    }

    /// Whether `permissions` satisfy the query. The control API stores permissions sorted by bytes, which makes this
    /// fast; direct SQL may store them in any order.
    pub fn is_met_by(&self, permissions: &[Box<str>]) -> bool {
        if permissions.is_sorted() {
            self.0.is_met_by(&|wanted| permissions.binary_search_by(|has| (**has).cmp(wanted)).is_ok())
        } else {
            self.0.is_met_by(&|wanted| permissions.iter().any(|has| **has == *wanted))
        }
    }
}

/// The parsed part of the text between two parentheses.
#[derive(Default)]
struct OpenGroup<'q> {
    /// The complete alternatives.
    any: Vec<QueryNode<'q>>,
    /// The operands of the alternative under way.
    all: Vec<QueryNode<'q>>,
}

impl<'q> OpenGroup<'q> {
    fn begin_alternative(&mut self) {
        self.any.push(joined(mem::take(&mut self.all), QueryNode::All));
    }

    fn into_node(mut self) -> QueryNode<'q> {
        self.begin_alternative();
        joined(self.any, QueryNode::Any)
    }
}

fn joined<'q>(mut nodes: Vec<QueryNode<'q>>, join: fn(Vec<QueryNode<'q>>) -> QueryNode<'q>) -> QueryNode<'q> {
    match nodes.pop() {
        Some(only) if nodes.is_empty() => only,
        last => {
            nodes.extend(last);
            join(nodes)
        }
    }
}

impl QueryNode<'_> {
    fn is_met_by(&self, has: &impl Fn(&str) -> bool) -> bool {
        match self {
            Self::Permission(wanted) => has(wanted),
            Self::All(nodes) => nodes.iter().all(|node| node.is_met_by(has)),
            Self::Any(nodes) => nodes.iter().any(|node| node.is_met_by(has)),
        }
    }
}

impl fmt::Display for PermissionQuery<'_> {
    /// Writes no more parentheses than needed to parse back as the same tree.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for QueryNode<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (nodes, operator) = match self {
            Self::Permission(permission) => return f.write_str(permission),
            Self::All(nodes) => (nodes, " AND "),
            Self::Any(nodes) => (nodes, " OR "),
        };
        for (index, node) in nodes.iter().enumerate() {
            if index > 0 {
                f.write_str(operator)?;
            }
            match (self, node) {
                (_, Self::Permission(_)) | (Self::Any(_), Self::All(_)) => write!(f, "{node}")?,
                _ => write!(f, "({node})")?,
            }
        }
        Ok(())
    }
}

#[derive(Clone, Copy)]
enum Token<'q> {
    Permission(&'q str),
    And,
    Or,
    Open,
    Close,
    /// A character outside the grammar.
    Foreign(char),
    End,
}

impl fmt::Display for Token<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Permission(_) => f.write_str("a permission"),
            Self::And => f.write_str("AND"),
            Self::Or => f.write_str("OR"),
            Self::Open => f.write_str("'('"),
            Self::Close => f.write_str("')'"),
            Self::Foreign(character) => write!(f, "'{}'", json_form(*character)),
            Self::End => f.write_str("the end"),
        }
    }
}

/// The rest of the query, and the number of its first character.
struct Tokens<'q> {
    rest: &'q str,
    at: usize,
}

impl<'q> Tokens<'q> {
    fn take(&mut self) -> (usize, Token<'q>) {
        let space = self.rest.len() - self.rest.trim_start_matches([' ', '\t', '\r', '\n']).len();
        self.skip(space);
        let at = self.at;
        let Some(first) = self.rest.chars().next() else { return (at, Token::End) };
        let length = self.rest.bytes().position(|byte| !is_of_permission(byte)).unwrap_or(self.rest.len());
        let token = match first {
            '(' => Token::Open,
            ')' => Token::Close,
            _ if length == 0 => Token::Foreign(first),
            _ => word(&self.rest[..length]),
        };
        self.skip(length.max(first.len_utf8()));
        (at, token)
    }

    fn skip(&mut self, bytes: usize) {
        let (skipped, rest) = self.rest.split_at(bytes);
        self.at += skipped.chars().count();
        self.rest = rest;
    }
}

fn word(text: &str) -> Token<'_> {
    if text.eq_ignore_ascii_case("and") {
        Token::And
    } else if text.eq_ignore_ascii_case("or") {
        Token::Or
    } else {
        Token::Permission(text)
    }
}

fn is_of_permission(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"._-*:/".contains(&byte)
}

/// A character as JSON text may have it: one that isn't printed by its number, as `\u00a0`.
fn json_form(character: char) -> String {
    match character {
        '"' | '\\' => format!("\\{character}"),
        _ if character == '\'' || character.escape_debug().len() == 1 => character.to_string(),
        _ => {
            let mut units = [0; 2];
            let units = character.encode_utf16(&mut units).iter();
            units.fold(String::new(), |text, unit| format!("{text}\\u{unit:04x}"))
        }
    }
}

fn unexpected(at: usize, expected: &'static str, found: Token<'_>) -> SyntaxError {
    SyntaxError { at, expected, found: found.to_string() }
}

#[cfg(test)]
mod tests;
