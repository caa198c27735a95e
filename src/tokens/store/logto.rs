//! SQL that reads a Logto database (contract, sections 6.1 and 9.1): rows as they are there, page by page by id.
//! Nothing here writes; JSON columns come as text, times in microseconds.

use diesel::deserialize::QueryableByName;
use diesel::prelude::*;
use diesel::sql_query;
use diesel::sql_types::{Array, BigInt, Binary, Bool, Nullable, Text};

type Answer<T> = Result<T, diesel::result::Error>;

/// A row of `connectors` or of `sso_connectors`.
#[derive(Clone, QueryableByName)]
pub(in crate::tokens) struct ConnectorRow {
    #[diesel(sql_type = Text)]
    pub(in crate::tokens) id: String,
    #[diesel(sql_type = Text)]
    pub(in crate::tokens) factory: String,
    #[diesel(sql_type = Text)]
    pub(in crate::tokens) name: String,
    #[diesel(sql_type = Text)]
    pub(in crate::tokens) config: String,
    #[diesel(sql_type = Text)]
    pub(in crate::tokens) metadata: String,
    #[diesel(sql_type = Text)]
    pub(in crate::tokens) domains: String,
    #[diesel(sql_type = Text)]
    pub(in crate::tokens) branding: String,
    #[diesel(sql_type = Bool)]
    pub(in crate::tokens) sync_profile: bool,
    #[diesel(sql_type = Bool)]
    pub(in crate::tokens) stores_tokens: bool,
    #[diesel(sql_type = BigInt)]
    pub(in crate::tokens) created_at: i64,
}

/// A row of `users`.
#[derive(Clone, QueryableByName)]
pub(in crate::tokens) struct UserRow {
    #[diesel(sql_type = Text)]
    pub(in crate::tokens) id: String,
    #[diesel(sql_type = Nullable<Text>)]
    pub(in crate::tokens) username: Option<String>,
    #[diesel(sql_type = Nullable<Text>)]
    pub(in crate::tokens) primary_email: Option<String>,
    #[diesel(sql_type = Nullable<Text>)]
    pub(in crate::tokens) primary_phone: Option<String>,
    #[diesel(sql_type = Nullable<Text>)]
    pub(in crate::tokens) name: Option<String>,
    #[diesel(sql_type = Nullable<Text>)]
    pub(in crate::tokens) avatar: Option<String>,
    #[diesel(sql_type = Text)]
    pub(in crate::tokens) profile: String,
    #[diesel(sql_type = Text)]
    pub(in crate::tokens) custom_data: String,
    #[diesel(sql_type = Text)]
    pub(in crate::tokens) identities: String,
    #[diesel(sql_type = Bool)]
    pub(in crate::tokens) is_suspended: bool,
    #[diesel(sql_type = Nullable<Text>)]
    pub(in crate::tokens) password: Option<String>,
    #[diesel(sql_type = Nullable<Text>)]
    pub(in crate::tokens) password_method: Option<String>,
    #[diesel(sql_type = BigInt)]
    pub(in crate::tokens) created_at: i64,
}

/// A row of `user_sso_identities`.
#[derive(Clone, QueryableByName)]
pub(in crate::tokens) struct SsoIdentityRow {
    #[diesel(sql_type = Text)]
    pub(in crate::tokens) id: String,
    #[diesel(sql_type = Text)]
    pub(in crate::tokens) user_id: String,
    #[diesel(sql_type = Text)]
    pub(in crate::tokens) issuer: String,
    #[diesel(sql_type = Text)]
    pub(in crate::tokens) identity_id: String,
    #[diesel(sql_type = Text)]
    pub(in crate::tokens) detail: String,
    #[diesel(sql_type = Text)]
    pub(in crate::tokens) connector_id: String,
    #[diesel(sql_type = BigInt)]
    pub(in crate::tokens) created_at: i64,
    #[diesel(sql_type = BigInt)]
    pub(in crate::tokens) updated_at: i64,
}

