//! The root key, the URL and the output format: from flags, then the environment, then files.

use std::cell::OnceCell;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, anyhow, bail, ensure};
use clap::builder::{StringValueParser, TypedValueParser as _};
use clap::{Args, ValueEnum as _};
use evictd_ops::connection_url::ConnectionUrl;
use evictd_wire::api::secret::Secret;

use crate::call::ApiServer;
use crate::print::OutputFormat;
use crate::proxy::HttpProxy;

/// The keys of evictd's config file.
const KEYS: [&str; 3] = ["root_key", "api_url", "verify_url"];

/// The flags of every API command. They may stand anywhere on the command line.
#[derive(Args, Default, Debug)]
#[command(next_help_heading = "Connection")]
pub(crate) struct ConnectionArgs {
    /// The root key. Prefer $EVICTD_ROOT_KEY (or $UNKEY_ROOT_KEY): other users can see command lines.
    #[arg(long, global = true, value_name = "KEY", allow_hyphen_values = true,
          value_parser = StringValueParser::new().map(Secret::new))]
    pub(crate) root_key: Option<Secret>,
    /// The server's URL. Default: $EVICTD_API_URL, $UNKEY_API_BASE_URL, `api_url` of the file,
    /// http://127.0.0.1:7070; for verify-key $EVICTD_VERIFY_URL, `verify_url` of the file, then the API URL of
    /// environment or file, http://127.0.0.1:7080.
    #[arg(long, global = true, value_name = "URL")]
    pub(crate) api_url: Option<String>,
    /// A TOML file with `root_key`, `api_url`, `verify_url`. Default: $EVICTD_CONFIG, $UNKEY_CONFIG,
    /// ~/.evictd/config.toml, ~/.unkey/config.toml.
    #[arg(long, global = true, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// `json` prints the whole answer. Default: $EVICTD_OUTPUT, $UNKEY_OUTPUT.
    #[arg(long, global = true, value_name = "FORMAT")]
    pub(crate) output: Option<OutputFormat>,
}

/// The environment variables and files that settings come from. Tests have their own.
pub(crate) struct Env<'a> {
    pub(crate) lookup: &'a dyn Fn(&str) -> Option<String>,
    pub(crate) read_file: &'a dyn Fn(&Path) -> io::Result<String>,
}

impl Env<'_> {
    pub(crate) fn of_process() -> Self {
        Self { lookup: &|name| std::env::var(name).ok(), read_file: &|path| std::fs::read_to_string(path) }
    }

    /// Returns the first of these variables that is set and not empty.
    pub(crate) fn first(&self, names: &[&str]) -> Option<String> {
        names.iter().filter_map(|name| (self.lookup)(name)).find(|value| !value.is_empty())
    }
}

/// What a command needs besides its own flags.
#[derive(Debug)]
pub(crate) struct ClientSettings {
    pub(crate) root_key: Secret,
    /// Without a slash at the end.
    pub(crate) url: String,
    /// The daemon at that URL, for messages.
    pub(crate) server: ApiServer,
    /// Whether to print the whole answer as JSON.
    pub(crate) json: bool,
    pub(crate) proxy: Option<HttpProxy>,
}

impl ClientSettings {
    /// Resolves each setting from the strongest place that has it. The error lists the places.
    pub(crate) fn resolve(flags: &ConnectionArgs, server: ApiServer, env: &Env<'_>) -> anyhow::Result<Self> {
        let flag = flags.root_key.as_ref().map(|key| key.expose().to_owned()).filter(|key| !key.is_empty());
        let given = flag.or_else(|| env.first(&["EVICTD_ROOT_KEY", "UNKEY_ROOT_KEY"]));
        let named = flags.config.as_deref();
        let files = ConfigFiles { named, must_exist: given.is_none(), env, loaded: OnceCell::new() };
        let root_key = match given {
            Some(key) => Secret::new(key.trim()),
            None => Secret::new(files.text("root_key")?.ok_or_else(|| files.no_root_key())?),
        };
        let (url, server) = match &flags.api_url {
            Some(url) => (url.clone(), server),
            None => find_url(server, &files, env)?,
        };
        let output = flags.output.map_or_else(|| output_of(env), Ok)?;
        let url = ConnectionUrl::http(&url)?;
        Ok(Self {
            root_key,
            proxy: HttpProxy::of(&url, env)?,
            url: url.expose().to_owned(),
            server,
            json: output == OutputFormat::Json,
        })
    }
}

