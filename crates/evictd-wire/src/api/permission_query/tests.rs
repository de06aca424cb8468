use proptest::prelude::*;

use super::*;

fn read(query: &str) -> String {
    PermissionQuery::parse(query).unwrap_or_else(|error| panic!("{query}: {error}")).to_string()
}

fn refusal(query: &str) -> String {
    PermissionQuery::parse(query).expect_err(query).to_string()
}

fn list(permissions: &[&str]) -> Vec<Box<str>> {
    permissions.iter().map(|text| Box::from(*text)).collect()
}

fn set(permissions: &[&str]) -> Vec<Box<str>> {
    let mut permissions = list(permissions);
    permissions.sort_unstable();
    permissions
}

fn is_met(query: &str, permissions: &[&str]) -> bool {
    PermissionQuery::parse(query).unwrap().is_met_by(&set(permissions))
}

#[test]
fn and_binds_tighter_than_or_unless_parentheses_say_otherwise() {
    let (a, b, c) = (QueryNode::Permission("a"), QueryNode::Permission("b"), QueryNode::Permission("c"));
    let all = QueryNode::All(vec![b.clone(), c.clone()]);
    assert_eq!(PermissionQuery::parse("a OR b AND c").unwrap().0, QueryNode::Any(vec![a.clone(), all]));
    let any = QueryNode::Any(vec![a, b]);
    assert_eq!(PermissionQuery::parse("(a OR b) AND c").unwrap().0, QueryNode::All(vec![any, c]));
}

#[test]
fn operators_may_have_any_case_and_spacing() {
    assert_eq!(read("a and b"), "a AND b");
    assert_eq!(read("\ta\nAnD\r\n b   oR c "), "a AND b OR c");
    assert_eq!(read("(a)and(b)or(c)"), "a AND b OR c");
}

#[test]
fn an_operator_is_a_whole_word() {
    assert_eq!(read("android"), "android");
    assert_eq!(read("order AND and.read AND or:write"), "order AND and.read AND or:write");
    assert_eq!(read("a.or OR _and"), "a.or OR _and");
}

#[test]
fn a_permission_holds_letters_digits_and_six_signs() {
    for permission in ["a", "Z9", "a.b_c-d*e:f/g", "*", "..", "-", "system:admin.*", "api_v2-test:*", "a/b"] {
        assert_eq!(PermissionQuery::parse(permission).unwrap().0, QueryNode::Permission(permission));
    }
}

#[test]
fn redundant_parentheses_are_dropped() {
    assert_eq!(read("((a))"), "a");
    assert_eq!(read("(a AND b) OR c"), "a AND b OR c");
    assert_eq!(read("(a OR b)"), "a OR b");
    assert_eq!(read("a AND (b AND c)"), "a AND (b AND c)");
}

#[test]
fn a_query_is_met_by_what_it_demands() {
    assert!(is_met("a", &["a"]));
    assert!(!is_met("a", &[]));
    assert!(!is_met("a", &["A", "ab", "b"]));
    assert!(is_met("a AND b", &["b", "a", "c"]));
    assert!(!is_met("a AND b", &["a"]));
    assert!(is_met("a OR b", &["b"]));
    assert!(!is_met("a OR b", &["c"]));
    assert!(is_met("a OR b AND c", &["a"]));
    assert!(!is_met("(a OR b) AND c", &["a"]));
}

#[test]
fn permissions_may_be_stored_in_any_order() {
    let query = PermissionQuery::parse("a AND b AND c AND d").unwrap();
    assert!(query.is_met_by(&list(&["d", "a", "c", "b", "a"])));
    assert!(!query.is_met_by(&list(&["d", "a", "c", "a"])));
}

#[test]
fn an_asterisk_is_literal() {
    assert!(!is_met("documents.read", &["documents.*", "*"]));
    assert!(!is_met("documents.*", &["documents.read"]));
    assert!(is_met("documents.*", &["documents.*"]));
}