/// A row of `secrets` with what relates it to an identity.
#[derive(Clone, QueryableByName)]
pub(in crate::tokens) struct SecretRow {
    #[diesel(sql_type = Text)]
    pub(in crate::tokens) id: String,
    #[diesel(sql_type = Text)]
    pub(in crate::tokens) user_id: String,
    #[diesel(sql_type = Text)]
    pub(in crate::tokens) kind: String,
    #[diesel(sql_type = Binary)]
    pub(in crate::tokens) encrypted_dek: Vec<u8>,
    #[diesel(sql_type = Binary)]
    pub(in crate::tokens) iv: Vec<u8>,
    #[diesel(sql_type = Binary)]
    pub(in crate::tokens) auth_tag: Vec<u8>,
    #[diesel(sql_type = Binary)]
    pub(in crate::tokens) ciphertext: Vec<u8>,
    #[diesel(sql_type = Text)]
    pub(in crate::tokens) metadata: String,
    #[diesel(sql_type = BigInt)]
    pub(in crate::tokens) created_at: i64,
    #[diesel(sql_type = BigInt)]
    pub(in crate::tokens) updated_at: i64,
    #[diesel(sql_type = Nullable<Text>)]
    pub(in crate::tokens) social_connector: Option<String>,
    #[diesel(sql_type = Nullable<Text>)]
    pub(in crate::tokens) target: Option<String>,
    #[diesel(sql_type = Nullable<Text>)]
    pub(in crate::tokens) sso_connector: Option<String>,
    #[diesel(sql_type = Nullable<Text>)]
    pub(in crate::tokens) issuer: Option<String>,
    #[diesel(sql_type = Nullable<Text>)]
    pub(in crate::tokens) identity_id: Option<String>,
    /// Whether the user has the identity that it is of.
    #[diesel(sql_type = Bool)]
    pub(in crate::tokens) is_linked: bool,
}

#[derive(QueryableByName)]
struct Count {
    #[diesel(sql_type = BigInt)]
    count: i64,
}

#[derive(QueryableByName)]
struct Setting {
    #[diesel(sql_type = Text)]
    value: String,
}

/// How many rows an import looks at; and how many of them are token sets.
pub(in crate::tokens) fn counts(
    conn: &mut PgConnection,
    tenant: &str,
    token_set: &str,
) -> Answer<(i64, i64)> {
    let query = sql_query(
        "SELECT (SELECT count(*) FROM connectors WHERE tenant_id = $1)
              + (SELECT count(*) FROM sso_connectors WHERE tenant_id = $1)
              + (SELECT count(*) FROM users WHERE tenant_id = $1)
              + (SELECT count(*) FROM secrets WHERE tenant_id = $1) AS count",
    );
    let all: Count = query.bind::<Text, _>(tenant).get_result(conn)?;
    let query = sql_query("SELECT count(*) AS count FROM secrets WHERE tenant_id = $1 AND type = $2");
    let sets: Count = query.bind::<Text, _>(tenant).bind::<Text, _>(token_set).get_result(conn)?;
    Ok((all.count, sets.count))
}

/// Social connectors after that id; their time of creation is what tells which was first.
pub(in crate::tokens) fn connectors(
    conn: &mut PgConnection,
    tenant: &str,
    after: &str,
    limit: i64,
) -> Answer<Vec<ConnectorRow>> {
    page(
        conn,
        "SELECT id::text, connector_id::text AS factory, '' AS name, CAST(config AS text),
                coalesce(metadata, '{}')::text AS metadata, '[]' AS domains, '{}' AS branding, sync_profile,
                enable_token_storage AS stores_tokens,
                (extract(epoch FROM created_at) * 1000000)::bigint AS created_at
         FROM connectors WHERE tenant_id = $1 AND id > $2 ORDER BY id LIMIT $3",
        (tenant, after, limit),
    )
}

/// Enterprise connectors after that id.
pub(in crate::tokens) fn sso_connectors(
    conn: &mut PgConnection,
    tenant: &str,
    after: &str,
    limit: i64,
) -> Answer<Vec<ConnectorRow>> {
    page(
        conn,
        "SELECT id::text, provider_name::text AS factory, coalesce(connector_name, '')::text AS name, CAST(config AS text),
                '{}' AS metadata, coalesce(domains, '[]')::text AS domains,
                coalesce(branding, '{}')::text AS branding, sync_profile, enable_token_storage AS stores_tokens,
                (extract(epoch FROM created_at) * 1000000)::bigint AS created_at
         FROM sso_connectors WHERE tenant_id = $1 AND id > $2 ORDER BY id LIMIT $3",
        (tenant, after, limit),
    )
}

