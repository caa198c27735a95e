//! `/v1/status`: with what the daemon works. For every authenticated caller; the vault's figures
//! are added for those who may see them.

use actix_web::HttpResponse;
use actix_web::web::{Data, Query};
use serde_json::json;

use super::NoQuery;
use crate::http::ops::Operations;
use crate::http::problem::Problem;
use crate::identity::Caller;
use crate::vault::{Vault, VaultError};

pub(super) async fn status(
    caller: Caller,
    daemon: Data<dyn Operations>,
    vault: Data<Vault>,
    _: Query<NoQuery>,
) -> Result<HttpResponse, Problem> {
    let mut body = daemon.status();
    body["tenant"] = json!(caller.tenant);
    match vault.figures(&caller).await {
        Ok(figures) => body["vault"] = json!(figures),
        Err(VaultError::Forbidden(_)) => {}
        // A status must not fail because of what it reports on.
        Err(error) => {
            tracing::warn!(%error, "no figures for the status");
            body["vault"] = json!(null);
        }
    }
    Ok(HttpResponse::Ok().json(body))
}
