//! What of Unkey's flag syntax clap has to be taught, and what to say of wrong usage that clap can't explain.

use std::ffi::OsString;

use clap::error::{ContextKind, ContextValue, ErrorKind};

/// Flags that are complete without a value, so that the argument after them is never theirs.
pub(super) const SWITCHES: [&str; 13] = [
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

/// What Unkey's command line has and evictd's hasn't: flags with their dashes, and commands. With the reason.
const LEFT_OUT: [(&str, &str); 23] = [
    ("--roles", "it knows no roles; give keys their permissions directly, with --permissions"),
    ("--credits-json", "it counts no usage"),
    ("--ratelimits-json", "it limits no rates"),
    ("--refill-json", "it counts no usage"),
    ("--refill-interval", "it counts no usage"),
    ("--refill-amount", "it counts no usage"),
    ("--refill-day", "it counts no usage"),
    ("--recoverable", "it keeps hashes of keys, so none can be shown again"),
    ("--decrypt", "it keeps hashes of keys, so none can be shown again"),
    ("--migration-id", "it migrates no keys on demand"),
    ("add-permissions", "use update-key --permissions, which says all that the key may do"),
    ("remove-permissions", "use update-key --permissions, which says all that the key may do"),
    ("set-permissions", "use update-key --permissions, which says all that the key may do"),
    ("add-roles", "it knows no roles; give keys their permissions directly, with update-key --permissions"),
    (
        "remove-roles",
        "it knows no roles; give keys their permissions directly, with update-key --permissions",
    ),
    ("set-roles", "it knows no roles; give keys their permissions directly, with update-key --permissions"),
    ("update-credits", "it counts no usage"),
    ("migrate-keys", "it migrates no keys"),
    ("whoami", "verify-key tells what is known of a key"),
    ("analytics", "it records no verifications"),
    ("identities", "an identity is only the --external-id that keys have in common"),
    (
        "permissions",
        "it knows no roles, and permissions are each key's own words, which need no creating; give keys theirs with \
         keys update-key --permissions",
    ),
    ("ratelimit", "it limits no rates"),
];

/// What to say to whoever asks for this flag or command, if it is one of those.
fn left_out(name: &str) -> Option<String> {
    let (_, reason) = LEFT_OUT.iter().find(|(left_out, _)| *left_out == name)?;
    Some(format!("evictd leaves out {name}: {reason}."))
}

/// Refuses a switch for what is left out. Off it asks for nothing, and scripts spell defaults out.
pub(super) fn must_be_off(switch: &str, on: bool) -> anyhow::Result<()> {
    anyhow::ensure!(!on, left_out(switch).unwrap_or_else(|| format!("{switch} must be false")));
    Ok(())
}

/// Refuses a list of what is left out, unless it is empty.
pub(super) fn must_be_empty(flag: &str, json: Option<&str>) -> anyhow::Result<()> {
    let asks = json.is_some_and(|json| json.split_ascii_whitespace().collect::<String>() != "[]");
    anyhow::ensure!(!asks, left_out(flag).unwrap_or_else(|| format!("{flag} must be empty")));
    Ok(())
}

/// A better explanation than clap's of what is wrong with `args`, where there is one.
pub(super) fn explained(error: &clap::Error, args: &[OsString]) -> Option<String> {
    let kind = match error.kind() {
        ErrorKind::UnknownArgument => ContextKind::InvalidArg,
        ErrorKind::InvalidSubcommand => ContextKind::InvalidSubcommand,
        _ => return None,
    };
    let Some(ContextValue::String(wrong)) = error.get(kind) else { return None };
    if let Some(explanation) = left_out(wrong) {
        return Some(explanation);
    }
    // A value that stands apart from its switch, as in `--wait 5s`.
    let switch = args.windows(2).filter(|pair| pair[1] == wrong.as_str()).find_map(|pair| {
        let flag = pair[0].to_str().and_then(long_flag)?;
        SWITCHES.contains(&flag).then_some(flag)
    })?;
    Some(format!(
        "unexpected '{wrong}': if it is meant for --{switch}, write --{switch}={wrong}, with the equals sign."
    ))
}

/// Rewrites `-flag` as `--flag`, which Unkey's CLI takes for the same. Apply it to the arguments of
/// `evictd api`, before clap sees them.
///
/// Values stay as they are, and so does everything after `--`.
pub(crate) fn normalise(args: impl IntoIterator<Item = OsString>) -> Vec<OsString> {
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

/// Rewrites `help` as `--help` where it is the first argument of a command that has none below it, as in
/// `keys delete-key help`. Before such commands, clap knows the word itself.
pub(crate) fn asking_for_help(mut args: Vec<OsString>, mut tree: clap::Command) -> Vec<OsString> {
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
            Some(below) => command = below,
            None => break,
        }
    }
    args
}

/// The flag without its dashes, one or two.
fn long_flag(arg: &str) -> Option<&str> {
    let flag = arg.strip_prefix("--").or_else(|| arg.strip_prefix('-'))?;
    flag.starts_with(|first: char| first.is_ascii_alphabetic()).then_some(flag)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn normalised(line: &str) -> String {
        let args = normalise(line.split(' ').map(OsString::from));
        args.iter().map(|arg| arg.to_str().unwrap()).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn one_dash_is_as_good_as_two() {
        assert_eq!(
            normalised("keys delete-key -key-id=k -permanent"),
            "keys delete-key --key-id=k --permanent"
        );
        assert_eq!(normalised("-key-id k -permanent=false"), "--key-id k --permanent=false");
        assert_eq!(normalised("--key-id k -h"), "--key-id k -h");
    }

    #[test]
    fn values_are_left_alone() {
        assert_eq!(normalised("--name -x -key -y"), "--name -x --key -y");
        assert_eq!(normalised("-permanent -key-id k"), "--permanent --key-id k");
        assert_eq!(normalised("-expires -5"), "--expires -5");
        assert_eq!(normalised("-key-id - -strict"), "--key-id - --strict");
        assert_eq!(normalised("-5 - -- -name"), "-5 - -- -name");
    }

    #[test]
    fn arguments_that_arent_text_pass_through() {
        use std::os::unix::ffi::OsStringExt as _;
        let odd = OsString::from_vec(vec![b'-', 0xff]);
        assert_eq!(normalise([odd.clone()]), [odd]);
    }
}