/// Users after that id.
pub(in crate::tokens) fn users(
    conn: &mut PgConnection,
    tenant: &str,
    after: &str,
    limit: i64,
) -> Answer<Vec<UserRow>> {
    page(
        conn,
        "SELECT id::text, username::text, primary_email::text, primary_phone::text, name::text, avatar::text,
                coalesce(profile, '{}')::text AS profile, coalesce(custom_data, '{}')::text AS custom_data,
                coalesce(identities, '{}')::text AS identities, is_suspended,
                password_encrypted::text AS password, password_encryption_method::text AS password_method,
                (extract(epoch FROM created_at) * 1000000)::bigint AS created_at
         FROM users WHERE tenant_id = $1 AND id > $2 ORDER BY id LIMIT $3",
        (tenant, after, limit),
    )
}

/// The enterprise identities of those users.
pub(in crate::tokens) fn sso_identities(
    conn: &mut PgConnection,
    tenant: &str,
    users: &[String],
) -> Answer<Vec<SsoIdentityRow>> {
    let query = sql_query(
        "SELECT id::text, user_id::text, issuer::text, identity_id::text, coalesce(detail, '{}')::text AS detail,
                sso_connector_id::text AS connector_id,
                (extract(epoch FROM created_at) * 1000000)::bigint AS created_at,
                (extract(epoch FROM updated_at) * 1000000)::bigint AS updated_at
         FROM user_sso_identities WHERE tenant_id = $1 AND user_id = ANY($2) ORDER BY id",
    );
    query.bind::<Text, _>(tenant).bind::<Array<Text>, _>(users).load(conn)
}

/// Secrets after that id.
pub(in crate::tokens) fn secrets(
    conn: &mut PgConnection,
    tenant: &str,
    after: &str,
    limit: i64,
) -> Answer<Vec<SecretRow>> {
    page(
        conn,
        "SELECT s.id::text, s.user_id::text, s.type::text AS kind, s.encrypted_dek, s.iv, s.auth_tag, s.ciphertext,
                s.metadata::text, (extract(epoch FROM s.created_at) * 1000000)::bigint AS created_at,
                (extract(epoch FROM s.updated_at) * 1000000)::bigint AS updated_at,
                r.connector_id::text AS social_connector, r.target::text, e.sso_connector_id::text AS sso_connector,
                e.issuer::text, coalesce(r.identity_id, e.identity_id)::text AS identity_id,
                coalesce(u.identities -> r.target ->> 'userId' = r.identity_id, i.id IS NOT NULL) AS is_linked
         FROM secrets s
         JOIN users u ON u.tenant_id = s.tenant_id AND u.id = s.user_id
         LEFT JOIN secret_social_connector_relations r ON r.tenant_id = s.tenant_id AND r.secret_id = s.id
         LEFT JOIN secret_enterprise_sso_connector_relations e ON e.tenant_id = s.tenant_id AND e.secret_id = s.id
         LEFT JOIN user_sso_identities i ON i.tenant_id = e.tenant_id AND i.issuer = e.issuer
             AND i.identity_id = e.identity_id AND i.user_id = s.user_id
             AND i.sso_connector_id = e.sso_connector_id
         WHERE s.tenant_id = $1 AND s.id > $2 ORDER BY s.id LIMIT $3",
        (tenant, after, limit),
    )
}

/// A value of `logto_configs`, as JSON.
pub(in crate::tokens) fn setting(conn: &mut PgConnection, tenant: &str, key: &str) -> Answer<Option<String>> {
    let query = sql_query("SELECT value::text FROM logto_configs WHERE tenant_id = $1 AND key = $2");
    let found: Option<Setting> =
        query.bind::<Text, _>(tenant).bind::<Text, _>(key).get_result(conn).optional()?;
    Ok(found.map(|setting| setting.value))
}

fn page<Row>(
    conn: &mut PgConnection,
    query: &str,
    (tenant, after, limit): (&str, &str, i64),
) -> Answer<Vec<Row>>
where
    Row: QueryableByName<diesel::pg::Pg> + 'static,
{
    let query = sql_query(query).bind::<Text, _>(tenant).bind::<Text, _>(after).bind::<BigInt, _>(limit);
    query.load(conn)
}
