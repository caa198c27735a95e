//! The Logto family under `/api`: Logto's routes, bodies, units and error codes, so that software written for
//! Logto works unchanged. What Lacre adds are routes and members of their own.
//!
//! One file per resource (`signing_keys`); `management` is the Management API's authentication, `input` reads
//! bodies, `error` is all that goes wrong, `dress` what every answer of the family has. This one is the route
//! table: further resources go beside `/configs`.

mod dress;
mod error;
mod input;
mod management;
mod signing_keys;

use actix_web::HttpResponse;
use actix_web::middleware::from_fn;
use actix_web::web::{self, PayloadConfig, ServiceConfig};

pub(super) use dress::after_a_panic;
pub(super) use error::ApiError;

/// No body of this family is long.
const BODY: usize = 32 << 10;

pub(super) fn routes(cfg: &mut ServiceConfig) {
    let configs = web::scope("/configs")
        .wrap(from_fn(management::authenticate))
        .configure(signing_keys::routes)
        .default_service(web::to(nothing_here));
    let api = web::scope("/api")
        .app_data(PayloadConfig::new(BODY))
        .wrap(from_fn(dress::dress))
        .service(configs)
        .default_service(web::to(nothing_here));
    cfg.service(api);
}

/// Whether a path is of this family, so that its errors have this family's form.
pub(super) fn owns(path: &str) -> bool {
    path == "/api" || path.starts_with("/api/")
}

async fn nothing_here() -> HttpResponse {
    HttpResponse::NotFound().content_type(dress::TEXT).body("Not Found")
}
