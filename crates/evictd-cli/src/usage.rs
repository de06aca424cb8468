//! Unkey's flag syntax where clap lacks it, and explanations of wrong usage where clap has none.

use std::ffi::OsString;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Arg, ArgAction, Command};
use strsim::levenshtein;

/// The end of `evictd --help`.
pub const EXIT_CODES: &str = "\
Exit codes:
  0    success; also of --help
  1    failure, wrong usage included
  3    the change is committed, but --wait ended before each region had confirmed it or its bound had elapsed
  4    verify-key --exit-code: the key is not valid
  130  ended by a second Ctrl-C (143: by a second SIGTERM)";

/// The exit code of `verify-key --exit-code` for a key that isn't valid.
pub(crate) const NOT_VALID: u8 = 4;

/// The commands that Unkey's command line has, too.
const UNKEYS: [&str; 2] = ["api", "auth"];

/// Unkey's flags and commands that evictd leaves out, with the reason.
const LEFT_OUT: [(&[&str], &str); 12] = [
    (&["--roles"], "it has no roles; give keys their permissions directly, with --permissions"),
    (
        &["add-roles", "remove-roles", "set-roles"],
        "it has no roles; give keys their permissions directly, with update-key --permissions",
    ),
    (
        &["add-permissions", "remove-permissions", "set-permissions"],
        "use update-key --permissions, which replaces all permissions of the key",
    ),
    (
        &["permissions"],
        "it has no roles, and permissions need no creating; set those of a key with keys update-key --permissions",
    ),
    (
        &[
            "--credits-json",
            "--refill-json",
            "--refill-interval",
            "--refill-amount",
            "--refill-day",
            "update-credits",
        ],
        "it counts no usage",
    ),
    (&["--ratelimits-json", "ratelimit"], "it has no rate limits for keys"),
    (&["--recoverable", "--decrypt"], "it stores only hashes of keys, so that no key can be shown again"),
    (&["--migration-id", "migrate-keys"], "it migrates no keys"),
    (&["whoami"], "verify-key shows what is stored about a key"),
    (&["analytics"], "it records no verifications"),
    (&["identities"], "an identity is only the --external-id that keys have in common"),
    (
        &["deploy", "healthcheck"],
        "they run Unkey; evictd is ready when /readyz on its admin port answers 200",
    ),
];

/// Explains why this flag or command is left out, if it is.
fn left_out(name: &str) -> Option<String> {
    let (_, reason) = LEFT_OUT.iter().find(|(names, _)| names.contains(&name))?;
    Some(format!("evictd leaves out {name}: {reason}."))
}

/// Refuses a switch for a feature that is left out. Off is accepted, because scripts spell defaults out.
pub(crate) fn must_be_off(switch: &str, value: Option<bool>) -> anyhow::Result<()> {
    anyhow::ensure!(
        value != Some(true),
        left_out(switch).unwrap_or_else(|| format!("{switch} must be false"))
    );
    Ok(())
}

/// Refuses a list for a feature that is left out, unless it is empty.
pub(crate) fn must_be_empty(flag: &str, json: Option<&str>) -> anyhow::Result<()> {
    let is_empty = json.is_none_or(|json| json.split_ascii_whitespace().collect::<String>() == "[]");
    anyhow::ensure!(is_empty, left_out(flag).unwrap_or_else(|| format!("{flag} must be empty")));
    Ok(())
}

/// Explains what is wrong with the normalized `args` of `tree`, if it can do so better than clap.
pub(crate) fn explain(error: &clap::Error, args: &[OsString], tree: &Command) -> Option<String> {
    let kind = match error.kind() {
        ErrorKind::UnknownArgument => ContextKind::InvalidArg,
        ErrorKind::InvalidSubcommand => ContextKind::InvalidSubcommand,
        _ => return None,
    };
    let Some(ContextValue::String(wrong)) = error.get(kind) else { return None };
    if let Some(explanation) = left_out(wrong) {
        return Some(explanation);
    }
    if kind == ContextKind::InvalidSubcommand {
        let suggested = match error.get(ContextKind::SuggestedSubcommand) {
            Some(ContextValue::Strings(names)) => names.as_slice(),
            _ => &[],
        };
        let paths = similar_commands(wrong, suggested, tree)?;
        return Some(format!("unrecognized command '{wrong}'; did you mean {}?", paths.join(" or ")));
    }
    // A value without the equals sign, as in `--wait 5s`: only switches are left without one.
    let switch = args.windows(2).filter(|pair| pair[1] == wrong.as_str()).find_map(|pair| {
        let flag = pair[0].to_str().and_then(long_flag)?;
        (!flag.contains('=')).then_some(flag)
    })?;
    Some(format!(
        "unexpected '{wrong}': if it is meant for --{switch}, write --{switch}={wrong}, with the equals sign."
    ))
}

