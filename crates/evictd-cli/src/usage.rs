//! Unkey's flag syntax where clap lacks it, and explanations of wrong usage where clap has none.

use std::ffi::OsString;

use clap::error::{ContextKind, ContextValue, ErrorKind};

/// Flags that need no value, so that the next argument is not their value.
pub(crate) const SWITCHES: [&str; 13] = [
    "permanent",
    "enabled",
    "wait",
    "strict",
    "clear-name",
    "clear-external-id",
    "clear-meta",
    "clear-expires",
    "revalidate-keys-cache",
    "recoverable",
    "decrypt",
    "help",
    "h",
];

/// Unkey's flags and commands that evictd leaves out, with the reason.
const LEFT_OUT: [(&[&str], &str); 11] = [
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

/// Explains what is wrong with `args`, if it can do so better than clap.
pub(crate) fn explain(error: &clap::Error, args: &[OsString]) -> Option<String> {
    let kind = match error.kind() {
        ErrorKind::UnknownArgument => ContextKind::InvalidArg,
        ErrorKind::InvalidSubcommand => ContextKind::InvalidSubcommand,
        _ => return None,
    };
    let Some(ContextValue::String(wrong)) = error.get(kind) else { return None };
    if let Some(explanation) = left_out(wrong) {
        return Some(explanation);
    }
    // A value without the equals sign, as in `--wait 5s`.
    let switch = args.windows(2).filter(|pair| pair[1] == wrong.as_str()).find_map(|pair| {
        let flag = pair[0].to_str().and_then(long_flag)?;
        SWITCHES.contains(&flag).then_some(flag)
    })?;
    Some(format!(
        "unexpected '{wrong}': if it is meant for --{switch}, write --{switch}={wrong}, with the equals sign."
    ))
}

/// Rewrites `-flag` as `--flag`, as Unkey's command line accepts both. Values stay as they are, and so does
/// everything after `--`. Apply it to the arguments of `evictd api` before clap parses them.
pub fn normalize(args: impl IntoIterator<Item = OsString>) -> Vec<OsString> {
    let mut rewritten = Vec::new();
    let mut args = args.into_iter();
    while let Some(arg) = args.next() {
        let Some(flag) = arg.to_str().and_then(long_flag) else {
            let ends_flags = arg == "--";
            rewritten.push(arg);
            if ends_flags {
                break;
            }
            continue;
        };
        let takes_next = !flag.contains('=') && !SWITCHES.contains(&flag);
        rewritten.push(if flag == "h" { "-h".into() } else { format!("--{flag}").into() });
        if takes_next {
            rewritten.extend(args.next());
        }
    }
    rewritten.extend(args);
    rewritten
}

/// Rewrites `help` as `--help` where it is the first argument of a command without subcommands, as in
/// `keys delete-key help`. For the other commands clap does it.
pub fn expand_help(mut args: Vec<OsString>, mut tree: clap::Command) -> Vec<OsString> {
    tree.build();
    let mut command = &tree;
    for arg in args.iter_mut().skip(1) {
        if !command.has_subcommands() {
            if arg == "help" && !command.is_hide_set() && command.get_name() != "help" {
                *arg = "--help".into();
            }
            break;
        }
        match arg.to_str().and_then(|name| command.find_subcommand(name)) {
            Some(subcommand) => command = subcommand,
            None => break,
        }
    }
    args
}

/// Returns the flag without its dashes, one or two.
fn long_flag(arg: &str) -> Option<&str> {
    let flag = arg.strip_prefix("--").or_else(|| arg.strip_prefix('-'))?;
    flag.starts_with(|first: char| first.is_ascii_alphabetic()).then_some(flag)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn normalized(line: &str) -> String {
        let args = normalize(line.split(' ').map(OsString::from));
        args.iter().map(|arg| arg.to_str().unwrap()).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn one_dash_equals_two() {
        assert_eq!(
            normalized("keys delete-key -key-id=k -permanent"),
            "keys delete-key --key-id=k --permanent"
        );
        assert_eq!(normalized("-key-id k -permanent=false"), "--key-id k --permanent=false");
        assert_eq!(normalized("--key-id k -h"), "--key-id k -h");
    }

    #[test]
    fn values_are_not_rewritten() {
        assert_eq!(normalized("--name -x -key -y"), "--name -x --key -y");
        assert_eq!(normalized("-permanent -key-id k"), "--permanent --key-id k");
        assert_eq!(normalized("-expires -5"), "--expires -5");
        assert_eq!(normalized("-key-id - -strict"), "--key-id - --strict");
        assert_eq!(normalized("-5 - -- -name"), "-5 - -- -name");
    }

    #[test]
    fn non_utf8_arguments_pass_through() {
        use std::os::unix::ffi::OsStringExt as _;
        let odd = OsString::from_vec(vec![b'-', 0xff]);
        assert_eq!(normalize([odd.clone()]), [odd]);
    }
}
