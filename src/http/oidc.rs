//! `/oidc/token`: the token endpoint (RFC 6749, section 4.4; RFC 8693 in `exchange`). The public documents are in
//! `discovery.rs`.
//!
//! Errors have the form of RFC 6749, section 5.2; what goes wrong inside is told as
//! `temporarily_unavailable` or `server_error` and explained in the log only.

mod exchange;

use actix_web::body::BoxBody;
use actix_web::http::StatusCode;
use actix_web::http::header;
use actix_web::web::{self, Bytes, Data, PayloadConfig, ServiceConfig};
use actix_web::{HttpMessage, HttpRequest, HttpResponse, HttpResponseBuilder};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use secrecy::{ExposeSecret, SecretString};
use serde_json::{Value, json};
use url::form_urlencoded;

use crate::audit::AuditCode;
use crate::http::auth::{self, Gate};
use crate::http::body::is_reason;
use crate::http::problem::{Code, Problem, chain, outage_of};
use crate::http::secret_body::{SecretJson, utf8_len};
use crate::ids::ClientId;
use crate::issuer::{ExchangeGrant, ExchangeRequest, Issuer, IssuerError, TokenRequest};

const FORM_LIMIT: usize = 16 << 10;

pub(super) fn routes(cfg: &mut ServiceConfig) {
    cfg.service(web::resource("/oidc/token").app_data(PayloadConfig::new(FORM_LIMIT)).post(token));
}

async fn token(
    request: HttpRequest,
    body: Result<Bytes, actix_web::Error>,
    issuer: Data<Issuer>,
    gate: Data<Gate>,
) -> HttpResponse {
    let used_basic = request.headers().contains_key(header::AUTHORIZATION);
    match answer(&request, body, &issuer, &gate).await {
        Ok(body) => issued(body),
        Err(error) => error.respond(used_basic),
    }
}

async fn answer(
    request: &HttpRequest,
    body: Result<Bytes, actix_web::Error>,
    issuer: &Issuer,
    gate: &Gate,
) -> Result<SecretJson, OauthError> {
    if !request.content_type().eq_ignore_ascii_case("application/x-www-form-urlencoded") {
        return Err(OauthError::request("the body must be application/x-www-form-urlencoded"));
    }
    let body = body.map_err(|_| OauthError::request("the body cannot be read or is too long"))?;
    let wanted = read_request(authorization(request)?, &body)?;
    let client = ClientId::parse(wanted.client_id()).map_err(|_| OauthError::new("invalid_client"))?;
    gate.count_client(&client).await.map_err(OauthError::from_problem)?;
    let id = auth::request_id(request);
    let answer = match wanted {
        Wanted::Token(wanted) => issuer.token(wanted, &id).await.map(|token| {
            let meta =
                json!({ "token_type": "Bearer", "expires_in": token.expires_in, "scope": token.scope });
            with_token(&meta, token.access_token.expose_secret())
        }),
        Wanted::Exchange(wanted) => issuer.exchange(*wanted, &id).await.map(|token| exchange::body(&token)),
    };
    answer.map_err(|error| {
        if matches!(error, IssuerError::InvalidClient) {
            auth::count_failure("invalid-client");
        }
        let answer = OauthError::of(&error);
        if answer.status.is_server_error() {
            tracing::error!(request_id = %id, cause = chain(&error), "no token issued");
        }
        answer
    })
}

/// An answer with its token (RFC 6749, section 5.1).
fn with_token(meta: &Value, token: &str) -> SecretJson {
    let mut body = SecretJson::object(meta, utf8_len(token.as_bytes()));
    body.name("access_token").utf8(token).raw("}");
    body
}

fn issued(body: SecretJson) -> HttpResponse {
    let mut response = HttpResponse::Ok();
    uncached(&mut response)
        .content_type("application/json")
        .message_body(body.finish())
        .map_or_else(|_| HttpResponse::InternalServerError().finish(), HttpResponse::map_into_boxed_body)
}

