//! Answers of token endpoints as tables (ID-4, ID-5, ID-8, ID-10).

use secrecy::ExposeSecret;
use zeroize::Zeroizing;

use super::super::Class;
use super::*;

fn answer(status: u16, content_type: &str, body: &str) -> Answer {
    let content_type = Some(content_type.to_owned()).filter(|text| !text.is_empty());
    Answer { status, retry_after: None, content_type, body: Zeroizing::new(body.as_bytes().to_vec()) }
}

fn json(body: &str) -> Result<TokenAnswer, TokenFailure> {
    read(&answer(200, "application/json", body), AnswerFormat::Json)
}

#[test]
fn a_life_is_digits_or_nothing_is_known_about_it() {
    use ExpiresIn::*;
    for (text, expected) in [
        ("null", Absent),
        ("0", Seconds(0)),
        ("3600", Seconds(3600)),
        ("\"3600\"", Seconds(3600)),
        ("2147483648", Seconds(LONGEST)),
        ("9223372036854775808", Seconds(LONGEST)),
        ("99999999999999999999999999", Seconds(LONGEST)),
        ("-1", Unreadable),
        ("1.5", Unreadable),
        ("1e3", Unreadable),
        ("1e400", Unreadable),
        ("\" 3600\"", Unreadable),
        ("\"3600s\"", Unreadable),
        ("\"-1\"", Unreadable),
        ("\"\"", Unreadable),
        ("\"NaN\"", Unreadable),
        ("true", Unreadable),
        ("[]", Unreadable),
        ("[3600]", Unreadable),
        ("{}", Unreadable),
    ] {
        let found =
            json(&format!(r#"{{"access_token":"a","expires_in": {text} }}"#)).map(|answer| answer.expires_in);
        assert_eq!(found, Ok(expected), "{text}");
    }
    assert_eq!(json(r#"{"access_token":"a"}"#).map(|answer| answer.expires_in), Ok(Absent));
    // No JSON at all.
    assert_eq!(json(r#"{"access_token":"a","expires_in":NaN}"#).err().unwrap().class, Class::Protocol);
}

#[test]
fn a_success_has_a_bearer_token_and_nothing_that_contradicts_it() {
    for (body, reason) in [
        (r#"{"access_token":"a"}"#, None),
        (r#"{"access_token":"a","token_type":"BEARER","refresh_token":null,"scope":""}"#, None),
        (r#"{"access_token":"a","token_type":"mac"}"#, Some("token_type")),
        (r#"{"access_token":"a","token_type":"DPoP"}"#, Some("token_type")),
        (r#"{"access_token":"a","token_type":1}"#, Some("token_type")),
        (r#"{"access_token":""}"#, Some("access_token")),
        (r#"{"access_token":null}"#, Some("access_token")),
        (r#"{"access_token":["a"]}"#, Some("access_token")),
        (r#"{"token_type":"bearer"}"#, Some("access_token")),
        (r#"{"access_token":"a","refresh_token":7}"#, Some("refresh_token")),
        (r#"{"access_token":"a","id_token":{}}"#, Some("id_token")),
        (r#"{"access_token":"a","access_token":"b"}"#, Some("not-json")),
        ("", Some("empty")),
        (" \n", Some("empty")),
        ("<html></html>", Some("not-json")),
        ("\u{feff}{\"access_token\":\"a\"}", Some("not-json")),
    ] {
        let failure = json(body).err();
        assert_eq!(failure.as_ref().map(|failure| failure.reason), reason, "{body}");
        assert!(failure.is_none_or(|failure| failure.class == Class::Protocol && failure.was_sent), "{body}");
    }
}

#[test]
fn a_refresh_token_is_new_the_same_or_not_mentioned() {
    for (member, expected) in
        [("", None), (r#","refresh_token":"""#, None), (r#","refresh_token":"same""#, Some("same"))]
    {
        let answer = json(&format!(r#"{{"access_token":"a","scope":"read"{member}}}"#)).ok().unwrap();
        let refresh = answer.refresh_token.as_ref().map(|token| token.expose_secret());
        assert_eq!((refresh, answer.scope.as_deref()), (expected, Some("read")), "{member}");
    }
}

#[test]
fn forms_are_read_where_they_may_come() {
    use AnswerFormat::*;
    const FORM: &str = "access_token=a%2Bb&token_type=bearer&expires_in=3600";
    const JSON: &str = r#"{"access_token":"a+b","token_type":"bearer","expires_in":3600}"#;
    for (format, content_type, body, accepted) in [
        (Json, "application/json", JSON, true),
        (Json, "text/plain", JSON, true),
        (Json, "application/x-www-form-urlencoded", FORM, false),
        (QueryString, "application/x-www-form-urlencoded", FORM, true),
        (QueryString, "text/plain", FORM, true),
        (QueryString, "application/json", JSON, false),
        (Either, "application/x-www-form-urlencoded; charset=utf-8", FORM, true),
        (Either, "Application/JSON;charset=utf-8", JSON, true),
        (Either, "application/json", FORM, false),
        (Either, "text/plain", FORM, true),
        (Either, "text/plain", JSON, true),
        (Either, "", JSON, true),
        (Either, "", "access_token=a&access_token=b", false),
        (Either, "text/html", "<html>access_token=a</html>", false),
    ] {
        let found = read(&answer(200, content_type, body), format);
        assert_eq!(found.is_ok(), accepted, "{format:?} {content_type} {body}");
        if let Ok(found) = found {
            assert_eq!(found.access_token.expose_secret(), "a+b");
            assert_eq!(found.expires_in, ExpiresIn::Seconds(3600));
        }
    }
}

#[test]
fn a_refusal_may_come_with_any_status_and_in_any_form() {
    use Class::*;
    const GRANT: &str = r#"{"error":"invalid_grant","error_description":"token s3cr3t expired"}"#;
    for (status, body, class, code) in [
        (400, GRANT, GrantDead, Some("invalid_grant")),
        (200, r#"{"error":"bad_refresh_token"}"#, GrantDead, Some("bad_refresh_token")),
        (200, r#"{"error":"bad_refresh_token","access_token":"a"}"#, GrantDead, Some("bad_refresh_token")),
        (200, r#"{"error":{"code":190}}"#, Protocol, None),
        (400, r#"{"error":"invalid_client"}"#, Config, Some("invalid_client")),
        (400, "error=invalid_grant&error_description=no", GrantDead, Some("invalid_grant")),
        (400, "<html>", Protocol, None),
        (401, "", Config, None),
        (403, "", Policy, None),
        (404, "", Config, None),
        (204, "", Protocol, None),
        (200, "", Protocol, None),
        (302, "", Config, None),
        (429, "", Transient, None),
        (500, "", Transient, None),
        (502, "<html>", Transient, None),
        (503, GRANT, Transient, Some("invalid_grant")),
    ] {
        let failure = read(&answer(status, "", body), AnswerFormat::Json).err().unwrap();
        assert_eq!((failure.class, failure.code.as_deref()), (class, code), "{status} {body}");
        assert_eq!((failure.status, failure.was_sent), (Some(status), true), "{status} {body}");
        assert!(!format!("{failure:?} {failure}").contains("s3cr3t"));
    }
}
