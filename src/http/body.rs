//! Request bodies: strict JSON, read once, with a limit that belongs to the route.
//!
//! Strict means: the media type is JSON, no content coding, no unknown or repeated member, nothing
//! after the value. Error texts name members of the documentation, never what a client sent.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;

use actix_web::dev::Payload;
use actix_web::http::header;
use actix_web::web::Bytes;
use actix_web::{FromRequest, HttpMessage, HttpRequest};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use futures_util::future::LocalBoxFuture;
use serde::de::{self, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::error::Category;
use zeroize::Zeroizing;

use crate::http::problem::{Code, Problem};
use crate::vault::{Encoding, PlainValue};

/// A JSON body that has not been parsed yet.
pub(super) struct JsonBody(Bytes);

impl JsonBody {
    /// # Errors
    /// 400 for what is not JSON, 422 for what is not a `T`.
    pub(super) fn parse<'a, T: Deserialize<'a>>(&'a self) -> Result<T, Problem> {
        serde_json::from_slice(&self.0).map_err(|error| explain(&error))
    }

    /// The bytes as they came: what an idempotency key stands for.
    pub(super) fn to_wiped_vec(&self) -> Zeroizing<Vec<u8>> {
        Zeroizing::new(self.0.to_vec())
    }
}

/// A JSON body, or none at all, which stands for `{}`.
pub(super) struct OptionalBody(Option<JsonBody>);

impl OptionalBody {
    /// # Errors
    /// As [`JsonBody::parse`].
    pub(super) fn parse<'a, T: Deserialize<'a> + Default>(&'a self) -> Result<T, Problem> {
        self.0.as_ref().map_or_else(|| Ok(T::default()), JsonBody::parse)
    }
}

impl FromRequest for OptionalBody {
    type Error = Problem;
    type Future = LocalBoxFuture<'static, Result<Self, Problem>>;

    fn from_request(request: &HttpRequest, payload: &mut Payload) -> Self::Future {
        let accepted = check_media_type(request);
        let body = Bytes::from_request(request, payload);
        Box::pin(async move {
            let body =
                body.await.map_err(|error| Problem::of_status(error.as_response_error().status_code()))?;
            if body.is_empty() {
                return Ok(Self(None));
            }
            accepted?;
            Ok(Self(Some(JsonBody(body))))
        })
    }
}

fn explain(error: &serde_json::Error) -> Problem {
    let place = format!("line {}, column {}", error.line(), error.column());
    match error.classify() {
        Category::Data => {
            let text = error.to_string();
            // Only texts that quote our own member names; others may quote the client's value.
            let known = ["missing field `", "duplicate field `", "repeated key"];
            let what = match text.split_once(" at line ") {
                Some((what, _)) if known.iter().any(|prefix| what.starts_with(prefix)) => what,
                _ if text.starts_with("unknown field") => "a member is not known here",
                _ => "a member has a wrong type",
            };
            Problem::new(Code::Invalid).detail(format!("{what} ({place})"))
        }
        _ => Problem::new(Code::Malformed).detail(format!("not JSON ({place})")),
    }
}

impl FromRequest for JsonBody {
    type Error = Problem;
    type Future = LocalBoxFuture<'static, Result<Self, Problem>>;

    fn from_request(request: &HttpRequest, payload: &mut Payload) -> Self::Future {
        let accepted = check_media_type(request);
        let body = Bytes::from_request(request, payload);
        Box::pin(async move {
            accepted?;
            let body = body.await;
            body.map(Self).map_err(|error| Problem::of_status(error.as_response_error().status_code()))
        })
    }
}

fn check_media_type(request: &HttpRequest) -> Result<(), Problem> {
    let coded = request.headers().get(header::CONTENT_ENCODING).is_some_and(|coding| coding != "identity");
    if coded || !request.content_type().eq_ignore_ascii_case("application/json") {
        return Err(Problem::new(Code::UnsupportedMediaType)
            .detail("application/json without a content coding is accepted here"));
    }
    Ok(())
}

/// Whether a text may be a reason in the audit log: 1 to 256 characters, none of them a control character.
pub(super) fn is_reason(text: &str) -> bool {
    (1..=256).contains(&text.chars().count()) && !text.chars().any(char::is_control)
}

/// A string of the body, borrowed where it has no escapes.
#[derive(Deserialize)]
#[serde(transparent)]
pub(super) struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

impl Text<'_> {
    /// The text, for what is not secret.
    pub(super) fn as_str(&self) -> &str {
        &self.0
    }

    /// Moves the text out without leaving a copy of its own behind.
    fn into_wiped(self) -> Zeroizing<Vec<u8>> {
        Zeroizing::new(self.0.into_owned().into_bytes())
    }
}