fn uncached(response: &mut HttpResponseBuilder) -> &mut HttpResponseBuilder {
    // RFC 6749, section 5.1.
    response.insert_header((header::CACHE_CONTROL, "no-store")).insert_header((header::PRAGMA, "no-cache"))
}

/// A client's id and secret as one of the two methods gave them.
type Credential = (String, SecretString);

/// The credential of an `Authorization: Basic` header (RFC 6749, section 2.3.1), if there is one.
fn authorization(request: &HttpRequest) -> Result<Option<Credential>, OauthError> {
    let Some(header) = request.headers().get(header::AUTHORIZATION) else { return Ok(None) };
    let read = || {
        let (scheme, encoded) = header.to_str().ok()?.split_once(' ')?;
        let decoded =
            STANDARD.decode(encoded.trim()).ok().filter(|_| scheme.eq_ignore_ascii_case("basic"))?;
        let (id, secret) = std::str::from_utf8(&decoded).ok()?.split_once(':')?;
        Some((form_decoded(id)?, SecretString::from(form_decoded(secret)?)))
    };
    read().map(Some).ok_or_else(|| {
        OauthError::new("invalid_client").explain("the Authorization header is not understood")
    })
}

/// Undoes `application/x-www-form-urlencoded` for one string; `None` if an escape is incomplete.
fn form_decoded(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'+' => b' ',
            b'%' => {
                let digits = [rest.next()?, rest.next()?];
                let mut decoded = [0];
                hex::decode_to_slice(digits, &mut decoded).ok()?;
                decoded[0]
            }
            other => other,
        });
    }
    String::from_utf8(bytes).ok()
}

#[derive(Default)]
struct Form {
    grant_type: Option<String>,
    client_id: Option<String>,
    client_secret: Option<SecretString>,
    scope: Option<String>,
    resource: Option<String>,
    /// What an exchange has beside these; its credential stays empty.
    exchange: ExchangeRequest,
}

impl Form {
    fn parse(body: &[u8]) -> Result<Self, OauthError> {
        let mut form = Self::default();
        for (name, value) in form_urlencoded::parse(body) {
            // RFC 6749, section 3.2: an empty parameter is absent, an unknown one is ignored, and
            // none may come twice.
            if value.is_empty() {
                continue;
            }
            let value = value.into_owned();
            let repeated = match &*name {
                "grant_type" => form.grant_type.replace(value).is_some(),
                "client_id" => form.client_id.replace(value).is_some(),
                "client_secret" => form.client_secret.replace(SecretString::from(value)).is_some(),
                "scope" => form.scope.replace(value).is_some(),
                "resource" => form.resource.replace(value).is_some(),
                name => exchange::put(&mut form.exchange, name, value),
            };
            if repeated {
                return Err(OauthError::request("a parameter comes twice"));
            }
        }
        Ok(form)
    }
}

/// What is asked for.
enum Wanted {
    Token(TokenRequest),
    Exchange(Box<ExchangeRequest>),
}

impl Wanted {
    fn client_id(&self) -> &str {
        match self {
            Self::Token(request) => &request.client_id,
            Self::Exchange(request) => &request.client_id,
        }
    }
}

fn read_request(basic: Option<Credential>, body: &[u8]) -> Result<Wanted, OauthError> {
    let form = Form::parse(body)?;
    let (client_id, client_secret) = match (basic, form.client_id, form.client_secret) {
        (Some(_), _, Some(_)) => {
            return Err(OauthError::request("one way of client authentication, not two"));
        }
        (Some((id, _)), Some(other), None) if id != other => {
            return Err(OauthError::request("client_id differs from the Authorization header"));
        }
        (Some(credential), _, None) => credential,
        (None, Some(id), Some(secret)) => (id, secret),
        (None, _, _) => {
            return Err(OauthError::new("invalid_client").explain("client authentication is needed"));
        }
    };
    let grant_type = form.grant_type.ok_or_else(|| OauthError::request("grant_type is needed"))?;
    let (scope, resource) = (form.scope, form.resource);
    let Some(grant) = ExchangeGrant::parse(&grant_type) else {
        return Ok(Wanted::Token(TokenRequest { grant_type, client_id, client_secret, scope, resource }));
    };
    let request = ExchangeRequest { client_id, client_secret, grant, scope, resource, ..form.exchange };
    if request.reason.as_deref().is_some_and(|reason| !is_reason(reason)) {
        return Err(OauthError::request("reason: 1 to 256 printable characters"));
    }
    Ok(Wanted::Exchange(Box::new(request)))
}

