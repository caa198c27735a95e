//! `/v1/secrets`: creating, listing, metadata, versions, deleting. Values are in `values.rs`.

use std::collections::BTreeMap;

use actix_web::http::header;
use actix_web::web::{Data, Path, Query};
use actix_web::{HttpRequest, HttpResponse};
use serde::Deserialize;
use serde_json::{Value, json};
use url::form_urlencoded;

use super::{Precondition, cursor_of, etag, idempotency, if_match, page, page_limit, read_cursor, secret_id};
use crate::http::body::{JsonBody, Text, plain_value, unique_keys};
use crate::http::problem::Problem;
use crate::identity::Caller;
use crate::vault::{ListFilter, NewSecret, SecretInfo, SecretKind, Vault, VersionInfo};

/// A secret's metadata as JSON.
pub(super) fn view(info: &SecretInfo) -> Value {
    json!({
        "id": info.id,
        "name": info.name,
        "kind": info.kind,
        "labels": info.labels,
        "version": info.version,
        "created_at": info.created_at.to_rfc3339(),
        "updated_at": info.updated_at.to_rfc3339(),
        "expires_at": info.expires_at.as_ref().map(ToString::to_string),
    })
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct CreateBody<'a> {
    name: String,
    kind: Option<String>,
    #[serde(borrow)]
    value: Text<'a>,
    encoding: Option<String>,
    #[serde(default, deserialize_with = "unique_keys")]
    labels: BTreeMap<String, String>,
    expires_at: Option<String>,
}

impl CreateBody<'_> {
    fn into_new(self) -> Result<NewSecret, Problem> {
        let kind = parse_kind(self.kind.as_deref())?.unwrap_or(SecretKind::Opaque);
        let expires_at = self.expires_at.map(|text| {
            NewSecret::parse_expiry(&text).ok_or_else(|| Problem::invalid("expires_at", "is not RFC 3339"))
        });
        let value = plain_value(self.value, self.encoding.as_deref())?;
        Ok(NewSecret {
            name: self.name,
            kind,
            value,
            labels: self.labels,
            expires_at: expires_at.transpose()?,
        })
    }
}

fn parse_kind(name: Option<&str>) -> Result<Option<SecretKind>, Problem> {
    let parse = |name| SecretKind::parse(name).ok_or_else(|| Problem::invalid("kind", "is not known"));
    name.map(parse).transpose()
}

pub(super) async fn create(
    caller: Caller,
    vault: Data<Vault>,
    request: HttpRequest,
    body: JsonBody,
) -> Result<HttpResponse, Problem> {
    let new = body.parse::<CreateBody<'_>>()?.into_new()?;
    let key = idempotency(&request, body.to_wiped_vec())?;
    let info = vault.create(&caller, new, key).await?;
    Ok(HttpResponse::Created()
        .insert_header((header::LOCATION, format!("/v1/secrets/{}", info.id)))
        .insert_header(etag(info.row_version))
        .json(view(&info)))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ListQuery {
    limit: Option<u32>,
    cursor: Option<String>,
    kind: Option<String>,
    name: Option<String>,
}

impl ListQuery {
    fn filter(&self) -> Result<ListFilter, Problem> {
        let unknown = || Problem::invalid("cursor", "is not one that this list gave");
        let after = match &self.cursor {
            Some(cursor) => Some(secret_id(&read_cursor(cursor)?).map_err(|_| unknown())?),
            None => None,
        };
        let kind = parse_kind(self.kind.as_deref())?;
        Ok(ListFilter { after, limit: page_limit(self.limit)?, kind, name: self.name.clone() })
    }

    /// The same list's query without the cursor.
    fn rest(&self) -> String {
        let mut query = form_urlencoded::Serializer::new(String::new());
        let limit = self.limit.map(|limit| limit.to_string());
        for (name, value) in [("limit", &limit), ("kind", &self.kind), ("name", &self.name)] {
            if let Some(value) = value {
                query.append_pair(name, value);
            }
        }
        query.finish()
    }
}

pub(super) async fn list(
    caller: Caller,
    vault: Data<Vault>,
    request: HttpRequest,
    query: Query<ListQuery>,
) -> Result<HttpResponse, Problem> {
    let found = vault.list(&caller, query.filter()?).await?;
    let last = found.items.last().filter(|_| found.more);
    let next = last.map(|last| (cursor_of(last.id.as_str()), query.rest()));
    Ok(page(&request, &found.items.iter().map(view).collect::<Vec<_>>(), next))
}

pub(super) async fn show(
    caller: Caller,
    vault: Data<Vault>,
    id: Path<String>,
) -> Result<HttpResponse, Problem> {
    let info = vault.show(&caller, &secret_id(&id)?).await?;
    Ok(HttpResponse::Ok().insert_header(etag(info.row_version)).json(view(&info)))
}

pub(super) async fn delete(
    caller: Caller,
    vault: Data<Vault>,
    request: HttpRequest,
    id: Path<String>,
) -> Result<HttpResponse, Problem> {
    let expected = match if_match(&request)? {
        Precondition::Version(version) => Some(version),
        // Deleting what is not there fails anyway, so `*` adds nothing.
        Precondition::Any | Precondition::Absent => None,
    };
    vault.delete(&caller, &secret_id(&id)?, expected).await?;
    Ok(HttpResponse::NoContent().finish())
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct PageQuery {
    limit: Option<u32>,
    cursor: Option<String>,
}

pub(super) async fn versions(
    caller: Caller,
    vault: Data<Vault>,
    request: HttpRequest,
    id: Path<String>,
    query: Query<PageQuery>,
) -> Result<HttpResponse, Problem> {
    let before = query.cursor.as_deref().map(version_cursor).transpose()?;
    let limit = page_limit(query.limit)?;
    let found = vault.versions(&caller, &secret_id(&id)?, before, limit).await?;
    let last = found.items.last().filter(|_| found.more);
    let next = last.map(|last| (cursor_of(&last.version.to_string()), format!("limit={limit}")));
    Ok(page(&request, &found.items.iter().map(version_view).collect::<Vec<_>>(), next))
}

fn version_cursor(cursor: &str) -> Result<u64, Problem> {
    let number = read_cursor(cursor)?.parse();
    number.map_err(|_| Problem::invalid("cursor", "is not one that this list gave"))
}

fn version_view(version: &VersionInfo) -> Value {
    json!({
        "version": version.version,
        "encoding": version.encoding,
        "length": version.len,
        "kek_version": version.kek_version,
        "created_at": version.created_at.to_rfc3339(),
    })
}
