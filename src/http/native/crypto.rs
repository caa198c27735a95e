//! `/v1/datakeys`, `/v1/seal`, `/v1/open`: for callers that keep the ciphertext themselves.
//!
//! A request holds one item, or up to 100 under `items`. A batch is answered with 200 and one
//! result per item, in order; an item that fails has its own error and spoils no other.

use actix_web::web::Data;
use actix_web::{HttpRequest, HttpResponse};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use serde_json::json;

use super::batch::{answer, counted, failed, merged, sorted};
use super::values::{json_response, wants_bytes};
use crate::http::body::{JsonBody, Text, plain_value, public_base64};
use crate::http::problem::{Code, Problem};
use crate::http::secret_body::{SecretBody, SecretJson, base64_len};
use crate::identity::Caller;
use crate::vault::{ExternalContext, OpenItem, Plain, SealItem, Vault};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct DataKeyBody {
    context: String,
    bytes: Option<usize>,
}

pub(super) async fn data_key(
    caller: Caller,
    vault: Data<Vault>,
    body: JsonBody,
) -> Result<HttpResponse, Problem> {
    let body: DataKeyBody = body.parse()?;
    let key = vault.data_key(&caller, &ExternalContext(body.context), body.bytes.unwrap_or(32)).await?;
    let meta = json!({ "sealed": STANDARD.encode(&key.sealed) });
    let mut json = SecretJson::object(&meta, base64_len(key.plain.len()));
    json.name("plaintext");
    key.plain.with(|plain| {
        json.base64(plain);
    });
    json.raw("}");
    Ok(json_response(HttpResponse::Ok(), json))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SealBody<'a> {
    context: Option<String>,
    #[serde(borrow)]
    value: Option<Text<'a>>,
    encoding: Option<String>,
    #[serde(borrow)]
    items: Option<Vec<SealEntry<'a>>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SealEntry<'a> {
    context: String,
    #[serde(borrow)]
    value: Text<'a>,
    encoding: Option<String>,
}

impl SealEntry<'_> {
    fn into_item(self) -> Result<SealItem, Problem> {
        let value = plain_value(self.value, self.encoding.as_deref())?;
        Ok(SealItem { context: ExternalContext(self.context), value })
    }
}

impl<'a> SealBody<'a> {
    /// The items, and whether they are a batch.
    fn into_entries(self) -> Result<(Vec<SealEntry<'a>>, bool), Problem> {
        match (self.items, self.context, self.value, self.encoding) {
            (Some(items), None, None, None) => Ok((counted(items)?, true)),
            (None, Some(context), Some(value), encoding) => {
                Ok((vec![SealEntry { context, value, encoding }], false))
            }
            _ => Err(Problem::invalid("body", "needs context and value, or items")),
        }
    }
}

pub(super) async fn seal(
    caller: Caller,
    vault: Data<Vault>,
    body: JsonBody,
) -> Result<HttpResponse, Problem> {
    let (entries, is_batch) = body.parse::<SealBody<'_>>()?.into_entries()?;
    let (items, results) = sorted(entries.into_iter().map(SealEntry::into_item));
    let sealed = vault.seal_external(&caller, items).await?;
    answer(merged(results, sealed)?, is_batch, |sealed| json!({ "sealed": STANDARD.encode(sealed) }))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct OpenBody {
    context: Option<String>,
    sealed: Option<String>,
    items: Option<Vec<OpenEntry>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct OpenEntry {
    context: String,
    sealed: String,
}

impl OpenEntry {
    fn into_item(self) -> Result<OpenItem, Problem> {
        Ok(OpenItem {
            context: ExternalContext(self.context),
            sealed: public_base64("sealed", &self.sealed)?,
        })
    }
}

impl OpenBody {
    fn into_entries(self) -> Result<(Vec<OpenEntry>, bool), Problem> {
        match (self.items, self.context, self.sealed) {
            (Some(items), None, None) => Ok((counted(items)?, true)),
            (None, Some(context), Some(sealed)) => Ok((vec![OpenEntry { context, sealed }], false)),
            _ => Err(Problem::invalid("body", "needs context and sealed, or items")),
        }
    }
}

pub(super) async fn open(
    caller: Caller,
    vault: Data<Vault>,
    request: HttpRequest,
    body: JsonBody,
) -> Result<HttpResponse, Problem> {
    let (entries, is_batch) = body.parse::<OpenBody>()?.into_entries()?;
    let (items, results) = sorted(entries.into_iter().map(OpenEntry::into_item));
    let as_bytes = !is_batch && wants_bytes(&request);
    let render = |plain: &Plain| if as_bytes { plain.with(SecretBody::copy_of) } else { opened(plain) };
    let mut results = merged(results, vault.open_external(&caller, items, render).await?)?;
    if is_batch {
        return Ok(json_response(HttpResponse::Ok(), opened_batch(&results)));
    }
    let one = results.pop().ok_or_else(|| Problem::new(Code::Internal))??;
    let media = if as_bytes { "application/octet-stream" } else { "application/json" };
    Ok(one.respond(HttpResponse::Ok(), media))
}

fn opened(value: &Plain) -> SecretBody {
    let mut json = SecretJson::with_capacity(base64_len(value.len()) + 64);
    json.raw("{\"encoding\":\"base64\",\"value\":");
    value.with(|bytes| {
        json.base64(bytes);
    });
    json.raw("}");
    json.finish()
}

fn opened_batch(results: &[Result<SecretBody, Problem>]) -> SecretJson {
    let errors: Vec<_> =
        results.iter().map(|one| one.as_ref().err().map(|error| failed(error).to_string())).collect();
    let len = results.iter().zip(&errors).map(|(one, error)| {
        1 + error.as_ref().map_or(0, String::len) + one.as_ref().map_or(0, |body| body.bytes().len())
    });
    let mut json = SecretJson::with_capacity(len.sum::<usize>() + 32);
    json.raw("{\"items\":[");
    for (index, (one, error)) in results.iter().zip(&errors).enumerate() {
        json.raw(if index == 0 { "" } else { "," });
        match (one, error) {
            (Ok(body), _) => json.part(body),
            (Err(_), error) => json.raw(error.as_deref().unwrap_or("null")),
        };
    }
    json.raw("]}");
    json
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_item_or_a_batch_and_not_both() {
        let read = |text: &str| {
            serde_json::from_str::<SealBody<'_>>(text)
                .unwrap()
                .into_entries()
                .map(|(entries, is_batch)| (entries.len(), is_batch))
        };
        assert_eq!(read(r#"{"context":"c","value":"v"}"#).unwrap(), (1, false));
        assert_eq!(read(r#"{"items":[{"context":"c","value":"v"}]}"#).unwrap(), (1, true));
        assert!(read(r#"{"items":[],"context":"c"}"#).is_err() && read("{}").is_err());
        assert!(read(r#"{"items":[]}"#).is_err());
    }
}