#[test]
fn a_syntax_error_names_its_place_and_the_expected_token() {
    for (query, error) in [
        ("", "at character 1: expected a permission or '(', found the end"),
        ("  ", "at character 3: expected a permission or '(', found the end"),
        ("AND", "at character 1: expected a permission or '(', found AND"),
        ("a AND", "at character 6: expected a permission or '(', found the end"),
        ("a or or b", "at character 6: expected a permission or '(', found OR"),
        ("()", "at character 2: expected a permission or '(', found ')'"),
        ("a b", "at character 3: expected AND, OR or the end, found a permission"),
        ("a (b)", "at character 3: expected AND, OR or the end, found '('"),
        ("a)", "at character 2: expected AND, OR or the end, found ')'"),
        ("(a b)", "at character 4: expected AND, OR or ')', found a permission"),
        ("(a AND b", "at character 9: expected AND, OR or ')', found the end"),
        ("a @ b", "at character 3: expected AND, OR or the end, found '@'"),
        ("a \u{e4}", "at character 3: expected AND, OR or the end, found '\u{e4}'"),
        ("a\u{a0}AND b", "at character 2: expected AND, OR or the end, found '\\u00a0'"),
        ("a\u{b}AND b", "at character 2: expected AND, OR or the end, found '\\u000b'"),
        ("a AND\u{c}b", "at character 6: expected a permission or '(', found '\\u000c'"),
        ("\u{2028}a", "at character 1: expected a permission or '(', found '\\u2028'"),
        ("\u{15}", "at character 1: expected a permission or '(', found '\\u0015'"),
        ("\u{e0001}", "at character 1: expected a permission or '(', found '\\udb40\\udc01'"),
        ("'a'", "at character 1: expected a permission or '(', found '''"),
        ("a\\b", "at character 2: expected AND, OR or the end, found '\\\\'"),
        ("a AND \u{e4}", "at character 7: expected a permission or '(', found '\u{e4}'"),
        ("\0", "at character 1: expected a permission or '(', found '\\u0000'"),
        ("not a", "at character 5: expected AND, OR or the end, found a permission"),
        ("a && b", "at character 3: expected AND, OR or the end, found '&'"),
        ("\"a\"", "at character 1: expected a permission or '(', found '\\\"'"),
    ] {
        assert_eq!(refusal(query), error, "{query:?}");
    }
}

#[test]
fn a_syntax_error_is_a_bad_request_that_names_the_field() {
    let error = ApiError::from(PermissionQuery::parse("a AND").unwrap_err());
    assert_eq!((error.status(), error.kind), (400, ErrorKind::PermissionsQuerySyntax));
    assert_eq!(
        error.kind.type_url(),
        "https://unkey.com/docs/errors/user/bad_request/permissions_query_syntax_error"
    );
    assert!(error.detail.contains("at character 6: expected a permission or '('"), "{}", error.detail);
    assert_eq!(error.errors.len(), 1);
    assert_eq!(error.errors[0].location, "/properties/permissions");
    assert!(error.kind.has_errors());
}

/// As in Unkey's server, the length is the only limit.
#[test]
fn a_query_names_any_number_of_permissions() {
    let query = vec!["a"; 101].join(" OR ");
    assert!(query.len() < CHARS_MAX);
    assert_eq!(read(&query), query);
    let most = format!("({}", vec!["a"; CHARS_MAX / 5].join(")or("));
    assert!(PermissionQuery::parse(&format!("{most})")).is_ok());
}

/// Runs `test` with 2 MiB of stack, as a worker thread has.
fn on_a_small_stack(test: impl FnOnce() + Send + 'static) {
    std::thread::Builder::new().stack_size(2 * 1024 * 1024).spawn(test).unwrap().join().unwrap();
}

#[test]
fn a_million_parentheses_dont_exhaust_the_stack() {
    on_a_small_stack(|| {
        let deep = 1_000_000;
        let query = format!("{}a{}", "(".repeat(deep), ")".repeat(deep));
        assert!(PermissionQuery::parse(&query).unwrap().is_met_by(&set(&["a"])));
        assert_eq!(
            refusal(&"(".repeat(deep)),
            "at character 1000001: expected a permission or '(', found the end"
        );
        assert!(PermissionQuery::parse(&query[..query.len() - 1]).is_err());
    });
}

#[test]
fn the_deepest_tree_of_a_query_fits_the_stack() {
    on_a_small_stack(|| {
        let pairs = CHARS_MAX / "a AND (b OR )".len();
        let query = format!("{}a{}", "a AND (b OR ".repeat(pairs), ")".repeat(pairs));
        let parsed = PermissionQuery::parse(&query).unwrap();
        assert!(parsed.is_met_by(&set(&["a"])) && !parsed.is_met_by(&set(&["b"])));
        assert_eq!(parsed.to_string(), query);
    });
}

