//! `/v1/signing-keys/{jwt|cookie}`: rings of signing and cookie keys, with all that is known of each key.
//!
//! A change answers with the whole ring as it is afterwards; `?dry_run=true` with the ring as it would be.

use std::time::Duration;

use actix_web::web::{self, Data, Path, Query, ServiceConfig};
use actix_web::{HttpRequest, HttpResponse};
use secrecy::SecretString;
use serde::Deserialize;
use serde_json::{Value, json};

use super::{NoQuery, page};
use crate::http::body::{JsonBody, OptionalBody};
use crate::http::problem::{Code, Problem};
use crate::http::{DefaultGrace, key_id};
use crate::identity::Caller;
use crate::keys::{Change, Choice, ImportAs, KeyView, Keys, PolicyPatch, Rotation, Use};

pub(super) fn routes(cfg: &mut ServiceConfig) {
    cfg.service(web::resource("/signing-keys/jwt/import").post(import))
        .service(web::resource("/signing-keys/orphans").get(orphans))
        .service(web::resource("/signing-keys/orphans/{id}").delete(destroy_orphan))
        .service(web::resource("/signing-keys/clock/accept").post(accept_clock))
        .service(web::resource("/signing-keys/{use}").get(list))
        .service(web::resource("/signing-keys/{use}/rotate").post(rotate))
        .service(web::resource("/signing-keys/{use}/cancel").post(cancel))
        .service(web::resource("/signing-keys/{use}/revert").post(revert))
        .service(web::resource("/signing-keys/{use}/policy").get(policy).patch(set_policy))
        .service(web::resource("/signing-keys/{use}/{id}").delete(delete))
        .service(web::resource("/signing-keys/{use}/{id}/revoke").post(revoke));
}

fn view(key: &KeyView) -> Value {
    json!({
        "id": key.id,
        "use": key.used.name(),
        "status": key.status.name(),
        "algorithm": key.choice,
        "kid": key.kid,
        "alg": key.alg,
        "origin": key.origin.name(),
        "device": key.device,
        "created_at": key.created_at.to_rfc3339(),
        "effective_at": key.effective_at.to_rfc3339(),
        "is_signing": key.is_signing,
        "signs_from": key.signs_from.to_rfc3339(),
        "signs_until": key.signs_until.as_ref().map(ToString::to_string),
        "published_until": key.published_until.as_ref().map(ToString::to_string),
        "waits_for": key.waits_for,
    })
}

fn changed(change: &Change) -> HttpResponse {
    let items: Vec<_> = change.keys.iter().map(view).collect();
    let mut body = json!({ "items": items });
    if let Some(dead) = change.dead_tokens {
        body["dead_tokens"] = json!(dead);
    }
    body["dry_run"] = json!(change.dry_run);
    HttpResponse::Ok().json(body)
}

