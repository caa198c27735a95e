//! Secrets in a configuration that is shown, and what comes back from whoever saw it.

use serde_json::{Map, Value};

use crate::tokens::providers::reader::check_url;

/// Stands for a secret that is set.
pub const MASK: &str = "********";

/// Members whose names only sound like secrets.
const PUBLIC: [&str; 6] = [
    "tokenEndpoint",
    "tokenEndpointAuthMethod",
    "tokenEndpointResponseType",
    "clientSecretJwtSigningAlgorithm",
    "idTokenVerificationConfig",
    "maxTokenAge",
];

/// Where a client proves itself: whoever answers there learns the secret.
const DESTINATIONS: [&str; 3] = ["tokenEndpoint", "issuer", "revocationEndpoint"];

/// The configuration as the API shows it: [`MASK`] in the place of every secret that is set. Members of
/// unknown meaning count as secrets if their name sounds like one.
pub fn masked(config: &Value) -> Value {
    match config {
        Value::Object(members) => {
            let shown = members.iter().map(|(name, value)| {
                let hide = is_secret_name(name) && is_set(value);
                (name.clone(), if hide { Value::from(MASK) } else { masked(value) })
            });
            Value::Object(shown.collect())
        }
        Value::Array(items) => items.iter().map(masked).collect(),
        other => other.clone(),
    }
}

/// The configuration that is meant by one that was shown masked and then changed: a secret that still is the
/// [`MASK`] is the stored one. Where nothing is stored, the member is left out rather than set to asterisks.
pub fn unmasked(new: &Value, stored: &Value) -> Value {
    match (new, stored) {
        (Value::Object(members), _) => {
            let merged = members.iter().filter_map(|(name, value)| {
                let old = stored.get(name);
                let value = if is_mask(name, value) {
                    old.filter(|old| is_set(old))?.clone()
                } else {
                    unmasked(value, old.unwrap_or(&Value::Null))
                };
                Some((name.clone(), value))
            });
            Value::Object(merged.collect())
        }
        // Items have no names: only a list of the same length can be the same list.
        (Value::Array(items), Value::Array(old)) if items.len() == old.len() => {
            items.iter().zip(old).map(|(item, old)| unmasked(item, old)).collect()
        }
        (Value::Array(items), _) => items.iter().map(|item| unmasked(item, &Value::Null)).collect(),
        (other, _) => other.clone(),
    }
}

/// The configuration without its secrets, for a place that is only shown.
pub fn without_secrets(config: &Value) -> Value {
    match config {
        Value::Object(members) => {
            let public = members.iter().filter(|(name, _)| !is_secret_name(name));
            Value::Object(public.map(|(name, value)| (name.clone(), without_secrets(value))).collect())
        }
        Value::Array(items) => items.iter().map(without_secrets).collect(),
        other => other.clone(),
    }
}

/// The member by which `new` would have a stored secret, kept by [`MASK`], sent to another origin than before.
///
/// Whoever may change a connector may not read its secret; without this rule, a changed address would hand it
/// over. The answer to such a change is to ask for the secret again.
pub fn would_move_secret(new: &Value, stored: &Value) -> Option<&'static str> {
    let keeps = |members: &Map<String, Value>| has_mask(members);
    if !new.as_object().is_some_and(keeps) {
        return None;
    }
    DESTINATIONS.into_iter().find(|member| {
        let origin = |config: &Value| {
            let url =
                config.get(member).and_then(Value::as_str).and_then(|text| check_url(member, text).ok());
            url.map(|url| url.origin())
        };
        // Removing an own address means the built-in one, which is the provider's.
        origin(new).is_some_and(|now| Some(now) != origin(stored))
    })
}

/// Whether a member or parameter of that name is treated as a secret.
pub(super) fn is_secret_name(name: &str) -> bool {
    let lower = name.to_ascii_lowercase();
    let sounds = ["secret", "key", "password", "token"].iter().any(|word| lower.contains(word));
    sounds && !PUBLIC.contains(&name)
}

fn is_set(value: &Value) -> bool {
    !value.is_null() && value.as_str() != Some("")
}

fn is_mask(name: &str, value: &Value) -> bool {
    is_secret_name(name) && value.as_str() == Some(MASK)
}

