//! Where the root key and the URL come from: flag, then environment, then file.

use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, anyhow, bail, ensure};
use clap::ValueEnum as _;
use evictd_wire::api::secret::Secret;

use super::args::Connection;
use crate::output_format::OutputFormat;

/// What evictd's file may say.
const KEYS: [&str; 3] = ["root_key", "api_url", "verify_url"];

/// Which daemon answers a request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Server {
    /// The control API.
    Publisher,
    /// The verify API.
    Agent,
}

impl Server {
    /// How it is started.
    pub(super) fn command(self) -> &'static str {
        match self {
            Self::Publisher => "evictd publisher",
            Self::Agent => "evictd agent",
        }
    }

    /// How its URL is told to the command line.
    pub(super) fn url_variable(self) -> &'static str {
        match self {
            Self::Publisher => "EVICTD_API_URL",
            Self::Agent => "EVICTD_VERIFY_URL",
        }
    }

    fn default_url(self) -> &'static str {
        match self {
            Self::Publisher => "http://127.0.0.1:7070",
            Self::Agent => "http://127.0.0.1:7080",
        }
    }
}

/// What of the process and its machine decides; tests bring their own.
pub(super) struct Surroundings<'a> {
    /// The environment. An empty variable counts as unset.
    pub(super) variable: &'a dyn Fn(&str) -> Option<String>,
    /// The file system.
    pub(super) read: &'a dyn Fn(&Path) -> io::Result<String>,
}

impl Surroundings<'static> {
    /// Those of this process.
    pub(super) fn of_process() -> Self {
        Self { variable: &|name| std::env::var(name).ok(), read: &|path| std::fs::read_to_string(path) }
    }
}

impl Surroundings<'_> {
    fn first_variable(&self, names: &[&str]) -> Option<String> {
        names.iter().filter_map(|name| (self.variable)(name)).find(|value| !value.is_empty())
    }
}

/// All that a command needs besides its own flags.
#[derive(Debug)]
pub(super) struct Settings {
    /// Authorises the request.
    pub(super) root_key: Secret,
    /// Where to send it, without a slash at the end.
    pub(super) url: String,
    /// Who is expected to answer there.
    pub(super) server: Server,
    /// Whether to print the whole answer.
    pub(super) json: bool,
}

impl Settings {
    /// Looks in every place in its order. The error says which places there are.
    pub(super) fn resolve(
        flags: &Connection,
        server: Server,
        surroundings: &Surroundings<'_>,
    ) -> anyhow::Result<Self> {
        let files = Files::load(flags.config.as_deref(), surroundings)?;
        let root_key = flags
            .root_key
            .clone()
            .filter(|key| !key.is_empty())
            .or_else(|| surroundings.first_variable(&["EVICTD_ROOT_KEY", "UNKEY_ROOT_KEY"]));
        let root_key = match root_key {
            Some(key) => Secret::new(key.trim()),
            None => Secret::new(files.text("root_key")?.ok_or_else(|| files.no_root_key())?),
        };
        let (url, server) = match &flags.api_url {
            Some(url) => (url.clone(), server),
            None => found_url(server, &files, surroundings)?,
        };
        let output = match flags.output {
            Some(output) => output,
            None => output_of_environment(surroundings)?,
        };
        Ok(Self { root_key, url: checked_url(&url)?, server, json: output == OutputFormat::Json })
    }
}

/// The URL that environment or file say, and who answers there. A publisher answers verifications, too: whoever has
/// said only where that is, as Unkey's one URL, sends the root key nowhere else.
fn found_url(
    server: Server,
    files: &Files,
    surroundings: &Surroundings<'_>,
) -> anyhow::Result<(String, Server)> {
    let places: &[Server] = match server {
        Server::Publisher => &[Server::Publisher],
        Server::Agent => &[Server::Agent, Server::Publisher],
    };
    for place in places {
        let (variables, member): (&[&str], _) = match place {
            Server::Publisher => (&["EVICTD_API_URL", "UNKEY_API_BASE_URL"], "api_url"),
            Server::Agent => (&["EVICTD_VERIFY_URL"], "verify_url"),
        };
        let url = match surroundings.first_variable(variables) {
            Some(url) => Some(url),
            None => files.text(member)?,
        };
        if let Some(url) = url {
            return Ok((url, *place));
        }
    }
    Ok((server.default_url().to_owned(), server))
}