/// The members `value` and `encoding` (default `utf8`) as bytes.
pub(super) fn plain_value(value: Text<'_>, encoding: Option<&str>) -> Result<PlainValue, Problem> {
    let encoding = encoding.map_or(Some(Encoding::Utf8), Encoding::parse);
    let encoding = encoding.ok_or_else(|| Problem::invalid("encoding", "must be utf8 or base64"))?;
    let bytes = match encoding {
        Encoding::Utf8 => value.into_wiped(),
        Encoding::Base64 => {
            let text = value.into_wiped();
            let mut bytes = Zeroizing::new(vec![0; base64::decoded_len_estimate(text.len())]);
            let len = STANDARD
                .decode_slice(&*text, &mut bytes)
                .map_err(|_| Problem::invalid("value", "is not base64 with padding (RFC 4648, section 4)"))?;
            bytes.truncate(len);
            bytes
        }
    };
    Ok(PlainValue { encoding, bytes })
}

/// Decodes base64 that is not secret.
pub(super) fn public_base64(field: &str, text: &str) -> Result<Vec<u8>, Problem> {
    STANDARD.decode(text).map_err(|_| Problem::invalid(field, "is not base64 with padding"))
}

/// Serde helper: a map in which a key that comes twice is an error, not the last one's win.
pub(super) fn unique_keys<'de, D>(input: D) -> Result<BTreeMap<String, String>, D::Error>
where
    D: Deserializer<'de>,
{
    struct Unique;

    impl<'de> Visitor<'de> for Unique {
        type Value = BTreeMap<String, String>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("an object of strings")
        }

        fn visit_map<A: MapAccess<'de>>(self, mut input: A) -> Result<Self::Value, A::Error> {
            let mut map = BTreeMap::new();
            while let Some((key, value)) = input.next_entry()? {
                if map.insert(key, value).is_some() {
                    return Err(de::Error::custom("repeated key"));
                }
            }
            Ok(map)
        }
    }
    input.deserialize_map(Unique)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Sample {
        #[expect(dead_code, reason = "only its parsing is looked at")]
        name: String,
        #[serde(default, deserialize_with = "unique_keys")]
        labels: BTreeMap<String, String>,
    }

    fn parse(text: &str) -> Result<Sample, Problem> {
        JsonBody(Bytes::copy_from_slice(text.as_bytes())).parse()
    }

    fn detail(text: &str) -> (Code, String) {
        let problem = parse(text).unwrap_err();
        (problem.code(), problem.item()["detail"].as_str().unwrap_or_default().to_owned())
    }

    #[test]
    fn unknown_repeated_and_trailing_things_are_refused() {
        assert_eq!(parse(r#"{"name":"a","labels":{"k":"v"}}"#).unwrap().labels["k"], "v");
        assert_eq!(detail(r#"{"name":"a","nam":"b"}"#).0, Code::Invalid);
        assert_eq!(detail(r#"{"name":"a","name":"b"}"#).0, Code::Invalid);
        assert_eq!(detail(r#"{"name":"a","labels":{"k":"1","k":"2"}}"#).0, Code::Invalid);
        assert_eq!(detail(r#"{"name":"a"} x"#).0, Code::Malformed);
        assert_eq!(detail(&"[".repeat(200)).0, Code::Invalid);
        assert_eq!(detail(r#"{"name":"#).0, Code::Malformed);
    }

    #[test]
    fn what_a_client_sent_is_not_quoted_back() {
        for text in [r#"{"name":"a","labels":"hunter2"}"#, r#"{"hunter2":1}"#, r#"{"name":{"hunter2":1}}"#] {
            let (_, detail) = detail(text);
            assert!(!detail.contains("hunter2"), "{detail}");
        }
        assert!(detail("{}").1.starts_with("missing field `name`"));
    }

    #[test]
    fn a_value_is_text_unless_it_says_base64() {
        let text = |text: &'static str| Text(Cow::Borrowed(text));
        assert_eq!(plain_value(text("aGk="), None).ok().unwrap().bytes.as_slice(), b"aGk=");
        assert_eq!(plain_value(text("aGk="), Some("base64")).ok().unwrap().bytes.as_slice(), b"hi");
        assert!(plain_value(text("aGk"), Some("base64")).is_err());
        assert!(plain_value(text("aGl="), Some("base64")).is_err(), "one value, one spelling");
        assert!(plain_value(text("aGk="), Some("hex")).is_err());
    }
}
