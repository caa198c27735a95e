//! `/v1/audit/events`: the log as it is kept, record for record. The exact bytes are served: a
//! consumer that checks the hash chain must not get a re-serialized record.

use actix_web::http::header;
use actix_web::web::{Data, Query};
use actix_web::{HttpRequest, HttpResponse};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::audit::{AuditLog, Record};
use crate::http::problem::{Code, Problem};
use crate::identity::Caller;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct EventsQuery {
    after: Option<u64>,
    limit: Option<u32>,
    tenants: Option<Tenants>,
}

/// Whose records; the caller's own tenant's, if nothing is said.
#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum Tenants {
    /// The whole chain, for the operator on the daemon's host.
    All,
}

#[derive(Serialize)]
struct Events {
    events: Vec<Box<RawValue>>,
    next_after: u64,
}

pub(super) async fn events(
    caller: Caller,
    log: Data<AuditLog>,
    request: HttpRequest,
    query: Query<EventsQuery>,
) -> Result<HttpResponse, Problem> {
    let after = query.after.unwrap_or(0);
    let limit = query.limit.unwrap_or(100);
    if !(1..=1000).contains(&limit) {
        return Err(Problem::invalid("limit", "must be 1 to 1000"));
    }
    let records = match query.tenants {
        None => log.events(&caller, after, limit).await?,
        Some(Tenants::All) => log.export(&caller, after, limit).await?,
    };
    match wants_lines(&request) {
        true => Ok(lines(&records)),
        false => Ok(HttpResponse::Ok().json(object(records, after)?)),
    }
}

fn wants_lines(request: &HttpRequest) -> bool {
    let accept = request.headers().get(header::ACCEPT).and_then(|value| value.to_str().ok());
    accept.is_some_and(|accept| accept.to_ascii_lowercase().contains("application/x-ndjson"))
}

fn lines(records: &[Record]) -> HttpResponse {
    let text: String = records.iter().flat_map(|record| [record.body.as_str(), "\n"]).collect();
    HttpResponse::Ok().content_type("application/x-ndjson").body(text)
}

/// `next_after` is what the next request says as `after`, also when nothing new was there.
fn object(records: Vec<Record>, after: u64) -> Result<Events, Problem> {
    let next_after = records.last().map_or(after, |record| record.seq);
    let raw = records.into_iter().map(|record| RawValue::from_string(record.body));
    let events =
        raw.collect::<Result<_, _>>().map_err(|error| Problem::new(Code::Internal).caused_by(error))?;
    Ok(Events { events, next_after })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_served_byte_for_byte() {
        let body = r#"{"seq":7,  "z":1,"a":1.0}"#.to_owned();
        let json =
            serde_json::to_string(&object(vec![Record { seq: 7, body: body.clone() }], 3).unwrap()).unwrap();
        assert_eq!(json, format!("{{\"events\":[{body}],\"next_after\":7}}"));
        assert_eq!(object(vec![], 3).unwrap().next_after, 3);
    }
}
