//! Redirects are not followed, and credentials go to nobody else (ID-7).

use lacre::upstream::{Class, Request};
use secrecy::SecretString;

use crate::server::{Server, answer};
use crate::{refresh, upstream};

#[tokio::test]
async fn a_redirect_is_an_answer() {
    let elsewhere = Server::plain(vec![answer(200, "", r#"{"access_token":"stolen"}"#)]).await;
    let port = elsewhere.at.port();
    for status in [301, 302, 303, 307, 308] {
        for target in [
            format!("http://localhost:{port}/token"),
            format!("http://127.0.0.1:{port}/token"),
            format!("//localhost:{port}/token"),
            "/other".to_owned(),
            "https://idp.example.com/token".to_owned(),
        ] {
            let server = Server::plain(vec![answer(status, &format!("location: {target}\r\n"), "")]).await;

            let failure = upstream().token(refresh(server.url("/token"))).await.err().unwrap();
            assert_eq!((failure.class, failure.reason), (Class::Config, "redirect"), "{status} {target}");
            assert_eq!(failure.status, Some(status), "{status} {target}");
            let request = Request::get(server.url("/")).bearer(&SecretString::from("token"));
            assert_eq!(upstream().send(request).await.ok().unwrap().status, status);

            assert_eq!(server.requests().len(), 2, "{status} {target}");
        }
    }
    assert_eq!(elsewhere.connections(), 0);
}
