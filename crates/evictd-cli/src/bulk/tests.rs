use std::collections::HashMap;
use std::io::{BufRead as _, BufReader, Read as _, Write};
use std::net::{TcpListener, TcpStream};

use evictd_wire::api::error::ApiError;
use evictd_wire::api::responses::Empty;
use evictd_wire::api::secret::Secret;
use indicatif::{InMemoryTerm, TermLike as _};

use super::*;
use crate::call::ApiServer;

/// The answer of the fake publisher to one request.
enum FakeAnswer {
    Done,
    Refuse(ErrorKind),
    /// 429, with `Retry-After` in seconds.
    Later(u64),
    /// No answer at all.
    HangUp,
}

/// Starts a publisher whose answers depend on the id of the key, and on how many requests for it came before. It ends
/// with the program.
fn publisher(answer: impl Fn(&str, usize) -> FakeAnswer + Send + Sync + 'static) -> ClientSettings {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let (answer, requests) = (Arc::new(answer), Arc::new(Mutex::new(HashMap::new())));
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let (answer, requests) = (answer.clone(), requests.clone());
            std::thread::spawn(move || {
                let stream = stream.unwrap();
                let mut reader = BufReader::new(stream.try_clone().unwrap());
                while let Some(id) = next_id(&mut reader) {
                    let before = {
                        let mut requests = requests.lock();
                        let count = requests.entry(id.clone()).or_insert(0);
                        *count += 1;
                        *count - 1
                    };
                    if !send(&stream, &id, &answer(&id, before)) {
                        return;
                    }
                }
            });
        }
    });
    ClientSettings {
        root_key: Secret::new("unkey_1"),
        url,
        server: ApiServer::Publisher,
        json: false,
        proxy: None,
    }
}

/// Reads the id in the next request on this connection.
fn next_id(reader: &mut BufReader<TcpStream>) -> Option<String> {
    let mut length = 0;
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).ok()? == 0 {
            return None;
        }
        if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse().unwrap();
        }
        if line == "\r\n" {
            break;
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    Some(DeleteKey::parse(&body).unwrap().key_id)
}

fn send(mut stream: &TcpStream, id: &str, answer: &FakeAnswer) -> bool {
    let (status, header, body) = match answer {
        FakeAnswer::HangUp => return false,
        FakeAnswer::Done => (200, String::new(), Success::new(format!("req_{id}"), Empty {}).to_bytes()),
        FakeAnswer::Refuse(kind) => {
            let error = ApiError::new(*kind, "because");
            (kind.status(), String::new(), Failure::new("req_1", &error).to_bytes())
        }
        FakeAnswer::Later(seconds) => {
            let error = ApiError::new(ErrorKind::WorkspaceRateLimited, "too many");
            (429, format!("Retry-After: {seconds}\r\n"), Failure::new("req_1", &error).to_bytes())
        }
    };
    let head = format!("HTTP/1.1 {status} X\r\n{header}Content-Length: {}\r\n\r\n", body.len());
    stream.write_all(&[head.as_bytes(), &body].concat()).is_ok()
}

fn deletion(concurrency: usize) -> BulkDeletion {
    BulkDeletion { permanent: false, concurrency, strict: false, wait: None }
}

fn ids(count: usize) -> Vec<String> {
    (1..=count).map(|n| format!("key_{n}")).collect()
}

/// Standard output or standard error on a terminal.
struct OnTerminal(InMemoryTerm);