/// A second implementation of the language: recursive descent that evaluates while it parses.
mod naive {
    /// Returns the value of `query`, if it is valid.
    pub(super) fn evaluate(query: &str, permissions: &[&str]) -> Option<bool> {
        let spaced = query.replace('(', " ( ").replace(')', " ) ");
        let words = spaced.split([' ', '\t', '\r', '\n']).filter(|word| !word.is_empty());
        let mut words: Vec<&str> = words.rev().collect();
        let value = any(&mut words, permissions)?;
        words.is_empty().then_some(value)
    }

    fn any(words: &mut Vec<&str>, permissions: &[&str]) -> Option<bool> {
        let mut value = all(words, permissions)?;
        while words.pop_if(|word| word.to_lowercase() == "or").is_some() {
            value |= all(words, permissions)?;
        }
        Some(value)
    }

    fn all(words: &mut Vec<&str>, permissions: &[&str]) -> Option<bool> {
        let mut value = one(words, permissions)?;
        while words.pop_if(|word| word.to_lowercase() == "and").is_some() {
            value &= one(words, permissions)?;
        }
        Some(value)
    }

    fn one(words: &mut Vec<&str>, permissions: &[&str]) -> Option<bool> {
        match words.pop()? {
            "(" => {
                let value = any(words, permissions)?;
                (words.pop()? == ")").then_some(value)
            }
            ")" => None,
            word if ["and", "or"].contains(&word.to_lowercase().as_str()) => None,
            word => {
                let fine = |c: char| c.is_ascii_alphanumeric() || "._-*:/".contains(c);
                word.chars().all(fine).then(|| permissions.contains(&word))
            }
        }
    }
}

fn permission() -> impl Strategy<Value = &'static str> {
    prop::sample::select(vec!["a", "b", "c", "d", "documents.*", "x:y/z", "and.or"])
}

fn node() -> impl Strategy<Value = QueryNode<'static>> {
    permission().prop_map(QueryNode::Permission).prop_recursive(6, 100, 4, |inner| {
        let list = prop::collection::vec(inner, 2..=4);
        prop_oneof![list.clone().prop_map(QueryNode::All), list.prop_map(QueryNode::Any)]
    })
}

/// Nearly valid queries: operands and operators mostly alternate.
fn nearly_a_query() -> impl Strategy<Value = String> {
    let piece = prop_oneof![
        6 => permission().prop_map(str::to_owned),
        5 => prop::sample::select(vec![" AND ", " OR ", " and ", "\tOr\n"]).prop_map(str::to_owned),
        2 => Just("(".to_owned()),
        2 => Just(")".to_owned()),
        1 => "\\PC".prop_map(String::from),
    ];
    prop::collection::vec(piece, 0..12).prop_map(|pieces| pieces.concat())
}

proptest! {
    #[test]
    fn a_printed_query_parses_back_as_the_same(node in node()) {
        let query = PermissionQuery(node);
        let printed = query.to_string();
        prop_assert_eq!(PermissionQuery::parse(&printed).unwrap(), query);
    }

    #[test]
    fn a_tree_agrees_with_the_naive_parser(
        node in node(),
        permissions in prop::collection::vec(permission(), 0..4),
    ) {
        let query = PermissionQuery(node);
        let expected = naive::evaluate(&query.to_string(), &permissions);
        prop_assert_eq!(Some(query.is_met_by(&set(&permissions))), expected);
        prop_assert_eq!(Some(query.is_met_by(&list(&permissions))), expected);
    }

    #[test]
    fn a_nearly_valid_query_agrees_with_the_naive_parser(
        query in nearly_a_query(),
        permissions in prop::collection::vec(permission(), 0..4),
    ) {
        let read = PermissionQuery::parse(&query).ok();
        let value = read.map(|query| query.is_met_by(&set(&permissions)));
        prop_assert_eq!(value, naive::evaluate(&query, &permissions));
    }

    #[test]
    fn no_text_makes_the_parser_panic(query in any::<String>()) {
        if let Err(SyntaxError { at, .. }) = PermissionQuery::parse(&query) {
            prop_assert!((1..=query.chars().count() + 1).contains(&at));
        }
    }
}
