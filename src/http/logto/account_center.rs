//! `/api/account-center`: whether people can use the Account API, and for what (contract, section 4.6).

use std::collections::BTreeMap;

use actix_web::HttpResponse;
use actix_web::web::{self, Data, ServiceConfig};
use serde_json::{Map, Value, json};

use super::error::ApiError;
use super::input::{Body, Input};
use crate::identity::Caller;
use crate::ids::TenantId;
use crate::tokens::{AccountCenter, FieldAccess, Tokens};

/// There is one in a tenant.
const ID: &str = "default";

pub(super) fn routes(cfg: &mut ServiceConfig) {
    cfg.service(web::resource("").get(show).patch(set));
}

// What Lacre does not offer is shown as Logto shows it where it was never set.
fn shown(tenant: &TenantId, center: &AccountCenter) -> Value {
    json!({
        "tenantId": tenant,
        "id": ID,
        "enabled": center.enabled,
        "fields": center.fields,
        "webauthnRelatedOrigins": [],
        "deleteAccountUrl": null,
        "customCss": null,
        "profileFields": [],
    })
}

async fn show(caller: Caller, tokens: Data<Tokens>) -> Result<HttpResponse, ApiError> {
    let center = tokens.account_center(&caller).await?;
    Ok(HttpResponse::Ok().json(shown(&caller.tenant, &center)))
}

async fn set(caller: Caller, tokens: Data<Tokens>, body: Body) -> Result<HttpResponse, ApiError> {
    let mut input = body.members()?;
    let enabled = input.flag("enabled");
    let fields = input.object("fields").map(|fields| accesses(&mut input, fields));
    input.end()?;
    let center = tokens.set_account_center(&caller, enabled, fields).await?;
    Ok(HttpResponse::Ok().json(shown(&caller.tenant, &center)))
}

fn accesses(input: &mut Input, fields: Map<String, Value>) -> BTreeMap<String, FieldAccess> {
    let mut read = BTreeMap::new();
    for (name, value) in fields {
        match serde_json::from_value(value) {
            Ok(access) => drop(read.insert(name, access)),
            Err(_) => {
                let member = format!("fields.{name}");
                input.wrong(&member, "invalid_enum_value", "Expected Off, ReadOnly or Edit");
            }
        }
    }
    read
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_have_logtos_members_in_its_order() {
        let fields = BTreeMap::from([("social".to_owned(), FieldAccess::Edit)]);
        let center = AccountCenter { enabled: true, fields };
        let wanted = concat!(
            r#"{"tenantId":"default","id":"default","enabled":true,"fields":{"social":"Edit"},"#,
            r#""webauthnRelatedOrigins":[],"deleteAccountUrl":null,"customCss":null,"profileFields":[]}"#,
        );
        assert_eq!(shown(&TenantId::parse("default").unwrap(), &center).to_string(), wanted);
    }

    #[test]
    fn every_field_that_is_wrong_is_named() {
        let mut input = Input::default();
        let fields = json!({ "social": "Edit", "name": "edit", "email": 1 });
        let read = accesses(&mut input, fields.as_object().unwrap().clone());
        assert_eq!(read, BTreeMap::from([("social".to_owned(), FieldAccess::Edit)]));
        let told = format!("{:?}", input.end().unwrap_err());
        assert!(told.contains("fields.name") && told.contains("fields.email"), "{told}");
    }
}
