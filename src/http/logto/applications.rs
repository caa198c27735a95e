//! `/api/applications`: machine-to-machine and traditional web applications, in Logto's form.
//!
//! A secret is in the answer that made it and nowhere else, because it is kept as a MAC. `scopes` is Lacre's own:
//! what is not granted with it, a machine application does not have.

use actix_web::middleware::from_fn;
use actix_web::web::{self, Data, Path, ServiceConfig};
use actix_web::{HttpRequest, HttpResponse};
use secrecy::ExposeSecret;
use serde_json::{Map, Value, json};
use url::form_urlencoded;

use super::error::ApiError;
use super::input::{Body, Input};
use super::{management, nothing_here};
use crate::http::secret_body::SecretJson;
use crate::identity::{Caller, Scope, ScopeSet};
use crate::ids::ClientId;
use crate::issuer::{AppExtras, AppInfo, AppKind, AppPatch, Issuer, IssuerError, NewApp};

const TOTAL: &str = "total-number";
const KINDS: &str = "MachineToMachine or Traditional; others are not offered";

pub(super) fn routes(cfg: &mut ServiceConfig) {
    let applications = web::scope("/applications")
        .wrap(from_fn(management::authenticate))
        .service(web::resource("").get(list).post(create))
        .service(web::resource("/{id}").get(show).patch(update).delete(delete))
        .default_service(web::to(nothing_here));
    cfg.service(applications);
}

fn kind_of(name: &str) -> Option<AppKind> {
    [AppKind::Machine, AppKind::Traditional].into_iter().find(|kind| type_of(*kind) == name)
}

const fn type_of(kind: AppKind) -> &'static str {
    match kind {
        AppKind::Machine => "MachineToMachine",
        AppKind::Traditional => "Traditional",
    }
}

/// Logto's members in its order, Lacre's own last.
fn view(caller: &Caller, app: &AppInfo) -> Value {
    let AppExtras { description, post_logout_redirect_uris, client_metadata, custom_data } = &app.extras;
    let mut custom = Map::from_iter([("allowTokenExchange".to_owned(), json!(app.allow_token_exchange))]);
    custom.extend(client_metadata.clone());
    json!({
        "tenantId": caller.tenant,
        "id": app.client_id,
        "name": app.name,
        "description": description,
        "type": type_of(app.kind),
        "oidcClientMetadata": {
            "redirectUris": app.redirect_uris,
            "postLogoutRedirectUris": post_logout_redirect_uris,
        },
        "customClientMetadata": custom,
        "protectedAppMetadata": null,
        "customData": custom_data,
        "isThirdParty": false,
        "createdAt": app.created_at.as_micros().div_euclid(1000),
        "scopes": app.scopes.iter().map(Scope::name).collect::<Vec<_>>(),
    })
}

/// The members that a body to make and one to change have in common.
fn patch_of(input: &mut Input) -> AppPatch {
    let mut oidc = input.within("oidcClientMetadata");
    let (redirect_uris, post_logout_redirect_uris) =
        (oidc.texts("redirectUris"), oidc.texts("postLogoutRedirectUris"));
    input.close("oidcClientMetadata", oidc);
    let mut custom = input.within("customClientMetadata");
    let allow_token_exchange = custom.flag("allowTokenExchange");
    AppPatch {
        name: input.text("name"),
        description: input.nullable_text("description"),
        redirect_uris,
        post_logout_redirect_uris,
        allow_token_exchange,
        client_metadata: input.close("customClientMetadata", custom),
        custom_data: input.object("customData").unwrap_or_default(),
    }
}

fn read_new(body: &Body) -> Result<NewApp, ApiError> {
    let mut input = body.members()?;
    let mut patch = patch_of(&mut input);
    let kind = input.one_of("type", kind_of, KINDS);
    let (name, kind) = (input.needed("name", patch.name.take()), input.needed("type", kind));
    let (scopes, is_third_party) = (input.texts("scopes").unwrap_or_default(), input.flag("isThirdParty"));
    input.end()?;
    // It would have fewer rights than a first-party one, and here it would not.
    if is_third_party == Some(true) {
        return Err(ApiError::invalid_member("body", "isThirdParty", "Third-party is not offered"));
    }
    let scopes: Option<ScopeSet> = scopes.iter().map(|name| Scope::parse(name)).collect();
    Ok(NewApp {
        name: name.unwrap_or_default(),
        kind: kind.unwrap_or(AppKind::Machine),
        scopes: scopes.ok_or_else(|| ApiError::invalid_member("body", "scopes", "One is not known"))?,
        redirect_uris: patch.redirect_uris.unwrap_or_default(),
        allow_token_exchange: patch.allow_token_exchange.unwrap_or_default(),
        signing: None,
        extras: AppExtras {
            description: patch.description.flatten(),
            post_logout_redirect_uris: patch.post_logout_redirect_uris.unwrap_or_default(),
            client_metadata: patch.client_metadata,
            custom_data: patch.custom_data,
        },
    })
}

