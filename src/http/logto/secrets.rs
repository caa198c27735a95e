//! `/api/secrets`: deleting a token set (contract, section 7.4). Here only: nothing is told to the provider.

use actix_web::HttpResponse;
use actix_web::web::{self, Data, Path, ServiceConfig};

use super::error::ApiError;
use super::query::set_id;
use crate::identity::Caller;
use crate::tokens::Tokens;

pub(super) fn routes(cfg: &mut ServiceConfig) {
    cfg.service(web::resource("/{id}").delete(delete));
}

async fn delete(caller: Caller, tokens: Data<Tokens>, id: Path<String>) -> Result<HttpResponse, ApiError> {
    tokens.delete_set(&caller, &set_id(&id)).await?;
    Ok(HttpResponse::NoContent().finish())
}
