//! How a client logs in to NATS. A file is read at each connect, so that what it holds can be rotated: a server that
//! refuses a login gets the file's newest content at the next attempt.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_nats::{Auth, AuthError, ConnectOptions};
use evictd_wire::api::secret::Secret;
use nkeys::KeyPair;

use super::{BusConfig, BusError};

/// Returns the login that a file's content and the server's nonce make.
type Parse = Box<dyn Fn(&str, &[u8]) -> io::Result<Auth> + Send + Sync>;

/// A file with a secret, and what its content means.
struct SecretFile {
    key: &'static str,
    path: PathBuf,
    parse: Parse,
}

/// Returns the client's options for the configured login. Fails if a file can't be used now: the client would only
/// retry.
pub(super) async fn options(config: &BusConfig) -> Result<ConnectOptions, BusError> {
    let Some(file) = SecretFile::of(config) else {
        return Ok(match config.user.as_str() {
            "" => ConnectOptions::new(),
            user => {
                ConnectOptions::with_user_and_password(user.to_owned(), config.password.expose().to_owned())
            }
        });
    };
    let file = Arc::new(file);
    let first = Arc::clone(&file).log_in(Vec::new()).await;
    first.map_err(|source| BusError::File { key: file.key, path: file.path.clone(), source })?;
    Ok(ConnectOptions::with_auth_callback(move |nonce| {
        let file = Arc::clone(&file);
        async move {
            let (key, path) = (file.key, file.path.clone());
            file.log_in(nonce)
                .await
                .map_err(|error| AuthError::new(format!("can't read `{key}` {}: {error}", path.display())))
        }
    }))
}

impl SecretFile {
    fn of(config: &BusConfig) -> Option<Self> {
        let file =
            |key, path: &str, parse: Parse| Some(Self { key, path: Path::new(path).to_owned(), parse });
        if !config.credentials_file.is_empty() {
            return file("nats.credentials_file", &config.credentials_file, Box::new(with_jwt));
        }
        if !config.nkey_seed_file.is_empty() {
            return file("nats.nkey_seed_file", &config.nkey_seed_file, Box::new(with_nkey));
        }
        if !config.password_file.is_empty() {
            let user = config.user.clone();
            let parse = move |content: &str, _: &[u8]| Ok(with_password(&user, content));
            return file("nats.password_file", &config.password_file, Box::new(parse));
        }
        None
    }

    async fn log_in(self: Arc<Self>, nonce: Vec<u8>) -> io::Result<Auth> {
        let read = tokio::task::spawn_blocking(move || {
            let content = Secret::new(std::fs::read_to_string(&self.path)?);
            (self.parse)(content.expose(), &nonce)
        });
        read.await.map_err(io::Error::other).flatten()
    }
}

fn with_password(user: &str, content: &str) -> Auth {
    let mut auth = Auth::new();
    auth.username = Some(user.to_owned());
    // Editors and `echo` end files with a line break that no password has.
    auth.password = Some(content.trim_end_matches(['\r', '\n']).to_owned());
    auth
}

/// The content is a credentials file, as `nsc` writes it: the user's JWT and nkey seed, each between two lines of dashes.
fn with_jwt(content: &str, nonce: &[u8]) -> io::Result<Auth> {
    let mut auth = signed(decorated(content, "USER NKEY SEED")?, nonce)?.0;
    auth.jwt = Some(decorated(content, "NATS USER JWT")?.to_owned());
    Ok(auth)
}

/// The content is an nkey seed (`SU...`), alone in its file or between two lines of dashes.
fn with_nkey(content: &str, nonce: &[u8]) -> io::Result<Auth> {
    let seed = decorated(content, "USER NKEY SEED").unwrap_or(content);
    let (mut auth, public_key) = signed(seed.trim(), nonce)?;
    auth.nkey = Some(public_key);
    Ok(auth)
}

/// Returns a login with the seed's signature, and its public key.
fn signed(seed: &str, nonce: &[u8]) -> io::Result<(Auth, String)> {
    // The library's errors could repeat a part of the seed.
    let wrong = |_| invalid("the nkey seed is not valid; it begins with SU");
    let pair = KeyPair::from_seed(seed).map_err(wrong)?;
    let mut auth = Auth::new();
    auth.signature = Some(pair.sign(nonce).map_err(wrong)?);
    Ok((auth, pair.public_key()))
}

/// Returns the line after `-----BEGIN <title>-----`.
fn decorated<'c>(content: &'c str, title: &str) -> io::Result<&'c str> {
    let mut lines = content.lines().map(str::trim);
    let begin = format!("BEGIN {title}");
    lines
        .find(|line| line.starts_with("---") && line.contains(&begin))
        .and_then(|_| lines.find(|line| !line.is_empty()))
        .ok_or_else(|| invalid(&format!("it has no `-----BEGIN {title}-----` and no line after it")))
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn credentials(seed: &str) -> String {
        format!(
            "-----BEGIN NATS USER JWT-----\neyJ0.eyJq.sig\n------END NATS USER JWT------\n\n\
             ************************* IMPORTANT *************************\n\n\
             -----BEGIN USER NKEY SEED-----\n{seed}\n------END USER NKEY SEED------\n"
        )
    }

    #[test]
    fn credentials_sign_the_nonce() {
        let pair = KeyPair::new_user();
        let auth = with_jwt(&credentials(&pair.seed().unwrap()), b"nonce").unwrap();
        assert_eq!(auth.jwt.as_deref(), Some("eyJ0.eyJq.sig"));
        pair.verify(b"nonce", &auth.signature.unwrap()).unwrap();
        assert_eq!(auth.nkey, None, "the server takes the key from the JWT");
    }

    #[test]
    fn nkey_seed_signs_the_nonce() {
        let pair = KeyPair::new_user();
        let seed = pair.seed().unwrap();
        for content in [format!("{seed}\n"), credentials(&seed)] {
            let auth = with_nkey(&content, b"nonce").unwrap();
            assert_eq!(auth.nkey, Some(pair.public_key()));
            pair.verify(b"nonce", &auth.signature.unwrap()).unwrap();
        }
    }

    #[test]
    fn malformed_files_are_refused_without_being_shown() {
        let seed = KeyPair::new_user().seed().unwrap();
        let cut = &seed[..seed.len() - 3];
        for error in [
            with_jwt(&seed, b"").map(drop).unwrap_err(),
            with_jwt(&credentials(cut), b"").map(drop).unwrap_err(),
            with_nkey(cut, b"").map(drop).unwrap_err(),
            with_nkey("", b"").map(drop).unwrap_err(),
        ] {
            assert!(!error.to_string().contains(&cut[2..12]), "{error}");
        }
    }
}
