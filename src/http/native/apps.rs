//! `/v1/apps`: the machine applications that may ask for tokens.

use actix_web::http::header;
use actix_web::web::{Data, Path, Query};
use actix_web::{HttpRequest, HttpResponse};
use secrecy::ExposeSecret;
use serde::Deserialize;
use serde_json::{Value, json};

use super::values::json_response;
use super::{NoQuery, page};
use crate::http::body::JsonBody;
use crate::http::problem::{Code, Problem};
use crate::http::secret_body::SecretJson;
use crate::identity::{Caller, Scope};
use crate::ids::ClientId;
use crate::issuer::{AppExtras, AppInfo, AppKind, Issuer, NewApp, SigningForm, SigningPolicy};

fn client_id(text: &str) -> Result<ClientId, Problem> {
    ClientId::parse(text).map_err(|_| Problem::new(Code::NotFound))
}

fn view(app: &AppInfo) -> Value {
    json!({
        "client_id": app.client_id,
        "name": app.name,
        "kind": app.kind,
        "scopes": app.scopes.iter().map(Scope::name).collect::<Vec<_>>(),
        "redirect_uris": app.redirect_uris,
        "allow_token_exchange": app.allow_token_exchange,
        "signing": app.signing,
        "created_at": app.created_at.to_rfc3339(),
    })
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct CreateBody {
    name: String,
    kind: Option<String>,
    scopes: Vec<String>,
    #[serde(default)]
    redirect_uris: Vec<String>,
    #[serde(default)]
    allow_token_exchange: bool,
    signing: Option<SigningForm>,
}

impl CreateBody {
    fn into_new(self) -> Result<NewApp, Problem> {
        let kind = self.kind.as_deref().map_or(Some(AppKind::Machine), AppKind::parse);
        let scopes = self.scopes.iter().map(|name| Scope::parse(name)).collect::<Option<_>>();
        Ok(NewApp {
            name: self.name,
            kind: kind.ok_or_else(|| Problem::invalid("kind", "must be machine or traditional"))?,
            scopes: scopes.ok_or_else(|| Problem::invalid("scopes", "one of them is not known"))?,
            redirect_uris: self.redirect_uris,
            allow_token_exchange: self.allow_token_exchange,
            signing: self.signing.map(read_policy).transpose()?,
            extras: AppExtras::default(),
        })
    }
}

fn read_policy(form: SigningForm) -> Result<SigningPolicy, Problem> {
    SigningPolicy::try_from(form).map_err(|bad| Problem::invalid(bad.field, bad.reason))
}

pub(super) async fn create(
    caller: Caller,
    issuer: Data<Issuer>,
    request: HttpRequest,
    body: JsonBody,
) -> Result<HttpResponse, Problem> {
    // The secret is shown once, so a repeated request could not be answered as the first one was.
    if request.headers().contains_key("idempotency-key") {
        return Err(Problem::invalid("Idempotency-Key", "is not offered for applications"));
    }
    let (app, secret) = issuer.create_app(&caller, body.parse::<CreateBody>()?.into_new()?).await?;
    let secret = secret.expose_secret();
    let mut json = SecretJson::object(&view(&app), secret.len());
    json.name("client_secret").utf8(secret).raw("}");
    let mut response = HttpResponse::Created();
    response.insert_header((header::LOCATION, format!("/v1/apps/{}", app.client_id)));
    Ok(json_response(response, json))
}

// An installation has few applications: one page holds them all.
pub(super) async fn list(
    caller: Caller,
    issuer: Data<Issuer>,
    request: HttpRequest,
    _: Query<NoQuery>,
) -> Result<HttpResponse, Problem> {
    let apps = issuer.list_apps(&caller).await?;
    Ok(page(&request, &apps.iter().map(view).collect::<Vec<_>>(), None))
}

pub(super) async fn delete(
    caller: Caller,
    issuer: Data<Issuer>,
    id: Path<String>,
) -> Result<HttpResponse, Problem> {
    issuer.delete_app(&caller, &client_id(&id)?).await?;
    Ok(HttpResponse::NoContent().finish())
}

// Nothing at all is shown as the policy that allows nothing.
fn shown(policy: Option<SigningPolicy>) -> HttpResponse {
    HttpResponse::Ok().json(policy.map(SigningForm::from).unwrap_or_default())
}

pub(super) async fn signing_policy(
    caller: Caller,
    issuer: Data<Issuer>,
    id: Path<String>,
) -> Result<HttpResponse, Problem> {
    Ok(shown(issuer.find_app(&caller, &client_id(&id)?).await?.signing))
}

pub(super) async fn set_signing_policy(
    caller: Caller,
    issuer: Data<Issuer>,
    id: Path<String>,
    body: JsonBody,
) -> Result<HttpResponse, Problem> {
    let (id, policy) = (client_id(&id)?, read_policy(body.parse()?)?);
    Ok(shown(issuer.set_signing_policy(&caller, &id, policy).await?))
}
