//! `/api/verifications`: proofs with a short life (contract, sections 7.7 and 7.8). `/sso` is Lacre's own.

use actix_web::HttpResponse;
use actix_web::web::{self, Data, ServiceConfig};
use serde_json::json;

use super::error::{ApiError, tokens as errors};
use super::input::Body;
use crate::identity::UserCaller;
use crate::tokens::{Family, StartVerification, Tokens};

pub(super) fn routes(cfg: &mut ServiceConfig) {
    cfg.service(web::resource("/social").post(start_social))
        .service(web::resource("/social/verify").post(verify_social))
        .service(web::resource("/sso").post(start_sso))
        .service(web::resource("/sso/verify").post(verify_sso))
        .service(web::resource("/password").post(password));
}

async fn start_social(
    person: UserCaller,
    tokens: Data<Tokens>,
    body: Body,
) -> Result<HttpResponse, ApiError> {
    started(&person, &tokens, &body, Family::Social).await
}

async fn start_sso(person: UserCaller, tokens: Data<Tokens>, body: Body) -> Result<HttpResponse, ApiError> {
    started(&person, &tokens, &body, Family::Sso).await
}

async fn started(
    person: &UserCaller,
    tokens: &Tokens,
    body: &Body,
    family: Family,
) -> Result<HttpResponse, ApiError> {
    let start = read_start(body, family)?;
    let started = tokens.start_verification(person, start).await.map_err(errors::told(family))?;
    Ok(HttpResponse::Created().json(json!({
        "verificationRecordId": started.id,
        "authorizationUri": started.authorization_uri,
        "expiresAt": in_millis(&started.expires_at.to_rfc3339()),
    })))
}

// Empty texts pass: `session.insufficient_info` is the service's to say.
fn read_start(body: &Body, family: Family) -> Result<StartVerification, ApiError> {
    let mut input = body.members()?;
    let mut text = |name: &str| {
        let found = input.text(name);
        input.needed(name, found)
    };
    let (connector, state, redirect_uri) = (text("connectorId"), text("state"), text("redirectUri"));
    let scope = input.text("scope");
    let start = connector.zip(state).zip(redirect_uri);
    let ((connector, state), redirect_uri) = input.end_with(start)?;
    Ok(StartVerification { family, connector, state, redirect_uri, scope })
}

async fn verify_social(
    person: UserCaller,
    tokens: Data<Tokens>,
    body: Body,
) -> Result<HttpResponse, ApiError> {
    verified(&person, &tokens, &body, Family::Social).await
}

async fn verify_sso(person: UserCaller, tokens: Data<Tokens>, body: Body) -> Result<HttpResponse, ApiError> {
    verified(&person, &tokens, &body, Family::Sso).await
}

async fn verified(
    person: &UserCaller,
    tokens: &Tokens,
    body: &Body,
    family: Family,
) -> Result<HttpResponse, ApiError> {
    // Logto's own example sends no content type.
    let mut input = body.members_of_any_type()?;
    let record = input.filled_text("verificationRecordId", &["verificationId"]);
    let record = input.needed("verificationRecordId", record);
    let data = input.object("connectorData");
    let data = input.needed("connectorData", data);
    let (record, data) = input.end_with(record.zip(data))?;
    let id = tokens.verify(person, family, &record, &data).await.map_err(errors::of_exchange(family))?;
    Ok(HttpResponse::Ok().json(json!({ "verificationRecordId": id })))
}

async fn password(person: UserCaller, tokens: Data<Tokens>, body: Body) -> Result<HttpResponse, ApiError> {
    let mut input = body.members()?;
    let password = input.secret("password");
    let password = input.needed("password", password);
    let password = input.end_with(password)?;
    let (id, expires_at) = tokens.verify_password(&person, password).await?;
    let expires_at = in_millis(&expires_at.to_rfc3339());
    Ok(HttpResponse::Created().json(json!({ "verificationRecordId": id, "expiresAt": expires_at })))
}

/// A time as JavaScript writes it: three digits behind the point.
fn in_millis(micros: &str) -> String {
    match micros.strip_suffix('Z').and_then(|text| text.rsplit_once('.')) {
        Some((seconds, fraction)) => format!("{seconds}.{fraction:.3}Z"),
        None => micros.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::logto::users::tests::at;
    use crate::tokens::StartedVerification;

    #[test]
    fn a_time_has_three_digits_behind_the_point() {
        let started = StartedVerification {
            id: crate::ids::VerificationId::generate(),
            authorization_uri: String::new(),
            expires_at: at(1_795_348_208_856),
        };
        assert_eq!(in_millis(&started.expires_at.to_rfc3339()), "2026-11-22T11:50:08.856Z");
        let whole: StartedVerification = StartedVerification { expires_at: at(0), ..started };
        assert_eq!(in_millis(&whole.expires_at.to_rfc3339()), "1970-01-01T00:00:00.000Z");
    }
}
