//! The Logto family under `/api`: Logto's routes, bodies, units and error codes, so that software written for
//! Logto works unchanged. What Lacre adds are routes and members of their own.
//!
//! One file per resource. `management` and `account` are the two ways in: machines for the Management API,
//! people for the Account and Verification APIs, which have aliases without `/api` and are open to pages of any
//! origin (`cors`). `input` reads bodies, `query` paths and queries, `error` is all that goes wrong, `dress` what
//! every answer of the family has. This one is the route table.

mod account;
mod account_center;
mod applications;
mod connectors;
mod cors;
mod dress;
mod error;
mod identities;
mod input;
mod management;
mod my_account;
mod query;
mod secrets;
mod signing_keys;
mod sso_connectors;
mod subject_tokens;
mod users;
mod verifications;

use actix_web::HttpResponse;
use actix_web::dev::HttpServiceFactory;
use actix_web::middleware::from_fn;
use actix_web::web::{self, PayloadConfig, ServiceConfig};

pub(super) use dress::after_a_panic;
pub(super) use error::ApiError;

/// No body of this family is long,
const BODY: usize = 32 << 10;

/// but what applications keep with users, and certificates in configurations, may be.
const LONG_BODY: usize = 256 << 10;

type Routes = fn(&mut ServiceConfig);

/// Where people come in: the first of each is Logto's, the others are its documents' and old clients'
/// (contract, section 1.2).
const PERSONAL: [(&str, Routes); 6] = [
    ("/api/my-account", my_account::routes),
    ("/my-account", my_account::routes),
    ("/api/verifications", verifications::routes),
    ("/api/verification", verifications::routes),
    ("/verifications", verifications::routes),
    ("/verification", verifications::routes),
];

pub(super) fn routes(cfg: &mut ServiceConfig) {
    for (prefix, routes) in PERSONAL {
        cfg.service(personal(prefix, routes));
    }
    let api = web::scope("/api")
        .app_data(PayloadConfig::new(BODY))
        .wrap(from_fn(dress::dress))
        .service(managed("/configs", BODY, signing_keys::routes))
        .service(managed("/users", LONG_BODY, users::routes))
        .service(managed("/secrets", BODY, secrets::routes))
        .service(managed("/secret", BODY, secrets::routes))
        .service(managed("/connectors", LONG_BODY, connectors::routes))
        .service(managed("/connector-factories", BODY, connectors::factory_routes))
        .service(managed("/sso-connectors", LONG_BODY, sso_connectors::routes))
        .service(managed("/sso-connector-providers", BODY, sso_connectors::provider_routes))
        .service(managed("/account-center", BODY, account_center::routes))
        .configure(applications::routes)
        .configure(subject_tokens::routes)
        .default_service(web::to(nothing_here));
    cfg.service(api);
}

/// A part of the Management API.
fn managed(path: &str, longest: usize, routes: Routes) -> impl HttpServiceFactory + use<> {
    web::scope(path)
        .app_data(PayloadConfig::new(longest))
        .wrap(from_fn(management::authenticate))
        .configure(routes)
        .default_service(web::to(nothing_here))
}

/// A part of the Account or Verification API.
fn personal(prefix: &str, routes: Routes) -> impl HttpServiceFactory + use<> {
    web::scope(prefix)
        .app_data(PayloadConfig::new(BODY))
        .wrap(from_fn(account::authenticate))
        .wrap(from_fn(dress::dress))
        .configure(routes)
        .default_service(web::to(nothing_here))
}

/// Whether a path is of this family, so that its errors have this family's form.
pub(super) fn owns(path: &str) -> bool {
    is_at_or_below("/api", path) || is_personal(path)
}

fn is_personal(path: &str) -> bool {
    PERSONAL.iter().any(|(prefix, _)| is_at_or_below(prefix, path))
}

fn is_at_or_below(prefix: &str, path: &str) -> bool {
    path.strip_prefix(prefix).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

/// The unit of every time of the family that does not say otherwise.
const fn millis(micros: i64) -> i64 {
    micros.div_euclid(1000)
}

async fn nothing_here() -> HttpResponse {
    HttpResponse::NotFound().content_type(dress::TEXT).body("Not Found")
}

#[cfg(test)]
mod tests;
