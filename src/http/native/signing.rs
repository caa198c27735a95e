//! `/v1/jwt`, `/v1/jws`, `/v1/cookies`, `/v1/signing-keys`: signatures for other systems, as far as the caller's
//! policy goes. Tokens and cookies only; nothing here signs bytes as they come.

use actix_web::HttpResponse;
use actix_web::web::{self, Data, PayloadConfig, ServiceConfig};
use serde::Deserialize;
use serde_json::json;
use serde_json::value::RawValue;

use super::batch::{answer, counted};
use crate::http::body::{JsonBody, Text};
use crate::http::problem::Problem;
use crate::identity::Caller;
use crate::issuer::{CookieProof, CookieRequest, Issuer, IssuerError, JwtRequest};
use crate::keys::CookieCheck;

/// What a JWT is where nothing else is said (RFC 7519, section 5.1).
const JWT: &str = "JWT";

/// A batch of tokens or cookies.
const TOKENS_BODY: usize = 4 << 20;

pub(super) fn routes(cfg: &mut ServiceConfig) {
    let post = |path: &str| web::resource(path).app_data(PayloadConfig::new(TOKENS_BODY));
    cfg.service(post("/jwt").post(jwt))
        .service(post("/jws").post(jws))
        .service(post("/cookies/sign").post(sign_cookie))
        .service(post("/cookies/verify").post(verify_cookie))
        .service(web::resource("/signing-keys/current").get(current_key));
}

fn problems<T>(results: Vec<Result<T, IssuerError>>) -> Vec<Result<T, Problem>> {
    results.into_iter().map(|one| one.map_err(Into::into)).collect()
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct JwtBody<'a> {
    #[serde(borrow)]
    claims: Option<&'a RawValue>,
    #[serde(rename = "type", borrow)]
    typ: Option<Text<'a>>,
    lifetime: Option<u64>,
    #[serde(borrow)]
    items: Option<Vec<JwtEntry<'a>>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct JwtEntry<'a> {
    #[serde(borrow)]
    claims: &'a RawValue,
    #[serde(rename = "type", borrow)]
    typ: Option<Text<'a>>,
    lifetime: u64,
}

impl JwtEntry<'_> {
    fn request(&self) -> JwtRequest<'_> {
        let typ = self.typ.as_ref().map_or(JWT, Text::as_str);
        JwtRequest { claims: self.claims.get(), typ, lifetime: self.lifetime }
    }
}

impl<'a> JwtBody<'a> {
    /// The items, and whether they are a batch.
    fn into_entries(self) -> Result<(Vec<JwtEntry<'a>>, bool), Problem> {
        match (self.items, self.claims, self.typ, self.lifetime) {
            (Some(items), None, None, None) => Ok((counted(items)?, true)),
            (None, Some(claims), typ, Some(lifetime)) => {
                Ok((vec![JwtEntry { claims, typ, lifetime }], false))
            }
            _ => Err(Problem::invalid("body", "needs claims and lifetime, or items")),
        }
    }
}

