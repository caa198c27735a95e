//! Passwords of people: Argon2id (RFC 9106), in the form of the PHC string format. Takes tens of milliseconds and 19 MiB,
//! so it runs on a thread of the database, which may block.

use std::time::Duration;

use argon2::password_hash::SaltString;
use argon2::{Argon2, PasswordHash, PasswordHasher, PasswordVerifier};
use moka::sync::Cache;
use secrecy::{ExposeSecret, SecretString};
use tokio::sync::Semaphore;

use super::{TokensError, invalid};
use crate::db::DbError;
use crate::ids::{TenantId, UserId, generate_token};

/// Wrong passwords of one user within [`TRIES_FOR`], on each daemon.
const TRIES: u32 = 10;
const TRIES_FOR: Duration = Duration::from_secs(300);

/// How often each user's password was wrong lately, and how many are looked at at the same time: each takes a thread of
/// the database for tens of milliseconds.
pub(super) struct Tries {
    wrong: Cache<(TenantId, UserId), u32>,
    pub(super) at_once: Semaphore,
}

impl Tries {
    pub(super) fn new() -> Self {
        let wrong = Cache::builder().max_capacity(100_000).time_to_live(TRIES_FOR).build();
        Self { wrong, at_once: Semaphore::new(1) }
    }

    /// # Errors
    /// [`TokensError::TooManyTries`].
    pub(super) fn allow(&self, tenant: &TenantId, user: &UserId) -> Result<(), TokensError> {
        let wrong = self.wrong.get(&(tenant.clone(), user.clone())).unwrap_or(0);
        if wrong < TRIES { Ok(()) } else { Err(TokensError::TooManyTries) }
    }

    pub(super) fn count(&self, tenant: &TenantId, user: &UserId) {
        let key = (tenant.clone(), user.clone());
        let wrong = self.wrong.get(&key).unwrap_or(0);
        self.wrong.insert(key, wrong.saturating_add(1));
    }
}

/// In bytes; a longer one only costs time.
const LONGEST: usize = 256;

/// The hash of a new password.
///
/// # Errors
/// [`TokensError::Invalid`] if it is empty or too long.
pub(super) fn hash(password: &SecretString) -> Result<String, TokensError> {
    let text = password.expose_secret();
    if text.is_empty() || text.len() > LONGEST {
        return Err(invalid("password", format!("must have 1 to {LONGEST} bytes")));
    }
    // Without randomness nothing can be made now, as without storage.
    let random = generate_token("").map_err(|_| DbError::Unavailable(None))?;
    let salt = SaltString::encode_b64(&random.expose_secret().as_bytes()[..24]);
    let salt = salt.map_err(|_| DbError::Unavailable(None))?;
    let hash = Argon2::default().hash_password(text.as_bytes(), &salt);
    Ok(hash.map_err(|_| DbError::Unavailable(None))?.to_string())
}

/// Whether that is the password. Without a hash it takes as long as with one.
pub(super) fn is_right(password: &SecretString, stored: Option<&str>) -> bool {
    const NOBODYS: &str = "$argon2id$v=19$m=19456,t=2,p=1$c29tZXRoaW5nIHRoYXQgaXM$\
        Tm9ib2R5IGhhcyBhIHBhc3N3b3JkIG9mIHRoYXQgaGE";
    let text = password.expose_secret();
    if text.len() > LONGEST {
        return false;
    }
    let Ok(hash) = PasswordHash::new(stored.unwrap_or(NOBODYS)) else { return false };
    Argon2::default().verify_password(text.as_bytes(), &hash).is_ok() && stored.is_some()
}

/// Whether [`is_right`] can tell by that hash, and in reasonable time: of Argon2, whichever, and made with 1 GiB at most.
pub(super) fn is_usable(hash: &str) -> bool {
    let Ok(hash) = PasswordHash::new(hash) else { return false };
    let Ok(params) = argon2::Params::try_from(&hash) else { return false };
    argon2::Algorithm::try_from(hash.algorithm).is_ok()
        && (hash.salt.is_some() && hash.hash.is_some())
        && (params.m_cost() <= 1 << 20 && params.t_cost() <= 1 << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_password_proves_itself_and_nothing_else() {
        let secret = |text: &str| SecretString::from(text.to_owned());
        let hash = hash(&secret("correct horse")).unwrap();

        assert!(hash.starts_with("$argon2id$v=19$"), "{hash}");
        assert!(is_right(&secret("correct horse"), Some(&hash)));
        assert!(!is_right(&secret("correct hors"), Some(&hash)));
        assert!(!is_right(&secret("correct horse"), None));
        assert!(!is_right(&secret("correct horse"), Some("no hash")));
        assert!(super::hash(&secret("")).is_err());
        assert!(super::hash(&secret(&"x".repeat(257))).is_err());
    }
    #[test]
    fn hashes_from_elsewhere_are_used_if_they_are_of_argon2() {
        let secret = |text: &str| SecretString::from(text.to_owned());
        let salt = SaltString::encode_b64(b"salt of sixteen!").unwrap();
        for algorithm in [argon2::Algorithm::Argon2i, argon2::Algorithm::Argon2id] {
            let params = argon2::Params::new(4096, 10, 1, None).unwrap();
            let maker = Argon2::new(algorithm, argon2::Version::V0x13, params);
            let hash = maker.hash_password(b"pass", &salt).unwrap().to_string();
            assert!(is_usable(&hash), "{hash}");
            assert!(is_right(&secret("pass"), Some(&hash)));
            assert!(!is_right(&secret("word"), Some(&hash)));
        }
        for bad in [
            "",
            "$2a$10$N9qo8uLOickgx2ZMRZoMyeIjZAgcfl7p92ldGxad68LJZdL17lhWy",
            "5f4dcc3b5aa765d61d8327deb882cf99",
            "$argon2id$v=19$m=19456,t=2,p=1$c29tZXRoaW5n",
            "$argon2id$v=19$m=4194304,t=2,p=1$c29tZXRoaW5nIHRoYXQgaXM$Tm9ib2R5IGhhcyBhIHBhc3N3b3JkIG9mIHRoYXQgaGE",
        ] {
            assert!(!is_usable(bad), "{bad}");
        }
    }
}