/// Returns the commands of the whole tree whose names are the closest to `wrong`. `None` if none is close, or none is
/// closer than what clap suggests, which looks for it in one place only.
fn similar_commands(wrong: &str, suggested: &[String], tree: &Command) -> Option<Vec<String>> {
    fn collect(command: &Command, above: &str, found: &mut Vec<(String, String)>) {
        for command in command.get_subcommands().filter(|command| !command.is_hide_set()) {
            let path = format!("{above} {}", command.get_name());
            collect(command, &path, found);
            found.push((command.get_name().to_owned(), path));
        }
    }
    let mut commands = Vec::new();
    collect(tree, tree.get_name(), &mut commands);
    let distance = |name: &str| levenshtein(wrong, name);
    let closest = commands.iter().map(|(name, _)| distance(name)).min()?;
    let is_close = closest <= (wrong.chars().count() / 4).min(3);
    if !is_close || suggested.iter().any(|name| distance(name) <= closest) {
        return None;
    }
    let paths = commands.iter().filter(|(name, _)| distance(name) == closest);
    Some(paths.map(|(_, path)| format!("`{path}`")).collect())
}

/// Rewrites the arguments of `tree`, the first of which is the program, where Unkey's command line accepts more than clap.
///
/// `help` as the first argument of a command without subcommands becomes `--help`. In [`UNKEYS`] commands, `-flag`
/// becomes `--flag`, and a value joins its flag, even if it begins with a dash. A flag with an empty value counts as not
/// given: a script with an empty variable must not clear or choose anything. Everything after `--` stays as it is.
pub fn normalize(args: impl IntoIterator<Item = OsString>, mut tree: Command) -> Vec<OsString> {
    tree.build();
    let mut command = &tree;
    let (mut is_unkeys, mut is_first) = (false, false);
    let mut args = args.into_iter();
    let mut rewritten: Vec<OsString> = args.next().into_iter().collect();
    while let Some(arg) = args.next() {
        if arg == "--" {
            rewritten.push(arg);
            break;
        }
        let Some(flag) = arg.to_str().and_then(long_flag).filter(|_| is_unkeys) else {
            let is_help = arg == "help" && is_first && !command.has_subcommands();
            is_first = false;
            if let Some(subcommand) = arg.to_str().and_then(|name| command.find_subcommand(name)) {
                is_unkeys |= rewritten.len() == 1 && UNKEYS.contains(&subcommand.get_name());
                is_first = !subcommand.is_hide_set() && subcommand.get_name() != "help";
                command = subcommand;
            }
            rewritten.push(if is_help { "--help".into() } else { arg });
            continue;
        };
        is_first = false;
        if flag == "h" {
            rewritten.push("-h".into());
            continue;
        }
        let (name, value) = flag.split_once('=').map_or((flag, None), |(name, value)| (name, Some(value)));
        let long = format!("--{name}");
        let known = command.get_arguments().find(|arg| arg.get_long() == Some(name));
        let value = match value {
            Some(value) => Some(value.into()),
            None if known.is_some_and(is_switch) => None,
            None => args.next(),
        };
        match value {
            Some(value) if value.is_empty() && (known.is_some() || left_out(&long).is_some()) => {
                // The last value of a flag counts, except for a list, which has them all.
                if !known.is_some_and(|known| matches!(known.get_action(), ArgAction::Append)) {
                    let start = format!("{long}=");
                    rewritten
                        .retain(|arg| *arg != *long && !arg.as_encoded_bytes().starts_with(start.as_bytes()));
                }
            }
            Some(value) => {
                let mut joined = OsString::from(long);
                joined.push("=");
                joined.push(value);
                rewritten.push(joined);
            }
            None => rewritten.push(long.into()),
        }
    }
    rewritten.extend(args);
    rewritten
}

/// Whether the flag needs no value, so that the next argument isn't its value.
fn is_switch(flag: &Arg) -> bool {
    flag.is_require_equals_set() || !flag.get_action().takes_values()
}

/// Parses the value of a switch as Go's `strconv.ParseBool` does, which Unkey's command line uses.
pub(crate) fn switch(text: &str) -> Result<bool, &'static str> {
    match text {
        "1" | "t" | "T" | "TRUE" | "true" | "True" => Ok(true),
        "0" | "f" | "F" | "FALSE" | "false" | "False" => Ok(false),
        _ => Err("write true or false"),
    }
}

/// Returns the flag without its dashes, one or two.
fn long_flag(arg: &str) -> Option<&str> {
    let flag = arg.strip_prefix("--").or_else(|| arg.strip_prefix('-'))?;
    flag.starts_with(|first: char| first.is_ascii_alphabetic()).then_some(flag)
}

#[cfg(test)]
mod tests {
    use clap::{Parser, Subcommand};

    use super::*;
    use crate::ApiArgs;

    #[derive(Parser)]
    #[command(name = "evictd")]
    struct TestCli {
        #[command(subcommand)]
        command: TestCommand,
    }

    #[derive(Subcommand)]
    enum TestCommand {
        Api(Box<ApiArgs>),
        DeleteProtection { name: String },
    }

    fn tree() -> Command {
        use clap::CommandFactory as _;
        TestCli::command()
    }

