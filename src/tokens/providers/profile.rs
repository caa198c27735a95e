//! What a provider says of a user, cut down to what may be kept and shown.
//!
//! The text is hostile: somebody chose it at a provider, to be read by an administrator. An id that breaks a
//! rule is an error, for a shortened id would be another account; everything else is dropped or cut.

use serde_json::{Map, Value, json};
use url::Url;

use crate::tokens::providers::{Factory, Provider, Settings};

const LONGEST_ID: usize = 128;
const LONGEST_NAME: usize = 256;
const LONGEST_EMAIL: usize = 254;
const LONGEST_URL: usize = 2048;
/// A profile is copied with every identity that is shown.
const LONGEST_RAW: usize = 16 * 1024;

/// Where a profile comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProfileSource<'a> {
    /// The answer of this URL to the access token.
    UserInfo(&'a str),
    /// The claims of the checked ID token.
    IdToken,
    /// The claims of the checked ID token, and the answer of the userinfo endpoint over them; see
    /// [`merged_claims`]. `None`: the discovered endpoint, if there is one.
    IdTokenAndUserInfo(Option<&'a str>),
}

/// The provider's answer cannot be a user's profile.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadProfile {
    /// There is no object.
    #[error("the profile is not an object")]
    NotAnObject,
    /// There is no id.
    #[error("the profile has no id")]
    NoId,
    /// The id is longer than 128 characters, or has control characters.
    #[error("the profile's id is not one that can be kept")]
    BadId,
    /// The userinfo endpoint answered for another user (OpenID Connect Core, section 5.3.2).
    #[error("the profile is of another user than the ID token")]
    OtherSubject,
}

/// An account at a provider.
#[derive(Clone, Debug, PartialEq)]
pub struct Profile {
    /// What the provider calls it; 1 to 128 characters.
    pub id: String,
    /// At most 256 characters, none of which moves others around.
    pub name: Option<String>,
    /// An address that the provider has verified, as far as it says so.
    pub email: Option<String>,
    /// A http or https URL.
    pub avatar: Option<String>,
    /// The whole answer; `{}` if it is too long to keep.
    pub raw: Value,
}

/// Reads a profile from a userinfo answer, or from an ID token's claims.
///
/// # Errors
/// [`BadProfile`] if there is no account in it that could be told from others.
pub fn profile(factory: &Factory, settings: &Settings, userinfo: &Value) -> Result<Profile, BadProfile> {
    if !userinfo.is_object() {
        return Err(BadProfile::NotAnObject);
    }
    let text = |path: &str| at(userinfo, path).and_then(Value::as_str);
    let map = &settings.profile_map;
    let (id, name, email, avatar) = match factory.provider {
        Provider::Github => {
            let name = text("name").and_then(shown_name).or(text("login").and_then(shown_name));
            ("id", name, text("email"), "avatar_url")
        }
        Provider::Facebook => ("id", text("name").and_then(shown_name), text("email"), "picture.data.url"),
        Provider::OAuth2 | Provider::Other => {
            (map.id.as_str(), text(&map.name).and_then(shown_name), text(&map.email), map.avatar.as_str())
        }
        _ => {
            let email = text("email").filter(|_| is_trusted(settings, userinfo));
            ("sub", text("name").and_then(shown_name), email, "picture")
        }
    };
    Ok(Profile {
        id: account_id(at(userinfo, id))?,
        name,
        email: email.filter(|email| is_email(email)).map(str::to_owned),
        avatar: text(avatar).filter(|url| is_picture(url)).map(str::to_owned),
        raw: kept_raw(userinfo),
    })
}

/// The claims of an ID token with those of the userinfo endpoint over them.
///
/// # Errors
/// [`BadProfile::OtherSubject`] unless both are of the same user: the answer could be of a swapped token.
pub fn merged_claims(id_token: &Value, userinfo: &Value) -> Result<Value, BadProfile> {
    let (Value::Object(claims), Value::Object(more)) = (id_token, userinfo) else {
        return Err(BadProfile::NotAnObject);
    };
    match (claims.get("sub"), more.get("sub")) {
        (Some(Value::String(one)), Some(Value::String(other))) if one == other => {}
        _ => return Err(BadProfile::OtherSubject),
    }
    let mut merged = claims.clone();
    // What was verified is the address beside it, not one that another answer brings.
    if more.get("email").is_some_and(|email| Some(email) != claims.get("email")) {
        merged.shift_remove("email_verified");
    }
    merged.extend(more.clone());
    Ok(Value::Object(merged))
}

impl Profile {
    /// The member `details` of an identity.
    pub fn details(&self) -> Value {
        let mut details = Map::new();
        details.insert("id".into(), json!(self.id));
        let members = [("name", &self.name), ("email", &self.email), ("avatar", &self.avatar)];
        for (name, value) in members {
            details.extend(value.as_ref().map(|value| (name.to_owned(), json!(value))));
        }
        details.insert("rawData".into(), self.raw.clone());
        Value::Object(details)
    }
}

