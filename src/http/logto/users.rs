//! `/api/users`: people, as Logto shows them.
//!
//! A text that is not there is `null` here and nowhere else in the family. Times are in milliseconds. An empty
//! text empties a member, as `null` does.

use actix_web::web::{self, Data, Path, ServiceConfig};
use actix_web::{HttpRequest, HttpResponse};
use serde_json::{Map, Value, json};

use super::error::ApiError;
use super::identities::{self, social_map};
use super::input::{Body, Input};
use super::query::{Page, parameter, says_yes, user_id};
use crate::identity::Caller;
use crate::ids::TenantId;
use crate::issuer::Issuer;
use crate::tokens::{Family, Identity, NewUser, Tokens, User, UserPatch, UserQuery};

pub(super) fn routes(cfg: &mut ServiceConfig) {
    cfg.service(web::resource("").post(create).get(list))
        .service(web::resource("/{userId}").get(one).patch(update).delete(delete))
        .service(web::resource("/{userId}/password").patch(set_password))
        .service(web::resource("/{userId}/is-suspended").patch(set_suspended))
        .service(web::resource("/{userId}/custom-data").get(custom_data).patch(add_custom_data))
        .configure(identities::routes);
}

/// A user with the identities that are in it.
pub(super) fn shown(user: &User, identities: &[Identity]) -> Value {
    json!({
        "id": user.id,
        "username": user.username,
        "primaryEmail": user.primary_email,
        "primaryPhone": user.primary_phone,
        "name": user.name,
        "avatar": user.avatar,
        "customData": object_of(&user.custom_data),
        "identities": social_map(identities),
        "lastSignInAt": null,
        "createdAt": super::millis(user.created_at.as_micros()),
        "updatedAt": super::millis(user.updated_at.as_micros()),
        "profile": object_of(&user.profile),
        "applicationId": null,
        "isSuspended": user.is_suspended,
        "hasPassword": user.has_password,
    })
}

/// What is kept as an object and was never set is an empty one.
pub(super) fn object_of(kept: &Value) -> Value {
    if kept.is_object() { kept.clone() } else { json!({}) }
}

fn answer((user, identities): &(User, Vec<Identity>)) -> HttpResponse {
    HttpResponse::Ok().json(shown(user, identities))
}

async fn create(caller: Caller, tokens: Data<Tokens>, body: Body) -> Result<HttpResponse, ApiError> {
    let mut input = body.members()?;
    let user = NewUser {
        username: input.text("username"),
        primary_email: input.text("primaryEmail"),
        primary_phone: input.text("primaryPhone"),
        name: input.text("name"),
        avatar: input.text("avatar"),
        password: input.secret("password"),
        profile: input.object("profile").map(Value::Object),
        custom_data: input.object("customData").map(Value::Object),
    };
    input.end()?;
    let user = tokens.create_user(&caller, user).await?;
    Ok(answer(&(user, Vec::new())))
}

async fn list(caller: Caller, tokens: Data<Tokens>, request: HttpRequest) -> Result<HttpResponse, ApiError> {
    let page = Page::read(&request)?.unwrap_or_default();
    let search = parameter(&request, "search").filter(|search| !search.is_empty());
    let query = UserQuery { page: page.number, page_size: page.size, search };
    let found = tokens.users(&caller, query).await?;
    let mut response = HttpResponse::Ok();
    page.put_headers(&mut response, &request, found.total);
    Ok(response
        .json(found.users.iter().map(|(user, identities)| shown(user, identities)).collect::<Vec<_>>()))
}

async fn one(
    caller: Caller,
    tokens: Data<Tokens>,
    request: HttpRequest,
    id: Path<String>,
) -> Result<HttpResponse, ApiError> {
    let (user, identities) = tokens.user(&caller, &user_id(&id)).await?;
    let mut body = shown(&user, &identities);
    if says_yes(&request, "includeSsoIdentities") {
        body["ssoIdentities"] = sso_identities(&caller.tenant, &identities);
    }
    Ok(HttpResponse::Ok().json(body))
}