/// The service's names of members are not Logto's.
fn of_app(error: IssuerError) -> ApiError {
    let IssuerError::Invalid { field, reason } = error else { return error.into() };
    let member = match field {
        "redirect_uris" => "oidcClientMetadata.redirectUris",
        "post_logout_redirect_uris" => "oidcClientMetadata.postLogoutRedirectUris",
        "client_metadata" => "customClientMetadata",
        "custom_data" => "customData",
        field => field,
    };
    ApiError::invalid_member("body", member, reason)
}

// A malformed id names nothing, like an unknown one.
fn client_id(text: &str) -> Result<ClientId, ApiError> {
    ClientId::parse(text).map_err(|_| IssuerError::NotFound.into())
}

async fn create(caller: Caller, issuer: Data<Issuer>, body: Body) -> Result<HttpResponse, ApiError> {
    let (app, secret) = issuer.create_app(&caller, read_new(&body)?).await.map_err(of_app)?;
    let secret = secret.expose_secret();
    let mut json = SecretJson::object(&view(&caller, &app), secret.len());
    json.name("secret").utf8(secret).raw("}");
    Ok(json.finish().respond(HttpResponse::Ok(), "application/json"))
}

async fn list(caller: Caller, issuer: Data<Issuer>, request: HttpRequest) -> Result<HttpResponse, ApiError> {
    let page = page_of(request.query_string())?;
    let mut apps = issuer.list_apps(&caller).await?;
    apps.sort_by_key(|app| std::cmp::Reverse(app.created_at));
    let total = apps.len();
    let (skipped, taken) = page.unwrap_or((0, usize::MAX));
    let shown: Vec<_> = apps.iter().skip(skipped).take(taken).map(|app| view(&caller, app)).collect();
    let mut response = HttpResponse::Ok();
    if page.is_some() {
        response.insert_header((TOTAL, total.to_string()));
    }
    Ok(response.json(shown))
}

/// `?page=` and `?page_size=` as how many to skip and to take; `None`: all at once.
fn page_of(query: &str) -> Result<Option<(usize, usize)>, ApiError> {
    let find = |wanted: &str| {
        let mut members = form_urlencoded::parse(query.as_bytes());
        members.find(|(name, _)| name == wanted).map(|(_, value)| value.parse::<usize>().unwrap_or(0))
    };
    let (page, size) = match (find("page"), find("page_size")) {
        (None, None) => return Ok(None),
        (page, size) => (page.unwrap_or(1), size.unwrap_or(20)),
    };
    if page == 0 || !(1..=100).contains(&size) {
        let rule = "Expected a page from 1 and a page_size of 1 to 100";
        return Err(ApiError::invalid_member("query", "page", rule));
    }
    Ok(Some(((page - 1).saturating_mul(size), size)))
}

async fn show(caller: Caller, issuer: Data<Issuer>, id: Path<String>) -> Result<HttpResponse, ApiError> {
    let app = issuer.find_app(&caller, &client_id(&id)?).await?;
    Ok(HttpResponse::Ok().json(view(&caller, &app)))
}

async fn update(
    caller: Caller,
    issuer: Data<Issuer>,
    id: Path<String>,
    body: Body,
) -> Result<HttpResponse, ApiError> {
    let mut input = body.members()?;
    let patch = patch_of(&mut input);
    input.end()?;
    let app = issuer.update_app(&caller, &client_id(&id)?, patch).await.map_err(of_app)?;
    Ok(HttpResponse::Ok().json(view(&caller, &app)))
}

async fn delete(caller: Caller, issuer: Data<Issuer>, id: Path<String>) -> Result<HttpResponse, ApiError> {
    issuer.delete_app(&caller, &client_id(&id)?).await?;
    Ok(HttpResponse::NoContent().finish())
}

#[cfg(test)]
mod tests {
    use actix_web::ResponseError;
    use actix_web::body::to_bytes;

    use super::*;
    use crate::ids::TenantId;

