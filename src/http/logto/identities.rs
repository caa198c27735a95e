//! A user's accounts at other providers and the metadata of their token sets, for administrators (contract,
//! sections 7.1 to 7.3 and 7.9).
//!
//! `expiresAt` is in seconds, every other time in milliseconds. What is absent is omitted. Lacre's own members
//! come last. Token values are in none of these answers.

use actix_web::http::StatusCode;
use actix_web::web::{self, Data, Path, ServiceConfig};
use actix_web::{HttpRequest, HttpResponse};
use serde_json::{Map, Value, json};

use super::error::{ApiError, tokens as errors};
use super::input::Body;
use super::millis;
use super::query::{connection, says_yes, user_id};
use super::users;
use crate::identity::Caller;
use crate::ids::TenantId;
use crate::tokens::{Connection, Family, Identity, Status, TokenSetInfo, Tokens, TokensError, User};

/// The one kind of secret that Logto knows.
const KIND: &str = "federated_token_set";

const INCLUDE: &str = "includeTokenSecret";

pub(super) fn routes(cfg: &mut ServiceConfig) {
    cfg.service(web::resource("/{userId}/identities").post(link))
        .service(web::resource("/{userId}/identities/{target}").get(one_social).put(put).delete(remove))
        .service(web::resource("/{userId}/sso-identities/{connectorId}").get(one_sso).delete(remove_sso))
        .service(web::resource("/{userId}/all-identities").get(all));
}

/// An identity as it is inside a user.
fn social(identity: &Identity) -> Value {
    let mut shown = json!({ "userId": identity.identity_id });
    if !identity.details.is_null() {
        shown["details"] = identity.details.clone();
    }
    shown
}

/// The social ones among `identities`, by target.
pub(super) fn social_map(identities: &[Identity]) -> Value {
    let found = identities.iter().filter(|identity| identity.family == Family::Social);
    found.map(|identity| (identity.target.clone(), social(identity))).collect::<Map<_, _>>().into()
}

pub(super) fn sso(tenant: &TenantId, identity: &Identity) -> Value {
    let mut shown = json!({ "tenantId": tenant, "id": identity.id, "userId": identity.user });
    if let Some(issuer) = &identity.issuer {
        shown["issuer"] = json!(issuer);
    }
    shown["identityId"] = json!(identity.identity_id);
    shown["detail"] = users::object_of(&identity.details);
    shown["createdAt"] = json!(millis(identity.created_at.as_micros()));
    shown["updatedAt"] = json!(millis(identity.updated_at.as_micros()));
    shown["ssoConnectorId"] = json!(identity.target);
    shown
}

/// `tokenSecret`.
fn token_secret(tenant: &TenantId, set: &TokenSetInfo) -> Value {
    let mut shown = json!({
        "tenantId": tenant,
        "id": set.id,
        "userId": set.user,
        "type": KIND,
        "metadata": metadata(set),
        "createdAt": millis(set.created_at.as_micros()),
        "updatedAt": millis(set.updated_at.as_micros()),
    });
    let mut put = |name: &str, value: Value| shown[name] = value;
    match set.family {
        Family::Social => {
            put("connectorId", json!(set.connector));
            put("identityId", json!(set.identity_id));
            put("target", json!(set.target));
        }
        Family::Sso => {
            put("ssoConnectorId", json!(set.connector));
            if let Some(issuer) = &set.issuer {
                put("issuer", json!(issuer));
            }
            put("identityId", json!(set.identity_id));
        }
    }
    // Lacre's own.
    put("status", json!(set.status.name()));
    if let Some(at) = set.next_refresh_at {
        put("nextRefreshAt", json!(millis(at.as_micros())));
    }
    if let Some(class) = &set.last_error {
        put("lastError", json!(class));
    }
    if set.failures > 0 {
        put("failures", json!(set.failures));
    }
    shown
}

fn metadata(set: &TokenSetInfo) -> Value {
    let mut shown = Map::new();
    let mut put = |name: &str, value: Value| shown.insert(name.to_owned(), value);
    // The contract's two examples differ in where this one stands.
    if set.family == Family::Sso {
        put("hasRefreshToken", json!(set.has_refresh_token));
    }
    if let Some(scope) = &set.scope {
        put("scope", json!(scope));
    }
    if let Some(at) = set.expires_at {
        put("expiresAt", json!(at));
    }
    if let Some(kind) = &set.token_type {
        put("tokenType", json!(kind));
    }
    if set.family == Family::Social {
        put("hasRefreshToken", json!(set.has_refresh_token));
    }
    // Lacre's own: absent means no.
    if needs_the_person(set) {
        put("needsReauthorization", json!(true));
    }
    Value::Object(shown)
}

