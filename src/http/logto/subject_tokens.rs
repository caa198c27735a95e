//! `/api/subject-tokens`: tokens that stand for a user until they are exchanged (contract, section 4.4).

use actix_web::HttpResponse;
use actix_web::middleware::from_fn;
use actix_web::web::{self, Data, ServiceConfig};
use secrecy::ExposeSecret;
use serde_json::json;

use super::error::ApiError;
use super::input::Body;
use super::{management, nothing_here};
use crate::http::secret_body::SecretJson;
use crate::identity::Caller;
use crate::ids::UserId;
use crate::issuer::{Issuer, IssuerError};

pub(super) fn routes(cfg: &mut ServiceConfig) {
    let tokens = web::scope("/subject-tokens")
        .wrap(from_fn(management::authenticate))
        .service(web::resource("").post(create))
        .default_service(web::to(nothing_here));
    cfg.service(tokens);
}

async fn create(caller: Caller, issuer: Data<Issuer>, body: Body) -> Result<HttpResponse, ApiError> {
    let mut input = body.members()?;
    let user = input.text("userId");
    let user = input.needed("userId", user);
    // For claims of users' JWTs, which are not offered: checked, and kept nowhere.
    input.object("context");
    input.end()?;
    // An id that cannot be is one that nobody has.
    let user = UserId::parse(&user.unwrap_or_default()).map_err(|_| IssuerError::NoSuchUser)?;
    let made = issuer.issue_subject_token(&caller, &user).await?;
    let token = made.token.expose_secret();
    let mut json = SecretJson::object(&json!({}), token.len() + 32);
    json.name("subjectToken").utf8(token).name("expiresIn").raw(&made.expires_in.to_string()).raw("}");
    Ok(json.finish().respond(HttpResponse::Created(), "application/json"))
}
