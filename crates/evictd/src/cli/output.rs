//! What is printed: Unkey's forms, results to standard output and everything else to standard error.

use std::fmt::Write as _;
use std::time::Duration;

use evictd_wire::api::envelope::{Failure, Meta, Pagination};
use evictd_wire::api::requests::{CreateApi, RerollKey};
use serde::Deserialize;
use serde_json::value::RawValue;

use super::client::{Answer, Call, Lost, Progress, Repeat, Sent};
use super::settings::Settings;

/// What a command leaves behind.
#[derive(PartialEq, Eq, Debug)]
pub(super) struct Outcome {
    /// For pipes: a result, or nothing.
    pub(super) stdout: String,
    /// For people: what went wrong, or nothing.
    pub(super) stderr: String,
    /// Whether the command did what it was asked to.
    pub(super) success: bool,
}

/// Words what came of `call`.
pub(super) fn outcome(call: &Call, settings: &Settings, sent: &Sent, took: Duration) -> Outcome {
    if let Some(problem) = problem(call, settings, sent) {
        return Outcome { stdout: String::new(), stderr: format!("{problem}\n"), success: false };
    }
    let stdout = sent.result.as_ref().ok().and_then(|answer| success(answer, settings.json, took));
    Outcome { stdout: stdout.unwrap_or_default(), stderr: String::new(), success: true }
}

/// Words what went wrong, beginning with a line that says it all; `None` if nothing did.
pub(super) fn problem(call: &Call, settings: &Settings, sent: &Sent) -> Option<String> {
    let answer = match &sent.result {
        Ok(answer) if answer.status == 200 => {
            return framed(answer).is_none().then(|| foreign(answer, settings));
        }
        Ok(answer) => answer,
        Err(lost) => return Some(unreachable(call, settings, lost)),
    };
    let mut problem = refused(answer, settings);
    if answer.status == 404 && sent.maybe_done_before && call.repeat == Repeat::FindsNothing {
        problem.push_str(
            "\n\nAn earlier attempt got no good answer, but has probably been carried out: \
             what you wanted deleted is gone.",
        );
    }
    Some(problem)
}

/// What every success holds; a list also says where it goes on.
#[derive(Deserialize)]
struct Framed<'a> {
    meta: Meta,
    #[serde(borrow)]
    data: &'a RawValue,
    #[serde(default)]
    pagination: Option<Pagination>,
}

/// `None` if the answer isn't framed as evictd and Unkey do.
fn framed(answer: &Answer) -> Option<Framed<'_>> {
    serde_json::from_slice(&answer.body).ok()
}

fn success(answer: &Answer, whole: bool, took: Duration) -> Option<String> {
    let framed = framed(answer)?;
    if whole {
        return std::str::from_utf8(&answer.body).ok().map(|body| format!("{}\n", indented(body)));
    }
    let (id, data) = (framed.meta.request_id, indented(framed.data.get()));
    let next =
        framed.pagination.and_then(|page| page.cursor).map(|cursor| format!("\nmore: --cursor={cursor}\n"));
    Some(format!("{id} (took {}ms)\n\n{data}\n{}", took.as_millis(), next.unwrap_or_default()))
}

fn refused(answer: &Answer, settings: &Settings) -> String {
    let Ok(Failure { meta, error }) = serde_json::from_slice(&answer.body) else {
        return foreign(answer, settings);
    };
    match error.status {
        400 => {
            let mut text = error.detail;
            for problem in error.errors.unwrap_or_default() {
                // Writing to a String can't fail.
                let _ = write!(text, "\n  {}: {}", problem.location, problem.message);
                if let Some(fix) = problem.fix {
                    let _ = write!(text, " ({fix})");
                }
            }
            text
        }
        401 => format!(
            "Authentication failed: {}\n\nCheck the root key in --root-key, EVICTD_ROOT_KEY or the config file; \
             an ordinary API key doesn't do.",
            error.detail
        ),
        403 => format!("Permission denied: {}", error.detail),
        404 => format!("Not found: {}", error.detail),
        status => {
            let again = answer.retry_after.map(|after| format!("\n\nTry again in {} s.", after.as_secs()));
            format!(
                "{} ({status}): {}\n  type: {}\n  request: {}{}",
                error.title,
                error.detail,
                error.r#type,
                meta.request_id,
                again.unwrap_or_default()
            )
        }
    }
}

fn foreign(answer: &Answer, settings: &Settings) -> String {
    format!(
        "{} answered {}, but not as `{}` does; check --api-url or {}",
        settings.url,
        answer.status,
        settings.server.command(),
        settings.server.url_variable()
    )
}

