//! Answers as they must be: one JSON object or one form, every member once.
//!
//! Two readers that disagree about one text are how a wrong token gets in, so whatever readers disagree about
//! is refused: another encoding than UTF-8, a byte order mark, a member that comes twice, nesting without end.

use std::collections::BTreeMap;
use std::fmt;

use secrecy::SecretString;
use serde::Deserialize;
use serde::de::{DeserializeOwned, Deserializer, Error, MapAccess, Visitor};
use serde_json::value::{RawValue, to_raw_value};
use serde_json::{Map, Value};

/// As deep as an answer may nest.
const LEVELS: usize = 64;

/// Why an answer cannot be read; one word for the audit log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Unreadable(pub(super) &'static str);

/// The members of an object, each as the JSON text it came with: a number that no type holds spoils only the
/// member it is in.
pub(super) struct Members(BTreeMap<String, Box<RawValue>>);

impl Members {
    /// Reads a JSON object.
    pub(super) fn from_json(body: &[u8]) -> Result<Self, Unreadable> {
        let text = str::from_utf8(body).map_err(|_| Unreadable("not-utf8"))?;
        if !is_shallow(text) {
            return Err(Unreadable("too-deep"));
        }
        serde_json::from_str(text).map_err(|_| Unreadable("not-json"))
    }

    /// Reads a form (`application/x-www-form-urlencoded`), as some providers answer with.
    pub(super) fn from_form(body: &[u8]) -> Result<Self, Unreadable> {
        let text = str::from_utf8(body).map_err(|_| Unreadable("not-utf8"))?.trim();
        // Every text is a form in some way; a page with a link in it must not be one that gives a token.
        if text.starts_with('<') {
            return Err(Unreadable("not-a-form"));
        }
        let mut members = BTreeMap::new();
        for (name, value) in url::form_urlencoded::parse(text.as_bytes()) {
            let value = to_raw_value(&value).map_err(|_| Unreadable("not-a-form"))?;
            if members.insert(name.into_owned(), value).is_some() {
                return Err(Unreadable("duplicate"));
            }
        }
        Ok(Self(members))
    }

    /// A member's JSON text; `None` if it is absent or null.
    pub(super) fn raw(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(|raw| raw.get()).filter(|text| *text != "null")
    }

    /// Whether a member is there, be it null.
    pub(super) fn has(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    /// A member of one type; absent or null is `None`, another type an error.
    pub(super) fn read<T: DeserializeOwned>(&self, name: &'static str) -> Result<Option<T>, Unreadable> {
        self.raw(name).map(serde_json::from_str).transpose().map_err(|_| Unreadable(name))
    }

    /// A text that must not be shown; an empty one counts as absent.
    pub(super) fn secret(&self, name: &'static str) -> Result<Option<SecretString>, Unreadable> {
        let text = self.read::<String>(name)?.filter(|text| !text.is_empty());
        Ok(text.map(SecretString::from))
    }

    /// The whole object.
    pub(super) fn into_map(self) -> Result<Map<String, Value>, Unreadable> {
        let read = |(name, raw): (String, Box<RawValue>)| Ok((name, serde_json::from_str(raw.get())?));
        let map: Result<_, serde_json::Error> = self.0.into_iter().map(read).collect();
        map.map_err(|_| Unreadable("not-json"))
    }
}

impl<'de> Deserialize<'de> for Members {
    fn deserialize<D: Deserializer<'de>>(input: D) -> Result<Self, D::Error> {
        struct Object;
        impl<'de> Visitor<'de> for Object {
            type Value = Members;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut input: A) -> Result<Members, A::Error> {
                let mut members = BTreeMap::new();
                while let Some((name, value)) = input.next_entry::<String, Box<RawValue>>()? {
                    if members.insert(name, value).is_some() {
                        return Err(A::Error::custom("a member comes twice"));
                    }
                }
                Ok(Members(members))
            }
        }
        input.deserialize_map(Object)
    }
}

/// Whether no more than [`LEVELS`] brackets are open at once. Counted before parsing: a raw value is skipped by
/// the parser whatever its depth.
fn is_shallow(text: &str) -> bool {
    let (mut open, mut in_text, mut escaped) = (0_usize, false, false);
    for byte in text.bytes() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_text => escaped = true,
            b'"' => in_text = !in_text,
            b'{' | b'[' if !in_text => open += 1,
            b'}' | b']' if !in_text => open = open.saturating_sub(1),
            _ => {}
        }
        if open > LEVELS {
            return false;
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(body: &[u8]) -> Option<&'static str> {
        Members::from_json(body).err().map(|Unreadable(reason)| reason)
    }

    #[test]
    fn one_object_in_utf_8_with_every_member_once() {
        let utf16: Vec<u8> = "{\"a\":1}".encode_utf16().flat_map(u16::to_le_bytes).collect();
        let nested = |levels| format!("{}1{}", "{\"a\":".repeat(levels), "}".repeat(levels));
        for (body, expected) in [
            (b"{}".as_slice(), None),
            (b" {\"a\": [1, 1e400], \"b\": null} \r\n", None),
            (b"{\"a\":\"[[[{{{\\\"[[\"}", None),
            (nested(LEVELS).as_bytes(), None),
            (nested(LEVELS + 1).as_bytes(), Some("too-deep")),
            ("[".repeat(10_000).as_bytes(), Some("too-deep")),
            (b"{\"a\":1,\"a\":1}", Some("not-json")),
            (b"{\"a\":1,\"\\u0061\":1}", Some("not-json")),
            (b"\xef\xbb\xbf{}", Some("not-json")),
            (b"{\"a\":\"\xff\"}", Some("not-utf8")),
            (&utf16, Some("not-json")),
            (b"[]", Some("not-json")),
            (b"{} {}", Some("not-json")),
            (b"{\"a\":NaN}", Some("not-json")),
            (b"", Some("not-json")),
            (b"<!DOCTYPE html><html>", Some("not-json")),
        ] {
            assert_eq!(refused(body), expected, "{}", String::from_utf8_lossy(body));
        }
    }

    #[test]
    fn a_form_has_every_member_once_too() {
        let members = Members::from_form(b"access_token=a%2Fb+c&expires_in=3600&scope=\n").unwrap();
        assert_eq!(members.read::<String>("access_token").unwrap().as_deref(), Some("a/b c"));
        assert_eq!(members.raw("expires_in"), Some("\"3600\""));

        assert_eq!(Members::from_form(b"a=1&b=2&a=1").err(), Some(Unreadable("duplicate")));
        assert_eq!(Members::from_form(b"a=\xff").err(), Some(Unreadable("not-utf8")));
        let page = Members::from_form(b"\n<a href='?x&access_token=a&y'>");
        assert_eq!(page.err(), Some(Unreadable("not-a-form")));
    }
}