/// `{use}`; a ring of another name is not there.
fn ring(name: &str) -> Result<Use, Problem> {
    Use::parse(name).ok_or_else(|| Problem::new(Code::NotFound))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ChangeQuery {
    #[serde(default)]
    dry_run: bool,
}

// A ring has few keys: one page holds them all.
async fn list(
    caller: Caller,
    keys: Data<Keys>,
    request: HttpRequest,
    of: Path<String>,
    _: Query<NoQuery>,
) -> Result<HttpResponse, Problem> {
    let found = keys.list(&caller, ring(&of)?).await?;
    Ok(page(&request, &found.iter().map(view).collect::<Vec<_>>(), None))
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RotateBody {
    algorithm: Option<Choice>,
    /// Seconds.
    grace: Option<u64>,
}

async fn rotate(
    caller: Caller,
    (keys, default): (Data<Keys>, Data<DefaultGrace>),
    of: Path<String>,
    query: Query<ChangeQuery>,
    body: OptionalBody,
) -> Result<HttpResponse, Problem> {
    let (used, RotateBody { algorithm: choice, grace }) = (ring(&of)?, body.parse()?);
    let grace = default.or(used, grace.map(Duration::from_secs));
    let order = Rotation { choice, grace, dry_run: query.dry_run };
    Ok(changed(&keys.rotate(&caller, used, order).await?))
}

async fn cancel(
    caller: Caller,
    keys: Data<Keys>,
    of: Path<String>,
    query: Query<ChangeQuery>,
) -> Result<HttpResponse, Problem> {
    Ok(changed(&keys.cancel(&caller, ring(&of)?, query.dry_run).await?))
}

async fn revert(
    caller: Caller,
    keys: Data<Keys>,
    of: Path<String>,
    query: Query<ChangeQuery>,
) -> Result<HttpResponse, Problem> {
    Ok(changed(&keys.revert(&caller, ring(&of)?, query.dry_run).await?))
}

async fn delete(
    caller: Caller,
    keys: Data<Keys>,
    path: Path<(String, String)>,
    query: Query<ChangeQuery>,
) -> Result<HttpResponse, Problem> {
    Ok(changed(&keys.delete(&caller, ring(&path.0)?, &key_id(&path.1), query.dry_run).await?))
}

async fn revoke(
    caller: Caller,
    keys: Data<Keys>,
    path: Path<(String, String)>,
    query: Query<ChangeQuery>,
) -> Result<HttpResponse, Problem> {
    Ok(changed(&keys.revoke(&caller, ring(&path.0)?, &key_id(&path.1), query.dry_run).await?))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ImportBody {
    /// PKCS#8.
    pem: SecretString,
    #[serde(rename = "as")]
    status: String,
    /// Seconds; of `previous`.
    lifetime: Option<u64>,
}

impl ImportBody {
    fn into_parts(self) -> Result<(SecretString, ImportAs), Problem> {
        let lifetime = self.lifetime.map(Duration::from_secs);
        let into = match (self.status.as_str(), lifetime) {
            ("current", lifetime) => ImportAs::Current { lifetime: lifetime.unwrap_or(ImportAs::LIFETIME) },
            ("previous", Some(lifetime)) => ImportAs::Previous { lifetime },
            ("previous", None) => return Err(Problem::invalid("lifetime", "is needed for a previous key")),
            _ => return Err(Problem::invalid("as", "must be current or previous")),
        };
        Ok((self.pem, into))
    }
}

async fn import(
    caller: Caller,
    keys: Data<Keys>,
    query: Query<ChangeQuery>,
    body: JsonBody,
) -> Result<HttpResponse, Problem> {
    let (pem, into) = body.parse::<ImportBody>()?.into_parts()?;
    Ok(changed(&keys.import(&caller, pem, into, query.dry_run).await?))
}

async fn policy(
    caller: Caller,
    keys: Data<Keys>,
    of: Path<String>,
    _: Query<NoQuery>,
) -> Result<HttpResponse, Problem> {
    Ok(HttpResponse::Ok().json(keys.policy(&caller, ring(&of)?).await?))
}

async fn set_policy(
    caller: Caller,
    keys: Data<Keys>,
    of: Path<String>,
    body: JsonBody,
) -> Result<HttpResponse, Problem> {
    let patch = body.parse::<PolicyPatch>()?;
    Ok(HttpResponse::Ok().json(keys.set_policy(&caller, ring(&of)?, patch).await?))
}

/// Keys on the devices that no row knows.
async fn orphans(
    caller: Caller,
    keys: Data<Keys>,
    request: HttpRequest,
    _: Query<NoQuery>,
) -> Result<HttpResponse, Problem> {
    let found = keys.orphans(&caller).await?;
    let items: Vec<_> = found
        .iter()
        .map(|orphan| json!({ "id": orphan.id, "kind": orphan.kind, "device": orphan.device }))
        .collect();
    Ok(page(&request, &items, None))
}

async fn destroy_orphan(
    caller: Caller,
    keys: Data<Keys>,
    id: Path<String>,
    _: Query<NoQuery>,
) -> Result<HttpResponse, Problem> {
    keys.destroy_orphan(&caller, &id).await?;
    Ok(HttpResponse::NoContent().finish())
}

async fn accept_clock(caller: Caller, keys: Data<Keys>, _: Query<NoQuery>) -> Result<HttpResponse, Problem> {
    keys.accept_clock(&caller).await?;
    Ok(HttpResponse::NoContent().finish())
}