fn unreachable(call: &Call, settings: &Settings, lost: &Lost) -> String {
    let command = settings.server.command();
    let mut text = format!("no answer from {}: {}", settings.url, lost.why);
    match (lost.progress, call.repeat) {
        (Progress::Impossible, _) => {
            let _ = write!(text, "\n\nCheck --api-url or {}, and the root key.", settings.server.url_variable());
        }
        (Progress::NotSent, _) => {
            let _ = write!(
                text,
                "\n\nIs `{command}` running there? Start it with `{command}`, or say where it is with --api-url or {}.",
                settings.server.url_variable()
            );
        }
        (Progress::MaybeDone, Repeat::Harmless) => text.push_str("\n\nTry again."),
        (Progress::MaybeDone, Repeat::FindsNothing) => text.push_str(
            "\n\nThe deletion may or may not have been carried out. Try again: \"not found\" then means that it has.",
        ),
        (Progress::MaybeDone, Repeat::Duplicates) => {
            let _ = write!(text, "\n\n{} It wasn't tried again.", perhaps_done(call.path));
        }
    }
    text
}

/// What may be left of a creation whose answer was lost.
fn perhaps_done(path: &str) -> &'static str {
    match path {
        CreateApi::PATH => {
            "The API may have been created all the same, under an id that nobody knows; without keys it does no harm."
        }
        RerollKey::PATH => {
            "The key may have been replaced all the same: then it ends as you said, and nobody knows its successor."
        }
        _ => {
            "The key may have been created all the same; a key that was created this way is known to nobody."
        }
    }
}

/// Valid JSON, indented by two spaces. Works on the text, so that the order of members and the form of
/// numbers stay as the server sent them.
fn indented(json: &str) -> String {
    let mut out = String::with_capacity(json.len() * 2);
    let mut depth = 0;
    let (mut in_string, mut escaped, mut just_opened) = (false, false, false);
    for character in json.chars() {
        if in_string {
            out.push(character);
            in_string = escaped || character != '"';
            escaped = !escaped && character == '\\';
            continue;
        }
        if character.is_ascii_whitespace() {
            continue;
        }
        let closes = matches!(character, '}' | ']');
        if closes {
            depth -= 1;
        }
        if just_opened != closes && (just_opened || closes) {
            new_line(&mut out, depth);
        }
        just_opened = matches!(character, '{' | '[');
        out.push(character);
        match character {
            '{' | '[' => depth += 1,
            ',' => new_line(&mut out, depth),
            ':' => out.push(' '),
            '"' => in_string = true,
            _ => {}
        }
    }
    out
}

fn new_line(out: &mut String, depth: usize) {
    out.push('\n');
    out.extend(std::iter::repeat_n("  ", depth));
}

#[cfg(test)]
mod tests {
    use evictd_wire::api::error::{ApiError, ErrorKind, FieldError};
    use evictd_wire::api::secret::Secret;

    use super::super::settings::Server;
    use super::*;

    fn settings(json: bool) -> Settings {
        let url = "http://127.0.0.1:7070".to_owned();
        Settings { root_key: Secret::new("unkey_hunter2"), url, server: Server::Publisher, json }
    }

    fn call(repeat: Repeat) -> Call {
        Call { path: "/v2/test", body: b"{}".to_vec(), server: Server::Publisher, repeat, prefer: None }
    }

    fn answered(status: u16, body: impl Into<Vec<u8>>, maybe_done_before: bool, json: bool) -> Outcome {
        let answer = Answer { status, body: body.into(), retry_after: None };
        let sent = Sent { result: Ok(answer), maybe_done_before };
        outcome(&call(Repeat::FindsNothing), &settings(json), &sent, Duration::from_micros(45_900))
    }

    /// What is printed on a failure; standard output stays empty.
    fn failed(error: &ApiError, maybe_done_before: bool) -> String {
        let body = Failure::new("req_1", error).to_bytes();
        let outcome = answered(error.status(), body, maybe_done_before, true);
        assert_eq!((outcome.stdout.as_str(), outcome.success), ("", false));
        outcome.stderr
    }

    const EMPTY: &str = r#"{"meta":{"requestId":"req_2c9a0jf23l4k567"},"data":{}}"#;

    #[test]
    fn success_is_the_request_the_time_and_the_data() {
        let outcome = answered(200, EMPTY, false, false);
        assert_eq!(outcome.stdout, "req_2c9a0jf23l4k567 (took 45ms)\n\n{}\n");
        assert_eq!((outcome.stderr.as_str(), outcome.success), ("", true));
    }

    #[test]
    fn json_output_is_the_whole_answer() {
        let outcome = answered(200, EMPTY, false, true);
        let expected =
            "{\n  \"meta\": {\n    \"requestId\": \"req_2c9a0jf23l4k567\"\n  },\n  \"data\": {}\n}\n";
        assert_eq!(outcome.stdout, expected);
    }