/// Follows names, and positions in lists, with dots between them.
fn at<'a>(value: &'a Value, path: &str) -> Option<&'a Value> {
    path.split('.').try_fold(value, |value, name| match value {
        Value::Object(members) => members.get(name),
        Value::Array(items) => items.get(name.parse::<usize>().ok()?),
        _ => None,
    })
}

fn account_id(found: Option<&Value>) -> Result<String, BadProfile> {
    let id = match found {
        Some(Value::String(text)) => text.clone(),
        // A number that went through floating point may have become another one.
        Some(Value::Number(number)) if !number.is_f64() => number.to_string(),
        Some(Value::Number(_)) => return Err(BadProfile::BadId),
        _ => return Err(BadProfile::NoId),
    };
    if id.is_empty() {
        return Err(BadProfile::NoId);
    }
    // White space at the ends would make two accounts that look the same.
    let keeps = id.chars().count() <= LONGEST_ID && !id.contains(char::is_control) && id.trim() == id;
    if keeps { Ok(id) } else { Err(BadProfile::BadId) }
}

fn shown_name(text: &str) -> Option<String> {
    let name: String = text.chars().filter(|c| !is_unseen(*c)).take(LONGEST_NAME).collect();
    let name = name.trim();
    (!name.is_empty()).then(|| name.to_owned())
}

