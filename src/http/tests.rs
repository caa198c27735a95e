//! What needs no service: the shapes of errors, headers, and the operations' answers.

use actix_web::FromRequest;
use actix_web::body::to_bytes;
use actix_web::dev::Service;
use actix_web::http::header;
use actix_web::test::{TestRequest, call_service, init_service};
use actix_web::web::PayloadConfig;
use serde_json::{Value, json};

use super::body::JsonBody;
use super::*;
use crate::seal::Arena;
use crate::seal::guarded::Options;

struct Daemon {
    problem: Option<&'static str>,
    optional: Option<&'static str>,
    draining: bool,
}

impl Operations for Daemon {
    fn checks(&self) -> Vec<Check> {
        vec![
            Check::needed("device", self.problem.map(str::to_owned)),
            Check { name: "device/b".into(), problem: self.optional.map(str::to_owned), is_needed: false },
        ]
    }

    fn is_draining(&self) -> bool {
        self.draining
    }

    fn status(&self) -> Value {
        json!({})
    }

    fn metrics(&self) -> String {
        String::new()
    }
}

async fn take(body: JsonBody) -> Result<&'static str, Problem> {
    body.parse::<Value>().map(|_| "taken")
}

async fn send(daemon: Daemon, request: TestRequest) -> (ServiceResponse<()>, Value) {
    let daemon: Arc<dyn Operations> = Arc::new(daemon);
    let small = web::resource("/take").app_data(PayloadConfig::new(64)).post(take);
    let app = App::new()
        .app_data(Data::from(daemon))
        .service(small)
        .configure(|cfg| routes(1024, cfg))
        .wrap(from_fn(observe::observe));
    let response = call_service(&init_service(app).await, request.to_request()).await;
    let (request, response) = response.into_parts();
    let (response, body) = response.into_parts();
    let body = to_bytes(body).await.unwrap();
    let body = serde_json::from_slice(&body).unwrap_or(Value::Null);
    (ServiceResponse::new(request, response), body)
}

async fn ask(request: TestRequest) -> (ServiceResponse<()>, Value) {
    send(Daemon { problem: None, optional: None, draining: false }, request).await
}

fn header_of(response: &ServiceResponse<()>, name: &str) -> String {
    response.headers().get(name).map_or("", |value| value.to_str().unwrap()).to_owned()
}

#[actix_web::test]
async fn what_is_not_there_is_a_problem_with_the_requests_id() {
    let (response, body) =
        ask(TestRequest::get().uri("/nowhere?x=1").insert_header(("X-Request-Id", "abc-1"))).await;

    assert_eq!(response.status(), 404);
    assert_eq!(header_of(&response, "content-type"), "application/problem+json");
    assert_eq!(header_of(&response, "x-request-id"), "abc-1");
    assert_eq!(header_of(&response, "x-content-type-options"), "nosniff");
    assert_eq!(body["request_id"], "abc-1");
    assert_eq!(body["instance"], "/nowhere");
    assert_eq!(body["type"], "urn:lacre:problem:not-found");
}

#[actix_web::test]
async fn an_ill_formed_request_id_is_replaced() {
    let (response, _) = ask(TestRequest::get().uri("/livez").insert_header(("X-Request-Id", "a b;c"))).await;
    assert_eq!(header_of(&response, "x-request-id").len(), 32);
}

#[actix_web::test]
async fn a_wrong_method_names_the_right_ones() {
    let (response, body) = ask(TestRequest::post().uri("/livez")).await;

    assert_eq!((response.status().as_u16(), body["code"].as_str()), (405, Some("method-not-allowed")));
    assert_eq!(header_of(&response, "allow"), "GET");
}

