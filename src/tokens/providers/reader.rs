//! Reads the members of a configuration, each by its rule.

use serde_json::{Map, Value};
use url::Url;

const LONGEST_TEXT: usize = 2048;
pub(super) const MOST_PARAMETERS: usize = 32;

/// Parameters that the program sets itself. One of these in a configuration could send a code elsewhere, or
/// replace the whole request (`request`, `request_uri`: RFC 9101).
const RESERVED: [&str; 22] = [
    "response_type",
    "client_id",
    "client_secret",
    "scope",
    "redirect_uri",
    "state",
    "nonce",
    "code_challenge",
    "code_challenge_method",
    "code_verifier",
    "code",
    "grant_type",
    "refresh_token",
    "access_token",
    "id_token",
    "client_assertion",
    "client_assertion_type",
    "assertion",
    "request",
    "request_uri",
    "registration",
    "fb_exchange_token",
];

/// The configuration breaks a rule.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{member}` {rule}")]
pub struct BadConfig {
    /// Where, as a path with dots.
    pub member: String,
    /// The rule, to be read after the member's name. Never quotes a value.
    pub rule: String,
}

/// Whether the text is a `scope` (RFC 6749, appendix A.4), and not too long. Providers that want commas get them.
pub fn is_scope(text: &str) -> bool {
    let allowed = |byte: u8| (b' '..=b'~').contains(&byte) && byte != b'"' && byte != b'\\';
    !text.is_empty() && text.len() <= LONGEST_TEXT && text.bytes().all(allowed)
}

pub(super) fn bad(member: &str, rule: &str) -> BadConfig {
    BadConfig { member: member.to_owned(), rule: rule.to_owned() }
}

/// Whether this is text that may go into a request.
pub(super) fn is_text(text: &str) -> bool {
    !text.is_empty() && text.chars().count() <= LONGEST_TEXT && !text.contains(char::is_control)
}

/// An address that may be called, or that a user may be sent to: discovered ones are checked by this, too.
pub(super) fn check_url(member: &str, text: &str) -> Result<Url, BadConfig> {
    let rule = "must be a http or https URL without user, password and fragment";
    // The parser drops white space inside; what is checked here must be what is sent later.
    let url = Some(text).filter(|text| is_text(text) && text.bytes().all(|byte| byte.is_ascii_graphic()));
    let url = url.and_then(|text| Url::parse(text).ok()).filter(|url| {
        let plain = url.username().is_empty() && url.password().is_none() && url.fragment().is_none();
        matches!(url.scheme(), "http" | "https") && url.has_host() && plain
    });
    url.ok_or_else(|| bad(member, rule))
}

/// The endpoint's own query is kept, so it must not say what the program says.
pub(super) fn no_reserved_query(member: &str, endpoint: &str) -> Result<(), BadConfig> {
    let url = check_url(member, endpoint)?;
    match url.query_pairs().find(|(name, _)| RESERVED.contains(&name.as_ref())) {
        Some(_) => Err(bad(member, "must not have a parameter of the protocol in its query")),
        None => Ok(()),
    }
}

/// As Logto names parameters: `maxAge` and `max-age` are sent as `max_age`.
fn snake_case(name: &str) -> String {
    let mut out = String::with_capacity(name.len() + 4);
    let mut chars = name.chars().peekable();
    let mut before: Option<char> = None;
    while let Some(c) = chars.next() {
        let begins = match before {
            Some(b) if c.is_ascii_uppercase() => {
                let next_is_lower = chars.peek().is_some_and(char::is_ascii_lowercase);
                b.is_ascii_lowercase() || b.is_ascii_digit() || (b.is_ascii_uppercase() && next_is_lower)
            }
            _ => false,
        };
        if begins {
            out.push('_');
        }
        out.push(if matches!(c, '-' | '.') { '_' } else { c.to_ascii_lowercase() });
        before = Some(c);
    }
    out
}

/// Reads members of one object; `path` is put before their names in errors.
pub(super) struct Reader<'a> {
    members: &'a Map<String, Value>,
    path: &'static str,
}

impl<'a> Reader<'a> {
    pub(super) fn new(members: &'a Map<String, Value>) -> Self {
        Self { members, path: "" }
    }

    pub(super) fn bad(&self, member: &str, rule: &str) -> BadConfig {
        BadConfig { member: format!("{}{member}", self.path), rule: rule.to_owned() }
    }

