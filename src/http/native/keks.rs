//! `/v1/keks`, `/v1/jobs` and `/v1/restore`: KEK versions, the jobs that move records between them, and the
//! end of the quarantine after a restore.

use actix_web::http::header;
use actix_web::web::{Data, Path, Query};
use actix_web::{HttpRequest, HttpResponse};
use serde::Deserialize;
use serde_json::{Value, json};
use zeroize::Zeroizing;

use super::{NoQuery, idempotency, job_id, page};
use crate::http::body::OptionalBody;
use crate::http::problem::Problem;
use crate::identity::Caller;
use crate::vault::{DeviceName, JobInfo, KekInfo, Vault};

fn kek_view(kek: &KekInfo) -> Value {
    json!({
        "kek_id": kek.kek_id,
        "version": kek.version,
        "key_id": kek.key_id,
        "device": kek.device,
        "role": kek.role,
        "mechanism": kek.mechanism,
        "state": kek.state,
        "wraps": kek.wraps,
        "wrap_budget": kek.wrap_budget,
        "records": kek.records,
        "created_at": kek.created_at.to_rfc3339(),
        "activated_at": kek.activated_at.as_ref().map(ToString::to_string),
    })
}

fn job_view(job: &JobInfo) -> Value {
    json!({
        "id": job.id,
        "kind": job.kind,
        "state": job.state,
        "target_version": job.target_version,
        "total": job.total,
        "done": job.done,
        "failed": job.failed,
        "last_error": job.last_error,
        "created_at": job.created_at.to_rfc3339(),
        "updated_at": job.updated_at.to_rfc3339(),
    })
}

// A tenant has few KEK versions: one page holds them all.
pub(super) async fn list(
    caller: Caller,
    vault: Data<Vault>,
    request: HttpRequest,
    _: Query<NoQuery>,
) -> Result<HttpResponse, Problem> {
    let keks = vault.keks(&caller).await?;
    Ok(page(&request, &keks.iter().map(kek_view).collect::<Vec<_>>(), None))
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Rotate {
    device: Option<String>,
}

pub(super) async fn rotate(
    caller: Caller,
    vault: Data<Vault>,
    request: HttpRequest,
    body: OptionalBody,
) -> Result<HttpResponse, Problem> {
    let Rotate { device } = body.parse()?;
    // Without a device the body stands for nothing, as it always has.
    let stands_for = device.as_deref().unwrap_or_default().as_bytes().to_vec();
    let key = idempotency(&request, Zeroizing::new(stands_for))?;
    let read = |name: String| {
        DeviceName::parse(&name).ok_or_else(|| Problem::invalid("device", "is not a device's name"))
    };
    let kek = vault.rotate_kek(&caller, device.map(read).transpose()?, key).await?;
    Ok(HttpResponse::Created().insert_header((header::LOCATION, "/v1/keks")).json(kek_view(&kek)))
}

pub(super) async fn rewrap(
    caller: Caller,
    vault: Data<Vault>,
    request: HttpRequest,
) -> Result<HttpResponse, Problem> {
    let key = idempotency(&request, Zeroizing::default())?;
    let job = vault.rewrap(&caller, key).await?;
    let location = format!("/v1/jobs/{}", job.id);
    Ok(HttpResponse::Accepted().insert_header((header::LOCATION, location)).json(job_view(&job)))
}

pub(super) async fn release(caller: Caller, vault: Data<Vault>) -> Result<HttpResponse, Problem> {
    let released = vault.release(&caller).await?;
    Ok(HttpResponse::Ok().json(json!({ "released": released })))
}

pub(super) async fn job(
    caller: Caller,
    vault: Data<Vault>,
    id: Path<String>,
) -> Result<HttpResponse, Problem> {
    let job = vault.job(&caller, &job_id(&id)?).await?;
    Ok(HttpResponse::Ok().json(job_view(&job)))
}

pub(super) async fn cancel(
    caller: Caller,
    vault: Data<Vault>,
    id: Path<String>,
) -> Result<HttpResponse, Problem> {
    let job = vault.cancel_job(&caller, &job_id(&id)?).await?;
    Ok(HttpResponse::Ok().json(job_view(&job)))
}
