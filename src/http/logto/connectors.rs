//! `/api/connectors` and `/api/connector-factories`: social connectors (contract, section 7.11).
//!
//! A connector is shown with the members of the factory that it is made from. Secrets in its configuration are
//! masked: a mask that comes back leaves the secret as it is. Lacre's own members come last.

use actix_web::web::{self, Data, Path, ServiceConfig};
use actix_web::{HttpRequest, HttpResponse};
use serde_json::{Map, Value, json};

use super::error::{ApiError, tokens as errors};
use super::input::{Body, Input};
use super::millis;
use super::query::{connector_id, parameter};
use super::users::object_of;
use crate::identity::{Caller, Scope};
use crate::ids::ConnectorId;
use crate::tokens::providers::{self, Factory};
use crate::tokens::{Connector, ConnectorPatch, Family, NewConnector, Tokens, TokensError};

pub(super) fn routes(cfg: &mut ServiceConfig) {
    cfg.service(web::resource("").post(create).get(list))
        .service(web::resource("/{id}").get(one).patch(update).delete(delete));
}

pub(super) fn factory_routes(cfg: &mut ServiceConfig) {
    cfg.service(web::resource("").get(factories)).service(web::resource("/{id}").get(factory));
}

/// Members that a standard connector's metadata have instead of the factory's.
const OF_METADATA: [&str; 3] = ["name", "logo", "logoDark"];

fn shown(connector: &Connector) -> Value {
    let metadata = object_of(&connector.shown.metadata);
    let mut shown = Map::new();
    let mut put = |name: &str, value: Value| shown.insert(name.to_owned(), value);
    for (name, value) in factory_members(&connector.factory) {
        match name.as_str() {
            "id" => put("id", json!(connector.id)),
            "target" => {
                put("connectorId", json!(connector.factory));
                put("target", json!(connector.target))
            }
            name => put(name, chosen(name, &metadata).unwrap_or(value)),
        };
    }
    put("syncProfile", json!(connector.shown.sync_profile));
    put("enableTokenStorage", json!(connector.stores_tokens));
    put("config", object_of(&connector.shown.config));
    put("metadata", metadata);
    put_own(&mut shown, connector);
    Value::Object(shown)
}

/// A factory that is not known any more is not shown, its connectors are.
fn factory_members(id: &str) -> Map<String, Value> {
    match providers::social_factory(id).map(Factory::json) {
        Some(Value::Object(members)) => members,
        _ => Map::from_iter(["id", "type", "target"].map(|name| (name.to_owned(), json!("Social")))),
    }
}

fn chosen(name: &str, metadata: &Value) -> Option<Value> {
    let value = OF_METADATA.contains(&name).then(|| metadata.get(name)).flatten()?;
    Some(value.clone()).filter(|value| !value.is_null())
}

/// Lacre's own members.
pub(super) fn put_own(shown: &mut Map<String, Value>, connector: &Connector) {
    let mut put = |name: &str, value: Value| shown.insert(name.to_owned(), value);
    put("refreshAhead", json!(connector.refresh_ahead));
    if let Some((until, why)) = &connector.breaker {
        put("pausedUntil", json!(millis(until.as_micros())));
        put("pausedFor", json!(why));
    }
}

/// The connector of a body; `made_from` is the member that names its factory.
pub(super) fn read_new(body: &Body, family: Family, made_from: &str) -> Result<NewConnector, ApiError> {
    let mut input = body.members()?;
    let id = input.one_of("id", |text| ConnectorId::parse(text).ok(), "1 to 64 of A-Z a-z 0-9 _ -");
    let factory = input.filled_text(made_from, &[]);
    let factory = input.needed(made_from, factory);
    let mut connector = NewConnector {
        id,
        family,
        factory: factory.unwrap_or_default(),
        config: object(&mut input, "config"),
        metadata: json!({}),
        sync_profile: input.flag("syncProfile").unwrap_or_default(),
        connector_name: String::new(),
        domains: json!([]),
        branding: json!({}),
        stores_tokens: input.flag("enableTokenStorage").unwrap_or_default(),
        refresh_ahead: input.whole("refreshAhead").unwrap_or_default(),
    };
    match family {
        Family::Social => connector.metadata = object(&mut input, "metadata"),
        Family::Sso => {
            let name = input.filled_text("connectorName", &[]);
            connector.connector_name = input.needed("connectorName", name).unwrap_or_default();
            connector.domains = input.texts("domains").map_or(connector.domains, Value::from);
            connector.branding = object(&mut input, "branding");
        }
    }
    input.end().map(|()| connector)
}

fn object(input: &mut Input, name: &str) -> Value {
    Value::Object(input.object(name).unwrap_or_default())
}

/// The change of a body.
pub(super) fn read_patch(body: &Body, family: Family) -> Result<ConnectorPatch, ApiError> {
    let mut input = body.members()?;
    let mut patch = ConnectorPatch {
        config: input.object("config").map(Value::Object),
        sync_profile: input.flag("syncProfile"),
        stores_tokens: input.flag("enableTokenStorage"),
        refresh_ahead: input.whole("refreshAhead"),
        ..ConnectorPatch::default()
    };
    match family {
        Family::Social => patch.metadata = input.object("metadata").map(Value::Object),
        Family::Sso => {
            patch.connector_name = input.text("connectorName");
            patch.domains = input.texts("domains").map(Value::from);
            patch.branding = input.object("branding").map(Value::Object);
        }
    }
    input.end().map(|()| patch)
}

async fn create(caller: Caller, tokens: Data<Tokens>, body: Body) -> Result<HttpResponse, ApiError> {
    let connector = read_new(&body, Family::Social, "connectorId")?;
    let connector = tokens.create_connector(&caller, connector).await;
    Ok(HttpResponse::Ok().json(shown(&connector.map_err(errors::of_connector(Family::Social))?)))
}

