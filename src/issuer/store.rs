//! The `applications` table; that of users' tokens is in `store/user_tokens.rs`.

pub(super) mod user_tokens;

use diesel::prelude::{ExpressionMethods, OptionalExtension, QueryDsl, RunQueryDsl};
use serde::{Deserialize, Serialize};

use crate::clock::Timestamp;
use crate::db::schema::applications;
use crate::db::{Conn, DbError};
use crate::identity::ScopeSet;
use crate::ids::{ClientId, TenantId};
use crate::issuer::SigningPolicy;
use crate::issuer::model::{AppExtras, AppInfo, AppKind};
use crate::with_conn;

/// An application with what proves its secret.
#[derive(Clone)]
pub(super) struct App {
    pub(super) info: AppInfo,
    pub(super) tenant: TenantId,
    /// HMAC of the client secret under a device key.
    pub(super) secret_mac: [u8; 32],
}

#[derive(Default, Serialize, Deserialize)]
#[serde(default)]
struct Settings {
    redirect_uris: Vec<String>,
    allow_token_exchange: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    signing: Option<SigningPolicy>,
    #[serde(skip_serializing_if = "is_empty")]
    extras: AppExtras,
}

fn is_empty(extras: &AppExtras) -> bool {
    *extras == AppExtras::default()
}

type Row = (String, String, String, String, Vec<u8>, String, String, i64);

/// The application of that id, of whatever tenant.
pub(super) fn find(conn: &mut Conn, id: &ClientId) -> Result<Option<App>, DbError> {
    let query = applications::table.find(id.as_str()).select(columns());
    let row: Option<Row> = with_conn!(conn, |c| query.first(c).optional())?;
    row.map(read).transpose()
}

/// The tenant's applications by id.
pub(super) fn list(conn: &mut Conn, tenant: &TenantId) -> Result<Vec<App>, DbError> {
    let query = applications::table
        .filter(applications::tenant_id.eq(tenant.as_str()))
        .order(applications::client_id)
        .select(columns());
    let rows: Vec<Row> = with_conn!(conn, |c| query.load(c))?;
    rows.into_iter().map(read).collect()
}

/// # Errors
/// [`DbError::Duplicate`] if the id is taken.
pub(super) fn insert(conn: &mut Conn, app: &App) -> Result<(), DbError> {
    let row = (
        applications::client_id.eq(app.info.client_id.as_str()),
        applications::tenant_id.eq(app.tenant.as_str()),
        applications::name.eq(app.info.name.as_str()),
        applications::kind.eq(app.info.kind.name()),
        applications::secret_mac.eq(&app.secret_mac[..]),
        applications::scopes.eq(app.info.scopes.to_string()),
        applications::settings.eq(settings(&app.info)),
        applications::created_at.eq(app.info.created_at.as_micros()),
        applications::row_version.eq(1),
    );
    with_conn!(conn, |c| diesel::insert_into(applications::table).values(row).execute(c))?;
    Ok(())
}

/// Replaces everything but id, tenant and date; whether the tenant has such an application.
pub(super) fn update(conn: &mut Conn, app: &App) -> Result<bool, DbError> {
    let row = applications::table
        .filter(applications::client_id.eq(app.info.client_id.as_str()))
        .filter(applications::tenant_id.eq(app.tenant.as_str()));
    let new = (
        applications::name.eq(app.info.name.as_str()),
        applications::kind.eq(app.info.kind.name()),
        applications::secret_mac.eq(&app.secret_mac[..]),
        applications::scopes.eq(app.info.scopes.to_string()),
        applications::settings.eq(settings(&app.info)),
        applications::row_version.eq(applications::row_version + 1),
    );
    Ok(with_conn!(conn, |c| diesel::update(row).set(new).execute(c))? == 1)
}

/// Whether the tenant had such an application.
pub(super) fn delete(conn: &mut Conn, tenant: &TenantId, id: &ClientId) -> Result<bool, DbError> {
    let row = applications::table
        .filter(applications::client_id.eq(id.as_str()))
        .filter(applications::tenant_id.eq(tenant.as_str()));
    Ok(with_conn!(conn, |c| diesel::delete(row).execute(c))? == 1)
}

type Columns = (
    applications::client_id,
    applications::tenant_id,
    applications::name,
    applications::kind,
    applications::secret_mac,
    applications::scopes,
    applications::settings,
    applications::created_at,
);

const fn columns() -> Columns {
    (
        applications::client_id,
        applications::tenant_id,
        applications::name,
        applications::kind,
        applications::secret_mac,
        applications::scopes,
        applications::settings,
        applications::created_at,
    )
}

fn settings(info: &AppInfo) -> String {
    let settings = Settings {
        redirect_uris: info.redirect_uris.clone(),
        allow_token_exchange: info.allow_token_exchange,
        signing: info.signing.clone(),
        extras: info.extras.clone(),
    };
    // Texts, numbers, flags and what was JSON before always serialise.
    serde_json::to_string(&settings).unwrap_or_default()
}

fn read(row: Row) -> Result<App, DbError> {
    let (id, tenant, name, kind, secret_mac, scopes, settings, created_at) = row;
    let app = || {
        let settings: Settings = serde_json::from_str(&settings).ok()?;
        let info = AppInfo {
            client_id: ClientId::parse(&id).ok()?,
            name,
            kind: AppKind::parse(&kind)?,
            scopes: ScopeSet::parse(&scopes)?,
            redirect_uris: settings.redirect_uris,
            allow_token_exchange: settings.allow_token_exchange,
            signing: settings.signing,
            extras: settings.extras,
            created_at: Timestamp::from_micros(created_at),
        };
        let secret_mac = secret_mac.try_into().ok()?;
        Some(App { info, tenant: TenantId::parse(&tenant).ok()?, secret_mac })
    };
    app().ok_or_else(|| DbError::impossible("applications", &id))
}