/// Control characters, and those that turn the direction of what stands around them.
fn is_unseen(c: char) -> bool {
    c.is_control() || matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

fn is_email(text: &str) -> bool {
    let has_parts = text.rsplit_once('@').is_some_and(|(user, host)| !user.is_empty() && !host.is_empty());
    has_parts && text.len() <= LONGEST_EMAIL && !text.contains(|c: char| c.is_whitespace() || is_unseen(c))
}

/// It becomes the source of a picture in a page.
fn is_picture(text: &str) -> bool {
    let url = Some(text).filter(|text| text.len() <= LONGEST_URL && !text.contains(char::is_control));
    url.and_then(|text| Url::parse(text).ok()).is_some_and(|url| matches!(url.scheme(), "http" | "https"))
}

fn is_trusted(settings: &Settings, claims: &Value) -> bool {
    settings.trust_unverified_email
        || match claims.get("email_verified") {
            Some(Value::Bool(verified)) => *verified,
            Some(Value::String(text)) => settings.accept_string_booleans && text == "true",
            _ => false,
        }
}

fn kept_raw(userinfo: &Value) -> Value {
    if userinfo.to_string().len() <= LONGEST_RAW { userinfo.clone() } else { json!({}) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokens::providers::{social_factory, sso_provider};

    fn read(factory: &str, more: Value, userinfo: Value) -> Result<Profile, BadProfile> {
        let factory = social_factory(factory).or(sso_provider(factory)).unwrap();
        let mut config = json!({
            "clientId": "c", "clientSecret": "s", "issuer": "https://idp.example",
            "authorizationEndpoint": "https://idp.example/a", "tokenEndpoint": "https://idp.example/t",
            "userInfoEndpoint": "https://idp.example/u",
            "idTokenVerificationConfig": { "jwksUri": "https://idp.example/j" },
        });
        config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        profile(factory, &Settings::read(factory, &config).unwrap(), &userinfo)
    }

    fn details(factory: &str, more: Value, userinfo: Value) -> Value {
        let mut details = read(factory, more, userinfo).unwrap().details();
        details.as_object_mut().unwrap().remove("rawData");
        details
    }

    #[test]
    fn each_provider_is_read_in_its_own_words() {
        let claims = |verified: Value| json!({ "sub": "s", "name": "N", "email": "a@b.c", "email_verified": verified, "picture": "https://p/x" });
        let with_email = json!({ "id": "s", "name": "N", "email": "a@b.c", "avatar": "https://p/x" });
        let without = json!({ "id": "s", "name": "N", "avatar": "https://p/x" });
        let github = json!({ "id": 583_231, "login": "octo", "name": null, "email": null, "avatar_url": "https://p/x" });
        let facebook = json!({ "id": "9", "name": "N", "picture": { "data": { "url": "https://p/x" } } });
        let nested = json!({ "data": { "user": { "uid": "u", "mails": ["a@b.c"] } }, "name": "N" });
        let map = json!({ "profileMap": { "id": "data.user.uid", "email": "data.user.mails.0" } });
        let trust = json!({ "trustUnverifiedEmail": true });
        let strings = json!({ "acceptStringTypedBooleanClaims": true });
        let rows = [
            (
                "github-universal",
                json!({}),
                github,
                json!({ "id": "583231", "name": "octo", "avatar": "https://p/x" }),
            ),
            (
                "facebook-universal",
                json!({}),
                facebook,
                json!({ "id": "9", "name": "N", "avatar": "https://p/x" }),
            ),
            ("oauth2", map, nested, json!({ "id": "u", "name": "N", "email": "a@b.c" })),
            (
                "oauth2",
                json!({}),
                json!({ "id": 7, "avatar": "https://p/x" }),
                json!({ "id": "7", "avatar": "https://p/x" }),
            ),
            ("google-universal", json!({}), claims(json!(true)), with_email.clone()),
            ("google-universal", json!({}), claims(json!(false)), without.clone()),
            ("oidc", json!({}), claims(json!("true")), without.clone()),
            ("oidc", strings.clone(), claims(json!("true")), with_email.clone()),
            ("oidc", strings, claims(json!("false")), without.clone()),
            ("oidc", json!({}), claims(json!(1)), without.clone()),
            ("oidc", trust.clone(), claims(json!(null)), with_email.clone()),
            ("OIDC", json!({}), claims(json!(null)), without),
            ("AzureAdOidc", trust, claims(json!(false)), with_email),
        ];
        for (factory, more, userinfo, expected) in rows {
            assert_eq!(details(factory, more, userinfo.clone()), expected, "{factory}: {userinfo}");
        }
    }

    #[test]
    fn an_id_is_kept_whole_or_refused() {
        let longest = "x".repeat(128);
        let good = [
            (json!("1"), "1"),
            (json!(0), "0"),
            (json!(u64::MAX), "18446744073709551615"),
            (json!(longest), &longest),
        ];
        for (id, expected) in good {
            assert_eq!(read("oauth2", json!({}), json!({ "id": id })).unwrap().id, expected);
        }
        let none = [json!(null), json!(""), json!(true), json!([1]), json!({ "a": 1 })];
        let bad =
            [json!("x".repeat(129)), json!("a\u{0}"), json!("a\n"), json!(" a"), json!(1.5), json!(1e300)];
        for (ids, error) in [(&none[..], BadProfile::NoId), (&bad[..], BadProfile::BadId)] {
            for id in ids {
                assert_eq!(read("oauth2", json!({}), json!({ "id": id })), Err(error), "{id}");
            }
        }
        assert_eq!(read("oidc", json!({}), json!({ "id": "x" })), Err(BadProfile::NoId));
        for not_object in [json!(null), json!([]), json!("x"), json!(1)] {
            assert_eq!(read("oauth2", json!({}), not_object), Err(BadProfile::NotAnObject));
        }
    }

    #[test]
    fn hostile_text_is_dropped_or_cut() {
        let name = |text: &str| read("oauth2", json!({}), json!({ "id": 1, "name": text })).unwrap().name;
        assert_eq!(name(" A\u{0}\u{1b}[31m\u{202e}B\r\n").as_deref(), Some("A[31mB"));
        assert_eq!(name(&"é".repeat(300)).unwrap().chars().count(), 256);
        assert_eq!(name("\u{0} \u{202e}"), None);

        let rest = |member: &str, text: &str| {
            let found = read("oauth2", json!({}), json!({ "id": 1, member: text })).unwrap();
            found.email.or(found.avatar)
        };
        for bad in ["", "a", "@b", "a@", "a b@c", "a@b\n", "a@b\u{202e}", &format!("a@{}", "b".repeat(260))] {
            assert_eq!(rest("email", bad), None, "{bad:?}");
        }
        for bad in [
            "",
            "x",
            "javascript:alert(1)",
            "data:image/png;base64,AA",
            "//p/x",
            "https://p/\n",
            "file:///etc",
        ] {
            assert_eq!(rest("avatar", bad), None, "{bad:?}");
        }
        assert_eq!(rest("avatar", &format!("https://p/{}", "x".repeat(2048))), None);
    }

    #[test]
    fn details_have_the_contracts_order_and_the_raw_answer() {
        let userinfo =
            json!({ "id": "idp-user-1", "name": "N", "email": "a@b.c", "avatar": "https://idp/a.png" });
        let text = read("oauth2", json!({}), userinfo).unwrap().details().to_string();
        let start =
            r#"{"id":"idp-user-1","name":"N","email":"a@b.c","avatar":"https://idp/a.png","rawData":{"id""#;
        assert!(text.starts_with(start), "{text}");
        let long = json!({ "id": 1, "bio": "x".repeat(20_000) });
        assert_eq!(read("oauth2", json!({}), long).unwrap().details(), json!({ "id": "1", "rawData": {} }));
    }

    #[test]
    fn userinfo_is_only_added_for_the_same_subject() {
        let claims = json!({ "sub": "s", "name": "old" });
        let merged = merged_claims(&claims, &json!({ "sub": "s", "name": "new", "email": "a@b.c" })).unwrap();
        assert_eq!(merged, json!({ "sub": "s", "name": "new", "email": "a@b.c" }));
        for other in [json!({ "sub": "t" }), json!({}), json!({ "sub": null }), json!({ "sub": 1 })] {
            assert_eq!(merged_claims(&claims, &other), Err(BadProfile::OtherSubject), "{other}");
        }
        let verified = json!({ "sub": "s", "email": "a@b.c", "email_verified": true });
        for (email, still) in [("a@b.c", true), ("x@y.z", false)] {
            let merged = merged_claims(&verified, &json!({ "sub": "s", "email": email })).unwrap();
            assert_eq!(merged.get("email_verified").is_some(), still, "{email}");
        }
        assert_eq!(merged_claims(&json!({}), &json!({})), Err(BadProfile::OtherSubject));
        assert_eq!(merged_claims(&claims, &json!([])), Err(BadProfile::NotAnObject));
    }
}