impl Write for OnTerminal {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let text = String::from_utf8_lossy(bytes).replace('\n', "\r\n");
        self.0.write_str(&text).map(|()| bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Returns the sorted lines of standard output, standard error, and the exit code.
fn run_to_end(run: &BulkRun<'_>) -> (Vec<String>, String, u8) {
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let mut report = BulkReport::new(
        run.ids,
        run.settings.json,
        (Box::new(&mut out), Box::new(&mut err)),
        ProgressDrawTarget::hidden(),
    );
    run.work(&mut report);
    let code = report.conclude(run.deletion).unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    let mut lines: Vec<_> = text(out).lines().map(str::to_owned).collect();
    lines.sort();
    (lines, text(err), code)
}

fn delete(ids: &[String], deletion: &BulkDeletion, settings: &ClientSettings) -> (Vec<String>, String, u8) {
    run_to_end(&BulkRun::new(ids, deletion, settings))
}

#[test]
fn each_id_is_deleted_and_has_its_line() {
    let settings = publisher(|_, _| FakeAnswer::Done);
    let (lines, err, code) = delete(&ids(50), &deletion(8), &settings);
    let mut expected: Vec<_> = ids(50).iter().map(|id| format!("{id}  deleted  req_{id}")).collect();
    expected.sort();
    assert_eq!(lines, expected);
    assert_eq!(err, "50 keys: 50 deleted, 0 not found, 0 failed, 0 not started\n");
    assert_eq!(code, 0);
}

#[test]
fn terminal_shows_a_bar_and_in_the_end_only_the_outcomes() {
    let ids = ids(4);
    let terminal = InMemoryTerm::new(20, 100);
    let output = || Box::new(OnTerminal(terminal.clone()));
    let target = ProgressDrawTarget::term_like(Box::new(terminal.clone()));
    let mut report = BulkReport::new(&ids, false, (output(), output()), target);
    assert_eq!(terminal.contents(), format!("[{}] 0/4", " ".repeat(30)));
    report.done(0, &DeletionOutcome::Deleted { request_id: "req_1".to_owned(), receipt: None });
    assert_eq!(terminal.contents(), "key_1  deleted  req_1\n[=======>                      ] 1/4");
    report.done(1, &DeletionOutcome::NotFound { is_maybe_done: false });
    report.note("The server's rate limit is reached; continuing in 1 s.");
    let bar = terminal.contents().lines().last().unwrap().to_owned();
    assert_eq!(bar, "[===============>              ] 2/4, 1 not found");
    report.done(2, &DeletionOutcome::Failed("no".to_owned()));
    let bar = terminal.contents().lines().last().unwrap().to_owned();
    assert!(bar.ends_with("] 3/4, 1 not found, 1 failed"), "{bar}");
    assert_eq!(report.conclude(&deletion(1)).unwrap(), 1);
    let expected = [
        "key_1  deleted  req_1",
        "key_2  not found",
        "The server's rate limit is reached; continuing in 1 s.",
        "key_3  failed: no",
        "key_4  not started",
        "4 keys: 1 deleted, 1 not found, 1 failed, 1 not started",
        "A key is not found if it was deleted before, or never existed: check that you expected it.",
        "To continue, run it again with the same list: deleted keys will be reported as not found.",
    ];
    assert_eq!(terminal.contents(), expected.join("\n"));
}

#[test]
fn pipe_gets_no_bar() {
    let (ids, mut err) = (ids(2), Vec::new());
    let output = (Box::new(io::sink()) as _, Box::new(&mut err) as _);
    let mut report = BulkReport::new(&ids, false, output, ProgressDrawTarget::hidden());
    report.done(0, &DeletionOutcome::NotFound { is_maybe_done: false });
    report.conclude(&deletion(1)).unwrap();
    assert!(!err.contains(&b'\r') && !err.contains(&b'\x1b'), "{}", String::from_utf8_lossy(&err));
}

#[test]
fn nothing_to_delete_is_no_failure() {
    let settings = publisher(|_, _| FakeAnswer::HangUp);
    let (lines, err, code) = delete(&[], &deletion(8), &settings);
    assert_eq!((lines.len(), code), (0, 0));
    assert!(err.contains("nothing to delete"), "{err}");
}

#[test]
fn failure_of_one_key_does_not_stop_the_others() {
    let settings = publisher(|id, _| match id {
        "key_2" => FakeAnswer::Refuse(ErrorKind::KeyNotFound),
        "key_3" => FakeAnswer::Refuse(ErrorKind::InsufficientPermissions),
        _ => FakeAnswer::Done,
    });
    let (lines, err, code) = delete(&ids(4), &deletion(2), &settings);
    assert_eq!(
        lines,
        [
            "key_1  deleted  req_key_1",
            "key_2  not found",
            "key_3  failed: Permission denied: because",
            "key_4  deleted  req_key_4"
        ]
    );
    assert!(err.starts_with("4 keys: 2 deleted, 1 not found, 1 failed, 0 not started\n"), "{err}");
    assert_eq!(code, 1);
}

#[test]
fn rejected_root_key_ends_the_run() {
    let settings = publisher(|_, _| FakeAnswer::Refuse(ErrorKind::RootKeyNotFound));
    let (lines, err, code) = delete(&ids(100), &deletion(1), &settings);
    assert_eq!(lines[0], "key_1  failed: Authentication failed: because");
    assert_eq!(lines.iter().filter(|line| line.ends_with("  not started")).count(), 99);
    assert!(err.contains("would fail too. Authentication failed: because\n"), "{err}");
    assert_eq!(code, 1);
}

#[test]
fn foreign_server_ends_the_run() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let _ = next_id(&mut BufReader::new(stream.try_clone().unwrap()));
            let page = "HTTP/1.1 404 Not Found\r\nContent-Length: 4\r\nConnection: close\r\n\r\nnope";
            let _ = stream.write_all(page.as_bytes());
        }
    });
    let settings = ClientSettings {
        root_key: Secret::new("unkey_1"),
        url,
        server: ApiServer::Publisher,
        json: false,
        proxy: None,
    };
    let (lines, _, code) = delete(&ids(3), &deletion(1), &settings);
    assert!(
        lines[0].contains("key_1  failed: http://127.0.0.1:") && lines[0].contains("answered 404"),
        "{lines:?}"
    );
    assert_eq!(lines[1..], ["key_2  not started", "key_3  not started"]);
    assert_eq!(code, 1);
}

