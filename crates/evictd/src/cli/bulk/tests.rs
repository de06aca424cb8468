use std::collections::HashMap;
use std::io::{BufRead as _, BufReader, Read as _, Write};
use std::net::{TcpListener, TcpStream};

use evictd_wire::api::error::ApiError;
use evictd_wire::api::responses::Empty;
use evictd_wire::api::secret::Secret;

use super::*;

/// What a publisher answers to one request.
enum Reply {
    Done,
    Refuse(ErrorKind),
    /// 429, and when to come again.
    Later(u64),
    /// No answer at all.
    HangUp,
}

/// A publisher that answers by the id of the key, and by how often it was asked for it before. It ends with the
/// program.
fn publisher(answer: impl Fn(&str, usize) -> Reply + Send + Sync + 'static) -> Settings {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let (answer, asked) = (Arc::new(answer), Arc::new(Mutex::new(HashMap::new())));
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let (answer, asked) = (answer.clone(), asked.clone());
            std::thread::spawn(move || {
                let stream = stream.unwrap();
                let mut reader = BufReader::new(stream.try_clone().unwrap());
                while let Some(id) = next_id(&mut reader) {
                    let before = {
                        let mut asked = asked.lock();
                        let count = asked.entry(id.clone()).or_insert(0);
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
    Settings { root_key: Secret::new("unkey_1"), url, server: Server::Publisher, json: false }
}

/// The key that the next request on this connection wants deleted.
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

fn send(mut stream: &TcpStream, id: &str, reply: &Reply) -> bool {
    let (status, header, body) = match reply {
        Reply::HangUp => return false,
        Reply::Done => (200, String::new(), Success::new(format!("req_{id}"), Empty {}).to_bytes()),
        Reply::Refuse(kind) => {
            let error = ApiError::new(*kind, "because");
            (kind.status(), String::new(), Failure::new("req_1", &error).to_bytes())
        }
        Reply::Later(seconds) => {
            let error = ApiError::new(ErrorKind::WorkspaceRateLimited, "too many");
            (429, format!("Retry-After: {seconds}\r\n"), Failure::new("req_1", &error).to_bytes())
        }
    };
    let head = format!("HTTP/1.1 {status} X\r\n{header}Content-Length: {}\r\n\r\n", body.len());
    stream.write_all(&[head.as_bytes(), &body].concat()).is_ok()
}

fn order(concurrency: usize) -> Order {
    Order { permanent: false, concurrency, strict: false, wait: None }
}

fn ids(how_many: usize) -> Vec<String> {
    (1..=how_many).map(|n| format!("key_{n}")).collect()
}

/// A terminal, on which standard output and standard error meet.
struct Screen<'a>(&'a Mutex<Vec<u8>>);

impl Write for Screen<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Standard output in the order of its lines' text, standard error, and the exit code.
fn ran(run: &Run<'_>) -> (Vec<String>, String, u8) {
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let mut report = Report::new(run.ids, run.settings.json, (Box::new(&mut out), Box::new(&mut err)), None);
    run.work(&mut report);
    let code = report.conclude(run.order);
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    let mut lines: Vec<_> = text(out).lines().map(str::to_owned).collect();
    lines.sort();
    (lines, text(err), code)
}

fn deleting(ids: &[String], order: &Order, settings: &Settings) -> (Vec<String>, String, u8) {
    ran(&Run::new(ids, order, settings))
}

#[test]
fn every_id_is_deleted_and_has_its_line() {
    let settings = publisher(|_, _| Reply::Done);
    let (lines, err, code) = deleting(&ids(50), &order(8), &settings);
    let mut expected: Vec<_> = ids(50).iter().map(|id| format!("{id}  deleted  req_{id}")).collect();
    expected.sort();
    assert_eq!(lines, expected);
    assert_eq!(err, "50 keys: 50 deleted, 0 not found, 0 failed, 0 not started\n");
    assert_eq!(code, 0);
}

/// What a terminal shows of `written`: a line that is drawn over shows what was drawn last.
fn shown(written: &str) -> Vec<&str> {
    written.lines().map(|line| line.rsplit("\r\x1b[K").next().unwrap_or_default()).collect()
}

/// Ten times a second it is drawn, however often that is asked for.
fn draw_until_shown(report: &mut Report<'_>, screen: &Mutex<Vec<u8>>, bar: &str) {
    while !String::from_utf8_lossy(&screen.lock()).contains(bar) {
        report.draw();
    }
}

#[test]
fn a_terminal_shows_how_far_it_has_come_and_in_the_end_only_what_became_of_it() {
    let ids = ids(4);
    let screen = Mutex::new(Vec::new());
    let terminal = || Box::new(Screen(&screen));
    let mut report = Report::new(&ids, false, (terminal(), terminal()), Some(Instant::now()));
    let deleted = |id: &str| Fate::Deleted { request_id: format!("req_{id}"), reached: None };
    report.done(0, &deleted("1"));
    draw_until_shown(&mut report, &screen, "] 1/4");
    report.done(1, &Fate::NotFound { maybe_now: false });
    report.note("The limit of requests is reached; going on in 1 s.");
    draw_until_shown(&mut report, &screen, "] 2/4");
    report.done(2, &Fate::Failed("no".to_owned()));
    assert_eq!(report.conclude(&order(1)), 1);

    let written = String::from_utf8(screen.into_inner()).unwrap();
    let bars: Vec<_> = written.split("\r\x1b[K").filter(|text| text.starts_with('[')).collect();
    assert_eq!(
        bars,
        ["[=======>                      ] 1/4", "[===============>              ] 2/4, 1 not found"]
    );
    assert_eq!(
        shown(&written),
        [
            "key_1  deleted  req_1",
            "key_2  not found",
            "The limit of requests is reached; going on in 1 s.",
            "key_3  failed: no",
            "key_4  not started",
            "4 keys: 1 deleted, 1 not found, 1 failed, 1 not started",
            "Not found means deleted before, or never there: look whether you expected each of those.",
            "Run it again with the same list to go on: what is gone will be told as not found.",
        ]
    );
}

#[test]
fn where_nobody_looks_nothing_is_drawn() {
    let (ids, mut err) = (ids(2), Vec::new());
    let mut report = Report::new(&ids, false, (Box::new(io::sink()), Box::new(&mut err)), None);
    report.draw();
    report.done(0, &Fate::NotFound { maybe_now: false });
    report.draw();
    report.conclude(&order(1));
    assert!(!err.contains(&b'\r') && !err.contains(&b'\x1b'), "{}", String::from_utf8_lossy(&err));
}

#[test]
fn nothing_to_delete_is_no_failure() {
    let settings = publisher(|_, _| Reply::HangUp);
    let (lines, err, code) = deleting(&[], &order(8), &settings);
    assert_eq!((lines.len(), code), (0, 0));
    assert!(err.contains("nothing to delete"), "{err}");
}

#[test]
fn what_goes_wrong_with_one_key_doesnt_keep_the_others() {
    let settings = publisher(|id, _| match id {
        "key_2" => Reply::Refuse(ErrorKind::KeyNotFound),
        "key_3" => Reply::Refuse(ErrorKind::InsufficientPermissions),
        _ => Reply::Done,
    });
    let (lines, err, code) = deleting(&ids(4), &order(2), &settings);
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
fn a_server_that_refuses_the_root_key_ends_the_run() {
    let settings = publisher(|_, _| Reply::Refuse(ErrorKind::RootKeyNotFound));
    let (lines, err, code) = deleting(&ids(100), &order(1), &settings);
    assert_eq!(lines[0], "key_1  failed: Authentication failed: because");
    assert_eq!(lines.iter().filter(|line| line.ends_with("  not started")).count(), 99);
    assert!(err.contains("would fail alike. Authentication failed: because\n"), "{err}");
    assert_eq!(code, 1);
}

#[test]
fn a_server_that_isnt_evictd_deletes_nothing_and_finds_nothing() {
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
    let settings = Settings { root_key: Secret::new("unkey_1"), url, server: Server::Publisher, json: false };
    let (lines, _, code) = deleting(&ids(3), &order(1), &settings);
    assert!(
        lines[0].contains("key_1  failed: http://127.0.0.1:") && lines[0].contains("answered 404"),
        "{lines:?}"
    );
    assert_eq!(lines[1..], ["key_2  not started", "key_3  not started"]);
    assert_eq!(code, 1);
}

#[test]
fn an_attempt_without_an_answer_is_made_again() {
    let settings = publisher(|id, before| match (id, before) {
        (_, 0) => Reply::HangUp,
        ("key_2", _) => Reply::Refuse(ErrorKind::KeyNotFound),
        _ => Reply::Done,
    });
    let (lines, _, code) = deleting(&ids(3), &order(1), &settings);
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
fn a_limit_of_requests_is_kept_by_all_workers() {
    let settings =
        publisher(|id, before| if id == "key_1" && before == 0 { Reply::Later(1) } else { Reply::Done });
    let began = Instant::now();
    let (lines, err, code) = deleting(&ids(20), &order(1), &settings);
    assert!(began.elapsed() >= Duration::from_secs(1));
    assert_eq!((lines.len(), code), (20, 0));
    assert!(lines.iter().all(|line| line.contains("  deleted  ")), "{lines:?}");
    assert!(err.starts_with("The limit of requests is reached; going on in 1 s.\n"), "{err}");
}

#[test]
fn who_waits_for_the_limit_can_be_stopped() {
    let settings = publisher(|_, _| Reply::Later(3600));
    let (ids, order) = (ids(5), order(2));
    let run = Run::new(&ids, &order, &settings);
    let stop = run.stop.clone();
    let began = Instant::now();
    let (lines, err, code) = std::thread::scope(|scope| {
        let ran = scope.spawn(|| ran(&run));
        while *run.closed_until.lock() <= Instant::now() + Duration::from_mins(1) {
            std::thread::yield_now();
        }
        stop.set("enough".to_owned());
        ran.join().unwrap()
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
fn what_is_under_way_is_finished_when_the_rest_is_stopped() {
    let stop = Arc::new(Mutex::new(None::<Arc<Stop>>));
    let settings = publisher({
        let stop = stop.clone();
        move |id, _| {
            if id == "key_3" {
                // As if Ctrl-C came just now.
                stop.lock().as_ref().unwrap().set("enough".to_owned());
            }
            Reply::Done
        }
    });
    let (ids, order) = (ids(10), order(1));
    let run = Run::new(&ids, &order, &settings);
    *stop.lock() = Some(run.stop.clone());
    let (lines, _, code) = ran(&run);
    let deleted: Vec<_> = lines.iter().filter(|line| line.contains("  deleted  ")).collect();
    assert_eq!(
        deleted,
        ["key_1  deleted  req_key_1", "key_2  deleted  req_key_2", "key_3  deleted  req_key_3"]
    );
    assert_eq!(lines.iter().filter(|line| line.ends_with("  not started")).count(), 7);
    assert_eq!(code, 1);
}