/// Finds the URL in environment or files, and which daemon it belongs to. A publisher verifies keys too: if only
/// its URL is set, as in a setup made for Unkey, the root key is sent nowhere else.
fn find_url(
    server: ApiServer,
    files: &ConfigFiles<'_>,
    env: &Env<'_>,
) -> anyhow::Result<(String, ApiServer)> {
    let publisher = (ApiServer::Publisher, &["EVICTD_API_URL", "UNKEY_API_BASE_URL"][..], "api_url");
    let agent = (ApiServer::Agent, &["EVICTD_VERIFY_URL"][..], "verify_url");
    let places: &[_] = match server {
        ApiServer::Publisher => &[publisher],
        ApiServer::Agent => &[agent, publisher],
    };
    for (owner, variables, key) in places {
        let url = env.first(variables).map_or_else(|| files.text(key), |url| Ok(Some(url)))?;
        if let Some(url) = url {
            return Ok((url, *owner));
        }
    }
    Ok((server.default_url().to_owned(), server))
}

/// Unkey's own command line reads its variable too, and takes every value but `json` as text.
fn output_of(env: &Env<'_>) -> anyhow::Result<OutputFormat> {
    if let Some(own) = env.first(&["EVICTD_OUTPUT"]) {
        return OutputFormat::from_str(&own, false)
            .map_err(|_| anyhow!("EVICTD_OUTPUT must be `text` or `json`, not {own:?}"));
    }
    let is_json = env.first(&["UNKEY_OUTPUT"]).as_deref() == Some("json");
    Ok(if is_json { OutputFormat::Json } else { OutputFormat::Text })
}

/// A file to read, and whether it is Unkey's own, which may have keys that only Unkey's programs read.
struct ConfigFile {
    path: PathBuf,
    is_unkeys: bool,
}

impl ConfigFile {
    /// Users who come from Unkey may pass its file to evictd.
    fn new(path: impl Into<PathBuf>) -> Self {
        let path = path.into();
        let is_unkeys = path.parent().is_some_and(|directory| directory.ends_with(".unkey"));
        Self { path, is_unkeys }
    }
}

/// Returns the file that flag or environment names, if any.
fn named_file(flag: Option<&Path>, env: &Env<'_>) -> Option<ConfigFile> {
    let unkeys = |path: String| ConfigFile { path: path.into(), is_unkeys: true };
    flag.map(ConfigFile::new)
        .or_else(|| env.first(&["EVICTD_CONFIG"]).map(ConfigFile::new))
        .or_else(|| env.first(&["UNKEY_CONFIG"]).map(unkeys))
}

/// Returns the files in the home directory, the strongest first.
fn home_files(env: &Env<'_>) -> Vec<ConfigFile> {
    let Some(home) = env.first(&["HOME"]).map(PathBuf::from) else { return Vec::new() };
    [".evictd/config.toml", ".unkey/config.toml"].map(|file| ConfigFile::new(home.join(file))).into()
}

/// Returns the path of the strongest file, whether the file exists or not.
pub(crate) fn strongest_file(flag: Option<&Path>, env: &Env<'_>) -> Option<PathBuf> {
    let file = named_file(flag, env).or_else(|| home_files(env).into_iter().next());
    file.map(|file| file.path)
}

/// The config files, which are read when the first value is looked for in them.
struct ConfigFiles<'a> {
    /// As the flag names it.
    named: Option<&'a Path>,
    /// Whether a file that flag or environment names has to exist. As for Unkey's command line, it need not if the root
    /// key comes from elsewhere.
    must_exist: bool,
    env: &'a Env<'a>,
    loaded: OnceCell<LoadedFiles>,
}

/// The config files that exist, the strongest first.
struct LoadedFiles {
    tables: Vec<(PathBuf, toml::Table)>,
    searched: Vec<String>,
}

impl LoadedFiles {
    /// Reads the named file, or else those in the home directory, which may be absent.
    fn load(named: Option<&Path>, must_exist: bool, env: &Env<'_>) -> anyhow::Result<Self> {
        let named = named_file(named, env);
        let must_exist = must_exist && named.is_some();
        let mut files = Self { tables: Vec::new(), searched: Vec::new() };
        for ConfigFile { path, is_unkeys } in named.map_or_else(|| home_files(env), |file| vec![file]) {
            files.searched.push(path.display().to_string());
            let text = match (env.read_file)(&path) {
                Ok(text) => text,
                Err(error) if error.kind() == io::ErrorKind::NotFound && !must_exist => continue,
                Err(error) => {
                    return Err(error)
                        .with_context(|| format!("cannot read the config file {}", path.display()));
                }
            };
            let table = parse(&path, &text)?;
            if !is_unkeys {
                check_keys(&path, &table)?;
            }
            files.tables.push((path, table));
        }
        Ok(files)
    }
}