/// Unkey's variable is for its own command line, too, which takes whatever isn't `json` for text.
fn output_of_environment(surroundings: &Surroundings<'_>) -> anyhow::Result<OutputFormat> {
    if let Some(own) = surroundings.first_variable(&["EVICTD_OUTPUT"]) {
        return OutputFormat::from_str(&own, false)
            .map_err(|_| anyhow!("EVICTD_OUTPUT must be `text` or `json`, not {own:?}"));
    }
    let unkeys = surroundings.first_variable(&["UNKEY_OUTPUT"]);
    Ok(if unkeys.as_deref() == Some("json") { OutputFormat::Json } else { OutputFormat::Text })
}

/// A URL that isn't one is refused here, where its origin is still known.
fn checked_url(url: &str) -> anyhow::Result<String> {
    let url = url.trim().trim_end_matches('/');
    let host = url.strip_prefix("http://").or_else(|| url.strip_prefix("https://"));
    if host.is_none_or(str::is_empty) {
        bail!("the API URL '{url}' isn't a URL: it has to look like http://127.0.0.1:7070");
    }
    Ok(url.to_owned())
}

/// A file to look in.
struct File {
    path: PathBuf,
    /// Whether it is Unkey's own, which may say what only Unkey's programs know.
    unkeys: bool,
}

impl File {
    fn evictds(path: impl Into<PathBuf>) -> Self {
        let path = path.into();
        // Whoever comes from Unkey may name its file to evictd.
        let unkeys = path.parent().is_some_and(|directory| directory.ends_with(".unkey"));
        Self { path, unkeys }
    }

    fn unkeys(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), unkeys: true }
    }
}

/// The file that was asked for, if one was.
fn named_file(flag: Option<&Path>, surroundings: &Surroundings<'_>) -> Option<File> {
    let variable = |name| surroundings.first_variable(&[name]);
    flag.map(File::evictds)
        .or_else(|| variable("EVICTD_CONFIG").map(File::evictds))
        .or_else(|| variable("UNKEY_CONFIG").map(File::unkeys))
}

/// Where else is looked: evictd's file, then Unkey's.
fn usual_files(surroundings: &Surroundings<'_>) -> Vec<File> {
    let Some(home) = surroundings.first_variable(&["HOME"]).map(PathBuf::from) else { return Vec::new() };
    vec![File::evictds(home.join(".evictd/config.toml")), File::unkeys(home.join(".unkey/config.toml"))]
}

/// The file that counts most, whether it exists or not.
pub(super) fn first_file(flag: Option<&Path>, surroundings: &Surroundings<'_>) -> Option<PathBuf> {
    let file = named_file(flag, surroundings).or_else(|| usual_files(surroundings).into_iter().next());
    file.map(|file| file.path)
}

/// The configuration files that exist, the one that counts most first.
struct Files {
    tables: Vec<(PathBuf, toml::Table)>,
    looked_in: Vec<PathBuf>,
}

