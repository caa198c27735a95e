//! What may be stored: the rules for names, labels, values and contexts, without I/O.

use std::collections::BTreeMap;

use crate::clock::Timestamp;

use super::VaultError;
use super::model::{Encoding, ExternalContext, IdempotencyKey, NewSecret, PlainValue, SecretKind};

/// Longest name of a secret and longest idempotency key.
const NAME_LEN: usize = 128;
/// Labels per secret.
const LABELS: usize = 32;
/// Longest key of a label.
const LABEL_KEY_LEN: usize = 64;
/// Longest value of a label, in characters.
const LABEL_VALUE_LEN: usize = 256;
/// Longest context of a ciphertext that the caller keeps, in bytes.
const CONTEXT_LEN: usize = 512;
/// Items in one request to seal or open.
const ITEMS: usize = 100;

fn invalid(field: &'static str, reason: impl Into<String>) -> VaultError {
    VaultError::Invalid { field, reason: reason.into() }
}

/// Checks everything about a secret that is to be created.
pub(super) fn new_secret(new: &NewSecret, now: Timestamp, limit: usize) -> Result<(), VaultError> {
    name(&new.name)?;
    labels(&new.labels)?;
    if new.expires_at.is_some_and(|at| at <= now) {
        return Err(invalid("expires_at", "must be in the future"));
    }
    value(new.kind, &new.value, limit)
}

fn name(name: &str) -> Result<(), VaultError> {
    path("name", name, NAME_LEN)
}

/// Segments of `A-Z a-z 0-9 . _ -` separated by single slashes.
fn path(field: &'static str, text: &str, limit: usize) -> Result<(), VaultError> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "._-/".contains(c);
    if text.is_empty() || text.len() > limit {
        return Err(invalid(field, format!("must have 1 to {limit} characters")));
    }
    if !text.chars().all(allowed) {
        return Err(invalid(field, "may have only the characters A-Z a-z 0-9 . _ - /"));
    }
    if text.split('/').any(str::is_empty) {
        return Err(invalid(field, "must not begin or end with a slash or have two in a row"));
    }
    Ok(())
}

fn labels(labels: &BTreeMap<String, String>) -> Result<(), VaultError> {
    if labels.len() > LABELS {
        return Err(invalid("labels", format!("must be at most {LABELS}")));
    }
    for (key, text) in labels {
        path("labels", key, LABEL_KEY_LEN)?;
        if text.chars().count() > LABEL_VALUE_LEN || text.chars().any(char::is_control) {
            let rule =
                format!("values have at most {LABEL_VALUE_LEN} characters, none of them control characters");
            return Err(invalid("labels", rule));
        }
    }
    Ok(())
}

/// Checks a value against its kind. Works on the bytes in place: a parser that copied them would
/// leave plaintext behind.
pub(super) fn value(kind: SecretKind, value: &PlainValue, limit: usize) -> Result<(), VaultError> {
    let bytes = value.bytes.as_slice();
    if bytes.len() > limit {
        return Err(VaultError::TooLarge { limit });
    }
    let text = std::str::from_utf8(bytes);
    if value.encoding == Encoding::Utf8 && text.is_err() {
        return Err(invalid("value", "is not UTF-8"));
    }
    match (kind, text) {
        (SecretKind::Opaque, _) => Ok(()),
        (_, Err(_)) => Err(invalid("value", "must be UTF-8 text for this kind")),
        (SecretKind::Json, Ok(text)) => match serde_json::from_str::<serde::de::IgnoredAny>(text) {
            Ok(_) => Ok(()),
            // The parser's own message may quote the value.
            Err(_) => Err(invalid("value", "is not one JSON value")),
        },
        (_, Ok("")) => Err(invalid("value", "must not be empty for this kind")),
        (SecretKind::ApiKey, Ok(text)) if text.chars().any(char::is_whitespace) => {
            Err(invalid("value", "an api-key has no white space"))
        }
        (SecretKind::Password | SecretKind::ApiKey, Ok(_)) => Ok(()),
    }
}

/// Checks the header's form.
pub(super) fn idempotency(key: Option<&IdempotencyKey>) -> Result<(), VaultError> {
    let well_formed =
        |key: &str| (1..=NAME_LEN).contains(&key.len()) && key.bytes().all(|byte| byte.is_ascii_graphic());
    match key {
        Some(key) if !well_formed(&key.key) => {
            Err(invalid("Idempotency-Key", format!("must have 1 to {NAME_LEN} visible ASCII characters")))
        }
        _ => Ok(()),
    }
}

/// Checks a caller's own context.
pub(super) fn context(context: &ExternalContext) -> Result<(), VaultError> {
    let text = &context.0;
    if text.is_empty() || text.len() > CONTEXT_LEN || text.chars().any(char::is_control) {
        let rule = format!("must have 1 to {CONTEXT_LEN} bytes without control characters");
        return Err(invalid("context", rule));
    }
    Ok(())
}

/// Checks the size of a batch.
pub(super) fn batch(len: usize) -> Result<(), VaultError> {
    if len <= ITEMS { Ok(()) } else { Err(invalid("items", format!("must be at most {ITEMS}"))) }
}

