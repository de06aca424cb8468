//! Merges the layers, and collects all their problems.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use serde::de::{Deserialize as _, DeserializeOwned};
use toml::de::{DeTable, DeValue, ValueDeserializer};
use toml::{Spanned, Table, Value};

use super::redact::is_secret;
use super::reference::join;
use super::suggest::suggest;
use super::{ConfigError, Validate, env_name, listen, text};
use crate::connection_url::mask_urls;

/// The layers of a configuration. Precedence rises from defaults over files and environment to flags, in whatever order
/// they are added. Of two files or flags the later wins.
pub struct Layers {
    defaults: Table,
    /// Each key and each section by its dotted name; a section has no default.
    known: BTreeMap<String, Option<Value>>,
    given: Vec<Assignment>,
    problems: Vec<String>,
}

/// A configuration that was read and checked.
#[derive(Debug)]
pub struct Loaded<T> {
    pub config: T,
    /// The same as TOML: every key with its effective value. It holds secrets; print it with
    /// [`super::print_effective`].
    pub effective: Table,
}

/// A value that a layer assigned to a known key, and that has the key's type.
struct Assignment {
    key: String,
    value: Value,
    source: ValueSource,
}

/// What the default file says of a name.
enum Declaration {
    Section,
    /// With its default.
    Key(Value),
}

/// Where a value comes from.
#[derive(Clone)]
enum ValueSource {
    File { path: String, line: usize },
    Environment { variable: String },
    Flag { key: String },
}

impl fmt::Display for ValueSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File { path, line } => write!(f, "{path}:{line}"),
            Self::Environment { variable } => f.write_str(variable),
            Self::Flag { key } => write!(f, "--set {key}"),
        }
    }
}

impl ValueSource {
    /// The order of precedence.
    fn rank(&self) -> u8 {
        match self {
            Self::File { .. } => 0,
            Self::Environment { .. } => 1,
            Self::Flag { .. } => 2,
        }
    }
}

impl Layers {
    /// Starts with the defaults: a documented TOML file that names every key.
    pub fn new(defaults: &'static str) -> Self {
        let mut layers =
            Self { defaults: Table::new(), known: BTreeMap::new(), given: Vec::new(), problems: Vec::new() };
        match defaults.parse::<Table>() {
            Ok(table) => {
                declare(&mut layers.known, "", &table);
                layers.defaults = table;
            }
            Err(error) => layers.problems.push(format!("built-in defaults: {}", error.message())),
        }
        layers.check_variables();
        layers
    }

    /// Adds a configuration file. [`Self::load`] reports it if it can't be read.
    #[must_use]
    pub fn file(mut self, path: &Path) -> Self {
        let name = path.display().to_string();
        let content = match std::fs::read_to_string(path) {
            Ok(content) => content,
            Err(error) => {
                self.problems.push(format!("{name}: can't read the configuration file: {error}"));
                return self;
            }
        };
        let (table, errors) = DeTable::parse_recoverable(&content);
        if errors.is_empty() {
            self.take_table(&SourceFile { name, content: &content }, "", table.get_ref());
            return self;
        }
        for error in errors {
            // The error's own text would quote the line, which may hold a password.
            let line = error.span().map_or(1, |span| line_of(&content, span.start));
            self.problems.push(format!("{name}:{line}: {}", error.message()));
        }
        self
    }

    /// Adds the environment, through a lookup of the variable of each known key.
    #[must_use]
    pub fn env(mut self, variable: impl Fn(&str) -> Option<String>) -> Self {
        let keys: Vec<String> = self.keys().map(str::to_owned).collect();
        for key in keys {
            let name = env_name(&key);
            if let Some(value) = variable(&name) {
                self.take_text(&key, &value, ValueSource::Environment { variable: name });
            }
        }
        self
    }

    /// Adds a flag; `key` is dotted.
    #[must_use]
    pub fn set(mut self, key: &str, value: &str) -> Self {
        self.take_text(key, value, ValueSource::Flag { key: key.to_owned() });
        self
    }

    /// Returns the value of one key, even if others are wrong.
    pub fn value(&self, key: &str) -> Option<Value> {
        let given = self.given.iter().filter(|given| given.key == key);
        let default = || self.known.get(key).cloned().flatten();
        // Of equals, the last one counts.
        given.max_by_key(|given| given.source.rank()).map(|given| given.value.clone()).or_else(default)
    }

