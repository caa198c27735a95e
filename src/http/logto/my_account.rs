//! `/api/my-account`: what a person sees and changes of the own account (contract, sections 7.5, 7.6 and 7.9).
//!
//! The only place of the family where token values leave: the service has recorded the release before it
//! returns, and the answer is kept by nobody. Routes for enterprises' identities other than the access token's
//! GET are Lacre's own.

use actix_web::body::BoxBody;
use actix_web::http::header;
use actix_web::web::{self, Data, Path, ServiceConfig};
use actix_web::{HttpRequest, HttpResponse};

use super::error::{ApiError, tokens as errors};
use super::input::Body;
use super::query::connection;
use super::users::{self, May};
use crate::http::secret_body::{SecretBody, SecretJson, utf8_len};
use crate::identity::{UserCaller, UserScope};
use crate::tokens::{Connection, Family, LinkAs, Released, Tokens};

/// More than names, punctuation and a number take in an answer with a token.
const AROUND: usize = 128;

/// The proof that the person is there.
const PROOF: &str = "logto-verification-id";

pub(super) fn routes(cfg: &mut ServiceConfig) {
    let social = web::resource("/identities/{target}/access-token");
    let sso = web::resource("/sso-identities/{connectorId}/access-token");
    cfg.service(web::resource("").get(me))
        .service(web::resource("/identities").post(link).put(replace))
        .service(web::resource("/identities/{target}").delete(unlink))
        .service(social.get(token).put(renew).patch(renew))
        .service(web::resource("/sso-identities").post(link_sso))
        .service(web::resource("/sso-identities/{connectorId}").delete(unlink_sso))
        .service(sso.get(token_sso).put(renew_sso).patch(renew_sso));
}

async fn me(person: UserCaller, tokens: Data<Tokens>) -> Result<HttpResponse, ApiError> {
    let (user, identities) = tokens.me(&person).await?;
    let may = May {
        profile: person.scopes.contains(UserScope::Profile),
        identities: person.scopes.contains(UserScope::Identities),
    };
    Ok(HttpResponse::Ok().json(users::scoped(&user, &identities, &person.caller.tenant, may)))
}

fn proof(request: &HttpRequest) -> Option<&str> {
    request.headers().get(PROOF).and_then(|value| value.to_str().ok()).filter(|proof| !proof.is_empty())
}

async fn link(
    person: UserCaller,
    tokens: Data<Tokens>,
    request: HttpRequest,
    body: Body,
) -> Result<HttpResponse, ApiError> {
    linked(&person, &tokens, &request, &body, (Family::Social, LinkAs::New)).await
}

async fn replace(
    person: UserCaller,
    tokens: Data<Tokens>,
    request: HttpRequest,
    body: Body,
) -> Result<HttpResponse, ApiError> {
    linked(&person, &tokens, &request, &body, (Family::Social, LinkAs::Replacement)).await
}

async fn link_sso(
    person: UserCaller,
    tokens: Data<Tokens>,
    request: HttpRequest,
    body: Body,
) -> Result<HttpResponse, ApiError> {
    linked(&person, &tokens, &request, &body, (Family::Sso, LinkAs::New)).await
}

async fn linked(
    person: &UserCaller,
    tokens: &Tokens,
    request: &HttpRequest,
    body: &Body,
    (family, link_as): (Family, LinkAs),
) -> Result<HttpResponse, ApiError> {
    let mut input = body.members()?;
    let record = input.text("newIdentifierVerificationRecordId");
    let record = input.needed("newIdentifierVerificationRecordId", record);
    let record = input.end_with(record)?;
    tokens.link(person, family, &record, proof(request), link_as).await.map_err(errors::of_link)?;
    Ok(HttpResponse::NoContent().finish())
}

async fn unlink(
    person: UserCaller,
    tokens: Data<Tokens>,
    request: HttpRequest,
    target: Path<String>,
) -> Result<HttpResponse, ApiError> {
    unlinked(&person, &tokens, &request, &connection(Family::Social, &target)).await
}

async fn unlink_sso(
    person: UserCaller,
    tokens: Data<Tokens>,
    request: HttpRequest,
    connector: Path<String>,
) -> Result<HttpResponse, ApiError> {
    unlinked(&person, &tokens, &request, &connection(Family::Sso, &connector)).await
}

async fn unlinked(
    person: &UserCaller,
    tokens: &Tokens,
    request: &HttpRequest,
    connection: &Connection,
) -> Result<HttpResponse, ApiError> {
    tokens.unlink(person, connection, proof(request)).await.map_err(errors::of_unlink)?;
    Ok(HttpResponse::NoContent().finish())
}