/// The identities that are not in the user's map.
pub(super) fn sso_identities(tenant: &TenantId, identities: &[Identity]) -> Value {
    let found = identities.iter().filter(|identity| identity.family == Family::Sso);
    found.map(|identity| identities::sso(tenant, identity)).collect()
}

async fn update(
    caller: Caller,
    tokens: Data<Tokens>,
    id: Path<String>,
    body: Body,
) -> Result<HttpResponse, ApiError> {
    let mut input = body.members()?;
    let patch = UserPatch {
        username: input.text_or_null("username"),
        primary_email: input.text_or_null("primaryEmail"),
        primary_phone: input.text_or_null("primaryPhone"),
        name: input.text_or_null("name"),
        avatar: input.text_or_null("avatar"),
        profile: input.object("profile").map(Value::Object),
        custom_data: input.object("customData").map(Value::Object),
        ..UserPatch::default()
    };
    input.end()?;
    Ok(answer(&tokens.update_user(&caller, &user_id(&id), patch).await?))
}

async fn delete(
    caller: Caller,
    (tokens, issuer): (Data<Tokens>, Data<Issuer>),
    id: Path<String>,
) -> Result<HttpResponse, ApiError> {
    let id = user_id(&id);
    tokens.delete_user(&caller, &id).await?;
    // The user's tokens are worth nothing any more in any case; here that is known at once.
    if let Err(error) = issuer.forget_user(&id).await {
        tracing::warn!(%error, "the tokens of a deleted user wait for their end");
    }
    Ok(HttpResponse::NoContent().finish())
}

async fn set_password(
    caller: Caller,
    tokens: Data<Tokens>,
    id: Path<String>,
    body: Body,
) -> Result<HttpResponse, ApiError> {
    let mut input = body.members()?;
    let password = input.secret("password");
    let password = input.needed("password", password);
    let patch = UserPatch { password: Some(input.end_with(password)?), ..UserPatch::default() };
    Ok(answer(&tokens.update_user(&caller, &user_id(&id), patch).await?))
}

async fn set_suspended(
    caller: Caller,
    tokens: Data<Tokens>,
    id: Path<String>,
    body: Body,
) -> Result<HttpResponse, ApiError> {
    let mut input = body.members()?;
    let suspended = input.flag("isSuspended");
    let suspended = input.needed("isSuspended", suspended);
    let patch = UserPatch { is_suspended: Some(input.end_with(suspended)?), ..UserPatch::default() };
    Ok(answer(&tokens.update_user(&caller, &user_id(&id), patch).await?))
}

async fn custom_data(
    caller: Caller,
    tokens: Data<Tokens>,
    id: Path<String>,
) -> Result<HttpResponse, ApiError> {
    let (user, _) = tokens.user(&caller, &user_id(&id)).await?;
    Ok(HttpResponse::Ok().json(object_of(&user.custom_data)))
}

// Unlike the whole user's, this PATCH adds to what is there. Of two at the same time one may be lost.
async fn add_custom_data(
    caller: Caller,
    tokens: Data<Tokens>,
    id: Path<String>,
    body: Body,
) -> Result<HttpResponse, ApiError> {
    let added = custom_data_of(body.members()?)?;
    let id = user_id(&id);
    let (user, _) = tokens.user(&caller, &id).await?;
    let custom_data = Some(merged(&user.custom_data, added));
    let patch = UserPatch { custom_data, ..UserPatch::default() };
    let (user, _) = tokens.update_user(&caller, &id, patch).await?;
    Ok(HttpResponse::Ok().json(object_of(&user.custom_data)))
}

fn custom_data_of(mut input: Input) -> Result<Map<String, Value>, ApiError> {
    let added = input.object("customData");
    let added = input.needed("customData", added);
    input.end_with(added)
}

fn merged(kept: &Value, added: Map<String, Value>) -> Value {
    let mut all = kept.as_object().cloned().unwrap_or_default();
    all.extend(added);
    Value::Object(all)
}

