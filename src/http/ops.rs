//! `/livez`, `/readyz`, `/metrics`: how the daemon is. What there is to know comes through
//! [`Operations`], because this layer knows neither the device nor the database.

use std::borrow::Cow;

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
    pub name: Cow<'static, str>,
    /// What is wrong; `None` is good.
    pub problem: Option<String>,
    /// Whether the daemon is not ready while it fails. Others are shown, and decide nothing.
    pub is_needed: bool,
}

impl Check {
    /// One that readiness depends on.
    pub const fn needed(name: &'static str, problem: Option<String>) -> Self {
        Self { name: Cow::Borrowed(name), problem, is_needed: true }
    }

    /// Whether it stands in the way of readiness.
    pub const fn is_passed(&self) -> bool {
        self.problem.is_none() || !self.is_needed
    }
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
    let is_ready = checks.iter().all(Check::is_passed);
    // Reasons are for operators; what a load balancer asks for shows names only.
    let shown = checks.iter().map(|check| {
        let mut shown = json!({ "name": check.name, "ok": check.problem.is_none() });
        if !check.is_needed {
            shown["optional"] = true.into();
        }
        if let Some(reason) = check.problem.as_ref().filter(|_| query.verbose.is_some()) {
            shown["reason"] = reason.as_str().into();
        }
        shown
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