    #[test]
    fn a_list_says_how_to_go_on() {
        let page = |pagination: &str| {
            let body = format!(r#"{{"meta":{{"requestId":"req_1"}},"data":[1],"pagination":{pagination}}}"#);
            answered(200, body, false, false).stdout
        };
        let more = page(r#"{"cursor":"key_3","hasMore":true}"#);
        assert_eq!(more, "req_1 (took 45ms)\n\n[\n  1\n]\n\nmore: --cursor=key_3\n");
        assert_eq!(page(r#"{"hasMore":false}"#), "req_1 (took 45ms)\n\n[\n  1\n]\n");
    }

    #[test]
    fn a_limit_says_when_to_come_again() {
        let body =
            Failure::new("req_1", &ApiError::new(ErrorKind::WorkspaceRateLimited, "because")).to_bytes();
        let answer = Answer { status: 429, body, retry_after: Some(Duration::from_secs(12)) };
        let text = refused(&answer, &settings(false));
        assert!(text.starts_with("Too Many Requests (429): because\n"), "{text}");
        assert!(text.ends_with("\n\nTry again in 12 s."), "{text}");
    }

    #[test]
    fn data_keeps_its_order_and_its_numbers() {
        let json = r#"{"b":1.50,"a":[ ],"c":[1,{"d":"{\"\\"}],"e":{ "f" : [[]] },"g":1e30}"#;
        let expected = r#"{
  "b": 1.50,
  "a": [],
  "c": [
    1,
    {
      "d": "{\"\\"
    }
  ],
  "e": {
    "f": [
      []
    ]
  },
  "g": 1e30
}"#;
        assert_eq!(indented(json), expected);
        assert_eq!(indented("null"), "null");
    }

    #[test]
    fn refusals_have_their_forms() {
        let error = |kind| ApiError::new(kind, "because");
        assert_eq!(failed(&error(ErrorKind::InsufficientPermissions), false), "Permission denied: because\n");
        assert_eq!(failed(&error(ErrorKind::KeyNotFound), false), "Not found: because\n");
        let text = failed(&error(ErrorKind::RootKeyNotFound), false);
        assert!(text.starts_with("Authentication failed: because\n\nCheck the root key"), "{text}");
        assert_eq!(
            failed(&error(ErrorKind::ProtectedResource), false),
            "Resource is protected (412): because\n  \
             type: https://unkey.com/docs/errors/unkey/application/protected_resource\n  request: req_1\n"
        );
    }

    #[test]
    fn a_bad_request_lists_what_to_correct() {
        let mut error = ApiError::new(ErrorKind::InvalidInput, "no good");
        error.errors = vec![
            FieldError { location: "/a".into(), message: "b".into(), fix: None },
            FieldError { location: "/c".into(), message: "d".into(), fix: Some("e".into()) },
        ];
        assert_eq!(failed(&error, false), "no good\n  /a: b\n  /c: d (e)\n");
    }

    #[test]
    fn a_deletion_that_finds_nothing_the_second_time_is_explained() {
        let error = ApiError::new(ErrorKind::KeyNotFound, "because");
        let text = failed(&error, true);
        assert!(text.starts_with("Not found: because\n\nAn earlier attempt"), "{text}");
    }

    #[test]
    fn an_answer_from_something_else_names_the_url() {
        for (status, body) in
            [(200, "hello"), (200, r#"{"data":{}}"#), (404, "404 page not found"), (502, "<html>")]
        {
            let outcome = answered(status, body, false, false);
            assert!(!outcome.success && outcome.stdout.is_empty());
            assert!(outcome.stderr.contains("http://127.0.0.1:7070 answered"), "{}", outcome.stderr);
            assert!(outcome.stderr.contains("--api-url"), "{}", outcome.stderr);
        }
    }

    #[test]
    fn a_server_that_isnt_there_is_named_with_the_way_to_start_it() {
        let lost = |progress, repeat| {
            let sent =
                Sent { result: Err(Lost { progress, why: "refused".into() }), maybe_done_before: false };
            outcome(&call(repeat), &settings(false), &sent, Duration::ZERO).stderr
        };
        let text = lost(Progress::NotSent, Repeat::Duplicates);
        for part in ["http://127.0.0.1:7070: refused", "`evictd publisher`", "EVICTD_API_URL"] {
            assert!(text.contains(part), "{text}");
        }
        assert!(lost(Progress::MaybeDone, Repeat::FindsNothing).contains("may or may not"));
        assert!(lost(Progress::MaybeDone, Repeat::Duplicates).contains("may have been created"));
        assert!(!lost(Progress::MaybeDone, Repeat::Harmless).contains("hunter2"));
    }

    #[test]
    fn a_creation_whose_answer_was_lost_is_told_by_what_it_creates() {
        use evictd_wire::api::requests::CreateKey;

        let told = |path| {
            let lost = Lost { progress: Progress::MaybeDone, why: "reset".into() };
            let sent = Sent { result: Err(lost), maybe_done_before: false };
            outcome(&Call { path, ..call(Repeat::Duplicates) }, &settings(false), &sent, Duration::ZERO)
                .stderr
        };
        let (api, key, replaced) = (told(CreateApi::PATH), told(CreateKey::PATH), told(RerollKey::PATH));
        assert!(api.contains("The API may have been created") && !api.contains("A key"), "{api}");
        assert!(key.contains("The key may have been created"), "{key}");
        assert!(replaced.contains("may have been replaced"), "{replaced}");
        assert!([api, key, replaced].iter().all(|text| text.contains("It wasn't tried again.")));
    }
}