impl Files {
    /// A file that was asked for must exist; the usual ones may be absent.
    fn load(flag: Option<&Path>, surroundings: &Surroundings<'_>) -> anyhow::Result<Self> {
        let named = named_file(flag, surroundings);
        let required = named.is_some();
        let files = named.map_or_else(|| usual_files(surroundings), |file| vec![file]);
        let mut tables = Vec::new();
        for File { path, unkeys } in &files {
            match (surroundings.read)(path) {
                Ok(text) => {
                    let table = parsed(path, &text)?;
                    if !unkeys {
                        check_keys(path, &table)?;
                    }
                    tables.push((path.clone(), table));
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound && !required => {}
                Err(error) => {
                    return Err(error)
                        .with_context(|| format!("can't read the config file {}", path.display()));
                }
            }
        }
        Ok(Self { tables, looked_in: files.into_iter().map(|file| file.path).collect() })
    }

    /// The first file's `member`.
    fn text(&self, member: &str) -> anyhow::Result<Option<String>> {
        for (path, table) in &self.tables {
            match table.get(member) {
                None => {}
                Some(toml::Value::String(text)) if text.is_empty() => {}
                Some(toml::Value::String(text)) => return Ok(Some(text.clone())),
                Some(_) => bail!("`{member}` in {} must be text in quotes", path.display()),
            }
        }
        Ok(None)
    }

    fn no_root_key(&self) -> anyhow::Error {
        let files: Vec<_> = self.looked_in.iter().map(|path| path.display().to_string()).collect();
        let files =
            if files.is_empty() { "a file given with --config".to_owned() } else { files.join(" or ") };
        anyhow!(
            "no root key: give one\n  \
             with the flag --root-key=unkey_...,\n  \
             in the environment variable EVICTD_ROOT_KEY (or UNKEY_ROOT_KEY), or\n  \
             as root_key = \"unkey_...\" in {files}, which `evictd auth login` writes"
        )
    }
}

/// A key that is misspelt would be ignored, and the next file's or a default taken instead.
fn check_keys(path: &Path, table: &toml::Table) -> anyhow::Result<()> {
    let unknown: Vec<_> = table.keys().filter(|key| !KEYS.contains(&key.as_str())).collect();
    ensure!(
        unknown.is_empty(),
        "the config file {} says what evictd doesn't know: {unknown:?}. It may say {}; a publisher's or an agent's \
         configuration is another file",
        path.display(),
        KEYS.join(", ")
    );
    Ok(())
}

/// The parser's own display shows the offending line, which may be the root key's.
fn parsed(path: &Path, text: &str) -> anyhow::Result<toml::Table> {
    text.parse().map_err(|error: toml::de::Error| {
        let before = error.span().and_then(|span| text.get(..span.start)).unwrap_or_default();
        let line = before.lines().count().max(1);
        anyhow!("the config file {} isn't valid TOML near line {line}", path.display())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Resolves with these variables and files.
    fn resolve(
        flags: &Connection,
        server: Server,
        variables: &[(&str, &str)],
        files: &[(&str, &str)],
    ) -> anyhow::Result<Settings> {
        let find = |pairs: &[(&str, &str)], name: &str| {
            pairs.iter().find(|(candidate, _)| *candidate == name).map(|(_, value)| (*value).to_owned())
        };
        let read = |path: &Path| find(files, path.to_str().unwrap()).ok_or(io::ErrorKind::NotFound.into());
        let variable = |name: &str| find(variables, name);
        Settings::resolve(flags, server, &Surroundings { variable: &variable, read: &read })
    }

    fn flags(root_key: Option<&str>) -> Connection {
        Connection { root_key: root_key.map(str::to_owned), ..Connection::default() }
    }

    const HOME: (&str, &str) = ("HOME", "/home/u");

    #[test]
    fn the_root_key_comes_from_the_first_place_that_has_one() {
        let mut variables = vec![HOME, ("EVICTD_ROOT_KEY", "env1"), ("UNKEY_ROOT_KEY", "env2")];
        let mut files = vec![
            ("/home/u/.evictd/config.toml", "root_key = 'file1'"),
            ("/home/u/.unkey/config.toml", "root_key = 'file2'"),
        ];
        let key = |flag: Option<&str>, variables: &[_], files: &[_]| {
            resolve(&flags(flag), Server::Publisher, variables, files).unwrap().root_key.expose().to_owned()
        };
        assert_eq!(key(Some("flag"), &variables, &files), "flag");
        assert_eq!(key(None, &variables, &files), "env1");
        assert_eq!(key(Some(""), &variables, &files), "env1");
        variables.remove(1);
        assert_eq!(key(None, &variables, &files), "env2");
        variables[1].1 = "";
        assert_eq!(key(None, &variables, &files), "file1");
        files[0].1 = "api_url = 'http://h'";
        assert_eq!(key(None, &variables, &files), "file2");
    }

    #[test]
    fn without_a_root_key_every_way_to_give_one_is_listed() {
        let error = resolve(&flags(None), Server::Publisher, &[HOME], &[]).unwrap_err().to_string();
        for way in [
            "--root-key",
            "EVICTD_ROOT_KEY",
            "UNKEY_ROOT_KEY",
            "/home/u/.evictd/config.toml",
            "/home/u/.unkey/",
            "evictd auth login",
        ] {
            assert!(error.contains(way), "{error}");
        }
        let error = resolve(&flags(None), Server::Publisher, &[], &[]).unwrap_err().to_string();
        assert!(error.contains("--config"), "{error}");
    }

    #[test]
    fn a_config_file_that_was_asked_for_must_exist() {
        let asked = Connection { config: Some("/etc/x.toml".into()), ..flags(Some("k")) };
        let error = resolve(&asked, Server::Publisher, &[HOME], &[]).unwrap_err().to_string();
        assert!(error.contains("/etc/x.toml"), "{error}");
        assert!(resolve(&flags(Some("k")), Server::Publisher, &[HOME], &[]).is_ok());
        let named = [("UNKEY_CONFIG", "/u.toml"), ("EVICTD_CONFIG", "/e.toml")];
        let files = [("/u.toml", "root_key = 'u'"), ("/e.toml", "root_key = 'e'")];
        let settings = resolve(&flags(None), Server::Publisher, &named, &files).unwrap();
        assert_eq!(settings.root_key.expose(), "e");
    }

    #[test]
    fn a_root_key_is_kept_where_it_will_be_found_first() {
        let first = |flag: Option<&str>, variables: &[(&str, &str)]| {
            let variable = |name: &str| {
                variables.iter().find(|(own, _)| *own == name).map(|(_, value)| (*value).to_owned())
            };
            let read = |_: &Path| Err(io::ErrorKind::NotFound.into());
            let surroundings = Surroundings { variable: &variable, read: &read };
            first_file(flag.map(Path::new), &surroundings).map(|path| path.display().to_string())
        };
        let named = [HOME, ("UNKEY_CONFIG", "/u.toml")];
        assert_eq!(first(Some("/f.toml"), &named).as_deref(), Some("/f.toml"));
        assert_eq!(first(None, &named).as_deref(), Some("/u.toml"));
        assert_eq!(first(None, &[HOME]).as_deref(), Some("/home/u/.evictd/config.toml"));
        assert_eq!(first(None, &[]), None);
    }

    #[test]
    fn a_broken_config_file_is_named_without_showing_it() {
        for text in ["root_key = unkey_hunter2", "\nroot_key = 'unkey_hunter2", "root_key = ['hunter2']"] {
            let files = [("/home/u/.evictd/config.toml", text)];
            let error = resolve(&flags(None), Server::Publisher, &[HOME], &files).unwrap_err();
            let error = format!("{error:?} {error:#}");
            assert!(error.contains("/home/u/.evictd/config.toml") && !error.contains("hunter2"), "{error}");
        }
    }

    #[test]
    fn the_url_comes_from_the_first_place_that_has_one() {
        let file = ("/home/u/.evictd/config.toml", "api_url = 'http://file/'\nverify_url = 'https://vfile'");
        let all = [
            HOME,
            ("EVICTD_API_URL", "http://env1"),
            ("UNKEY_API_BASE_URL", "http://env2"),
            ("EVICTD_VERIFY_URL", "http://venv"),
        ];
        let url = |flag: Option<&str>, server, variables: &[_], files: &[_]| {
            let flags = Connection { api_url: flag.map(str::to_owned), ..flags(Some("k")) };
            resolve(&flags, server, variables, files).unwrap().url
        };
        assert_eq!(url(Some("http://flag/"), Server::Publisher, &all, &[file]), "http://flag");
        assert_eq!(url(None, Server::Publisher, &all, &[file]), "http://env1");
        assert_eq!(url(None, Server::Publisher, &[HOME, all[2]], &[file]), "http://env2");
        assert_eq!(url(None, Server::Publisher, &[HOME], &[file]), "http://file");
        assert_eq!(url(None, Server::Publisher, &[], &[]), "http://127.0.0.1:7070");
        assert_eq!(url(Some("http://flag/"), Server::Agent, &all, &[file]), "http://flag");
        assert_eq!(url(None, Server::Agent, &all, &[file]), "http://venv");
        assert_eq!(url(None, Server::Agent, &all[..3], &[file]), "https://vfile");
        assert_eq!(url(None, Server::Agent, &[], &[]), "http://127.0.0.1:7080");
    }

    #[test]
    fn without_a_verify_url_the_publisher_that_was_named_verifies() {
        let evictds = ("/home/u/.evictd/config.toml", "api_url = 'http://file'");
        let both = ("/home/u/.evictd/config.toml", "api_url = 'http://file'\nverify_url = 'http://vfile'");
        let unkeys = ("UNKEY_API_BASE_URL", "http://env2");
        let found = |variables: &[_], files: &[_]| {
            let settings = resolve(&flags(Some("k")), Server::Agent, variables, files).unwrap();
            (settings.url, settings.server)
        };
        let publisher = |url: &str| (url.to_owned(), Server::Publisher);
        assert_eq!(found(&[HOME, unkeys], &[]), publisher("http://env2"));
        assert_eq!(found(&[HOME, unkeys, ("EVICTD_API_URL", "http://env1")], &[]), publisher("http://env1"));
        assert_eq!(found(&[HOME], &[evictds]), publisher("http://file"));
        assert_eq!(found(&[HOME, unkeys], &[evictds]), publisher("http://env2"));
        // A verify URL counts more, wherever it stands.
        assert_eq!(found(&[HOME, unkeys], &[both]), ("http://vfile".to_owned(), Server::Agent));
    }

    #[test]
    fn what_isnt_a_url_is_refused() {
        for url in ["127.0.0.1:7070", "http://", "ftp://host", ""] {
            let flags = Connection { api_url: Some(url.into()), ..flags(Some("k")) };
            assert!(resolve(&flags, Server::Publisher, &[], &[]).is_err(), "{url}");
        }
    }

    #[test]
    fn a_key_that_isnt_known_is_named_with_those_that_are_but_not_in_unkeys_file() {
        let says = "rootkey = 'hunter2'\nroot_key = 'k'\n[publisher]\nurl = 'http://h'";
        let resolved = |flag: Option<&str>, variables: &[_], path: &str| {
            let flags = Connection { config: flag.map(PathBuf::from), ..flags(None) };
            resolve(&flags, Server::Publisher, variables, &[(path, says)])
        };
        for (flag, variables, path) in [
            (None, vec![HOME], "/home/u/.evictd/config.toml"),
            (Some("/f.toml"), vec![HOME], "/f.toml"),
            (None, vec![("EVICTD_CONFIG", "/e.toml")], "/e.toml"),
        ] {
            let error = resolved(flag, &variables, path).unwrap_err().to_string();
            for part in [path, "\"rootkey\"", "\"publisher\"", "root_key, api_url, verify_url"] {
                assert!(error.contains(part), "{error}");
            }
            assert!(!error.contains("hunter2"), "{error}");
        }
        for (flag, variables, path) in [
            (None, vec![HOME], "/home/u/.unkey/config.toml"),
            (None, vec![("UNKEY_CONFIG", "/u.toml")], "/u.toml"),
            (Some("/home/v/.unkey/config.toml"), vec![HOME], "/home/v/.unkey/config.toml"),
        ] {
            assert_eq!(resolved(flag, &variables, path).unwrap().root_key.expose(), "k");
        }
    }

    #[test]
    fn json_output_can_be_asked_for_in_the_environment() {
        let settings = |output: Option<OutputFormat>, variables: &[_]| {
            let flags = Connection { output, ..flags(Some("k")) };
            resolve(&flags, Server::Publisher, variables, &[])
        };
        let json = |output, variables: &[_]| settings(output, variables).unwrap().json;
        assert!(json(Some(OutputFormat::Json), &[]));
        assert!(!json(Some(OutputFormat::Text), &[("EVICTD_OUTPUT", "json")]));
        assert!(json(None, &[("EVICTD_OUTPUT", "json")]));
        assert!(json(None, &[("UNKEY_OUTPUT", "json")]));
        assert!(!json(None, &[]));
        // What Unkey's own command line takes for text is no error.
        assert!(!json(None, &[("UNKEY_OUTPUT", "yaml")]));
        let error = settings(None, &[("EVICTD_OUTPUT", "yaml")]).unwrap_err().to_string();
        assert!(error.contains("EVICTD_OUTPUT must be `text` or `json`"), "{error}");
    }
}