impl ConfigFiles<'_> {
    fn loaded(&self) -> anyhow::Result<&LoadedFiles> {
        if let Some(loaded) = self.loaded.get() {
            return Ok(loaded);
        }
        let loaded = LoadedFiles::load(self.named, self.must_exist, self.env)?;
        Ok(self.loaded.get_or_init(|| loaded))
    }

    /// Returns the value of `key` in the strongest file that has it, without spaces and line ends around it.
    fn text(&self, key: &str) -> anyhow::Result<Option<String>> {
        for (path, table) in &self.loaded()?.tables {
            match table.get(key) {
                None => {}
                Some(toml::Value::String(text)) if text.trim().is_empty() => {}
                Some(toml::Value::String(text)) => return Ok(Some(text.trim().to_owned())),
                Some(_) => bail!("`{key}` in {} must be text in quotes", path.display()),
            }
        }
        Ok(None)
    }

    fn no_root_key(&self) -> anyhow::Error {
        let searched = self.loaded.get().map(|loaded| loaded.searched.as_slice()).unwrap_or_default();
        let files = match searched {
            [] => "a file that --config names".to_owned(),
            files => files.join(" or "),
        };
        anyhow!(
            "no root key; set one\n  \
             with the flag --root-key=unkey_...,\n  \
             in the environment variable EVICTD_ROOT_KEY (or UNKEY_ROOT_KEY), or\n  \
             as root_key = \"unkey_...\" in {files}, which `evictd auth login` writes"
        )
    }
}

/// Refuses unknown keys: a misspelled one would be ignored, and a weaker file or a default used instead.
fn check_keys(path: &Path, table: &toml::Table) -> anyhow::Result<()> {
    let unknown: Vec<_> = table.keys().filter(|key| !KEYS.contains(&key.as_str())).collect();
    ensure!(
        unknown.is_empty(),
        "the config file {} has unknown keys: {unknown:?}. The keys are {}; the configuration of a publisher or an \
         agent is a different file",
        path.display(),
        KEYS.join(", ")
    );
    Ok(())
}