async fn token(
    person: UserCaller,
    tokens: Data<Tokens>,
    target: Path<String>,
) -> Result<HttpResponse, ApiError> {
    let released = tokens.access_token(&person, &connection(Family::Social, &target)).await;
    Ok(released_json(&released.map_err(errors::of_token(Family::Social))?))
}

async fn token_sso(
    person: UserCaller,
    tokens: Data<Tokens>,
    connector: Path<String>,
) -> Result<HttpResponse, ApiError> {
    let released = tokens.access_token(&person, &connection(Family::Sso, &connector)).await;
    Ok(released_json(&released.map_err(errors::of_token(Family::Sso))?))
}

async fn renew(
    person: UserCaller,
    tokens: Data<Tokens>,
    target: Path<String>,
    body: Body,
) -> Result<HttpResponse, ApiError> {
    renewed(&person, &tokens, &connection(Family::Social, &target), &body).await
}

async fn renew_sso(
    person: UserCaller,
    tokens: Data<Tokens>,
    connector: Path<String>,
    body: Body,
) -> Result<HttpResponse, ApiError> {
    renewed(&person, &tokens, &connection(Family::Sso, &connector), &body).await
}

async fn renewed(
    person: &UserCaller,
    tokens: &Tokens,
    connection: &Connection,
    body: &Body,
) -> Result<HttpResponse, ApiError> {
    let mut input = body.members()?;
    // The real name, and the one of Logto's documents.
    let record = input.filled_text("verificationRecordId", &["socialVerificationId"]);
    let record = input.needed("verificationRecordId", record);
    let record = input.end_with(record)?;
    let released = tokens.renew(person, connection, &record).await;
    Ok(released_json(&released.map_err(errors::of_token(connection.family))?))
}

fn released_json(released: &Released) -> HttpResponse<BoxBody> {
    let known = Known {
        scope: released.scope(),
        token_type: released.token_type(),
        expires_in: released.expires_in(),
    };
    let body = released.with_access_token(|token| known.beside(token));
    let mut response = HttpResponse::Ok();
    response.insert_header((header::CACHE_CONTROL, "no-store")).content_type("application/json");
    let response = response.message_body(body);
    response.map_or_else(|_| HttpResponse::InternalServerError().finish(), HttpResponse::map_into_boxed_body)
}

/// What is known of an access token.
struct Known<'a> {
    scope: Option<&'a str>,
    token_type: Option<&'a str>,
    expires_in: Option<u64>,
}

impl Known<'_> {
    /// The answer with the token first, as Logto writes it. What is not known is omitted.
    fn beside(&self, token: &str) -> SecretBody {
        let known = [self.scope, self.token_type].into_iter().flatten();
        let texts: usize = known.chain([token]).map(|text| utf8_len(text.as_bytes())).sum();
        let mut json = SecretJson::with_capacity(texts + AROUND);
        json.raw("{").name("access_token").utf8(token);
        for (name, text) in [("scope", self.scope), ("token_type", self.token_type)] {
            if let Some(text) = text {
                json.name(name).utf8(text);
            }
        }
        if let Some(seconds) = self.expires_in {
            json.name("expires_in").raw(&seconds.to_string());
        }
        json.raw("}");
        json.finish()
    }
}

#[cfg(test)]
mod tests {
    use actix_web::test::TestRequest;

    use super::*;

    #[test]
    fn an_access_token_comes_first_and_what_is_not_known_is_omitted() {
        let all =
            Known { scope: Some("read \"write\""), token_type: Some("bearer"), expires_in: Some(u64::MAX) };
        let wanted = concat!(
            r#"{"access_token":"at-1","scope":"read \"write\"","token_type":"bearer","#,
            r#""expires_in":18446744073709551615}"#,
        );
        assert_eq!(all.beside("at-1").bytes(), wanted.as_bytes());
        assert!(wanted.len() < AROUND, "names, punctuation and number never make the buffer grow");

        let nothing = Known { scope: None, token_type: None, expires_in: None };
        assert_eq!(nothing.beside("at-1").bytes(), br#"{"access_token":"at-1"}"#);
    }

    #[test]
    fn a_proof_is_a_header_that_says_something() {
        let sent = |value: &str| TestRequest::default().insert_header((PROOF, value)).to_http_request();
        assert_eq!(proof(&sent("ourlea2na1d2w4a3ep806")), Some("ourlea2na1d2w4a3ep806"));
        assert_eq!(proof(&sent("")), None);
        assert_eq!(proof(&TestRequest::default().to_http_request()), None);
    }
}