/// The state "needs re-authorisation" of the contract, section 8.2; the status calls one half of it expired.
fn needs_the_person(set: &TokenSetInfo) -> bool {
    match set.status {
        Status::NeedsReauthorization => true,
        Status::Expired => !set.has_refresh_token,
        _ => false,
    }
}

fn with_secret(mut shown: Value, tenant: &TenantId, set: Option<&TokenSetInfo>) -> Value {
    if let Some(set) = set {
        shown["tokenSecret"] = token_secret(tenant, set);
    }
    shown
}

async fn one_social(
    caller: Caller,
    tokens: Data<Tokens>,
    request: HttpRequest,
    path: Path<(String, String)>,
) -> Result<HttpResponse, ApiError> {
    let (identity, set) = one(&caller, &tokens, &request, &path, Family::Social).await?;
    let shown = with_secret(json!({ "identity": social(&identity) }), &caller.tenant, set.as_ref());
    Ok(HttpResponse::Ok()
        .json(with_status(shown, &caller, &tokens, &request, (&identity, set.as_ref())).await?))
}

async fn one_sso(
    caller: Caller,
    tokens: Data<Tokens>,
    request: HttpRequest,
    path: Path<(String, String)>,
) -> Result<HttpResponse, ApiError> {
    let (identity, set) = one(&caller, &tokens, &request, &path, Family::Sso).await?;
    let shown = json!({ "ssoIdentity": sso(&caller.tenant, &identity) });
    let shown = with_secret(shown, &caller.tenant, set.as_ref());
    Ok(HttpResponse::Ok()
        .json(with_status(shown, &caller, &tokens, &request, (&identity, set.as_ref())).await?))
}

/// Adds what can be had of the tokens, Lacre's own, where they are asked for.
async fn with_status(
    mut shown: Value,
    caller: &Caller,
    tokens: &Tokens,
    request: &HttpRequest,
    (identity, set): (&Identity, Option<&TokenSetInfo>),
) -> Result<Value, TokensError> {
    if says_yes(request, INCLUDE) {
        let status = tokens.token_status(&caller.tenant, &identity.connection(), set).await?;
        shown["tokenStatus"] = json!(status.name());
    }
    Ok(shown)
}

async fn one(
    caller: &Caller,
    tokens: &Tokens,
    request: &HttpRequest,
    (user, target): &(String, String),
    family: Family,
) -> Result<(Identity, Option<TokenSetInfo>), TokensError> {
    let with_set = says_yes(request, INCLUDE);
    tokens.identity(caller, &user_id(user), &connection(family, target), with_set).await
}

async fn all(
    caller: Caller,
    tokens: Data<Tokens>,
    request: HttpRequest,
    id: Path<String>,
) -> Result<HttpResponse, ApiError> {
    let found = tokens.identities(&caller, &user_id(&id), says_yes(&request, INCLUDE)).await?;
    Ok(HttpResponse::Ok().json(everything(&caller.tenant, &found)))
}

fn everything(tenant: &TenantId, found: &[(Identity, Option<TokenSetInfo>)]) -> Value {
    let of = |family| found.iter().filter(move |(identity, _)| identity.family == family);
    let social = of(Family::Social).map(|(identity, set)| {
        let shown = json!({ "target": identity.target, "identity": social(identity) });
        with_secret(shown, tenant, set.as_ref())
    });
    let sso = of(Family::Sso).map(|(identity, set)| {
        let shown = json!({ "ssoConnectorId": identity.target, "ssoIdentity": sso(tenant, identity) });
        with_secret(shown, tenant, set.as_ref())
    });
    json!({ "socialIdentities": social.collect::<Value>(), "ssoIdentities": sso.collect::<Value>() })
}

async fn put(
    caller: Caller,
    tokens: Data<Tokens>,
    path: Path<(String, String)>,
    body: Body,
) -> Result<HttpResponse, ApiError> {
    let mut input = body.members()?;
    let account = input.filled_text("userId", &[]);
    let account = input.needed("userId", account);
    let details = input.object("details").map(Value::Object);
    let account = input.end_with(account)?;
    let (user, target) = (user_id(&path.0), &path.1);
    let (is_new, identities) = tokens.put_identity(&caller, &user, target, &account, details).await?;
    let status = if is_new { StatusCode::CREATED } else { StatusCode::OK };
    Ok(HttpResponse::build(status).json(social_map(&identities)))
}