/// Parses TOML. The parser's own message would show the line, which may contain the root key.
fn parse(path: &Path, text: &str) -> anyhow::Result<toml::Table> {
    text.parse().map_err(|error: toml::de::Error| {
        let before = error.span().and_then(|span| text.get(..span.start)).unwrap_or_default();
        let line = before.lines().count().max(1);
        anyhow!("the config file {} is not valid TOML near line {line}", path.display())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Resolves with these variables and files.
    fn resolve(
        flags: &ConnectionArgs,
        server: ApiServer,
        variables: &[(&str, &str)],
        files: &[(&str, &str)],
    ) -> anyhow::Result<ClientSettings> {
        let find = |pairs: &[(&str, &str)], name: &str| {
            pairs.iter().find(|(candidate, _)| *candidate == name).map(|(_, value)| (*value).to_owned())
        };
        let read = |path: &Path| find(files, path.to_str().unwrap()).ok_or(io::ErrorKind::NotFound.into());
        let variable = |name: &str| find(variables, name);
        ClientSettings::resolve(flags, server, &Env { lookup: &variable, read_file: &read })
    }

    fn flags(root_key: Option<&str>) -> ConnectionArgs {
        ConnectionArgs { root_key: root_key.map(Secret::new), ..ConnectionArgs::default() }
    }

    const HOME: (&str, &str) = ("HOME", "/home/u");

    #[test]
    fn root_key_comes_from_the_strongest_place() {
        let mut variables = vec![HOME, ("EVICTD_ROOT_KEY", "env1"), ("UNKEY_ROOT_KEY", "env2")];
        let mut files = vec![
            ("/home/u/.evictd/config.toml", "root_key = 'file1'"),
            ("/home/u/.unkey/config.toml", "root_key = 'file2'"),
        ];
        let key = |flag: Option<&str>, variables: &[_], files: &[_]| {
            resolve(&flags(flag), ApiServer::Publisher, variables, files)
                .unwrap()
                .root_key
                .expose()
                .to_owned()
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
    fn missing_root_key_lists_every_way_to_set_one() {
        let error = resolve(&flags(None), ApiServer::Publisher, &[HOME], &[]).unwrap_err().to_string();
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
        let error = resolve(&flags(None), ApiServer::Publisher, &[], &[]).unwrap_err().to_string();
        assert!(error.contains("--config"), "{error}");
    }

    #[test]
    fn named_config_file_must_exist_if_the_root_key_is_there() {
        let named = |root_key| ConnectionArgs { config: Some("/etc/x.toml".into()), ..flags(root_key) };
        let error = resolve(&named(None), ApiServer::Publisher, &[HOME], &[]).unwrap_err().to_string();
        assert!(error.contains("/etc/x.toml"), "{error}");
        // As for Unkey's command line, it isn't needed for anything else.
        let given = resolve(&named(Some("k")), ApiServer::Publisher, &[HOME], &[]).unwrap();
        assert_eq!(given.url, "http://127.0.0.1:7070");
        let variables = [HOME, ("UNKEY_ROOT_KEY", "k"), ("UNKEY_CONFIG", "/u.toml")];
        assert!(resolve(&flags(None), ApiServer::Agent, &variables, &[]).is_ok());
        assert!(resolve(&flags(Some("k")), ApiServer::Publisher, &[HOME], &[]).is_ok());
        let named = [("UNKEY_CONFIG", "/u.toml"), ("EVICTD_CONFIG", "/e.toml")];
        let files = [("/u.toml", "root_key = 'u'"), ("/e.toml", "root_key = 'e'")];
        let settings = resolve(&flags(None), ApiServer::Publisher, &named, &files).unwrap();
        assert_eq!(settings.root_key.expose(), "e");
    }

    #[test]
    fn config_file_is_read_only_if_something_is_needed() {
        let read = |_: &Path| -> io::Result<String> { panic!("it was read") };
        let variable = |name: &str| (name == "EVICTD_API_URL").then(|| "http://env".to_owned());
        let env = Env { lookup: &variable, read_file: &read };
        let named = ConnectionArgs { config: Some("/etc/x.toml".into()), ..flags(Some("k")) };
        let settings = ClientSettings::resolve(&named, ApiServer::Publisher, &env).unwrap();
        assert_eq!(settings.url, "http://env");
        let flag = ConnectionArgs { api_url: Some("http://flag".into()), ..flags(Some("k")) };
        assert!(ClientSettings::resolve(&flag, ApiServer::Agent, &env).is_ok());
    }

    #[test]
    fn values_of_a_config_file_are_trimmed() {
        let file =
            ("/home/u/.evictd/config.toml", "root_key = \"\"\"\nunkey_1\n\"\"\"\napi_url = ' http://h '");
        let settings = resolve(&flags(None), ApiServer::Publisher, &[HOME], &[file]).unwrap();
        assert_eq!((settings.root_key.expose(), settings.url.as_str()), ("unkey_1", "http://h"));
        let blank = ("/home/u/.evictd/config.toml", r#"root_key = " \n""#);
        assert!(resolve(&flags(None), ApiServer::Publisher, &[HOME], &[blank]).is_err());
    }

    #[test]
    fn login_writes_to_the_strongest_file() {
        let first = |flag: Option<&str>, variables: &[(&str, &str)]| {
            let variable = |name: &str| {
                variables.iter().find(|(own, _)| *own == name).map(|(_, value)| (*value).to_owned())
            };
            let read = |_: &Path| Err(io::ErrorKind::NotFound.into());
            let env = Env { lookup: &variable, read_file: &read };
            strongest_file(flag.map(Path::new), &env).map(|path| path.display().to_string())
        };
        let named = [HOME, ("UNKEY_CONFIG", "/u.toml")];
        assert_eq!(first(Some("/f.toml"), &named).as_deref(), Some("/f.toml"));
        assert_eq!(first(None, &named).as_deref(), Some("/u.toml"));
        assert_eq!(first(None, &[HOME]).as_deref(), Some("/home/u/.evictd/config.toml"));
        assert_eq!(first(None, &[]), None);
    }

    #[test]
    fn broken_config_file_is_named_but_not_shown() {
        for text in ["root_key = unkey_hunter2", "\nroot_key = 'unkey_hunter2", "root_key = ['hunter2']"] {
            let files = [("/home/u/.evictd/config.toml", text)];
            let error = resolve(&flags(None), ApiServer::Publisher, &[HOME], &files).unwrap_err();
            let error = format!("{error:?} {error:#}");
            assert!(error.contains("/home/u/.evictd/config.toml") && !error.contains("hunter2"), "{error}");
        }
    }

    #[test]
    fn url_comes_from_the_strongest_place() {
        let file = ("/home/u/.evictd/config.toml", "api_url = 'http://file/'\nverify_url = 'https://vfile'");
        let all = [
            HOME,
            ("EVICTD_API_URL", "http://env1"),
            ("UNKEY_API_BASE_URL", "http://env2"),
            ("EVICTD_VERIFY_URL", "http://venv"),
        ];
        let url = |flag: Option<&str>, server, variables: &[_], files: &[_]| {
            let flags = ConnectionArgs { api_url: flag.map(str::to_owned), ..flags(Some("k")) };
            resolve(&flags, server, variables, files).unwrap().url
        };
        assert_eq!(url(Some("http://flag/"), ApiServer::Publisher, &all, &[file]), "http://flag");
        assert_eq!(url(None, ApiServer::Publisher, &all, &[file]), "http://env1");
        assert_eq!(url(None, ApiServer::Publisher, &[HOME, all[2]], &[file]), "http://env2");
        assert_eq!(url(None, ApiServer::Publisher, &[HOME], &[file]), "http://file");
        assert_eq!(url(None, ApiServer::Publisher, &[], &[]), "http://127.0.0.1:7070");
        assert_eq!(url(Some("http://flag/"), ApiServer::Agent, &all, &[file]), "http://flag");
        assert_eq!(url(None, ApiServer::Agent, &all, &[file]), "http://venv");
        assert_eq!(url(None, ApiServer::Agent, &all[..3], &[file]), "https://vfile");
        assert_eq!(url(None, ApiServer::Agent, &[], &[]), "http://127.0.0.1:7080");
    }

    #[test]
    fn publisher_verifies_if_no_verify_url_is_set() {
        let evictds = ("/home/u/.evictd/config.toml", "api_url = 'http://file'");
        let both = ("/home/u/.evictd/config.toml", "api_url = 'http://file'\nverify_url = 'http://vfile'");
        let unkeys = ("UNKEY_API_BASE_URL", "http://env2");
        let found = |variables: &[_], files: &[_]| {
            let settings = resolve(&flags(Some("k")), ApiServer::Agent, variables, files).unwrap();
            (settings.url, settings.server)
        };
        let publisher = |url: &str| (url.to_owned(), ApiServer::Publisher);
        assert_eq!(found(&[HOME, unkeys], &[]), publisher("http://env2"));
        assert_eq!(found(&[HOME, unkeys, ("EVICTD_API_URL", "http://env1")], &[]), publisher("http://env1"));
        assert_eq!(found(&[HOME], &[evictds]), publisher("http://file"));
        assert_eq!(found(&[HOME, unkeys], &[evictds]), publisher("http://env2"));
        // A verify URL is stronger, wherever it is set.
        assert_eq!(found(&[HOME, unkeys], &[both]), ("http://vfile".to_owned(), ApiServer::Agent));
    }

    #[test]
    fn malformed_url_is_refused() {
        for url in ["127.0.0.1:7070", "http://", "ftp://host", ""] {
            let flags = ConnectionArgs { api_url: Some(url.into()), ..flags(Some("k")) };
            assert!(resolve(&flags, ApiServer::Publisher, &[], &[]).is_err(), "{url}");
        }
    }

    #[test]
    fn unknown_key_is_refused_except_in_unkeys_file() {
        let says = "rootkey = 'hunter2'\nroot_key = 'k'\n[publisher]\nurl = 'http://h'";
        let resolved = |flag: Option<&str>, variables: &[_], path: &str| {
            let flags = ConnectionArgs { config: flag.map(PathBuf::from), ..flags(None) };
            resolve(&flags, ApiServer::Publisher, variables, &[(path, says)])
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
    fn environment_can_set_json_output() {
        let settings = |output: Option<OutputFormat>, variables: &[_]| {
            let flags = ConnectionArgs { output, ..flags(Some("k")) };
            resolve(&flags, ApiServer::Publisher, variables, &[])
        };
        let json = |output, variables: &[_]| settings(output, variables).unwrap().json;
        assert!(json(Some(OutputFormat::Json), &[]));
        assert!(!json(Some(OutputFormat::Text), &[("EVICTD_OUTPUT", "json")]));
        assert!(json(None, &[("EVICTD_OUTPUT", "json")]));
        assert!(json(None, &[("UNKEY_OUTPUT", "json")]));
        assert!(!json(None, &[]));
        // Unkey's own command line takes this as text.
        assert!(!json(None, &[("UNKEY_OUTPUT", "yaml")]));
        let error = settings(None, &[("EVICTD_OUTPUT", "yaml")]).unwrap_err().to_string();
        assert!(error.contains("EVICTD_OUTPUT must be `text` or `json`"), "{error}");
    }
}