#[actix_web::test]
async fn a_body_must_be_json_and_short_enough() {
    let json = |text: &str| {
        TestRequest::post()
            .uri("/take")
            .insert_header(("content-type", "application/json"))
            .set_payload(text.to_owned())
    };
    let code = async |request| ask(request).await.1["code"].as_str().map(str::to_owned);

    assert_eq!(ask(json("{}")).await.0.status(), 200);
    assert_eq!(
        ask(json("{}").insert_header(("content-type", "application/json; charset=utf-8"))).await.0.status(),
        200
    );
    assert_eq!(code(json("{")).await.as_deref(), Some("malformed"));
    assert_eq!(code(json(&format!("\"{}\"", "x".repeat(64)))).await.as_deref(), Some("too-large"));
    let gzip = json("{}").insert_header(("content-encoding", "gzip"));
    assert_eq!(code(gzip).await.as_deref(), Some("unsupported-media-type"));
    let form = json("a=b").insert_header(("content-type", "text/plain"));
    assert_eq!(code(form).await.as_deref(), Some("unsupported-media-type"));
}

#[actix_web::test]
async fn nothing_under_v1_is_answered_without_the_gate() {
    for path in ["/v1/secrets", "/v1/nowhere", "/v1/status"] {
        let (response, body) = ask(TestRequest::get().uri(path)).await;
        // This application has no gate at all: closed, not open.
        assert_eq!((response.status().as_u16(), body["code"].as_str()), (500, Some("internal")), "{path}");
        assert_eq!(header_of(&response, "cache-control"), "no-store");
    }
}

#[actix_web::test]
async fn the_logto_family_has_its_own_words_and_no_open_door() {
    let (response, body) = ask(TestRequest::get().uri("/api/configs/oidc/private-keys")).await;
    assert_eq!((response.status().as_u16(), body), (500, json!({ "message": "Internal server error." })));
    assert_eq!(header_of(&response, "logto-core-request-id"), header_of(&response, "x-request-id"));
    assert_eq!(header_of(&response, "x-content-type-options"), "nosniff");

    for path in ["/api", "/api/nowhere"] {
        let (response, body) = ask(TestRequest::get().uri(path)).await;
        assert_eq!((response.status().as_u16(), body), (404, Value::Null), "{path}");
        assert_eq!(header_of(&response, "content-type"), "text/plain; charset=utf-8");
    }
    let (response, _) = ask(TestRequest::get().uri("/apis")).await;
    assert_eq!(header_of(&response, "content-type"), "application/problem+json");
}

