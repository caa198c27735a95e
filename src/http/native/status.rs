//! `/v1/status`: with what the daemon works. For every authenticated caller: it has figures and
//! versions in it, no names.

use actix_web::HttpResponse;
use actix_web::web::{Data, Query};
use serde_json::json;

use super::NoQuery;
use crate::audit::AuditLog;
use crate::http::ops::Operations;
use crate::http::problem::Problem;
use crate::identity::Caller;
use crate::vault::Vault;

pub(super) async fn status(
    caller: Caller,
    daemon: Data<dyn Operations>,
    vault: Data<Vault>,
    log: Data<AuditLog>,
    _: Query<NoQuery>,
) -> Result<HttpResponse, Problem> {
    let mut body = daemon.status();
    body["tenant"] = json!(caller.tenant);
    body["audit"] =
        json!(log.head().await.ok().map(|head| json!({ "seq": head.seq, "hash": hex::encode(head.hash) })));
    match vault.quarantined_at().await {
        Ok(since) => body["quarantined_at"] = json!(since.map(|since| since.to_rfc3339())),
        Err(error) => tracing::warn!(%error, "whether there is a quarantine is not known now"),
    }
    match vault.figures(&caller).await {
        Ok(figures) => body["vault"] = json!(figures),
        // A status must not fail because of what it reports on.
        Err(error) => {
            tracing::warn!(%error, "no figures for the status");
            body["vault"] = json!(null);
        }
    }
    Ok(HttpResponse::Ok().json(body))
}