async fn link(
    caller: Caller,
    tokens: Data<Tokens>,
    id: Path<String>,
    body: Body,
) -> Result<HttpResponse, ApiError> {
    let mut input = body.members()?;
    let (connector, data) = (input.text("connectorId"), input.object("connectorData"));
    let connector = input.needed("connectorId", connector);
    let data = input.needed("connectorData", data);
    let (connector, data) = input.end_with(connector.zip(data))?;
    let identities = tokens.link_by_connector(&caller, &user_id(&id), &connector, &data).await;
    Ok(HttpResponse::Ok().json(social_map(&identities.map_err(errors::of_admin_link)?)))
}

async fn remove(
    caller: Caller,
    tokens: Data<Tokens>,
    path: Path<(String, String)>,
) -> Result<HttpResponse, ApiError> {
    let connection = connection(Family::Social, &path.1);
    let (user, identities) = taken_away(&caller, &tokens, &path.0, &connection).await?;
    Ok(HttpResponse::Ok().json(users::shown(&user, &identities)))
}

async fn remove_sso(
    caller: Caller,
    tokens: Data<Tokens>,
    path: Path<(String, String)>,
) -> Result<HttpResponse, ApiError> {
    taken_away(&caller, &tokens, &path.0, &connection(Family::Sso, &path.1)).await?;
    Ok(HttpResponse::NoContent().finish())
}

