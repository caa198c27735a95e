//! The HTTP face: translates requests into calls of the services and answers into responses.
//!
//! It decides nothing. Families: `native` under `/v1` (problem+json), `logto` under `/api` (Logto's errors),
//! `oidc` (RFC 6749 errors) with the public documents of `discovery`, `ops` (`/livez`, `/readyz`, `/metrics`).
//! Every request passes `observe` (request id, log, metrics, error bodies); everything under `/v1` and the
//! Management API passes `auth` before its body is read. Released values leave in a `secret_body`, which wipes
//! itself. Start reading at [`app`].

mod auth;
mod body;
mod cached;
mod discovery;
mod limit;
mod logto;
mod native;
mod observe;
mod oidc;
mod ops;
mod peer;
mod problem;
mod secret_body;

use std::sync::Arc;
use std::time::Duration;

use actix_web::App;
use actix_web::Error;
use actix_web::body::BoxBody;
use actix_web::dev::{ServiceFactory, ServiceRequest, ServiceResponse};
use actix_web::middleware::from_fn;
use actix_web::web::{self, Data, PathConfig, QueryConfig, ServiceConfig};

use crate::audit::AuditLog;
use crate::ids::SigningKeyId;
use crate::issuer::Issuer;
use crate::keys::{Keys, Use};
use crate::tokens::Tokens;
use crate::vault::Vault;

pub use auth::Gate;
pub use limit::{Limiter, RateLimit};
pub use ops::{Check, MetricsAccess, Operations};
pub use peer::{CertificateRule, LocalUser, on_connect, signing_policies};

use problem::{Code, Problem};

/// What the face is put together from. Each part is registered by itself, so that a handler's
/// signature says what it can reach.
#[derive(Clone)]
pub struct Parts {
    /// Secrets, KEKs, jobs.
    pub vault: Vault,
    /// Tokens and applications.
    pub issuer: Issuer,
    /// Federated token sets.
    pub tokens: Tokens,
    /// Signing and cookie keys.
    pub keys: Keys,
    /// How long a new signing key is Next if nobody says so.
    pub rotation_grace: Duration,
    /// The audit log, for reading.
    pub audit: AuditLog,
    /// Who may come in.
    pub gate: Arc<Gate>,
    /// How the daemon is.
    pub operations: Arc<dyn Operations>,
    /// Who may read `/metrics`.
    pub metrics: MetricsAccess,
    /// Longest value in bytes, from which the body limits follow.
    pub max_value_bytes: usize,
}

/// The application that a server thread runs.
pub fn app(
    parts: &Parts,
) -> App<
    impl ServiceFactory<
        ServiceRequest,
        Config = (),
        Response = ServiceResponse<BoxBody>,
        Error = Error,
        InitError = (),
    > + use<>,
> {
    App::new()
        .configure(|cfg| register(parts, cfg))
        .configure(|cfg| routes(parts.max_value_bytes, cfg))
        .wrap(from_fn(observe::observe))
}

fn register(parts: &Parts, cfg: &mut ServiceConfig) {
    cfg.app_data(Data::new(parts.vault.clone()))
        .app_data(Data::new(parts.issuer.clone()))
        .app_data(Data::new(parts.tokens.clone()))
        .app_data(Data::new(parts.keys.clone()))
        .app_data(Data::new(DefaultGrace(parts.rotation_grace)))
        .app_data(Data::new(parts.audit.clone()))
        .app_data(Data::from(Arc::clone(&parts.gate)))
        .app_data(Data::from(Arc::clone(&parts.operations)))
        .app_data(Data::new(parts.metrics));
}

fn routes(max_value_bytes: usize, cfg: &mut ServiceConfig) {
    cfg.app_data(QueryConfig::default().error_handler(|error, _| problem::bad_query(&error).into()))
        .app_data(PathConfig::default().error_handler(|_, _| Problem::new(Code::NotFound).into()))
        .configure(ops::routes)
        .configure(oidc::routes)
        .configure(discovery::routes)
        .configure(logto::routes)
        .configure(|cfg| native::routes(max_value_bytes, cfg))
        .default_service(web::to(nothing_here));
}

/// `keys.rotation_grace`.
struct DefaultGrace(Duration);

impl DefaultGrace {
    /// What a rotation is asked for with. Cookie keys have no grace, so none is put in for them.
    fn or(&self, used: Use, asked: Option<Duration>) -> Option<Duration> {
        asked.or((used == Use::Jwt).then_some(self.0))
    }
}

/// A key's id as a path names it. Whether another refusal comes before "no such key" is the service's to say, so
/// a malformed id becomes one that no key has.
fn key_id(text: &str) -> SigningKeyId {
    SigningKeyId::parse(text).unwrap_or_else(|_| SigningKeyId::of_nothing())
}

async fn nothing_here() -> Result<&'static str, Problem> {
    Err(Problem::new(Code::NotFound))
}

#[cfg(test)]
mod tests;
