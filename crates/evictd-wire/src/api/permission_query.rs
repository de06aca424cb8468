//! What a verification asks a key to be allowed to do: `documents.read AND (users.view OR users.*)`.
//!
//! `AND` binds tighter than `OR`, in any case; parentheses group. A permission is matched literally, `*` too.
//!
//! Queries come from outside, on the hot path. So the parser doesn't recurse, however deep the parentheses. What
//! recurses afterwards goes at most as deep as there are permissions in the query: each level of its tree has at
//! least two branches.

use std::fmt;
use std::mem;

use super::error::{ApiError, ErrorKind, FieldError};

/// Longest query that a request may hold, in characters.
pub const CHARS_MAX: usize = 1000;

/// Most permissions that a query may name, counting each time.
pub const PERMISSIONS_MAX: usize = 100;

/// A query that was read.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PermissionQuery<'q>(Node<'q>);

/// A list has at least two items: one is its only item.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Node<'q> {
    Permission(&'q str),
    All(Vec<Node<'q>>),
    Any(Vec<Node<'q>>),
}

/// Why a query can't be read.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum SyntaxError {
    /// Something is where something else should be.
    #[error("at character {at}: expected {expected}, found {found}")]
    Unexpected {
        /// Where, in characters, the first being 1.
        at: usize,
        /// What could stand there.
        expected: &'static str,
        /// What does.
        found: String,
    },
    /// It names too many permissions.
    #[error("at character {at}: expected at most {PERMISSIONS_MAX} permissions, found another one")]
    TooMany {
        /// Where the first one too many begins, in characters, the first being 1.
        at: usize,
    },
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
    /// Reads a query. Time and memory are linear in its length, which the caller limits.
    pub fn parse(query: &'q str) -> Result<Self, SyntaxError> {
        let mut tokens = Tokens { rest: query, at: 1 };
        let mut group = Group::default();
        let mut enclosing = Vec::new();
        let mut permissions = 0;
        loop {
            match tokens.take() {
                (_, Token::Open) => {
                    enclosing.push(mem::take(&mut group));
                    continue;
                }
                (at, Token::Permission(_)) if permissions == PERMISSIONS_MAX => {
                    return Err(SyntaxError::TooMany { at });
                }
                (_, Token::Permission(permission)) => {
                    permissions += 1;
                    group.all.push(Node::Permission(permission));
                }
                (at, found) => return Err(unexpected(at, "a permission or '('", found)),
            }
            // An operand is complete, and perhaps the groups that it closes.
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

    /// Whether who has `permissions` may do what is asked. It is quick if they are sorted by their bytes, as the
    /// control API stores them; direct SQL may have stored them in any order.
    pub fn is_met_by(&self, permissions: &[Box<str>]) -> bool {
        if permissions.is_sorted() {
            self.0.is_met_by(&|wanted| permissions.binary_search_by(|has| (**has).cmp(wanted)).is_ok())
        } else {
            self.0.is_met_by(&|wanted| permissions.iter().any(|has| **has == *wanted))
        }
    }
}

/// What stands between two parentheses, as far as it was read.
#[derive(Default)]
struct Group<'q> {
    /// The alternatives that are complete.
    any: Vec<Node<'q>>,
    /// What the one that is being read demands so far.
    all: Vec<Node<'q>>,
}

impl<'q> Group<'q> {
    fn begin_alternative(&mut self) {
        self.any.push(joined(mem::take(&mut self.all), Node::All));
    }

    fn into_node(mut self) -> Node<'q> {
        self.begin_alternative();
        joined(self.any, Node::Any)
    }
}

fn joined<'q>(mut nodes: Vec<Node<'q>>, join: fn(Vec<Node<'q>>) -> Node<'q>) -> Node<'q> {
    match nodes.pop() {
        Some(only) if nodes.is_empty() => only,
        last => {
            nodes.extend(last);
            join(nodes)
        }
    }
}

impl Node<'_> {
    fn is_met_by(&self, has: &impl Fn(&str) -> bool) -> bool {
        match self {
            Self::Permission(wanted) => has(wanted),
            Self::All(nodes) => nodes.iter().all(|node| node.is_met_by(has)),
            Self::Any(nodes) => nodes.iter().any(|node| node.is_met_by(has)),
        }
    }
}

impl fmt::Display for PermissionQuery<'_> {
    /// With no more parentheses than needed to read it back as the same.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for Node<'_> {
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
    /// What no query holds.
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
            Self::Foreign(character) => write!(f, "{character:?}"),
            Self::End => f.write_str("the end"),
        }
    }
}

/// What is still to be read, and which character of the query it begins with.
struct Tokens<'q> {
    rest: &'q str,
    at: usize,
}

impl<'q> Tokens<'q> {
    fn take(&mut self) -> (usize, Token<'q>) {
        let space = self.rest.len() - self.rest.trim_start().len();
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

fn unexpected(at: usize, expected: &'static str, found: Token<'_>) -> SyntaxError {
    SyntaxError::Unexpected { at, expected, found: found.to_string() }
}

#[cfg(test)]
mod tests;
