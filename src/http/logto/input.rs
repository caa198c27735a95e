//! Bodies and parameters of the Logto family. Unlike the native API it ignores members that it does not know,
//! as Logto does; what it knows is checked, and all mistakes are told at once (contract, section 5.1).

use std::future::{Ready, ready};

use actix_web::dev::Payload;
use actix_web::web::Bytes;
use actix_web::{FromRequest, HttpMessage, HttpRequest};
use futures_util::future::LocalBoxFuture;
use secrecy::SecretString;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use url::form_urlencoded;

use super::error::{ApiError, Issue};

/// The largest whole number that JSON keeps exactly (RFC 8259, section 6): far beyond any span of time here.
const LARGEST: u64 = (1 << 53) - 1;

/// A body that was read and not parsed; none at all stands for `{}`.
pub(super) struct Body {
    bytes: Bytes,
    is_json: bool,
}

impl Body {
    #[cfg(test)]
    pub(super) fn of(text: &str) -> Self {
        Self { bytes: Bytes::copy_from_slice(text.as_bytes()), is_json: true }
    }

    /// Its members.
    ///
    /// # Errors
    /// 400 if it is not a JSON object.
    pub(super) fn members(&self) -> Result<Input, ApiError> {
        if self.bytes.is_empty() {
            return Ok(Input::default());
        }
        if !self.is_json {
            return Err(not_an_object());
        }
        self.members_of_any_type()
    }

    /// Its members, whatever its content type says.
    ///
    /// # Errors
    /// 400 if it is not a JSON object.
    pub(super) fn members_of_any_type(&self) -> Result<Input, ApiError> {
        if self.bytes.is_empty() {
            return Ok(Input::default());
        }
        match serde_json::from_slice(&self.bytes).map_err(|error| ApiError::not_json(&error))? {
            Value::Object(members) => Ok(Input { members, issues: Vec::new() }),
            _ => Err(not_an_object()),
        }
    }

    /// The body of a route of Lacre's own, whose type says what it takes.
    ///
    /// # Errors
    /// 400 if it is not such a `T`.
    pub(super) fn parse<T: DeserializeOwned + Default>(&self) -> Result<T, ApiError> {
        let members = Value::Object(self.members()?.members);
        serde_json::from_value(members).map_err(|_| {
            let rule = "A member is not known or has a wrong form";
            ApiError::invalid_input("body", &[issue("", "custom", rule)])
        })
    }
}

fn not_an_object() -> ApiError {
    ApiError::invalid_input("body", &[issue("", "invalid_type", "Expected a JSON object")])
}

impl FromRequest for Body {
    type Error = ApiError;
    type Future = LocalBoxFuture<'static, Result<Self, ApiError>>;

    fn from_request(request: &HttpRequest, payload: &mut Payload) -> Self::Future {
        let is_json = request.content_type().eq_ignore_ascii_case("application/json");
        let body = Bytes::from_request(request, payload);
        Box::pin(async move {
            let bytes = body.await;
            let bytes =
                bytes.map_err(|error| ApiError::of_status(error.as_response_error().status_code()))?;
            Ok(Self { bytes, is_json })
        })
    }
}

/// The members of a body, taken out one by one; mistakes are gathered.
#[derive(Default)]
pub(super) struct Input {
    members: Map<String, Value>,
    issues: Vec<Issue>,
}

impl Input {
    /// A text that `parse` knows; `None` if it is absent, or wrong, which [`Input::end`] tells.
    pub(super) fn one_of<T>(&mut self, name: &str, parse: fn(&str) -> Option<T>, known: &str) -> Option<T> {
        let value = self.members.get(name)?;
        let parsed = value.as_str().and_then(parse);
        if parsed.is_none() {
            self.issues.push(issue(name, "invalid_enum_value", &format!("Expected {known}")));
        }
        parsed
    }

    /// A whole number that is not negative; `4.0` is one in JSON (RFC 8259 has one kind of number).
    pub(super) fn whole(&mut self, name: &str) -> Option<u64> {
        let value = self.members.get(name)?;
        let whole = value.as_u64().or_else(|| value.as_f64().and_then(whole)).filter(|n| *n <= LARGEST);
        if whole.is_none() {
            let rule = "Expected a whole number that is not negative";
            self.issues.push(issue(name, "invalid_type", rule));
        }
        whole
    }