/// Checks the length of a data key.
pub(super) fn data_key_len(len: usize) -> Result<(), VaultError> {
    if (16..=64).contains(&len) { Ok(()) } else { Err(invalid("length", "must be 16 to 64 bytes")) }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use zeroize::Zeroizing;

    use super::{context, data_key_len, idempotency, labels, name, new_secret, value};
    use crate::clock::Timestamp;
    use crate::vault::VaultError;
    use crate::vault::model::{Encoding, ExternalContext, IdempotencyKey, NewSecret, PlainValue, SecretKind};

    fn plain(encoding: Encoding, bytes: &[u8]) -> PlainValue {
        PlainValue { encoding, bytes: Zeroizing::new(bytes.to_vec()) }
    }

    #[test]
    fn a_name_is_a_path_of_plain_segments() {
        for good in ["a", "db/prod/password", "A.b_c-1", &"n".repeat(128)] {
            assert!(name(good).is_ok(), "{good}");
        }
        for bad in ["", "/a", "a/", "a//b", "a b", "\u{e4}", "a\n", "a:b", &"n".repeat(129)] {
            assert!(matches!(name(bad), Err(VaultError::Invalid { field: "name", .. })), "{bad:?}");
        }
    }

    #[test]
    fn labels_are_few_and_short() {
        let one = |key: &str, text: &str| BTreeMap::from([(key.to_owned(), text.to_owned())]);
        let many = |count: u32| (0..count).map(|n| (format!("k{n}"), String::new())).collect();

        for good in [one("team", "\u{e4}\u{f6} any text"), one("k", &"\u{e4}".repeat(256)), many(32)] {
            assert!(labels(&good).is_ok());
        }
        for bad in [one("", "x"), one("a b", "x"), one(&"k".repeat(65), ""), one("k", "a\u{7}"), many(33)] {
            assert!(labels(&bad).is_err(), "{bad:?}");
        }
        assert!(labels(&one("k", &"x".repeat(257))).is_err());
    }

    #[test]
    fn a_value_has_the_form_of_its_kind() {
        use Encoding::{Base64, Utf8};
        use SecretKind::{ApiKey, Json, Opaque, Password};
        for (kind, encoding, bytes, good) in [
            (Opaque, Base64, &b"\xff\x00"[..], true),
            (Opaque, Utf8, b"", true),
            (Opaque, Utf8, b"\xff", false),
            (Json, Utf8, br#"{"a": [1, "x"]}"#, true),
            (Json, Base64, b"null", true),
            (Json, Utf8, br#"{"a": 1} {"#, false),
            (Json, Utf8, b"", false),
            (Json, Base64, b"\"\xff\"", false),
            (Password, Utf8, b"with space", true),
            (Password, Utf8, b"", false),
            (Password, Base64, b"\xff", false),
            (ApiKey, Utf8, b"sk_live_1", true),
            (ApiKey, Utf8, b"sk live", false),
            (ApiKey, Utf8, b"sk\n", false),
        ] {
            assert_eq!(value(kind, &plain(encoding, bytes), 100).is_ok(), good, "{kind:?} {bytes:?}");
        }
    }

    #[test]
    fn a_value_may_be_as_long_as_the_limit() {
        let at = |len| value(SecretKind::Opaque, &plain(Encoding::Base64, &vec![0; len]), 10);

        assert!(at(10).is_ok());
        assert!(matches!(at(11), Err(VaultError::TooLarge { limit: 10 })));
    }

    #[test]
    fn an_error_never_quotes_the_value() {
        let error = value(SecretKind::Json, &plain(Encoding::Utf8, b"hunter2"), 100).unwrap_err();

        assert!(!format!("{error} {error:?}").contains("hunter2"));
    }

    #[test]
    fn a_secret_cannot_expire_in_the_past() {
        let now = Timestamp::from_micros(1_000);
        let expiring = |at| NewSecret {
            name: "n".to_owned(),
            kind: SecretKind::Opaque,
            value: plain(Encoding::Utf8, b"v"),
            labels: BTreeMap::new(),
            expires_at: Some(Timestamp::from_micros(at)),
        };

        assert!(new_secret(&expiring(1_001), now, 10).is_ok());
        assert!(new_secret(&expiring(1_000), now, 10).is_err());
    }

    #[test]
    fn contexts_keys_and_lengths_have_bounds() {
        let of = |text: &str| context(&ExternalContext(text.to_owned()));
        assert!(of("orders/42").is_ok() && of(&"c".repeat(512)).is_ok());
        assert!(of("").is_err() && of(&"c".repeat(513)).is_err() && of("a\0b").is_err());

        let key = |key: &str| IdempotencyKey { key: key.to_owned(), body: Zeroizing::new(Vec::new()) };
        assert!(idempotency(None).is_ok() && idempotency(Some(&key("8e03978e"))).is_ok());
        assert!(idempotency(Some(&key(""))).is_err() && idempotency(Some(&key("a b"))).is_err());

        assert!(data_key_len(16).is_ok() && data_key_len(64).is_ok());
        assert!(data_key_len(15).is_err() && data_key_len(65).is_err());
    }
}