    pub(super) fn value(&self, member: &str) -> Option<&'a Value> {
        let present = |value: &&Value| !value.is_null() && value.as_str() != Some("");
        self.members.get(member).filter(present)
    }

    pub(super) fn required<T>(&self, member: &str, found: Option<T>) -> Result<T, BadConfig> {
        found.ok_or_else(|| self.bad(member, "is required"))
    }

    pub(super) fn text(&self, member: &str) -> Result<Option<String>, BadConfig> {
        let Some(value) = self.value(member) else { return Ok(None) };
        let text = value.as_str().filter(|text| is_text(text));
        let rule = "must be a text of at most 2048 characters without control characters";
        text.map(|text| Some(text.to_owned())).ok_or_else(|| self.bad(member, rule))
    }

    pub(super) fn url(&self, member: &str) -> Result<Option<String>, BadConfig> {
        let Some(text) = self.text(member)? else { return Ok(None) };
        check_url(&format!("{}{member}", self.path), &text)?;
        Ok(Some(text))
    }

    pub(super) fn issuer(&self, member: &str) -> Result<Option<String>, BadConfig> {
        // Logto lets this be a list; one issuer per connector is what keeps providers apart (RFC 9207).
        if let Some([Value::String(only)]) = self.value(member).and_then(Value::as_array).map(Vec::as_slice) {
            check_url(&format!("{}{member}", self.path), only)?;
            return Ok(Some(only.clone()));
        }
        let issuer = self.url(member)?;
        // RFC 8414, section 2.
        match issuer.as_deref().is_some_and(|issuer| issuer.contains('?')) {
            true => Err(self.bad(member, "must not have a query")),
            false => Ok(issuer),
        }
    }

    pub(super) fn scope(&self, member: &str) -> Result<Option<String>, BadConfig> {
        let Some(text) = self.text(member)? else { return Ok(None) };
        let rule = "must be printable ASCII without quotes and backslashes";
        if is_scope(&text) { Ok(Some(text)) } else { Err(self.bad(member, rule)) }
    }

    pub(super) fn flag(&self, member: &str) -> Result<Option<bool>, BadConfig> {
        let Some(value) = self.value(member) else { return Ok(None) };
        value.as_bool().map(Some).ok_or_else(|| self.bad(member, "must be true or false"))
    }

    pub(super) fn choice<T: Copy>(
        &self,
        member: &str,
        choices: &[(&str, T)],
    ) -> Result<Option<T>, BadConfig> {
        let Some(value) = self.value(member) else { return Ok(None) };
        let chosen = choices.iter().find(|(name, _)| value.as_str() == Some(name));
        let names = || choices.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ");
        let chosen = chosen.map(|(_, choice)| Some(*choice));
        chosen.ok_or_else(|| self.bad(member, &format!("must be one of {}", names())))
    }

    pub(super) fn inner(&self, member: &str, path: &'static str) -> Result<Option<Self>, BadConfig> {
        match self.value(member) {
            None => Ok(None),
            Some(Value::Object(members)) => Ok(Some(Self { members, path })),
            Some(_) => Err(self.bad(member, "must be an object")),
        }
    }

    pub(super) fn parameters(&self, member: &'static str) -> Result<Vec<(String, String)>, BadConfig> {
        let Some(given) = self.inner(member, "")? else { return Ok(Vec::new()) };
        if given.members.len() > MOST_PARAMETERS {
            return Err(self.bad(member, "must have at most 32 members"));
        }
        let mut parameters = Vec::new();
        for (name, value) in given.members {
            // RFC 6749, appendix A: the characters of a parameter's name.
            let nameable = |c: char| c.is_ascii_alphanumeric() || "-._".contains(c);
            if name.is_empty() || name.len() > 128 || !name.chars().all(nameable) {
                return Err(self.bad(member, "has a name that is not one of a parameter"));
            }
            let value = match value {
                Value::Null => continue,
                Value::String(text) => text.clone(),
                Value::Bool(_) | Value::Number(_) => value.to_string(),
                Value::Array(_) | Value::Object(_) => return Err(bad_in(member, name, "must be a text")),
            };
            if !value.is_empty() && !is_text(&value) {
                return Err(bad_in(member, name, "must be a text of at most 2048 characters"));
            }
            let sent = snake_case(name);
            if RESERVED.contains(&sent.as_str()) {
                return Err(bad_in(member, name, "is a parameter that is set already"));
            }
            if parameters.iter().any(|(there, _)| *there == sent) {
                return Err(bad_in(member, name, "is there twice"));
            }
            parameters.push((sent, value));
        }
        Ok(parameters)
    }
}

fn bad_in(member: &str, name: &str, rule: &str) -> BadConfig {
    bad(&format!("{member}.{name}"), rule)
}