    /// A text, or `null`, which empties.
    #[expect(clippy::option_option, reason = "absent, null and a text are three things")]
    pub(super) fn nullable_text(&mut self, name: &str) -> Option<Option<String>> {
        match self.members.get(name)? {
            Value::Null => Some(None),
            _ => self.text(name).map(Some),
        }
    }

    /// A list of texts.
    pub(super) fn texts(&mut self, name: &str) -> Option<Vec<String>> {
        let found = self.members.remove(name)?;
        let text = |item: &Value| item.as_str().map(str::to_owned);
        let texts: Option<Vec<_>> = found.as_array().and_then(|items| items.iter().map(text).collect());
        texts.or_else(|| self.mistyped(name, Some(found), "array of strings"))
    }

    /// The members of an object within, to be taken like those of the body; `{}` if it is absent.
    pub(super) fn within(&mut self, name: &str) -> Self {
        Self { members: self.object(name).unwrap_or_default(), issues: Vec::new() }
    }

    /// Takes over what was wrong in an object within; what it has left is returned.
    pub(super) fn close(&mut self, name: &str, inner: Self) -> Map<String, Value> {
        let issues = inner.issues.into_iter();
        self.issues.extend(issues.map(|told| Issue { member: format!("{name}.{}", told.member), ..told }));
        inner.members
    }

    /// A text that is not to be shown.
    pub(super) fn secret(&mut self, name: &str) -> Option<SecretString> {
        match self.members.remove(name) {
            Some(Value::String(text)) => Some(SecretString::from(text)),
            found => self.mistyped(name, found, "string"),
        }
    }

    /// A text, perhaps an empty one.
    pub(super) fn text(&mut self, name: &str) -> Option<String> {
        match self.members.remove(name) {
            Some(Value::String(text)) => Some(text),
            found => self.mistyped(name, found, "string"),
        }
    }

    /// A text that is not empty, under its name or else under one of `aliases`. Mistakes are told of the name.
    pub(super) fn filled_text(&mut self, name: &str, aliases: &[&str]) -> Option<String> {
        let mut names = std::iter::once(&name).chain(aliases);
        let used = names.find(|name| self.members.contains_key(**name)).unwrap_or(&name);
        match self.members.remove(*used) {
            Some(Value::String(text)) if text.is_empty() => {
                self.wrong(name, "too_small", "Expected at least 1 character");
                None
            }
            Some(Value::String(text)) => Some(text),
            found => self.mistyped(name, found, "string"),
        }
    }

    /// A text, or `null` or an empty one, which both empty the member.
    #[expect(clippy::option_option, reason = "what `UserPatch` takes: left as it is, emptied, or set")]
    pub(super) fn text_or_null(&mut self, name: &str) -> Option<Option<String>> {
        match self.members.remove(name) {
            Some(Value::Null) => Some(None),
            Some(Value::String(text)) => Some(Some(text).filter(|text| !text.is_empty())),
            found => self.mistyped(name, found, "string or null"),
        }
    }

    /// `true` or `false`.
    pub(super) fn flag(&mut self, name: &str) -> Option<bool> {
        match self.members.remove(name) {
            Some(Value::Bool(flag)) => Some(flag),
            found => self.mistyped(name, found, "boolean"),
        }
    }

    /// An object of whatever is in it.
    pub(super) fn object(&mut self, name: &str) -> Option<Map<String, Value>> {
        match self.members.remove(name) {
            Some(Value::Object(members)) => Some(members),
            found => self.mistyped(name, found, "object"),
        }
    }

    fn mistyped<T>(&mut self, name: &str, found: Option<Value>, wanted: &str) -> Option<T> {
        if found.is_some() {
            self.wrong(name, "invalid_type", &format!("Expected {wanted}"));
        }
        None
    }

    /// A member breaks a rule that the caller knows.
    pub(super) fn wrong(&mut self, name: &str, code: &'static str, rule: &str) {
        self.issues.push(issue(name, code, rule));
    }

    /// What has to be there.
    pub(super) fn needed<T>(&mut self, name: &str, found: Option<T>) -> Option<T> {
        if found.is_none() && !self.issues.iter().any(|issue| issue.member == name) {
            self.issues.push(issue(name, "invalid_type", "Required"));
        }
        found
    }

    /// To be asked after all members were taken.
    ///
    /// # Errors
    /// `guard.invalid_input` with everything that was wrong.
    pub(super) fn end(self) -> Result<(), ApiError> {
        if self.issues.is_empty() { Ok(()) } else { Err(ApiError::invalid_input("body", &self.issues)) }
    }