/// What an error of a lower layer is called, by the name it has in the audit log.
fn outage(audit_code: &str) -> &'static str {
    match outage_of(audit_code) {
        Code::Internal => "server_error",
        _ => "temporarily_unavailable",
    }
}

/// An error of the token endpoint.
#[derive(Debug)]
struct OauthError {
    status: StatusCode,
    error: &'static str,
    description: Option<String>,
    retry_after: Option<u64>,
}

impl OauthError {
    fn new(error: &'static str) -> Self {
        let status = match error {
            "invalid_client" => StatusCode::UNAUTHORIZED,
            "server_error" => StatusCode::INTERNAL_SERVER_ERROR,
            "temporarily_unavailable" => StatusCode::SERVICE_UNAVAILABLE,
            _ => StatusCode::BAD_REQUEST,
        };
        let retry_after = status.is_server_error().then_some(1);
        Self { status, error, description: None, retry_after }
    }

    fn request(description: &str) -> Self {
        Self::new("invalid_request").explain(description)
    }

    fn explain(mut self, description: &str) -> Self {
        self.description = Some(description.to_owned());
        self
    }

    fn from_problem(problem: Problem) -> Self {
        // Only the rate limit speaks before the issuer does.
        let status = problem.code().status();
        Self { status, retry_after: Some(1), ..Self::new("temporarily_unavailable") }
    }

    fn of(error: &IssuerError) -> Self {
        let name = match error {
            IssuerError::Tokens(error) => return exchange::refusal(error),
            IssuerError::UnauthorizedClient => "unauthorized_client",
            IssuerError::InvalidGrant(_) | IssuerError::NoSuchUser => "invalid_grant",
            IssuerError::InvalidClient | IssuerError::NotFound => "invalid_client",
            IssuerError::UnsupportedGrantType => "unsupported_grant_type",
            IssuerError::InvalidScope | IssuerError::Forbidden(_) => "invalid_scope",
            IssuerError::InvalidTarget => "invalid_target",
            IssuerError::Invalid { .. } | IssuerError::Refused(_) => "invalid_request",
            IssuerError::Keys(_) | IssuerError::Audit(_) | IssuerError::Db(_) => outage(error.audit_code()),
        };
        let answer = Self::new(name);
        if answer.status.is_server_error() { answer } else { answer.explain(&error.to_string()) }
    }

    fn respond(&self, used_basic: bool) -> HttpResponse<BoxBody> {
        let mut response = HttpResponse::build(self.status);
        uncached(&mut response);
        if self.status == StatusCode::UNAUTHORIZED && used_basic {
            response.insert_header((header::WWW_AUTHENTICATE, "Basic realm=\"lacre\", charset=\"UTF-8\""));
        }
        if let Some(seconds) = self.retry_after {
            response.insert_header((header::RETRY_AFTER, seconds.to_string()));
        }
        let mut body = json!({ "error": self.error });
        if let Some(description) = &self.description {
            body["error_description"] = json!(description);
        }
        response.json(body)
    }
}

#[cfg(test)]
mod tests {
    use actix_web::test::TestRequest;

    use super::*;

    fn basic(text: &str) -> Result<Option<Credential>, OauthError> {
        let value = format!("Basic {}", STANDARD.encode(text));
        authorization(&TestRequest::default().insert_header(("Authorization", value)).to_http_request())
    }