#[test]
fn lost_attempt_is_retried() {
    let settings = publisher(|id, before| match (id, before) {
        (_, 0) => FakeAnswer::HangUp,
        ("key_2", _) => FakeAnswer::Refuse(ErrorKind::KeyNotFound),
        _ => FakeAnswer::Done,
    });
    let (lines, _, code) = delete(&ids(3), &deletion(1), &settings);
    assert_eq!(
        lines,
        [
            "key_1  deleted  req_key_1",
            "key_2  not found  (an earlier attempt got no answer, and may have deleted it)",
            "key_3  deleted  req_key_3"
        ]
    );
    assert_eq!(code, 0);
}

#[test]
fn rate_limit_holds_for_all_workers() {
    let settings =
        publisher(
            |id, before| if id == "key_1" && before == 0 { FakeAnswer::Later(1) } else { FakeAnswer::Done },
        );
    let began = Instant::now();
    let (lines, err, code) = delete(&ids(20), &deletion(1), &settings);
    assert!(began.elapsed() >= Duration::from_secs(1));
    assert_eq!((lines.len(), code), (20, 0));
    assert!(lines.iter().all(|line| line.contains("  deleted  ")), "{lines:?}");
    assert!(err.starts_with("The server's rate limit is reached; continuing in 1 s.\n"), "{err}");
}

#[test]
fn wait_for_the_rate_limit_can_be_stopped() {
    let settings = publisher(|_, _| FakeAnswer::Later(3600));
    let (ids, deletion) = (ids(5), deletion(2));
    let run = BulkRun::new(&ids, &deletion, &settings);
    let stop = run.stop.clone();
    let began = Instant::now();
    let (lines, err, code) = std::thread::scope(|scope| {
        let ended = scope.spawn(|| run_to_end(&run));
        while *run.limited_until.lock() <= Instant::now() + Duration::from_mins(1) {
            std::thread::yield_now();
        }
        stop.fail("enough".to_owned());
        ended.join().unwrap()
    });
    assert!(began.elapsed() < Duration::from_mins(1));
    assert!(lines.iter().all(|line| line.ends_with("  not started")), "{lines:?}");
    assert!(
        err.contains("enough\n") && err.contains("0 deleted, 0 not found, 0 failed, 5 not started"),
        "{err}"
    );
    assert_eq!((lines.len(), code), (5, 1));
}

#[test]
fn stop_finishes_the_deletions_in_progress() {
    let stop = Arc::new(Mutex::new(None::<StopFlag>));
    let settings = publisher({
        let stop = stop.clone();
        move |id, _| {
            if id == "key_3" {
                // As if Ctrl-C came just now.
                stop.lock().as_ref().unwrap().fail("enough".to_owned());
            }
            FakeAnswer::Done
        }
    });
    let (ids, deletion) = (ids(10), deletion(1));
    let run = BulkRun::new(&ids, &deletion, &settings);
    *stop.lock() = Some(run.stop.clone());
    let (lines, _, code) = run_to_end(&run);
    let deleted: Vec<_> = lines.iter().filter(|line| line.contains("  deleted  ")).collect();
    assert_eq!(
        deleted,
        ["key_1  deleted  req_key_1", "key_2  deleted  req_key_2", "key_3  deleted  req_key_3"]
    );
    assert_eq!(lines.iter().filter(|line| line.ends_with("  not started")).count(), 7);
    assert_eq!(code, 1);
}
