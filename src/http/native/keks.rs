//! `/v1/keks` and `/v1/jobs`: KEK versions, and the jobs that move records between them.

use actix_web::http::header;
use actix_web::web::{Data, Path, Query};
use actix_web::{HttpRequest, HttpResponse};
use serde_json::{Value, json};
use zeroize::Zeroizing;

use super::{NoQuery, idempotency, job_id, page};
use crate::http::problem::Problem;
use crate::identity::Caller;
use crate::vault::{JobInfo, KekInfo, Vault};

fn kek_view(kek: &KekInfo) -> Value {
    json!({
        "kek_id": kek.kek_id,
        "version": kek.version,
        "key_id": kek.key_id,
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

pub(super) async fn rotate(
    caller: Caller,
    vault: Data<Vault>,
    request: HttpRequest,
) -> Result<HttpResponse, Problem> {
    let key = idempotency(&request, Zeroizing::default())?;
    let kek = vault.rotate_kek(&caller, key).await?;
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