    /// Parses and checks the whole, and reports all problems of all layers together.
    pub fn load<T: DeserializeOwned + Validate>(self) -> Result<Loaded<T>, ConfigError> {
        let Self { defaults, mut given, mut problems, .. } = self;
        given.sort_by_key(|given| given.source.rank());
        let (effective, config) = match layered::<T>(&defaults, &given, &mut problems) {
            Ok(layered) => layered,
            Err(problem) => {
                problems.push(problem);
                return Err(ConfigError { problems });
            }
        };
        config.validate(&mut problems);
        listen::check(&effective, &mut problems);
        if problems.is_empty() { Ok(Loaded { config, effective }) } else { Err(ConfigError { problems }) }
    }

    /// The known keys, without the sections.
    fn keys(&self) -> impl Iterator<Item = &str> {
        self.known.iter().filter(|(_, default)| default.is_some()).map(|(key, _)| key.as_str())
    }

    /// What the default file says of a key. A section that is empty there is open: its keys are the user's own, have no
    /// environment variable, and take strings.
    fn default_of(&self, key: &str) -> Option<Declaration> {
        match self.known.get(key) {
            Some(Some(default)) => return Some(Declaration::Key(default.clone())),
            Some(None) => return Some(Declaration::Section),
            None => {}
        }
        let (section, _) = key.rsplit_once('.')?;
        let inside = format!("{section}.");
        let is_open = matches!(self.known.get(section), Some(None))
            && !self.known.keys().any(|known| known.starts_with(&inside));
        is_open.then(|| Declaration::Key(Value::String(String::new())))
    }

    /// `a.b_c` and `a_b.c` would share a variable.
    fn check_variables(&mut self) {
        let mut owners: BTreeMap<String, &str> = BTreeMap::new();
        let mut clashes = Vec::new();
        for key in self.keys() {
            if let Some(other) = owners.insert(env_name(key), key) {
                let variable = env_name(key);
                clashes.push(format!("built-in defaults: `{other}` and `{key}` would share {variable}"));
            }
        }
        self.problems.extend(clashes);
    }

    fn take_table(&mut self, file: &SourceFile<'_>, path: &str, table: &DeTable<'_>) {
        for (name, value) in table {
            let key = join(path, name.get_ref());
            let source =
                ValueSource::File { path: file.name.clone(), line: line_of(file.content, name.span().start) };
            match self.default_of(&key) {
                None => self.unknown(&key, &source),
                Some(Declaration::Section) => match value.get_ref() {
                    DeValue::Table(inner) => self.take_table(file, &key, inner),
                    _ => self.problems.push(format!(
                        "{source}: `{key}` is a section; write its keys below a line `[{key}]`"
                    )),
                },
                Some(Declaration::Key(default)) => {
                    match plain(value).and_then(|value| text::fit(value, &default)) {
                        Ok(value) => self.given.push(Assignment { key, value, source }),
                        Err(expected) => self.wrong_type(&key, &source, &expected),
                    }
                }
            }
        }
    }

    fn take_text(&mut self, key: &str, value: &str, source: ValueSource) {
        match self.default_of(key) {
            None => self.unknown(key, &source),
            Some(Declaration::Section) => {
                self.problems.push(format!("{source}: `{key}` is a section; set one of its keys instead"));
            }
            Some(Declaration::Key(default)) => match text::parse(value, &default) {
                Ok(value) => self.given.push(Assignment { key: key.to_owned(), value, source }),
                Err(expected) => self.wrong_type(key, &source, &expected),
            },
        }
    }

    fn unknown(&mut self, key: &str, source: &ValueSource) {
        let known = self.known.keys().map(String::as_str);
        let hint = match suggest(key, known) {
            Some(meant) => Cow::Owned(format!("did you mean `{meant}`?")),
            None => Cow::Borrowed("the default file names every key there is"),
        };
        self.problems.push(format!("{source}: unknown key `{key}`; {hint}"));
    }

    fn wrong_type(&mut self, key: &str, source: &ValueSource, expected: &str) {
        self.problems.push(format!("{source}: `{key}` must be {expected}"));
    }
}

/// A file that is being read.
struct SourceFile<'a> {
    name: String,
    content: &'a str,
}

