//! The route table without services: what is there, for whom, and what its answers have.

use actix_web::App;
use actix_web::body::to_bytes;
use actix_web::dev::ServiceResponse;
use actix_web::http::Method;
use actix_web::test::{TestRequest, call_service, init_service};
use serde_json::{Value, json};

use super::*;
use crate::http::observe;

async fn ask(request: TestRequest) -> (ServiceResponse<()>, Value) {
    let app = App::new().configure(routes).wrap(from_fn(observe::observe));
    let response = call_service(&init_service(app).await, request.to_request()).await;
    let (request, response) = response.into_parts();
    let (response, body) = response.into_parts();
    let body = to_bytes(body).await.unwrap();
    (ServiceResponse::new(request, response), serde_json::from_slice(&body).unwrap_or(Value::Null))
}

fn header_of(response: &ServiceResponse<()>, name: &str) -> String {
    response.headers().get(name).map_or("", |value| value.to_str().unwrap()).to_owned()
}

#[test]
fn the_family_owns_its_aliases_and_nothing_that_only_begins_alike() {
    for path in [
        "/api",
        "/api/",
        "/api/nowhere",
        "/my-account",
        "/my-account/identities/github/access-token",
        "/verification/social",
        "/verifications",
        "/verifications/sso/verify",
    ] {
        assert!(owns(path), "{path}");
    }
    for path in ["/", "/apis", "/my-accounts", "/my", "/verificationss", "/v1/verifications", "/oidc/token"] {
        assert!(!owns(path), "{path}");
    }
    assert!(is_personal("/api/verification/social") && is_personal("/api/my-account"));
    assert!(!is_personal("/api/users") && !is_personal("/api/account-center"));
}

#[actix_web::test]
async fn every_route_is_closed_without_a_gate() {
    for path in [
        "/api/users",
        "/api/users/a/all-identities",
        "/api/secret/a",
        "/api/secrets/a",
        "/api/connectors/a",
        "/api/connector-factories",
        "/api/sso-connectors",
        "/api/sso-connector-providers",
        "/api/account-center",
        "/api/my-account",
        "/my-account/identities/a/access-token",
        "/api/verifications/social",
        "/api/verification/social",
        "/verification/social",
        "/verifications/password",
        "/my-account/nowhere",
        "/api/users/a/b/c/d",
    ] {
        for method in [Method::GET, Method::POST, Method::DELETE] {
            let (response, body) = ask(TestRequest::default().method(method).uri(path)).await;
            assert_eq!(
                (response.status().as_u16(), body),
                (500, json!({ "message": "Internal server error." }))
            );
            assert!(!header_of(&response, "logto-core-request-id").is_empty(), "{path}");
        }
    }
    let (response, _) = ask(TestRequest::get().uri("/api/secretss/a")).await;
    assert_eq!(response.status(), 404);
}

#[actix_web::test]
async fn a_page_of_any_origin_may_ask_for_an_account_and_for_nothing_else() {
    let preflight = |path: &str| {
        TestRequest::default()
            .method(Method::OPTIONS)
            .uri(path)
            .insert_header(("origin", "https://app.example"))
            .insert_header(("access-control-request-method", "PATCH"))
            .insert_header(("access-control-request-headers", "authorization,content-type"))
    };
    for path in ["/api/my-account/identities/a/access-token", "/my-account", "/verification/social"] {
        let (response, _) = ask(preflight(path)).await;
        assert_eq!(response.status(), 204, "{path}");
        assert_eq!(header_of(&response, "access-control-allow-origin"), "https://app.example");
        assert_eq!(header_of(&response, "access-control-allow-methods"), "PATCH");
        assert_eq!(header_of(&response, "access-control-allow-headers"), "authorization,content-type");
        assert_eq!(header_of(&response, "access-control-max-age"), "7200");
        assert_eq!(header_of(&response, "access-control-allow-credentials"), "");
        assert_eq!(header_of(&response, "vary"), "Origin");
    }
    let (response, _) = ask(preflight("/api/users")).await;
    assert_ne!(response.status(), 204);
    assert_eq!(header_of(&response, "access-control-allow-origin"), "");

    let (response, _) = ask(TestRequest::get().uri("/api/my-account")).await;
    assert_eq!(header_of(&response, "access-control-allow-origin"), "*");
    assert_eq!(header_of(&response, "access-control-expose-headers"), "*");
    assert_eq!(header_of(&response, "vary"), "");
}