#[actix_web::test]
async fn a_panic_in_the_logto_family_is_told_in_its_form() {
    let daemon: Arc<dyn Operations> = Arc::new(Daemon { problem: None, optional: None, draining: false });
    let app = App::new()
        .app_data(Data::from(daemon))
        .route("/api/panic", web::get().to(async || -> &'static str { panic!("{PAYLOAD}") }))
        .wrap(from_fn(observe::observe));
    let app = init_service(app).await;
    let answer = app.call(TestRequest::get().uri("/api/panic").to_request()).await;

    let response = answer.map(|_| "an answer").unwrap_err().error_response();
    assert_eq!(response.status(), 500);
    assert_eq!(response.headers().get("logto-core-request-id"), response.headers().get("x-request-id"));
    let body = to_bytes(response.into_body()).await.unwrap();
    assert_eq!(&*body, br#"{"message":"Internal server error."}"#);
}

#[actix_web::test]
async fn readiness_names_the_failing_check_and_explains_it_on_request() {
    let away = || Daemon { problem: Some("token not present"), optional: None, draining: false };

    let (response, body) = send(away(), TestRequest::get().uri("/readyz")).await;
    assert_eq!(response.status(), 503);
    assert_eq!(header_of(&response, "retry-after"), "1");
    let optional = |ok: bool| json!({ "name": "device/b", "ok": ok, "optional": true });
    assert_eq!(body["checks"], json!([{ "name": "device", "ok": false }, optional(true)]));

    let second = Daemon { problem: None, optional: Some("unplugged"), draining: false };
    let (response, body) = send(second, TestRequest::get().uri("/readyz")).await;
    assert_eq!(response.status(), 200, "nothing depends on it");
    assert_eq!(body["checks"][1], optional(false));

    let (_, body) = send(away(), TestRequest::get().uri("/readyz?verbose")).await;
    assert_eq!(body["checks"][0]["reason"], "token not present");

    let (response, body) = ask(TestRequest::get().uri("/readyz")).await;
    assert_eq!((response.status().as_u16(), &body["ready"]), (200, &json!(true)));
}

#[actix_web::test]
async fn connections_are_closed_while_the_daemon_drains() {
    let (response, _) =
        send(Daemon { problem: None, optional: None, draining: true }, TestRequest::get().uri("/livez"))
            .await;
    assert!(!response.response().head().keep_alive());
    assert_eq!(response.status(), 200);
    assert_eq!(response.headers().get(header::RETRY_AFTER), None);
}

/// What a client sends and no answer may show.
const PAYLOAD: &str = "payload-7f3a";

/// ME-7 wants a panic in every kind of handler. A failpoint in them would be in the release too; these are
/// handlers of the test under the same middleware, which is where a panic is met whatever raised it.
async fn panics(at: web::Path<String>, arena: Data<Arena>, body: String) -> Result<String, Problem> {
    let mut live = arena.take(body.len()).await.unwrap();
    live.with_mut(|bytes| bytes.copy_from_slice(body.as_bytes()));
    match at.as_str() {
        "inside" => live.with_mut(|bytes| panic!("{}", String::from_utf8_lossy(bytes))),
        "later" => {
            actix_web::rt::task::yield_now().await;
            panic!("{body}")
        }
        _ => Ok(live.with(|bytes| bytes.len().to_string())),
    }
}

struct Panicking;

impl FromRequest for Panicking {
    type Error = Error;
    type Future = std::future::Ready<Result<Self, Error>>;

    fn from_request(_: &actix_web::HttpRequest, _: &mut actix_web::dev::Payload) -> Self::Future {
        panic!("{PAYLOAD}")
    }
}

#[actix_web::test]
async fn a_panic_is_a_500_wipes_what_was_live_and_leaves_the_rest_alone() {
    let options = Options { slots: 1, allow_unlocked: true, ..Options::default() };
    let arena = Arena::new(&options).unwrap();
    let daemon: Arc<dyn Operations> = Arc::new(Daemon { problem: None, optional: None, draining: false });
    let app = App::new()
        .app_data(Data::new(arena.clone()))
        .app_data(Data::from(daemon))
        .route("/v1/panics/{at}", web::post().to(panics))
        .route("/oidc/panics/{at}", web::post().to(panics))
        .route("/extractor", web::post().to(async |_: Panicking| "never"))
        .configure(|cfg| routes(1024, cfg))
        .wrap(from_fn(observe::observe));
    let app = init_service(app).await;
    let paths =
        ["/v1/panics/inside", "/v1/panics/later", "/oidc/panics/inside", "/oidc/panics/later", "/extractor"];
    for path in paths {
        let request = TestRequest::post().uri(path).insert_header(("X-Request-Id", "abc-1"));
        let answer = app.call(request.set_payload(PAYLOAD).to_request()).await;

        let response = answer.map(|_| "an answer").unwrap_err().error_response();
        assert_eq!(response.status(), 500, "{path}");
        assert_eq!(response.headers().get("content-type").unwrap(), "application/problem+json");
        assert_eq!(response.headers().get("x-request-id").unwrap(), "abc-1");
        let body = to_bytes(response.into_body()).await.unwrap();
        let body: Value = serde_json::from_slice(&body).unwrap();
        assert_eq!((&body["code"], &body["instance"]), (&json!("internal"), &json!(path)));
        assert!(!body.to_string().contains(PAYLOAD), "{body}");
        // The only slot is free again and empty, and the next request is served.
        assert_eq!(arena.status().free, 1, "{path}");
        assert!(arena.try_take(64).unwrap().with(|bytes| bytes.iter().all(|byte| *byte == 0)), "{path}");
        let next = TestRequest::post().uri("/v1/panics/never").set_payload(PAYLOAD).to_request();
        assert_eq!(call_service(&app, next).await.status(), 200);
    }
}
