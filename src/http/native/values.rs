//! `/v1/secrets/{id}/value`: releasing and replacing. The only place of this family where a value
//! leaves; the service has recorded the release before it returns.

use actix_web::http::header;
use actix_web::web::{Data, Path, Query};
use actix_web::{HttpRequest, HttpResponse, HttpResponseBuilder};
use serde::Deserialize;
use serde_json::json;

use super::{Precondition, etag, if_match, secret_id, secrets};
use crate::http::body::{JsonBody, Text, plain_value};
use crate::http::problem::{Code, Problem};
use crate::http::secret_body::{SecretBody, SecretJson, base64_len, utf8_len};
use crate::identity::Caller;
use crate::vault::{Encoding, Plain, Revealed, Vault};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RevealQuery {
    version: Option<u64>,
}

pub(super) async fn reveal(
    caller: Caller,
    vault: Data<Vault>,
    request: HttpRequest,
    id: Path<String>,
    query: Query<RevealQuery>,
) -> Result<HttpResponse, Problem> {
    let revealed = vault.reveal(&caller, &secret_id(&id)?, query.version).await?;
    let mut response = HttpResponse::Ok();
    response.insert_header(etag(revealed.info.row_version));
    if wants_bytes(&request) {
        return Ok(bytes_response(response, &revealed.value));
    }
    Ok(json_response(response, value_json(&revealed)?))
}

/// `Accept: application/octet-stream` asks for the value's bytes and nothing around them.
pub(super) fn wants_bytes(request: &HttpRequest) -> bool {
    let accept = request.headers().get(header::ACCEPT).and_then(|value| value.to_str().ok());
    accept.is_some_and(|accept| {
        let first = accept.split([',', ';']).next().unwrap_or("");
        first.trim().eq_ignore_ascii_case("application/octet-stream")
    })
}

fn bytes_response(response: HttpResponseBuilder, value: &Plain) -> HttpResponse {
    value.with(SecretBody::copy_of).respond(response, "application/octet-stream")
}

pub(super) fn json_response(response: HttpResponseBuilder, json: SecretJson) -> HttpResponse {
    json.finish().respond(response, "application/json")
}

fn value_json(revealed: &Revealed) -> Result<SecretJson, Problem> {
    let meta = json!({ "id": revealed.info.id, "version": revealed.version, "encoding": revealed.encoding });
    revealed.value.with(|value| {
        let len = match revealed.encoding {
            Encoding::Utf8 => utf8_len(value),
            Encoding::Base64 => base64_len(value.len()),
        };
        let mut json = SecretJson::object(&meta, len);
        json.name("value");
        match revealed.encoding {
            // It was UTF-8 when it was sealed, and what opens is what was sealed.
            Encoding::Utf8 => {
                json.utf8(std::str::from_utf8(value).map_err(|_| Problem::new(Code::Integrity))?)
            }
            Encoding::Base64 => json.base64(value),
        };
        json.raw("}");
        Ok(json)
    })
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ReplaceBody<'a> {
    #[serde(borrow)]
    value: Text<'a>,
    encoding: Option<String>,
}

pub(super) async fn replace(
    caller: Caller,
    vault: Data<Vault>,
    request: HttpRequest,
    id: Path<String>,
    body: JsonBody,
) -> Result<HttpResponse, Problem> {
    let id = secret_id(&id)?;
    let body: ReplaceBody<'_> = body.parse()?;
    let value = plain_value(body.value, body.encoding.as_deref())?;
    let expected = match if_match(&request)? {
        Precondition::Version(version) => Some(version),
        // "Whatever is there": the version of this moment; a change in between is still a conflict.
        Precondition::Any => None,
        Precondition::Absent => {
            return Err(Problem::new(Code::PreconditionRequired)
                .detail("If-Match with the ETag of the secret, or *, is needed"));
        }
    };
    let info = vault.replace(&caller, &id, expected, value).await?;
    Ok(HttpResponse::Ok().insert_header(etag(info.row_version)).json(secrets::view(&info)))
}

#[cfg(test)]
mod tests {
    use actix_web::test::TestRequest;

    use super::*;

    #[test]
    fn bytes_are_for_those_who_ask_for_them_first() {
        let wants = |text: &str| {
            wants_bytes(&TestRequest::default().insert_header(("Accept", text)).to_http_request())
        };
        assert!(wants("application/octet-stream") && wants("Application/Octet-Stream;q=1, */*"));
        assert!(!wants("*/*") && !wants("application/json, application/octet-stream"));
    }
}