async fn list(caller: Caller, tokens: Data<Tokens>, request: HttpRequest) -> Result<HttpResponse, ApiError> {
    let target = parameter(&request, "target").filter(|target| !target.is_empty());
    let found = tokens.connectors(&caller, Family::Social, target.as_deref()).await?;
    Ok(HttpResponse::Ok().json(found.iter().map(shown).collect::<Vec<_>>()))
}

async fn one(caller: Caller, tokens: Data<Tokens>, id: Path<String>) -> Result<HttpResponse, ApiError> {
    Ok(HttpResponse::Ok().json(shown(&tokens.connector(&caller, Family::Social, &connector_id(&id)).await?)))
}

async fn update(
    caller: Caller,
    tokens: Data<Tokens>,
    id: Path<String>,
    body: Body,
) -> Result<HttpResponse, ApiError> {
    let patch = read_patch(&body, Family::Social)?;
    let connector = tokens.update_connector(&caller, Family::Social, &connector_id(&id), patch).await;
    Ok(HttpResponse::Ok().json(shown(&connector.map_err(errors::of_connector(Family::Social))?)))
}

async fn delete(caller: Caller, tokens: Data<Tokens>, id: Path<String>) -> Result<HttpResponse, ApiError> {
    tokens.delete_connector(&caller, Family::Social, &connector_id(&id)).await?;
    Ok(HttpResponse::NoContent().finish())
}

// What can be made is no secret, and the service has no part in it; the right is that of the routes beside.
async fn factories(caller: Caller) -> Result<HttpResponse, ApiError> {
    caller.require(Scope::ConnectorsAdmin)?;
    let all = providers::social_factories();
    Ok(HttpResponse::Ok().json(all.iter().map(Factory::json).collect::<Vec<_>>()))
}

async fn factory(caller: Caller, id: Path<String>) -> Result<HttpResponse, ApiError> {
    caller.require(Scope::ConnectorsAdmin)?;
    let found = providers::social_factory(&id).ok_or(TokensError::NotFound("factory"))?;
    Ok(HttpResponse::Ok().json(found.json()))
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::users::tests::at;
    use super::*;
    use crate::tokens::Shown;

    pub(in crate::http::logto) fn connector(family: Family, factory: &str) -> Connector {
        Connector {
            id: ConnectorId::parse("cwc5mtxw6yxk").unwrap(),
            family,
            factory: factory.to_owned(),
            target: "acme".to_owned(),
            shown: Shown { config: json!({ "clientId": "cid" }), ..Shown::default() },
            stores_tokens: true,
            refresh_ahead: 300,
            breaker: None,
            created_at: at(1_795_347_609_119),
            updated_at: at(1_795_347_609_119),
        }
    }

    fn names(shown: &Value) -> Vec<&str> {
        shown.as_object().unwrap().keys().map(String::as_str).collect()
    }

    #[test]
    fn what_a_connector_lacks_is_told_at_once() {
        let read = |text: &str, family, made_from| {
            read_new(&Body::of(text), family, made_from).map_err(|error| format!("{error:?}"))
        };
        let made =
            read(r#"{"connectorId":"oauth2","branding":1,"refreshAhead":60}"#, Family::Social, "connectorId");
        let made = made.ok().unwrap();
        assert_eq!((made.factory.as_str(), made.refresh_ahead, made.config), ("oauth2", 60, json!({})));

        let told = read(r#"{"domains":"a.example","config":1}"#, Family::Sso, "providerName").err().unwrap();
        for member in ["providerName", "connectorName", "domains", "config"] {
            assert!(told.contains(&format!("key path \\\"{member}\\\"")), "{told}");
        }
        let told = read(r#"{"connectorName":"Acme"}"#, Family::Sso, "providerName").err().unwrap();
        assert!(!told.contains("connectorName"), "{told}");
    }

    #[test]
    fn a_connector_has_its_factorys_members_and_its_own() {
        let shown = shown(&connector(Family::Social, "oauth2"));
        let names = names(&shown);
        assert_eq!(names[..4], ["id", "type", "connectorId", "target"]);
        let end = ["syncProfile", "enableTokenStorage", "config", "metadata", "refreshAhead"];
        assert_eq!(names[names.len() - 5..], end);
        assert_eq!(
            (&shown["id"], &shown["connectorId"], &shown["target"], &shown["type"]),
            (&json!("cwc5mtxw6yxk"), &json!("oauth2"), &json!("acme"), &json!("Social"))
        );
        assert_eq!((&shown["metadata"], &shown["refreshAhead"]), (&json!({}), &json!(300)));
    }

    #[test]
    fn metadata_name_a_standard_connector_and_a_breaker_is_told_last() {
        let mut made = connector(Family::Social, "oauth2");
        made.shown.metadata = json!({ "target": "acme", "name": { "en": "Acme" }, "logo": null });
        made.breaker = Some((at(1_795_347_700_000), "provider-config".to_owned()));
        let shown = shown(&made);
        assert_eq!(shown["name"], json!({ "en": "Acme" }));
        assert!(shown["logo"].is_string());
        let end = r#""pausedUntil":1795347700000,"pausedFor":"provider-config"}"#;
        assert!(shown.to_string().ends_with(end), "{shown}");
    }

    #[test]
    fn a_connector_outlives_its_factory() {
        let shown = shown(&connector(Family::Social, "gone"));
        assert_eq!(names(&shown)[..4], ["id", "type", "connectorId", "target"]);
        assert_eq!((&shown["type"], &shown["target"]), (&json!("Social"), &json!("acme")));
    }
}