    fn error(body: &str) -> &'static str {
        read_request(None, body.as_bytes()).err().map_or("none", |error| error.error)
    }

    #[test]
    fn basic_credentials_are_form_decoded() {
        let (id, secret) = basic("a%2Bb:c+d%3a%25").unwrap().unwrap();
        assert_eq!((id.as_str(), secret.expose_secret()), ("a+b", "c d:%"));

        assert!(basic("no-colon").is_err());
        assert!(basic("a:%2").is_err());
        assert!(authorization(&TestRequest::default().to_http_request()).unwrap().is_none());
    }

    #[test]
    fn one_way_of_authentication_is_enough_and_two_are_too_many() {
        let form = b"grant_type=client_credentials&client_id=a&client_secret=s";
        let Wanted::Token(with_form) = read_request(None, form).ok().unwrap() else { panic!("exchange") };
        assert_eq!((with_form.client_id.as_str(), with_form.client_secret.expose_secret()), ("a", "s"));

        let credential = || Some(("a".to_owned(), SecretString::from("s".to_owned())));
        assert_eq!(read_request(credential(), form).err().unwrap().error, "invalid_request");
        assert!(read_request(credential(), b"grant_type=x&client_id=a").is_ok());
        assert_eq!(
            read_request(credential(), b"grant_type=x&client_id=b").err().unwrap().error,
            "invalid_request"
        );
    }

    #[test]
    fn parameters_come_once() {
        assert_eq!(error("grant_type=a&grant_type=b&client_id=a&client_secret=s"), "invalid_request");
        assert_eq!(error("client_id=a&client_secret=s"), "invalid_request");
        assert_eq!(error("grant_type=a&client_id=a"), "invalid_client");
        assert_eq!(
            error("grant_type=a&client_id=a&client_secret=s&scope=&scope=x&unknown=1&unknown=2"),
            "none"
        );
    }

    #[test]
    fn an_exchange_is_asked_for_by_its_grant_type_and_its_parameters_come_once() {
        let form = |rest: &str| {
            format!(
                "client_id=a&client_secret=s&grant_type=urn%3Aietf%3Aparams%3Aoauth%3Agrant-type%3Atoken-exchange{rest}"
            )
        };
        let sent = form(
            "&subject_token=sub_x&subject_token_type=t&scope=openid+identities&connection=github&actor_token=z&login_hint=me",
        );
        let Wanted::Exchange(read) = read_request(None, sent.as_bytes()).ok().unwrap() else {
            panic!("token")
        };

        assert_eq!((read.client_id.as_str(), read.client_secret.expose_secret()), ("a", "s"));
        assert_eq!(read.subject_token.unwrap().expose_secret(), "sub_x");
        assert_eq!(read.subject_token_type.as_deref(), Some("t"));
        assert_eq!((read.scope.as_deref(), read.resource), (Some("openid identities"), None));
        assert_eq!((read.connection.as_deref(), read.audience), (Some("github"), None));
        assert!(read.has_actor);

        assert_eq!(error(&form("&connection=a&connection=b")), "invalid_request");
        assert_eq!(error(&form("&actor_token=a&actor_token=b")), "invalid_request");
        assert_eq!(error(&form("&reason=a%0Ab")), "invalid_request");
        assert_eq!(error(&form(&format!("&reason={}", "x".repeat(257)))), "invalid_request");
        assert_eq!(error(&form("&reason=nightly+sync&subject_token=")), "none");
    }

    #[test]
    fn a_refused_basic_client_is_challenged() {
        let response = OauthError::new("invalid_client").respond(true);
        assert_eq!(response.status(), 401);
        assert!(response.headers().contains_key(header::WWW_AUTHENTICATE));
        assert_eq!(response.headers().get(header::CACHE_CONTROL).unwrap(), "no-store");
        assert!(
            !OauthError::new("invalid_client")
                .respond(false)
                .headers()
                .contains_key(header::WWW_AUTHENTICATE)
        );
    }
}