async fn jwt(caller: Caller, issuer: Data<Issuer>, body: JsonBody) -> Result<HttpResponse, Problem> {
    let (entries, is_batch) = body.parse::<JwtBody<'_>>()?.into_entries()?;
    let items: Vec<_> = entries.iter().map(JwtEntry::request).collect();
    let results = problems(issuer.sign_jwts(&caller, &items).await?);
    answer(results, is_batch, |made| {
        json!({
            "token": made.signed.jws,
            "kid": made.signed.kid,
            "jti": made.jti,
            "expires_at": made.expires_at.to_rfc3339(),
        })
    })
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct JwsBody<'a> {
    #[serde(borrow)]
    signing_input: Option<Text<'a>>,
    #[serde(borrow)]
    items: Option<Vec<JwsEntry<'a>>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct JwsEntry<'a> {
    #[serde(borrow)]
    signing_input: Text<'a>,
}

impl<'a> JwsBody<'a> {
    fn into_entries(self) -> Result<(Vec<JwsEntry<'a>>, bool), Problem> {
        match (self.items, self.signing_input) {
            (Some(items), None) => Ok((counted(items)?, true)),
            (None, Some(signing_input)) => Ok((vec![JwsEntry { signing_input }], false)),
            _ => Err(Problem::invalid("body", "needs signing_input, or items")),
        }
    }
}

async fn jws(caller: Caller, issuer: Data<Issuer>, body: JsonBody) -> Result<HttpResponse, Problem> {
    let (entries, is_batch) = body.parse::<JwsBody<'_>>()?.into_entries()?;
    let items: Vec<_> = entries.iter().map(|entry| entry.signing_input.as_str()).collect();
    let results = problems(issuer.sign_jws(&caller, &items).await?);
    answer(results, is_batch, |signed| {
        let signature = signed.jws.rsplit('.').next().unwrap_or_default();
        json!({ "signature": signature, "token": signed.jws, "kid": signed.kid })
    })
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct CookieBody {
    name: Option<String>,
    value: Option<String>,
    max_age: Option<u64>,
    items: Option<Vec<CookieEntry>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct CookieEntry {
    name: String,
    value: String,
    max_age: Option<u64>,
}

impl CookieBody {
    fn into_entries(self) -> Result<(Vec<CookieEntry>, bool), Problem> {
        match (self.items, self.name, self.value, self.max_age) {
            (Some(items), None, None, None) => Ok((counted(items)?, true)),
            (None, Some(name), Some(value), max_age) => {
                Ok((vec![CookieEntry { name, value, max_age }], false))
            }
            _ => Err(Problem::invalid("body", "needs name and value, or items")),
        }
    }
}

async fn sign_cookie(caller: Caller, issuer: Data<Issuer>, body: JsonBody) -> Result<HttpResponse, Problem> {
    let (entries, is_batch) = body.parse::<CookieBody>()?.into_entries()?;
    let request = |CookieEntry { name, value, max_age }| CookieRequest { name, value, max_age };
    let results = issuer.sign_cookies(&caller, entries.into_iter().map(request).collect()).await?;
    answer(problems(results), is_batch, |signed| json!({ "signature": signed.signature }))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ProofBody {
    name: Option<String>,
    value: Option<String>,
    signature: Option<String>,
    items: Option<Vec<ProofEntry>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ProofEntry {
    name: String,
    value: String,
    signature: String,
}

impl ProofBody {
    fn into_entries(self) -> Result<(Vec<ProofEntry>, bool), Problem> {
        match (self.items, self.name, self.value, self.signature) {
            (Some(items), None, None, None) => Ok((counted(items)?, true)),
            (None, Some(name), Some(value), Some(signature)) => {
                Ok((vec![ProofEntry { name, value, signature }], false))
            }
            _ => Err(Problem::invalid("body", "needs name, value and signature, or items")),
        }
    }
}

async fn verify_cookie(
    caller: Caller,
    issuer: Data<Issuer>,
    body: JsonBody,
) -> Result<HttpResponse, Problem> {
    let (entries, is_batch) = body.parse::<ProofBody>()?.into_entries()?;
    let proof = |ProofEntry { name, value, signature }| CookieProof { name, value, signature };
    let items: Vec<_> = entries.into_iter().map(proof).collect();
    let results = issuer.verify_cookies(&caller, &items).await?;
    answer(
        problems(results),
        is_batch,
        |check| json!({ "valid": *check != CookieCheck::Invalid, "renew": *check == CookieCheck::Stale }),
    )
}

/// For a provider that builds its own tokens: their header names this key.
async fn current_key(caller: Caller, issuer: Data<Issuer>) -> Result<HttpResponse, Problem> {
    let key = issuer.current_key(&caller).await?;
    Ok(HttpResponse::Ok().json(json!({ "kid": key.kid, "alg": key.alg, "jwk": key.jwk })))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_item_or_a_batch_and_not_both() {
        let read = |text: &str| {
            let body: JwtBody<'_> = serde_json::from_str(text).unwrap();
            body.into_entries().map(|(entries, is_batch)| {
                (entries.iter().map(|entry| entry.request().typ.to_owned()).collect::<Vec<_>>(), is_batch)
            })
        };
        assert_eq!(read(r#"{"claims":{},"lifetime":1}"#).unwrap(), (vec!["JWT".to_owned()], false));
        let batch = r#"{"items":[{"claims":{"a":1,"a":1},"type":"at\u002bjwt","lifetime":1}]}"#;
        assert_eq!(read(batch).unwrap(), (vec!["at+jwt".to_owned()], true));
        for neither in [r#"{"items":[]}"#, "{}", r#"{"claims":{}}"#, r#"{"items":[],"lifetime":1}"#] {
            assert!(read(neither).is_err(), "{neither}");
        }
    }
}
