//! What leaves: the requests of every client authentication, byte by byte.

use jsonwebtoken::{Algorithm, DecodingKey, Validation};
use lacre::clock::Timestamp;
use lacre::upstream::{
    Class, ClientAuth, Config, Failure, HmacAlg, Request, RevokeRequest, TokenRequest, Upstream,
};
use secrecy::{ExposeSecret, SecretString};
use serde_json::{Value, json};

use crate::server::{Server, answer};
use crate::{config, refresh, upstream};

/// Head (lower case) and body of the one request that a refresh makes.
async fn sent(auth: ClientAuth) -> (String, String) {
    let server = Server::plain(vec![answer(200, "", r#"{"access_token":"new"}"#)]).await;
    let request = TokenRequest { auth, ..refresh(server.url("/token?tenant=a")) };
    let answer = upstream().token(request).await.ok().unwrap();
    assert_eq!(answer.access_token.expose_secret(), "new");
    let requests = server.requests();
    assert_eq!(requests.len(), 1);
    let (head, body) = requests[0].split_once("\r\n\r\n").unwrap();
    (head.to_owned(), body.to_owned())
}

#[tokio::test]
async fn a_refresh_is_a_form_in_a_given_order() {
    const GRANT: &str = "grant_type=refresh_token&refresh_token=old+token";
    // base64 of `the+client:s%26cr%3At` and of `the client:s&cr:t`
    for (auth, authorization, body) in [
        (
            ClientAuth::Post,
            None,
            format!("{GRANT}&client_id=the+client&client_secret=s%26cr%3At&tenant_hint=a+b"),
        ),
        (ClientAuth::Basic, Some("dGhlK2NsaWVudDpzJTI2Y3IlM0F0"), format!("{GRANT}&tenant_hint=a+b")),
        (ClientAuth::BasicRaw, Some("dGhlIGNsaWVudDpzJmNyOnQ="), format!("{GRANT}&tenant_hint=a+b")),
        (ClientAuth::None, None, format!("{GRANT}&client_id=the+client&tenant_hint=a+b")),
    ] {
        let (head, found) = sent(auth).await;
        assert_eq!(found, body, "{auth:?}");
        assert!(head.starts_with("POST /token?tenant=a HTTP/1.1\r\n"), "{head}");
        for line in [
            "content-type: application/x-www-form-urlencoded",
            "accept: application/json",
            concat!("user-agent: lacre/", env!("CARGO_PKG_VERSION")),
        ] {
            assert!(head.lines().any(|found| found == line), "{line} is not in {head}");
        }
        let found = head.lines().find_map(|line| line.strip_prefix("authorization: Basic "));
        assert_eq!(found, authorization, "{auth:?}");
    }
}

#[tokio::test]
async fn a_client_assertion_is_signed_with_the_secret_and_used_once() {
    let mut ids = Vec::new();
    for (hash, algorithm) in [
        (HmacAlg::Hs256, Algorithm::HS256),
        (HmacAlg::Hs384, Algorithm::HS384),
        (HmacAlg::Hs512, Algorithm::HS512),
    ] {
        let (_, body) = sent(ClientAuth::SecretJwt(hash)).await;
        let names: Vec<_> = url::form_urlencoded::parse(body.as_bytes()).map(|(name, _)| name).collect();
        let expected = [
            "grant_type",
            "refresh_token",
            "client_id",
            "client_assertion_type",
            "client_assertion",
            "tenant_hint",
        ];
        assert_eq!(names, expected);

        let assertion = body.split('&').find_map(|pair| pair.strip_prefix("client_assertion=")).unwrap();
        let mut rules = Validation::new(algorithm);
        rules.validate_exp = false;
        rules.validate_aud = false;
        let key = DecodingKey::from_secret(b"s&cr:t");
        let claims = jsonwebtoken::decode::<Value>(assertion, &key, &rules).unwrap().claims;
        assert_eq!((&claims["iss"], &claims["sub"]), (&json!("the client"), &json!("the client")));
        assert_eq!((&claims["iat"], &claims["exp"]), (&json!(1_800_000_000), &json!(1_800_000_600)));
        assert!(claims["aud"].as_str().unwrap().ends_with("/token?tenant=a"));
        ids.push(claims["jti"].as_str().unwrap().to_owned());
    }
    ids.dedup();
    assert_eq!(ids.len(), 3);
}

#[tokio::test]
async fn a_client_without_its_secret_asks_nobody() {
    let server = Server::plain(vec![]).await;
    for auth in
        [ClientAuth::Post, ClientAuth::Basic, ClientAuth::BasicRaw, ClientAuth::SecretJwt(HmacAlg::Hs256)]
    {
        let request = TokenRequest { auth, client_secret: None, ..refresh(server.url("/token")) };
        let failure = upstream().token(request).await.err().unwrap();
        assert_eq!((failure.class, failure.was_sent), (Class::Config, false), "{auth:?}");
    }
    assert_eq!(server.connections(), 0);
}

#[tokio::test]
async fn a_token_is_revoked() {
    for (status, class) in [(200, None), (503, Some(Class::Transient)), (401, Some(Class::Config))] {
        let server = Server::plain(vec![answer(status, "", "")]).await;
        let request = RevokeRequest {
            endpoint: server.url("/revoke"),
            client_id: "c".to_owned(),
            client_secret: Some(SecretString::from("s")),
            auth: ClientAuth::Post,
            token: SecretString::from("t/1"),
            token_type_hint: "refresh_token",
            now: Timestamp::from_micros(0),
        };

        let outcome = upstream().revoke(request).await;

        assert_eq!(outcome.err().map(|failure| failure.class), class);
        let body = "token=t%2F1&token_type_hint=refresh_token&client_id=c&client_secret=s";
        assert!(server.requests()[0].ends_with(&format!("\r\n\r\n{body}")));
    }
}

#[tokio::test]
async fn userinfo_is_asked_with_the_token_and_its_401_is_the_tokens_end() {
    let token = SecretString::from("t.1");
    let server = Server::plain(vec![answer(200, "", r#"{"sub":"u","sub_list":[1.5,null]}"#)]).await;
    let found = upstream().get_json(&server.url("/me"), Some(&token)).await.unwrap();
    assert_eq!(found, json!({"sub": "u", "sub_list": [1.5, null]}));
    let request = &server.requests()[0];
    assert!(request.starts_with("GET /me HTTP/1.1\r\n") && request.contains("authorization: Bearer t.1\r\n"));

    let server = Server::plain(vec![answer(401, "", "")]).await;
    let class = |outcome: Result<_, lacre::upstream::TokenFailure>| outcome.map(|_| ()).unwrap_err().class;
    assert_eq!(class(upstream().get_json(&server.url("/me"), Some(&token)).await), Class::GrantDead);
    assert_eq!(class(upstream().get_json(&server.url("/me"), None).await), Class::Config);
}

#[tokio::test]
async fn a_body_may_be_json() {
    let server = Server::plain(vec![answer(201, "content-type: text/plain\r\n", "ok")]).await;
    let request =
        Request::post(server.url("/")).basic("id", &SecretString::from("s")).json(json!({"a": "b"}));

    let answer = upstream().send(request).await.ok().unwrap();

    assert_eq!((answer.status, answer.body.as_slice()), (201, b"ok".as_slice()));
    assert_eq!(answer.content_type.as_deref(), Some("text/plain"));
    let request = &server.requests()[0];
    assert!(request.contains("content-type: application/json\r\n") && request.ends_with("{\"a\":\"b\"}"));
    assert!(request.contains("authorization: Basic aWQ6cw==\r\n"));
}

#[tokio::test]
async fn a_header_that_http_cannot_carry_is_not_sent() {
    let server = Server::plain(vec![]).await;
    let request = Request::get(server.url("/")).bearer(&SecretString::from("a\r\nx: y"));
    assert_eq!(upstream().send(request).await.err(), Some(Failure::NotSent("header")));
    assert_eq!(server.connections(), 0);
}

#[tokio::test]
async fn the_configured_proxy_is_asked_for_names_and_never_for_private_addresses() {
    let proxy = Server::plain(vec![answer(403, "", "")]).await;
    let config = Config { proxy: Some(format!("http://{}", proxy.at)), loopback_http: false, ..config() };
    let upstream = Upstream::new(&config).unwrap();

    let found =
        upstream.send(Request::get("https://idp.example.com/".parse::<url::Url>().unwrap())).await.err();
    assert_eq!(found, Some(Failure::NotSent("connect")));
    let found = upstream.send(Request::get("https://10.0.0.1/".parse::<url::Url>().unwrap())).await.err();
    assert_eq!(found, Some(Failure::Blocked));

    let requests = proxy.requests();
    assert!(requests.len() == 1 && requests[0].starts_with("CONNECT idp.example.com:443 "), "{requests:?}");
}
