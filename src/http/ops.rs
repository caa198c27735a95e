//! `/livez`, `/readyz`, `/metrics`: how the daemon is. What there is to know comes through
//! [`Operations`], because this layer knows neither the device nor the database.

use actix_web::http::header::{self, ContentType};
use actix_web::web::{self, Data, Query, ServiceConfig};
use actix_web::{HttpRequest, HttpResponse};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::http::auth;
use crate::http::problem::Problem;

/// What the daemon tells about itself. No call waits for the device or the database.
pub trait Operations: Send + Sync {
    /// The named checks of readiness.
    fn checks(&self) -> Vec<Check>;
    /// Whether the daemon is on its way out.
    fn is_draining(&self) -> bool;
    /// The object of `GET /v1/status`.
    fn status(&self) -> Value;
    /// The metrics in Prometheus's text format.
    fn metrics(&self) -> String;
}

/// One condition of readiness.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Check {
    /// `database`, `device`, `keys`, ...
    pub name: &'static str,
    /// What is wrong; `None` is good.
    pub problem: Option<String>,
}

/// Who may read `/metrics` (`[server] metrics`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MetricsAccess {
    /// Everybody who reaches a listener. The figures carry no names and no ids.
    #[default]
    Open,
    /// Every authenticated caller.
    Authenticated,
}

pub(super) fn routes(cfg: &mut ServiceConfig) {
    cfg.service(web::resource("/livez").get(live))
        .service(web::resource("/readyz").get(ready))
        .service(web::resource("/metrics").get(metrics));
}

// Answers as long as the process does: a restart heals neither a lost device nor a full disk.
async fn live() -> HttpResponse {
    HttpResponse::Ok().content_type(ContentType::plaintext()).body("ok\n")
}

#[derive(Deserialize)]
struct ReadyQuery {
    verbose: Option<String>,
}

async fn ready(daemon: Data<dyn Operations>, query: Query<ReadyQuery>) -> HttpResponse {
    let checks = daemon.checks();
    let is_ready = checks.iter().all(|check| check.problem.is_none());
    // Reasons are for operators; what a load balancer asks for shows names only.
    let shown = checks.iter().map(|check| match &check.problem {
        Some(reason) if query.verbose.is_some() => json!({"name": check.name, "ok": false, "reason": reason}),
        problem => json!({ "name": check.name, "ok": problem.is_none() }),
    });
    let body = json!({ "ready": is_ready, "checks": shown.collect::<Vec<_>>() });
    let mut response = if is_ready { HttpResponse::Ok() } else { HttpResponse::ServiceUnavailable() };
    if !is_ready {
        response.insert_header((header::RETRY_AFTER, "1"));
    }
    response.insert_header((header::CACHE_CONTROL, "no-store")).json(body)
}

async fn metrics(
    request: HttpRequest,
    daemon: Data<dyn Operations>,
    access: Data<MetricsAccess>,
    gate: Data<auth::Gate>,
) -> Result<HttpResponse, Problem> {
    if **access == MetricsAccess::Authenticated {
        gate.admit(&request).await?;
    }
    Ok(HttpResponse::Ok().content_type("text/plain; version=0.0.4; charset=utf-8").body(daemon.metrics()))
}