fn line_of(content: &str, offset: usize) -> usize {
    1 + content.bytes().take(offset).filter(|byte| *byte == b'\n').count()
}

/// A parsed value without its position in the file.
fn plain(value: &Spanned<DeValue<'_>>) -> Result<Value, String> {
    Value::deserialize(ValueDeserializer::from(value.clone())).map_err(|error| error.message().to_owned())
}

/// Collects the keys and sections of the defaults.
fn declare(known: &mut BTreeMap<String, Option<Value>>, path: &str, table: &Table) {
    for (name, value) in table {
        let key = join(path, name);
        if let Value::Table(inner) = value {
            declare(known, &key, inner);
            known.insert(key, None);
        } else {
            known.insert(key, Some(value.clone()));
        }
    }
}

fn put(table: &mut Table, key: &str, value: Value) {
    match key.split_once('.') {
        Some((section, rest)) => {
            // Known keys lie in known sections, and an open section has no others in it.
            if let Some(Value::Table(inner)) = table.get_mut(section) {
                put(inner, rest, value);
            }
        }
        None => drop(table.insert(key.to_owned(), value)),
    }
}

/// The defaults with everything given on top, and its typed form.
///
/// serde stops at the first value that it can't parse, and doesn't know its source. So if the whole can't be parsed,
/// each given value is tried alone on top of the defaults. Those that fail are reported with their source, and the rest
/// is used. `Err` is a problem that leaves nothing to check.
fn layered<T: DeserializeOwned>(
    defaults: &Table,
    given: &[Assignment],
    problems: &mut Vec<String>,
) -> Result<(Table, T), String> {
    let mut effective = defaults.clone();
    for Assignment { key, value, .. } in given {
        put(&mut effective, key, value.clone());
    }
    if let Ok(config) = T::deserialize(effective.clone()) {
        return Ok((effective, config));
    }
    if let Err(error) = T::deserialize(defaults.clone()) {
        return Err(format!("built-in defaults: {}", error.message()));
    }
    effective = defaults.clone();
    for Assignment { key, value, source } in given {
        let mut alone = defaults.clone();
        put(&mut alone, key, value.clone());
        match T::deserialize(alone) {
            Ok(_) => put(&mut effective, key, value.clone()),
            Err(_) if is_secret(key) => problems.push(format!("{source}: `{key}` can't be read")),
            Err(error) if error.message() == listen::NO_ADDRESS => {
                problems.push(format!("{source}: `{key}` must be {}, not {value}", listen::FORM));
            }
            Err(error) => problems.push(format!("{source}: `{key}`: {}", mask_urls(error.message()))),
        }
    }
    match T::deserialize(effective.clone()) {
        Ok(config) => Ok((effective, config)),
        Err(error) => Err(format!("conflicting settings: {}", mask_urls(error.message()))),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::io::Write as _;
    use std::time::Duration;

    use serde::Deserialize;
    use tempfile::NamedTempFile;

    use super::super::{ByteSize, HumanDuration};
    use super::*;

    const DEFAULTS: &str = r#"
        # Where verifications are answered.
        listen = "127.0.0.1:7080"
        tags = []
        [lease]
        bound = "30s"
        margin = "3s"
        rate = 0.5
        [cache]
        entries_max = 1000
        bytes_max = "64MiB"
        enabled = true
        admin_password = ""
    "#;

    #[derive(Deserialize, Debug)]
    #[serde(deny_unknown_fields)]
    struct TestConfig {
        listen: String,
        tags: Vec<String>,
        lease: LeaseSection,
        cache: CacheSection,
    }

    #[derive(Deserialize, Debug)]
    #[serde(deny_unknown_fields)]
    struct LeaseSection {
        bound: HumanDuration,
        margin: HumanDuration,
        rate: f64,
    }

    #[derive(Deserialize, Debug)]
    #[serde(deny_unknown_fields)]
    struct CacheSection {
        entries_max: u32,
        bytes_max: ByteSize,
        enabled: bool,
        admin_password: Pin,
    }

    /// A secret with a format, so that an error could quote it.
    #[derive(Deserialize, Debug)]
    #[serde(try_from = "String")]
    struct Pin(String);

    impl TryFrom<String> for Pin {
        type Error = String;

        fn try_from(text: String) -> Result<Self, String> {
            if text.chars().all(|c| c.is_ascii_digit()) { Ok(Self(text)) } else { Err(format!("bad {text}")) }
        }
    }

    impl Validate for TestConfig {
        fn validate(&self, problems: &mut Vec<String>) {
            if *self.lease.margin >= *self.lease.bound {
                problems.push("`lease.margin` must be less than `lease.bound`".to_owned());
            }
        }
    }

    fn file(content: &str) -> NamedTempFile {
        let mut file = NamedTempFile::new().unwrap();
        file.write_all(content.as_bytes()).unwrap();
        file
    }

    fn load(layers: Layers) -> Loaded<TestConfig> {
        layers.load().unwrap()
    }

    fn problems(layers: Layers) -> Vec<String> {
        layers.load::<TestConfig>().unwrap_err().problems
    }

    #[test]
    fn default_file_alone_is_a_configuration() {
        let Loaded { config, effective } = load(Layers::new(DEFAULTS));
        assert_eq!(config.listen, "127.0.0.1:7080");
        assert_eq!(*config.lease.bound, Duration::from_secs(30));
        assert_eq!(*config.cache.bytes_max, 64 << 20);
        assert!(config.cache.enabled);
        assert_eq!(config.cache.admin_password.0, "");
        assert_eq!(effective, DEFAULTS.parse::<Table>().unwrap());
    }

    #[test]
    fn stronger_layer_wins_in_any_order_of_calls() {
        let file = file("listen = \"file\"\n[lease]\nbound = \"20s\"\nrate = 2\n[cache]\nentries_max = 5\n");
        let env = HashMap::from([("EVICTD_LISTEN", "env"), ("EVICTD_LEASE_BOUND", "10s")]);
        let variable = |name: &str| env.get(name).map(|value| (*value).to_owned());
        let layers = Layers::new(DEFAULTS).set("listen", "flag").env(variable).file(file.path());
        let Loaded { config, effective } = load(layers);
        assert_eq!(config.listen, "flag");
        assert_eq!(*config.lease.bound, Duration::from_secs(10));
        assert!((config.lease.rate - 2.0).abs() < f64::EPSILON);
        assert_eq!(config.cache.entries_max, 5);
        assert_eq!(effective["listen"].as_str(), Some("flag"));
        assert_eq!(effective["lease"]["margin"].as_str(), Some("3s"));
    }

    #[test]
    fn later_of_two_files_or_flags_wins() {
        let (one, two) = (file("tags = ['one']\nlisten = 'one'"), file("listen = 'two'"));
        let layers = Layers::new(DEFAULTS).file(one.path()).file(two.path());
        let config = load(layers.set("cache.enabled", "true").set("cache.enabled", "false")).config;
        assert_eq!((config.listen.as_str(), config.tags), ("two", vec!["one".to_owned()]));
        assert!(!config.cache.enabled);
    }

    #[test]
    fn text_values_are_parsed_by_the_type_of_the_default() {
        let layers =
            Layers::new(DEFAULTS).set("tags", "a, b").set("cache.entries_max", "7").set("lease.rate", "1");
        let config = load(layers).config;
        assert_eq!(config.tags, ["a", "b"]);
        assert_eq!(config.cache.entries_max, 7);
    }

    #[test]
    fn all_problems_are_reported_with_key_and_source() {
        let file = file(
            "listne = 'x'\ncache = 1\n[lease]\nbound = 30\nmargin = '3 seconds'\n[leese]\nbound = '1s'\n",
        );
        let path = file.path().display();
        let env = |name: &str| (name == "EVICTD_CACHE_ENTRIES_MAX").then(|| "-1".to_owned());
        let layers = Layers::new(DEFAULTS)
            .file(file.path())
            .env(env)
            .set("cache.enabled", "yes")
            .set("bound", "1s")
            .set("lease", "1s");
        assert_eq!(
            problems(layers),
            [
                format!("{path}:2: `cache` is a section; write its keys below a line `[cache]`"),
                format!("{path}:4: `lease.bound` must be a string, such as \"30s\", not an integer"),
                format!("{path}:6: unknown key `leese`; did you mean `lease`?"),
                format!("{path}:1: unknown key `listne`; did you mean `listen`?"),
                "--set cache.enabled: `cache.enabled` must be true or false".to_owned(),
                "--set bound: unknown key `bound`; did you mean `lease.bound`?".to_owned(),
                "--set lease: `lease` is a section; set one of its keys instead".to_owned(),
                format!(
                    "{path}:5: `lease.margin`: `3 seconds` isn't a duration; write a whole number and a unit, \
                     such as 250ms, 30s, 5m or 1h"
                ),
                "EVICTD_CACHE_ENTRIES_MAX: `cache.entries_max`: invalid value: integer `-1`, expected u32"
                    .to_owned(),
            ]
        );
    }

    #[test]
    fn semantic_problems_join_the_list() {
        let layers = Layers::new(DEFAULTS).set("lease.margin", "40s").set("cache.enabled", "yes");
        assert_eq!(
            problems(layers),
            [
                "--set cache.enabled: `cache.enabled` must be true or false",
                "`lease.margin` must be less than `lease.bound`"
            ]
        );
    }

    #[test]
    fn error_shows_one_problem_per_line() {
        let error = Layers::new(DEFAULTS).set("a", "1").set("b", "2").load::<TestConfig>().unwrap_err();
        assert_eq!(error.to_string().lines().count(), 2);
    }

    #[test]
    fn unreadable_file_is_named() {
        let problems = problems(Layers::new(DEFAULTS).file(Path::new("/no/such/agent.toml")));
        assert!(problems[0].starts_with("/no/such/agent.toml: can't read the configuration file: "));
        assert_eq!(problems.len(), 1);
    }

    #[test]
    fn syntax_error_names_its_line_and_quotes_nothing() {
        let file = file("listen = 'x'\n[cache]\nadmin_password = 'hunter2\n");
        let problems = problems(Layers::new(DEFAULTS).file(file.path()));
        assert!(problems[0].starts_with(&format!("{}:3: ", file.path().display())), "{problems:?}");
        assert!(!problems.concat().contains("hunter2"), "{problems:?}");
    }

    #[test]
    fn unparsable_secret_is_not_quoted() {
        let layers = Layers::new(DEFAULTS).set("cache.admin_password", "hunter-two");
        assert_eq!(problems(layers), ["--set cache.admin_password: `cache.admin_password` can't be read"]);
    }

    #[test]
    fn keys_that_share_a_variable_are_found() {
        let problems = problems(Layers::new("[a]\nb_c = 1\n[a_b]\nc = 1\n"));
        assert_eq!(problems[0], "built-in defaults: `a.b_c` and `a_b.c` would share EVICTD_A_B_C");
    }

    #[test]
    fn empty_section_is_open_to_the_users_own_keys() {
        #[derive(Deserialize, Debug)]
        struct OpenConfig {
            apis: BTreeMap<String, String>,
            closed: BTreeMap<String, String>,
        }
        impl Validate for OpenConfig {
            fn validate(&self, _: &mut Vec<String>) {}
        }
        const DEFAULTS: &str = "[apis]\n[closed]\nkey = 'x'\n";
        let good = file("[apis]\napi_1 = 'stale'\n");
        let layers = Layers::new(DEFAULTS).file(good.path()).set("apis.api_2", "deny");
        let Loaded { config, effective } = layers.load::<OpenConfig>().unwrap();
        assert_eq!((config.apis["api_1"].as_str(), config.apis["api_2"].as_str()), ("stale", "deny"));
        assert_eq!(config.closed.len(), 1);
        assert_eq!(effective["apis"]["api_1"].as_str(), Some("stale"));

        let bad = file("[apis]\napi_1 = 1\n'a.b' = 'stale'\n[closed]\nother = 'x'\n");
        let problems = Layers::new(DEFAULTS).file(bad.path()).load::<OpenConfig>().unwrap_err().problems;
        let keys: Vec<_> = problems.iter().filter_map(|problem| problem.split('`').nth(1)).collect();
        assert_eq!(keys, ["apis.a.b", "apis.api_1", "closed.other"]);
    }

    #[test]
    fn defaults_that_dont_fit_the_program_are_found() {
        let incomplete = Layers::new("listen = 'x'").set("listen", "y");
        assert_eq!(problems(incomplete), ["built-in defaults: missing field `tags`"]);
        assert!(problems(Layers::new("listen = "))[0].starts_with("built-in defaults: "));
    }
}
