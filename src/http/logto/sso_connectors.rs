//! `/api/sso-connectors` and `/api/sso-connector-providers`: enterprises' single sign-on (contract, section 7.11).
//!
//! A row with the members of its provider behind. Secrets in its configuration are masked.

use actix_web::web::{self, Data, Path, ServiceConfig};
use actix_web::{HttpRequest, HttpResponse};
use serde_json::{Map, Value, json};

use super::connectors::{put_own, read_new, read_patch};
use super::error::{ApiError, tokens as errors};
use super::input::Body;
use super::millis;
use super::query::{Page, connector_id};
use super::users::object_of;
use crate::identity::{Caller, Scope};
use crate::ids::TenantId;
use crate::tokens::providers::{self, Factory};
use crate::tokens::{Connector, Family, Tokens};

pub(super) fn routes(cfg: &mut ServiceConfig) {
    cfg.service(web::resource("").post(create).get(list))
        .service(web::resource("/{id}").get(one).patch(update).delete(delete));
}

pub(super) fn provider_routes(cfg: &mut ServiceConfig) {
    cfg.service(web::resource("").get(all_providers));
}

fn shown(tenant: &TenantId, connector: &Connector) -> Value {
    let kept = &connector.shown;
    let mut shown = Map::new();
    let mut put = |name: &str, value: Value| shown.insert(name.to_owned(), value);
    put("tenantId", json!(tenant));
    put("id", json!(connector.id));
    put("providerName", json!(connector.factory));
    put("connectorName", json!(kept.connector_name));
    put("config", object_of(&kept.config));
    put("domains", if kept.domains.is_array() { kept.domains.clone() } else { json!([]) });
    put("branding", object_of(&kept.branding));
    put("syncProfile", json!(kept.sync_profile));
    put("enableTokenStorage", json!(connector.stores_tokens));
    put("createdAt", json!(millis(connector.created_at.as_micros())));
    // A provider that is not known any more is not shown, its connectors are.
    let provider = providers::sso_provider(&connector.factory).map(Factory::json).unwrap_or_default();
    for (name, of_provider) in [
        ("name", "name"),
        ("providerType", "providerType"),
        ("providerLogo", "logo"),
        ("providerLogoDark", "logoDark"),
    ] {
        if let Some(value) = provider.get(of_provider) {
            put(name, value.clone());
        }
    }
    put_own(&mut shown, connector);
    Value::Object(shown)
}

async fn create(caller: Caller, tokens: Data<Tokens>, body: Body) -> Result<HttpResponse, ApiError> {
    let connector = read_new(&body, Family::Sso, "providerName")?;
    let connector = tokens.create_connector(&caller, connector).await;
    let connector = connector.map_err(errors::of_connector(Family::Sso))?;
    Ok(HttpResponse::Ok().json(shown(&caller.tenant, &connector)))
}

async fn list(caller: Caller, tokens: Data<Tokens>, request: HttpRequest) -> Result<HttpResponse, ApiError> {
    let page = Page::read(&request)?;
    let found = tokens.connectors(&caller, Family::Sso, None).await?;
    let mut response = HttpResponse::Ok();
    let found = page.map_or(&*found, |page| {
        page.put_headers(&mut response, &request, found.len() as u64);
        page.of(&found)
    });
    Ok(response.json(found.iter().map(|one| shown(&caller.tenant, one)).collect::<Vec<_>>()))
}

async fn one(caller: Caller, tokens: Data<Tokens>, id: Path<String>) -> Result<HttpResponse, ApiError> {
    let connector = tokens.connector(&caller, Family::Sso, &connector_id(&id)).await?;
    Ok(HttpResponse::Ok().json(shown(&caller.tenant, &connector)))
}

async fn update(
    caller: Caller,
    tokens: Data<Tokens>,
    id: Path<String>,
    body: Body,
) -> Result<HttpResponse, ApiError> {
    let patch = read_patch(&body, Family::Sso)?;
    let connector = tokens.update_connector(&caller, Family::Sso, &connector_id(&id), patch).await;
    let connector = connector.map_err(errors::of_connector(Family::Sso))?;
    Ok(HttpResponse::Ok().json(shown(&caller.tenant, &connector)))
}

async fn delete(caller: Caller, tokens: Data<Tokens>, id: Path<String>) -> Result<HttpResponse, ApiError> {
    tokens.delete_connector(&caller, Family::Sso, &connector_id(&id)).await?;
    Ok(HttpResponse::NoContent().finish())
}

async fn all_providers(caller: Caller) -> Result<HttpResponse, ApiError> {
    caller.require(Scope::ConnectorsAdmin)?;
    let all = providers::sso_providers();
    Ok(HttpResponse::Ok().json(all.iter().map(Factory::json).collect::<Vec<_>>()))
}

#[cfg(test)]
mod tests {
    use super::super::connectors::tests::connector;
    use super::*;

    #[test]
    fn a_row_has_logtos_members_in_its_order_and_the_providers_behind() {
        let mut made = connector(Family::Sso, "Okta");
        made.shown.connector_name = "Acme".to_owned();
        let shown = shown(&TenantId::parse("default").unwrap(), &made);
        let row = concat!(
            r#"{"tenantId":"default","id":"cwc5mtxw6yxk","providerName":"Okta","connectorName":"Acme","#,
            r#""config":{"clientId":"cid"},"domains":[],"branding":{},"syncProfile":false,"#,
            r#""enableTokenStorage":true,"createdAt":1795347609119,"name":"Okta","providerType":"oidc","#,
        );
        assert!(shown.to_string().starts_with(row), "{shown}");
        let names: Vec<_> = shown.as_object().unwrap().keys().map(String::as_str).collect();
        assert_eq!(names[names.len() - 3..], ["providerLogo", "providerLogoDark", "refreshAhead"]);
    }
}
