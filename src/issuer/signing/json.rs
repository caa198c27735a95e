//! JSON as a token may hold it: one object, no member twice at any depth, no number that would be read as
//! another one. Two readers who see different things in one document are how tokens are forged.

use std::fmt;

use serde::de::{self, Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

/// Whole numbers above this are not the same in every reader (RFC 7493, section 2.2).
const EXACT: f64 = 9_007_199_254_740_991.0;

/// Reads one object; its members keep their order.
///
/// # Errors
/// What is wrong, without a word of the text itself.
pub(in crate::issuer) fn object(text: &[u8]) -> Result<Map<String, Value>, &'static str> {
    let read = serde_json::from_slice::<Strict>(text).map_err(|error| match error.classify() {
        // The only texts of our own are these two.
        serde_json::error::Category::Data if error.to_string().starts_with(TWICE) => TWICE,
        serde_json::error::Category::Data if error.to_string().starts_with(INEXACT) => INEXACT,
        _ => "is not a JSON object",
    })?;
    match read.0 {
        Value::Object(members) if members.keys().any(|name| is_lookalike(name)) => Err(LOOKALIKE),
        Value::Object(members) => Ok(members),
        _ => Err("is not a JSON object"),
    }
}

/// Names that readers act on (RFC 7519, section 4.1; RFC 7515, section 4.1).
const REGISTERED: [&str; 16] = [
    "iss", "sub", "aud", "exp", "nbf", "iat", "jti", "alg", "kid", "typ", "crit", "jku", "jwk", "x5u", "x5c",
    "b64",
];

/// Some readers match names without regard to case (Go's `encoding/json` folds U+017F and U+212A too), and the last
/// one wins: `ISS` is `iss` to them.
fn is_lookalike(name: &str) -> bool {
    let fold = |c: char| match c {
        '\u{17f}' => 's',
        '\u{212a}' => 'k',
        other => other.to_ascii_lowercase(),
    };
    // No registered name is longer, so nothing long is copied.
    name.len() <= 16 && {
        let folded: String = name.chars().map(fold).collect();
        folded != name && REGISTERED.contains(&folded.as_str())
    }
}

const TWICE: &str = "a member comes twice";
const INEXACT: &str = "a number is too large to be exact";
const LOOKALIKE: &str = "a member is spelt almost like a registered one";

struct Strict(Value);

impl<'de> Deserialize<'de> for Strict {
    fn deserialize<D: Deserializer<'de>>(input: D) -> Result<Self, D::Error> {
        input.deserialize_any(AnyValue).map(Self)
    }
}

struct AnyValue;

impl<'de> Visitor<'de> for AnyValue {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E: de::Error>(self, value: f64) -> Result<Value, E> {
        // A whole number that does not fit 64 bits comes here as well, already rounded.
        let number = Number::from_f64(value).filter(|_| value.fract() != 0.0 || value.abs() <= EXACT);
        number.map(Value::Number).ok_or_else(|| E::custom(INEXACT))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::String(value.to_owned()))
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(Value::String(value))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut input: A) -> Result<Value, A::Error> {
        let mut items = Vec::new();
        while let Some(Strict(item)) = input.next_element()? {
            items.push(item);
        }
        Ok(Value::Array(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut input: A) -> Result<Value, A::Error> {
        let mut members = Map::new();
        while let Some((name, Strict(value))) = input.next_entry::<String, _>()? {
            if members.insert(name, value).is_some() {
                return Err(de::Error::custom(TWICE));
            }
        }
        Ok(Value::Object(members))
    }
}

#[cfg(test)]
mod tests {
    use super::{INEXACT, TWICE, object};

    #[test]
    fn an_object_comes_back_as_it_was_in_its_order() {
        for text in [
            r#"{"z":1,"a":[true,null,{"b":-2}],"m":"\u00e9 \"","f":0.5}"#,
            "{}",
            r#"{"n":18446744073709551615,"m":-9223372036854775808}"#,
        ] {
            let read = object(text.as_bytes()).unwrap();
            let written = serde_json::to_string(&read).unwrap();
            assert_eq!(written, text.replace("\\u00e9", "é"));
        }
    }

    #[test]
    fn what_could_be_read_in_two_ways_is_refused() {
        for (text, wanted) in [
            (r#"{"a":1,"a":1}"#, TWICE),
            (r#"{"a":{"b":1,"b":2}}"#, TWICE),
            (r#"{"a":[{"b":1,"\u0062":2}]}"#, TWICE),
            (r#"{"a":18446744073709551616}"#, INEXACT),
            (r#"{"a":1e16}"#, INEXACT),
            (r#"{"a":1e999}"#, "is not a JSON object"),
            ("[]", "is not a JSON object"),
            (r#""{}""#, "is not a JSON object"),
            ("{} {}", "is not a JSON object"),
            ("", "is not a JSON object"),
            (r#"{"a":NaN}"#, "is not a JSON object"),
        ] {
            assert_eq!(object(text.as_bytes()), Err(wanted), "{text}");
        }
        assert!(object(b"{\"a\":\"\xff\"}").is_err());
        assert!(object(format!("{{\"a\":{}", "[".repeat(100_000)).as_bytes()).is_err());
    }
}