    /// The members that are wrong, or nothing.
    async fn wrong(text: &str) -> String {
        let Err(error) = read_new(&Body::of(text)) else { return String::new() };
        let bytes = to_bytes(error.error_response().into_body()).await.unwrap();
        let told: Value = serde_json::from_slice(&bytes).unwrap();
        assert_eq!(told["code"], "guard.invalid_input");
        let paths = told["data"]["issues"].as_array().unwrap().iter();
        let join = |path: &Value| {
            let parts = path.as_array().unwrap().iter().map(|part| part.as_str().unwrap());
            parts.collect::<Vec<_>>().join(".")
        };
        paths.map(|issue| join(&issue["path"])).collect::<Vec<_>>().join(" ")
    }

    #[actix_web::test]
    async fn a_body_that_makes_an_application_has_name_and_a_type_that_is_offered() {
        for (text, wanted) in [
            (r#"{"name":"a","type":"MachineToMachine"}"#, ""),
            (r#"{"name":"a","type":"Traditional","description":null,"unknown":1,"isThirdParty":false}"#, ""),
            ("{}", "name type"),
            (r#"{"name":"a","type":"SPA"}"#, "type"),
            (r#"{"name":"a","type":"machine"}"#, "type"),
            (r#"{"name":1,"type":"Traditional"}"#, "name"),
            (r#"{"name":"a","type":"Traditional","isThirdParty":true}"#, "isThirdParty"),
            (r#"{"name":"a","type":"MachineToMachine","scopes":["everything"]}"#, "scopes"),
            (
                r#"{"name":"a","type":"Traditional","oidcClientMetadata":{"redirectUris":"https://a"},
                    "customClientMetadata":{"allowTokenExchange":"yes"}}"#,
                "oidcClientMetadata.redirectUris customClientMetadata.allowTokenExchange",
            ),
        ] {
            assert_eq!(wrong(text).await, wanted, "{text}");
        }
    }

    #[test]
    fn a_machine_has_no_rights_unless_they_are_named() {
        let new = read_new(&Body::of(r#"{"name":"a","type":"MachineToMachine"}"#)).ok().unwrap();
        assert_eq!((new.scopes, new.allow_token_exchange), (ScopeSet::NONE, false));

        let text = r#"{"name":"a","type":"MachineToMachine","scopes":["token-sets:exchange"],
            "customClientMetadata":{"allowTokenExchange":true,"idTokenTtl":60},"customData":{"k":1}}"#;
        let new = read_new(&Body::of(text)).ok().unwrap();
        assert_eq!(new.scopes, [Scope::TokenSetsExchange].into_iter().collect());
        assert!(new.allow_token_exchange);
        assert_eq!(json!(new.extras.client_metadata), json!({ "idTokenTtl": 60 }));
        assert_eq!(json!(new.extras.custom_data), json!({ "k": 1 }));
    }

    #[test]
    fn an_application_is_shown_in_logtos_form_without_its_secret() {
        let app = AppInfo {
            client_id: ClientId::parse("app-1").unwrap(),
            name: "a".to_owned(),
            kind: AppKind::Traditional,
            scopes: ScopeSet::NONE,
            redirect_uris: vec!["https://a.example/cb".to_owned()],
            allow_token_exchange: true,
            signing: None,
            extras: AppExtras::default(),
            created_at: serde_json::from_str("1800000000123456").unwrap(),
        };
        let caller = Caller::system("test", TenantId::parse("default").unwrap());
        let wanted = json!({
            "tenantId": "default", "id": "app-1", "name": "a", "description": null, "type": "Traditional",
            "oidcClientMetadata": { "redirectUris": ["https://a.example/cb"], "postLogoutRedirectUris": [] },
            "customClientMetadata": { "allowTokenExchange": true }, "protectedAppMetadata": null,
            "customData": {}, "isThirdParty": false, "createdAt": 1_800_000_000_123_i64, "scopes": []
        });
        assert_eq!(view(&caller, &app).to_string(), wanted.to_string());
    }

    #[test]
    fn pages_are_cut_only_where_they_are_asked_for() {
        for (query, wanted) in [
            ("", Some(None)),
            ("types=Traditional", Some(None)),
            ("page=1", Some(Some((0, 20)))),
            ("page=3&page_size=10", Some(Some((20, 10)))),
            ("page_size=100", Some(Some((0, 100)))),
            ("page=0", None),
            ("page=x", None),
            ("page=1&page_size=101", None),
            ("page=1&page_size=-1", None),
        ] {
            assert_eq!(page_of(query).ok(), wanted, "{query}");
        }
    }
}
