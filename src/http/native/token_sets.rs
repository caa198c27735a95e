//! `/v1/token-sets`: a user's token at another provider, for a machine, without the user.

use actix_web::HttpResponse;
use actix_web::web::Data;
use serde::Deserialize;
use serde_json::json;

use super::values::json_response;
use crate::http::body::{JsonBody, is_reason};
use crate::http::problem::{Code, Problem};
use crate::http::secret_body::{SecretJson, utf8_len};
use crate::identity::{Caller, Scope};
use crate::ids::UserId;
use crate::tokens::{Release, Released, Tokens};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ReadBody {
    user_id: String,
    connection: String,
    reason: String,
}

// A POST, because it is a release with a reason and no mere look.
pub(super) async fn access_token(
    caller: Caller,
    tokens: Data<Tokens>,
    body: JsonBody,
) -> Result<HttpResponse, Problem> {
    let ReadBody { user_id, connection, reason } = body.parse()?;
    if !is_reason(&reason) {
        return Err(Problem::invalid("reason", "must be 1 to 256 printable characters"));
    }
    let user = UserId::parse(&user_id).map_err(|_| Problem::new(Code::NotFound))?;
    let release = Release { scope: Scope::TokenSetsRead, via: "machine", reason };
    let released = tokens.access_token_for(&caller, &user, &connection, release).await?;
    Ok(json_response(HttpResponse::Ok(), released_json(&released)))
}

fn released_json(released: &Released) -> SecretJson {
    let mut meta = json!({});
    for (name, value) in [
        ("scope", released.scope().map(|scope| json!(scope))),
        ("token_type", released.token_type().map(|kind| json!(kind))),
        ("expires_in", released.expires_in().map(|seconds| json!(seconds))),
    ] {
        if let Some(value) = value {
            meta[name] = value;
        }
    }
    released.with_access_token(|token| {
        let mut json = SecretJson::object(&meta, utf8_len(token.as_bytes()));
        json.name("access_token").utf8(token).raw("}");
        json
    })
}
