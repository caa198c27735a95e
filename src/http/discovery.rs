//! `/oidc/jwks` and `/oidc/.well-known/openid-configuration`: public documents, for every origin.

use std::time::Duration;

use actix_web::http::header::{self, HeaderName};
use actix_web::web::{self, Data, ServiceConfig};
use actix_web::{HttpRequest, HttpResponse, HttpResponseBuilder};
use serde_json::Value;

use crate::http::cached;
use crate::http::problem::Problem;
use crate::issuer::Issuer;

/// RFC 7517, section 8.5.2.
const JWKS: &str = "application/jwk-set+json; charset=utf-8";
const JSON: &str = "application/json; charset=utf-8";

pub(super) fn routes(cfg: &mut ServiceConfig) {
    let options = || web::method(actix_web::http::Method::OPTIONS).to(preflight);
    let keys = web::resource("/oidc/jwks").route(options()).route(web::head().to(jwks)).get(jwks);
    let about = web::resource("/oidc/.well-known/openid-configuration")
        .route(options())
        .route(web::head().to(configuration))
        .get(configuration);
    cfg.service(keys).service(about);
}

async fn jwks(request: HttpRequest, issuer: Data<Issuer>) -> Result<HttpResponse, Problem> {
    let published = issuer.published().await?;
    Ok(document(&request, JWKS, published.max_age, &published.jwks()))
}

// It names what the keys may be used with, so it is as old as they are.
async fn configuration(request: HttpRequest, issuer: Data<Issuer>) -> Result<HttpResponse, Problem> {
    let published = issuer.published().await?;
    Ok(document(&request, JSON, published.max_age, &published.configuration()))
}

fn document(request: &HttpRequest, kind: &str, max_age: Duration, content: &Value) -> HttpResponse {
    let content = content.to_string();
    let tag = cached::tag_of(content.as_bytes());
    let is_known = cached::is_known(request.headers(), &tag);
    let mut response = if is_known { HttpResponse::NotModified() } else { HttpResponse::Ok() };
    for_all(&mut response)
        .insert_header((header::CACHE_CONTROL, freshness(max_age)))
        .insert_header((header::ETAG, tag));
    match is_known {
        true => response.finish(),
        false => response.content_type(kind).body(content),
    }
}

/// The first text is the contract's, to the letter (section 9.6).
fn freshness(max_age: Duration) -> String {
    match max_age.as_secs() {
        0 => "no-cache, max-age=0, must-revalidate".to_owned(),
        seconds => format!("public, max-age={seconds}, must-revalidate"),
    }
}

/// CORS: nothing here depends on who asks, so it is for every origin.
fn for_all(response: &mut HttpResponseBuilder) -> &mut HttpResponseBuilder {
    let any: [(HeaderName, &str); 2] =
        [(header::ACCESS_CONTROL_ALLOW_ORIGIN, "*"), (header::ACCESS_CONTROL_EXPOSE_HEADERS, "*")];
    any.into_iter().fold(response, |response, header| response.insert_header(header))
}

async fn preflight() -> HttpResponse {
    for_all(&mut HttpResponse::NoContent())
        .insert_header((header::ACCESS_CONTROL_ALLOW_METHODS, "GET, HEAD"))
        .insert_header((header::ACCESS_CONTROL_ALLOW_HEADERS, "*"))
        .insert_header((header::ACCESS_CONTROL_MAX_AGE, "86400"))
        .finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cache_control_is_the_contracts_unless_the_policy_allows_more() {
        assert_eq!(freshness(Duration::ZERO), "no-cache, max-age=0, must-revalidate");
        assert_eq!(freshness(Duration::from_secs(300)), "public, max-age=300, must-revalidate");
    }
}