    fn normalized(line: &str) -> String {
        let args = normalize(line.split(' ').map(OsString::from), tree());
        args.iter().map(|arg| arg.to_str().unwrap()).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn one_dash_equals_two() {
        assert_eq!(
            normalized("evictd api keys delete-key -key-id=k -permanent"),
            "evictd api keys delete-key --key-id=k --permanent"
        );
        assert_eq!(
            normalized("evictd api -output json keys delete-key -key-id k -permanent=false -h"),
            "evictd api --output=json keys delete-key --key-id=k --permanent=false -h"
        );
    }

    #[test]
    fn values_are_not_rewritten() {
        let update = "evictd api keys update-key";
        assert_eq!(
            normalized(&format!("{update} --name -x -unknown -y")),
            format!("{update} --name=-x --unknown=-y")
        );
        assert_eq!(normalized(&format!("{update} -expires -5")), format!("{update} --expires=-5"));
        let delete = "evictd api keys delete-key";
        assert_eq!(
            normalized(&format!("{delete} -permanent -key-id -")),
            format!("{delete} --permanent --key-id=-")
        );
        assert_eq!(normalized(&format!("{delete} -5 - -- -name")), format!("{delete} -5 - -- -name"));
        // Other commands keep to clap's syntax.
        assert_eq!(normalized("evictd delete-protection -name ="), "evictd delete-protection -name =");
    }

    #[test]
    fn an_empty_value_counts_as_not_given() {
        let update = "evictd api keys update-key --key-id=k";
        for empty in [
            "--name=",
            "--permissions=",
            "--expires=",
            "--enabled=",
            "--wait=",
            "--clear-name=",
            "--meta-json=",
            "--ratelimits-json=",
            "--roles=",
            "--credits-json=",
            "--api-url=",
            "--output=",
            "--config=",
            "-name=",
        ] {
            assert_eq!(
                normalized(&format!("{update} {empty} --external-id=u")),
                format!("{update} --external-id=u")
            );
        }
        let separate =
            ["evictd", "api", "keys", "update-key", "--name", "", "--permissions", "", "--key-id", "k"];
        let args = normalize(separate.map(OsString::from), tree());
        assert_eq!(args, ["evictd", "api", "keys", "update-key", "--key-id=k"]);
        // The last value counts; a list has all of them.
        assert_eq!(normalized(&format!("{update} --name=a --name=")), update);
        assert_eq!(normalized(&format!("{update} --name= --name=a")), format!("{update} --name=a"));
        let listed = format!("{update} --permissions=a --permissions=");
        assert_eq!(normalized(&listed), format!("{update} --permissions=a"));
        // A slip stays visible.
        assert_eq!(normalized(&format!("{update} --nmae=")), format!("{update} --nmae="));
    }

    #[test]
    fn non_utf8_arguments_pass_through() {
        use std::os::unix::ffi::OsStringExt as _;
        let odd = OsString::from_vec(vec![b'-', 0xff]);
        let args = ["evictd".into(), "api".into(), odd];
        assert_eq!(normalize(args.clone(), tree()), args);
    }

    #[test]
    fn a_switch_is_parsed_as_go_does() {
        for (text, value) in
            [("1", true), ("t", true), ("TRUE", true), ("0", false), ("F", false), ("False", false)]
        {
            assert_eq!(switch(text), Ok(value), "{text}");
        }
        for other in ["yes", "tRUE", "on", "2", " 1", ""] {
            assert!(switch(other).is_err(), "{other}");
        }
    }

    #[test]
    fn a_command_in_another_place_is_suggested() {
        let explained = |line: &str| {
            let args = normalize(line.split(' ').map(OsString::from), tree());
            let error = TestCli::try_parse_from(&args).err().unwrap();
            explain(&error, &args, &tree())
        };
        for (line, path) in [
            ("evictd delete-key --key-id=k", "`evictd api keys delete-key`"),
            ("evictd delete-keys", "`evictd api keys delete-key`"),
            ("evictd keys delete-key", "`evictd api keys`"),
            ("evictd apis", "`evictd api apis`"),
            ("evictd api delete-key", "`evictd api keys delete-key`"),
            ("evictd api keys list-keys", "`evictd api apis list-keys`"),
        ] {
            let text = explained(line).unwrap_or_else(|| panic!("{line}"));
            assert!(text.contains(&format!("did you mean {path}?")), "{text}");
        }
        // Here clap's own suggestion is as good, or nothing is close.
        for line in ["evictd delete-protecton", "evictd api keys delete-kye", "evictd something-else"] {
            assert_eq!(explained(line), None, "{line}");
        }
        assert!(explained("evictd deploy").unwrap().starts_with("evictd leaves out deploy: "));
    }

    #[test]
    fn the_table_has_every_exit_code() {
        for code in [0, 1, crate::wait::UNPROVEN, NOT_VALID, 130] {
            let row = format!("\n  {code}  ");
            assert_eq!(EXIT_CODES.matches(&row).count(), 1, "{code}");
        }
    }
}