    /// [`Input::end`] for a body of which `found` is the one thing that is needed, as [`Input::needed`] gave it.
    ///
    /// # Errors
    /// `guard.invalid_input` with everything that was wrong.
    pub(super) fn end_with<T>(self, found: Option<T>) -> Result<T, ApiError> {
        self.end()?;
        // Nothing that is needed is absent without an issue.
        found.ok_or_else(not_an_object)
    }
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_precision_loss,
    reason = "a whole number within what a double keeps exactly"
)]
fn whole(number: f64) -> Option<u64> {
    (number.fract() == 0.0 && (0.0..=LARGEST as f64).contains(&number)).then_some(number as u64)
}

fn issue(member: &str, code: &'static str, rule: &str) -> Issue {
    Issue { member: member.to_owned(), code, rule: rule.to_owned() }
}

/// `?dryRun=true`: only tell what would come. Lacre's own.
pub(super) struct DryRun(pub(super) bool);

impl FromRequest for DryRun {
    type Error = ApiError;
    type Future = Ready<Result<Self, ApiError>>;

    fn from_request(request: &HttpRequest, _: &mut Payload) -> Self::Future {
        let mut members = form_urlencoded::parse(request.query_string().as_bytes());
        let value = members.find(|(name, _)| name == "dryRun").map(|(_, value)| value);
        // A typing error must not turn a question into a deed.
        ready(match value.as_deref() {
            None | Some("false") => Ok(Self(false)),
            Some("true") => Ok(Self(true)),
            Some(_) => {
                let rule = issue("dryRun", "invalid_enum_value", "Expected true or false");
                Err(ApiError::invalid_input("query", &[rule]))
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use actix_web::test::TestRequest;
    use actix_web::{ResponseError, body::to_bytes};
    use serde_json::json;

    use super::*;
    use crate::keys::Choice;

    fn body(text: &str) -> Body {
        Body::of(text)
    }

    /// `-` where there is none; nothing where the body is refused.
    fn grace(text: &str) -> Option<String> {
        let mut input = body(text).members().ok()?;
        let grace = input.whole("grace");
        input.end().ok().map(|()| grace.map_or_else(|| "-".to_owned(), |grace| grace.to_string()))
    }

    #[test]
    fn a_number_is_whole_and_not_negative() {
        for (text, wanted) in [
            ("", Some("-")),
            ("{}", Some("-")),
            (r#"{"other":-1}"#, Some("-")),
            (r#"{"grace":0}"#, Some("0")),
            (r#"{"grace":7200}"#, Some("7200")),
            (r#"{"grace":7200.0}"#, Some("7200")),
            (r#"{"grace":-1}"#, None),
            (r#"{"grace":-0.5}"#, None),
            (r#"{"grace":1.5}"#, None),
            (r#"{"grace":"1"}"#, None),
            (r#"{"grace":null}"#, None),
            (r#"{"grace":1e300}"#, None),
            (r#"{"grace":18446744073709551615}"#, None),
            ("[]", None),
            ("{", None),
        ] {
            assert_eq!(grace(text).as_deref(), wanted, "{text}");
        }
    }

    #[actix_web::test]
    async fn all_mistakes_are_told_at_once_and_no_value_is_shown() {
        let sent = body(r#"{"alg":"hunter2","grace":-1}"#);
        let mut input = sent.members().unwrap();
        assert!(input.one_of("alg", Choice::parse, "EC or RSA").is_none());
        assert!(input.whole("grace").is_none());
        let pem = input.secret("pem");
        assert!(input.needed("pem", pem).is_none());

        let response = input.end().unwrap_err().error_response();
        let text = to_bytes(response.into_body()).await.unwrap();
        let told: Value = serde_json::from_slice(&text).unwrap();
        let members = told["data"]["issues"].as_array().unwrap().iter();
        let members: Vec<_> = members.map(|issue| issue["path"][0].as_str().unwrap()).collect();
        assert_eq!(members, ["alg", "grace", "pem"]);
        assert_eq!(told["details"].as_str().unwrap().lines().count(), 3);
        assert!(!told.to_string().contains("hunter2"));
    }

    #[test]
    fn what_is_within_is_told_with_its_path_and_its_other_members_are_left() {
        let sent =
            body(r#"{"a":{"on":1,"uris":["x",2],"more":true},"b":{"on":true},"c":[],"d":null,"e":"x"}"#);
        let mut input = sent.members().unwrap();
        let mut inner = input.within("a");
        assert_eq!((inner.flag("on"), inner.texts("uris")), (None, None));
        assert_eq!(json!(input.close("a", inner)), json!({ "more": true }));
        let mut inner = input.within("b");
        assert_eq!((inner.flag("on"), inner.flag("off")), (Some(true), None));
        assert!(input.close("b", inner).is_empty());
        assert!(input.object("c").is_none() && input.object("nothing").is_none());
        assert_eq!((input.nullable_text("d"), input.nullable_text("f")), (Some(None), None));
        assert_eq!((input.nullable_text("e"), input.text("g")), (Some(Some("x".to_owned())), None));

        let members: Vec<_> = input.issues.iter().map(|issue| issue.member.as_str()).collect();
        assert_eq!(members, ["a.on", "a.uris", "c"]);
    }

    #[actix_web::test]
    async fn malformed_json_has_a_message_and_no_code() {
        let response = body("{").members().err().unwrap().error_response();
        assert_eq!(response.status(), 400);
        let told: Value = serde_json::from_slice(&to_bytes(response.into_body()).await.unwrap()).unwrap();
        assert!(told["message"].is_string());
        assert_eq!(told.as_object().unwrap().len(), 1, "{told}");
        assert!(Body { bytes: Bytes::from_static(b"a=b"), is_json: false }.members().is_err());
        assert_eq!(json!(body("").members().unwrap().members), json!({}));
    }

    #[test]
    fn of_two_names_the_first_wins_and_a_mistake_is_told_of_it() {
        let read = |text: &str| {
            let mut input = body(text).members().unwrap();
            let found = input.filled_text("new", &["old"]);
            let found = input.needed("new", found);
            input.end_with(found).map_err(|error| format!("{error:?}").contains("key path \\\"new\\\""))
        };
        assert_eq!(read(r#"{"old":"a"}"#).unwrap(), "a");
        assert_eq!(read(r#"{"old":"a","new":"b"}"#).unwrap(), "b");
        assert_eq!(read(r#"{"old":1,"new":"b"}"#).unwrap(), "b");
        for text in
            ["{}", r#"{"old":""}"#, r#"{"new":"","old":"a"}"#, r#"{"new":1,"old":"a"}"#, r#"{"old":[]}"#]
        {
            assert_eq!(read(text), Err(true), "{text}");
        }
    }

    #[test]
    fn types_are_told_and_null_is_only_taken_where_it_empties() {
        let mut input = body(r#"{"a":null,"b":"","c":null,"d":1,"e":[1],"f":{}}"#).members().unwrap();
        assert_eq!(input.text_or_null("a"), Some(None));
        assert_eq!(input.text_or_null("b"), Some(None));
        assert_eq!(input.text_or_null("nowhere"), None);
        assert_eq!(input.text("c"), None);
        assert_eq!(input.flag("d"), None);
        assert_eq!(input.texts("e"), None);
        assert_eq!(input.object("f"), Some(Map::new()));
        assert_eq!(input.issues.len(), 3);
    }

    #[test]
    fn a_body_that_is_an_object_may_lack_its_type() {
        let untyped =
            |text: &'static str| Body { bytes: Bytes::from_static(text.as_bytes()), is_json: false };
        assert_eq!(untyped(r#"{"a":"b"}"#).members_of_any_type().unwrap().text("a").as_deref(), Some("b"));
        assert!(untyped(r#"{"a":"b"}"#).members().is_err());
        assert!(untyped("a=b").members_of_any_type().is_err());
        assert!(untyped("[]").members_of_any_type().is_err());
    }

    #[actix_web::test]
    async fn a_dry_run_is_asked_for_in_one_way() {
        let read = async |query: &str| {
            let request = TestRequest::with_uri(&format!("/x{query}")).to_http_request();
            DryRun::extract(&request).await.ok().map(|dry| dry.0)
        };
        assert_eq!(read("").await, Some(false));
        assert_eq!(read("?other=1&dryRun=true").await, Some(true));
        assert_eq!(read("?dryRun=false").await, Some(false));
        assert_eq!(read("?dryRun=1").await, None);
        assert_eq!(read("?dryRun").await, None);
    }
}