/// What the owner of an account sees of it: what the token's scopes are for.
pub(super) fn scoped(user: &User, identities: &[Identity], tenant: &TenantId, may: May) -> Value {
    let all = shown(user, identities);
    let mut body = json!({ "id": all["id"] });
    let mut put = |name: &str| body[name] = all[name].clone();
    if may.profile {
        ["username", "name", "avatar"].into_iter().for_each(&mut put);
    }
    if may.identities {
        put("identities");
    }
    ["lastSignInAt", "createdAt", "updatedAt"].into_iter().for_each(&mut put);
    if may.profile {
        put("profile");
    }
    ["applicationId", "isSuspended", "hasPassword"].into_iter().for_each(&mut put);
    if may.identities {
        body["ssoIdentities"] = sso_identities(tenant, identities);
    }
    body
}

/// What a person's token shows of its owner.
#[derive(Clone, Copy)]
pub(super) struct May {
    pub(super) profile: bool,
    pub(super) identities: bool,
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::ids::UserId;

    pub(in crate::http::logto) fn at<T: serde::de::DeserializeOwned>(millis: i64) -> T {
        serde_json::from_value(json!(millis * 1000 + 123)).unwrap()
    }

    fn user() -> User {
        User {
            id: UserId::parse("q29640o27alz").unwrap(),
            username: Some("ann".to_owned()),
            primary_email: None,
            primary_phone: None,
            name: None,
            avatar: None,
            profile: Value::Null,
            custom_data: json!({ "b": 1, "a": 2 }),
            has_password: true,
            is_suspended: false,
            created_at: at(1_795_347_609_119),
            updated_at: at(1_795_347_609_120),
        }
    }

    #[test]
    fn a_user_has_logtos_members_in_its_order_and_null_for_what_is_absent() {
        let wanted = concat!(
            r#"{"id":"q29640o27alz","username":"ann","primaryEmail":null,"primaryPhone":null,"name":null,"#,
            r#""avatar":null,"customData":{"b":1,"a":2},"identities":{},"lastSignInAt":null,"#,
            r#""createdAt":1795347609119,"updatedAt":1795347609120,"profile":{},"applicationId":null,"#,
            r#""isSuspended":false,"hasPassword":true}"#,
        );
        assert_eq!(shown(&user(), &[]).to_string(), wanted);
    }

    #[test]
    fn identities_are_a_map_by_target_and_those_of_sso_stand_apart() {
        let both = [identities::tests::social(), identities::tests::sso()];
        let body = shown(&user(), &both);
        let wanted = r#"{"acme":{"userId":"idp-user-1","details":{"id":"idp-user-1"}}}"#;
        assert_eq!(body["identities"].to_string(), wanted);

        let apart = sso_identities(&TenantId::parse("default").unwrap(), &both);
        assert_eq!((apart.as_array().unwrap().len(), &apart[0]["identityId"]), (1, &json!("sub-1")));
    }

    #[test]
    fn the_owner_sees_what_the_scopes_are_for() {
        let names = |profile, identities| {
            let tenant = TenantId::parse("default").unwrap();
            let body = scoped(&user(), &[], &tenant, May { profile, identities });
            body.as_object().unwrap().keys().cloned().collect::<Vec<_>>()
        };
        let always =
            ["id", "lastSignInAt", "createdAt", "updatedAt", "applicationId", "isSuspended", "hasPassword"];
        assert_eq!(names(false, false), always);
        for name in ["username", "name", "avatar", "profile"] {
            assert!(names(true, false).iter().any(|found| found == name), "{name}");
        }
        assert!(names(false, true).iter().any(|found| found == "ssoIdentities"));
        assert!(!names(true, false).iter().any(|found| found == "identities"));
    }

    #[test]
    fn custom_data_that_comes_alone_is_added() {
        let added = json!({ "a": { "x": 1 }, "c": null });
        let all = merged(&json!({ "a": { "y": 2 }, "b": 1 }), added.as_object().unwrap().clone());
        assert_eq!(all, json!({ "a": { "x": 1 }, "b": 1, "c": null }));
    }
}