async fn taken_away(
    caller: &Caller,
    tokens: &Tokens,
    user: &str,
    connection: &Connection,
) -> Result<(User, Vec<Identity>), TokensError> {
    tokens.remove_identity(caller, &user_id(user), connection).await
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::ids::{ConnectorId, IdentityId, TokenSetId, UserId};
    use users::tests::at;

    fn tenant() -> TenantId {
        TenantId::parse("default").unwrap()
    }

    pub(in crate::http::logto) fn social() -> Identity {
        Identity {
            user: UserId::parse("q29640o27alz").unwrap(),
            family: Family::Social,
            target: "acme".to_owned(),
            id: IdentityId::parse("idn0000000000000000x1").unwrap(),
            issuer: None,
            identity_id: "idp-user-1".to_owned(),
            details: json!({ "id": "idp-user-1" }),
            created_at: at(1_795_347_609_119),
            updated_at: at(1_795_347_609_119),
        }
    }

    pub(in crate::http::logto) fn sso() -> Identity {
        Identity {
            user: UserId::parse("nkc7aaaaaaaa").unwrap(),
            family: Family::Sso,
            target: "jrgtqu3trc5w".to_owned(),
            id: IdentityId::parse("ipyb0000000000000000x").unwrap(),
            issuer: Some("https://idp".to_owned()),
            identity_id: "sub-1".to_owned(),
            details: json!({}),
            created_at: at(1_795_347_735_399),
            updated_at: at(1_795_347_735_399),
        }
    }

    fn set() -> TokenSetInfo {
        TokenSetInfo {
            id: TokenSetId::parse("rkfzqv2xidf3jec9ptuuj").unwrap(),
            user: UserId::parse("q29640o27alz").unwrap(),
            family: Family::Social,
            target: "acme".to_owned(),
            connector: ConnectorId::parse("cwc5mtxw6yxk").unwrap(),
            issuer: None,
            identity_id: "idp-user-1".to_owned(),
            has_refresh_token: true,
            scope: Some("read write".to_owned()),
            token_type: Some("bearer".to_owned()),
            expires_at: Some(1_795_351_208),
            created_at: at(1_795_347_609_119),
            updated_at: at(1_795_347_609_119),
            status: Status::Active,
            next_refresh_at: None,
            last_error: None,
            failures: 0,
        }
    }

    fn sso_set() -> TokenSetInfo {
        TokenSetInfo {
            id: TokenSetId::parse("sec00000000000000000x").unwrap(),
            user: UserId::parse("nkc7aaaaaaaa").unwrap(),
            family: Family::Sso,
            target: "jrgtqu3trc5w".to_owned(),
            connector: ConnectorId::parse("jrgtqu3trc5w").unwrap(),
            issuer: Some("https://idp".to_owned()),
            identity_id: "sub-1".to_owned(),
            scope: None,
            token_type: None,
            expires_at: Some(1_795_347_739),
            created_at: at(1_795_347_735_399),
            updated_at: at(1_795_347_735_399),
            ..set()
        }
    }

    #[test]
    fn a_social_token_set_is_the_documented_one() {
        let shown = with_secret(json!({ "identity": super::social(&social()) }), &tenant(), Some(&set()));
        let wanted = concat!(
            r#"{"identity":{"userId":"idp-user-1","details":{"id":"idp-user-1"}},"tokenSecret":{"#,
            r#""tenantId":"default","id":"rkfzqv2xidf3jec9ptuuj","userId":"q29640o27alz","#,
            r#""type":"federated_token_set","metadata":{"scope":"read write","expiresAt":1795351208,"#,
            r#""tokenType":"bearer","hasRefreshToken":true},"createdAt":1795347609119,"#,
            r#""updatedAt":1795347609119,"connectorId":"cwc5mtxw6yxk","identityId":"idp-user-1","#,
            r#""target":"acme","status":"active"}}"#,
        );
        assert_eq!(shown.to_string(), wanted);
    }

    #[test]
    fn an_enterprises_token_set_is_the_documented_one() {
        let shown = json!({ "ssoIdentity": super::sso(&tenant(), &sso()) });
        let wanted = concat!(
            r#"{"ssoIdentity":{"tenantId":"default","id":"ipyb0000000000000000x","userId":"nkc7aaaaaaaa","#,
            r#""issuer":"https://idp","identityId":"sub-1","detail":{},"createdAt":1795347735399,"#,
            r#""updatedAt":1795347735399,"ssoConnectorId":"jrgtqu3trc5w"},"tokenSecret":{"#,
            r#""tenantId":"default","id":"sec00000000000000000x","userId":"nkc7aaaaaaaa","#,
            r#""type":"federated_token_set","metadata":{"hasRefreshToken":true,"expiresAt":1795347739},"#,
            r#""createdAt":1795347735399,"updatedAt":1795347735399,"ssoConnectorId":"jrgtqu3trc5w","#,
            r#""issuer":"https://idp","identityId":"sub-1","status":"active"}}"#,
        );
        assert_eq!(with_secret(shown, &tenant(), Some(&sso_set())).to_string(), wanted);
    }

    #[test]
    fn what_is_absent_is_omitted_and_lacres_own_come_last() {
        let bare = TokenSetInfo { scope: None, token_type: None, expires_at: None, ..set() };
        assert_eq!(token_secret(&tenant(), &bare)["metadata"], json!({ "hasRefreshToken": true }));

        let ill = TokenSetInfo {
            status: Status::NeedsReauthorization,
            next_refresh_at: Some(at(1_795_347_700_000)),
            last_error: Some("provider-grant".to_owned()),
            failures: 2,
            ..set()
        };
        let shown = token_secret(&tenant(), &ill).to_string();
        let end = concat!(
            r#""target":"acme","status":"needs_reauthorization","nextRefreshAt":1795347700000,"#,
            r#""lastError":"provider-grant","failures":2}"#,
        );
        assert!(shown.ends_with(end), "{shown}");
        assert!(shown.contains(r#""hasRefreshToken":true,"needsReauthorization":true}"#), "{shown}");
    }

    #[test]
    fn only_what_nobody_but_the_person_can_mend_is_marked() {
        for (status, has_refresh_token, marked) in [
            (Status::Active, false, false),
            (Status::Expired, true, false),
            (Status::Expired, false, true),
            (Status::NeedsReauthorization, true, true),
        ] {
            let set = TokenSetInfo { has_refresh_token, status, ..set() };
            let mark = metadata(&set).get("needsReauthorization").cloned();
            assert_eq!(mark, marked.then(|| json!(true)), "{status:?}");
        }
    }

    #[test]
    fn all_identities_are_two_lists() {
        let found = [(social(), None), (sso(), Some(sso_set()))];
        let shown = everything(&tenant(), &found);
        let wanted = concat!(
            r#"{"socialIdentities":[{"target":"acme","identity":{"userId":"idp-user-1","#,
            r#""details":{"id":"idp-user-1"}}}],"ssoIdentities":[{"ssoConnectorId":"jrgtqu3trc5w","#,
            r#""ssoIdentity":{"tenantId":"default","#,
        );
        assert!(shown.to_string().starts_with(wanted), "{shown}");
        assert_eq!(shown["ssoIdentities"][0]["tokenSecret"]["issuer"], "https://idp");
        assert_eq!(everything(&tenant(), &[]), json!({ "socialIdentities": [], "ssoIdentities": [] }));
    }
}