fn has_mask(members: &Map<String, Value>) -> bool {
    members.iter().any(|(name, value)| is_mask(name, value) || value.as_object().is_some_and(has_mask))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn stored() -> Value {
        json!({
            "clientId": "cid", "clientSecret": "s3cret", "scope": "read",
            "tokenEndpoint": "https://idp.example/token", "tokenEndpointAuthMethod": "client_secret_jwt",
            "tokenEndpointResponseType": "json", "clientSecretJwtSigningAlgorithm": "HS256",
            "idTokenVerificationConfig": { "jwksUri": "https://idp.example/jwks", "maxTokenAge": 3 },
            "customConfig": { "apiKey": "k", "audience": "a", "PASSWORD": "p", "empty_token": "" },
            "list": [{ "secret": 1 }, { "x": { "mySecretThing": { "a": "b" } } }],
            "nothingToken": null,
        })
    }

    #[test]
    fn secrets_are_masked_wherever_they_are() {
        let expected = json!({
            "clientId": "cid", "clientSecret": MASK, "scope": "read",
            "tokenEndpoint": "https://idp.example/token", "tokenEndpointAuthMethod": "client_secret_jwt",
            "tokenEndpointResponseType": "json", "clientSecretJwtSigningAlgorithm": "HS256",
            "idTokenVerificationConfig": { "jwksUri": "https://idp.example/jwks", "maxTokenAge": 3 },
            "customConfig": { "apiKey": MASK, "audience": "a", "PASSWORD": MASK, "empty_token": "" },
            "list": [{ "secret": MASK }, { "x": { "mySecretThing": MASK } }],
            "nothingToken": null,
        });
        assert_eq!(masked(&stored()), expected);
        assert_eq!(masked(&json!("text")), json!("text"));
    }

    #[test]
    fn what_was_shown_and_comes_back_unchanged_changes_nothing() {
        assert_eq!(unmasked(&masked(&stored()), &stored()), stored());
    }

    #[test]
    fn a_mask_is_the_stored_secret_or_nothing() {
        let rows = [
            // new, stored, meant
            (
                json!({ "clientSecret": MASK, "a": 1 }),
                json!({ "clientSecret": "s" }),
                json!({ "clientSecret": "s", "a": 1 }),
            ),
            (
                json!({ "clientSecret": "new" }),
                json!({ "clientSecret": "s" }),
                json!({ "clientSecret": "new" }),
            ),
            (json!({ "clientSecret": "" }), json!({ "clientSecret": "s" }), json!({ "clientSecret": "" })),
            (json!({}), json!({ "clientSecret": "s" }), json!({})),
            (json!({ "clientSecret": MASK }), json!({}), json!({})),
            (json!({ "clientSecret": MASK }), json!({ "clientSecret": "" }), json!({})),
            (json!({ "clientSecret": MASK }), json!(null), json!({})),
            (json!({ "c": { "key": MASK } }), json!({ "c": "text" }), json!({ "c": {} })),
            (json!({ "clientId": MASK }), json!({ "clientId": "c" }), json!({ "clientId": MASK })),
            (
                json!({ "l": [{ "key": MASK }] }),
                json!({ "l": [{ "key": 1 }, { "key": 2 }] }),
                json!({ "l": [{}] }),
            ),
            (
                json!({ "l": [{ "key": MASK }] }),
                json!({ "l": [{ "key": 1 }] }),
                json!({ "l": [{ "key": 1 }] }),
            ),
        ];
        for (new, stored, meant) in rows {
            assert_eq!(unmasked(&new, &stored), meant, "{new} over {stored}");
        }
    }

    #[test]
    fn the_public_part_has_no_secret_member() {
        let public = without_secrets(&stored());
        assert_eq!(public["customConfig"], json!({ "audience": "a" }));
        assert_eq!(public["list"], json!([{}, { "x": {} }]));
        for gone in ["clientSecret", "nothingToken"] {
            assert!(public.get(gone).is_none(), "{gone}");
        }
        assert_eq!(public["tokenEndpoint"], "https://idp.example/token");
    }

    #[test]
    fn a_kept_secret_does_not_move_to_another_origin() {
        let stored = json!({ "clientSecret": "s", "tokenEndpoint": "https://idp.example/token" });
        let to = |secret: &str, url: &str| json!({ "clientSecret": secret, "tokenEndpoint": url });
        let rows = [
            (to(MASK, "https://idp.example/token"), None),
            (to(MASK, "https://IDP.example:443/oauth/token"), None),
            (to(MASK, "https://evil.example/token"), Some("tokenEndpoint")),
            (to(MASK, "http://idp.example/token"), Some("tokenEndpoint")),
            (to(MASK, "https://idp.example:8443/token"), Some("tokenEndpoint")),
            (to("known", "https://evil.example/token"), None),
            (json!({ "clientSecret": MASK }), None),
            (
                json!({ "clientSecret": MASK, "revocationEndpoint": "https://evil.example" }),
                Some("revocationEndpoint"),
            ),
            (json!({ "customConfig": { "apiKey": MASK }, "issuer": "https://evil.example" }), Some("issuer")),
        ];
        for (new, expected) in rows {
            assert_eq!(would_move_secret(&new, &stored), expected, "{new}");
        }
    }
}
