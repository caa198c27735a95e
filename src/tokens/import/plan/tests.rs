//! Each row of Logto's, and what becomes of it.

use secrecy::ExposeSecret;
use serde_json::json;

use super::*;
use crate::tokens::import::report::Fate;

type Change<Row> = fn(&mut Row);

const NOW: Timestamp = Timestamp::from_micros(9_000_000);

fn connector_row(factory: &str, config: Value) -> ConnectorRow {
    ConnectorRow {
        id: "c0nnector001".to_owned(),
        factory: factory.to_owned(),
        name: String::new(),
        config: config.to_string(),
        metadata: json!({ "target": "acme" }).to_string(),
        domains: "[]".to_owned(),
        branding: "{}".to_owned(),
        sync_profile: true,
        stores_tokens: true,
        created_at: 5_000_000,
    }
}

fn connectors() -> Connectors {
    let (mut social, _) = connector(connector_row("oauth2", json!({})), Family::Social, NOW).unwrap();
    social.refresh_ahead = 60;
    // As sealing leaves it.
    social.shown.config = json!({
        "authorizationEndpoint": "https://idp.example/auth", "tokenEndpoint": "https://idp.example/token",
        "userInfoEndpoint": "https://idp.example/me", "clientId": "c", "clientSecret": "********",
    });
    let sso = ConnectorRow { id: "ssoc0nnector".to_owned(), ..connector_row("OIDC", json!({})) };
    let (mut sso, _) = connector(sso, Family::Sso, NOW).unwrap();
    sso.shown.config =
        json!({ "issuer": "https://idp.example", "clientId": "c", "clientSecret": "********" });
    [social, sso].into_iter().map(|found| (found.id.clone(), found)).collect()
}

fn user_row() -> UserRow {
    UserRow {
        id: "us3r00000001".to_owned(),
        username: Some("ana".to_owned()),
        primary_email: Some(String::new()),
        primary_phone: None,
        name: Some("Ana".to_owned()),
        avatar: None,
        profile: "{}".to_owned(),
        custom_data: "{}".to_owned(),
        identities: json!({ "acme": { "userId": "a1", "details": { "name": "A" } } }).to_string(),
        is_suspended: false,
        password: None,
        password_method: None,
        created_at: 4_000_000,
    }
}

fn sso_row() -> SsoIdentityRow {
    SsoIdentityRow {
        id: "ssoidentity0000000001".to_owned(),
        user_id: "us3r00000001".to_owned(),
        issuer: "https://idp.example".to_owned(),
        identity_id: "sub-1".to_owned(),
        detail: "{}".to_owned(),
        connector_id: "ssoc0nnector".to_owned(),
        created_at: 1,
        updated_at: 2,
    }
}

/// The row of the contract's vector (section 6.6).
fn secret_row() -> SecretRow {
    let bytes = |text: &str| hex::decode(text).unwrap();
    SecretRow {
        id: "s3cret000000000000001".to_owned(),
        user_id: "us3r00000001".to_owned(),
        kind: TOKEN_SET.to_owned(),
        encrypted_dek: bytes(
            "a0a1a2a3a4a5a6a7a8a9aaab8861dcd1aceb8f9afa5810809a4eb7dde421573b9556df469b7209d94a1902f9d8bbcf97817f12034b61a1a44cab19c0",
        ),
        iv: bytes("b0b1b2b3b4b5b6b7b8b9babb"),
        auth_tag: bytes("6f418834a624ec0a4e17ddf709ba8b07"),
        ciphertext: bytes(
            "e2773bc88fa8c82c188cf8c9a833aaf8a65d3dff240ca31737aadd8533e997782771015317f3979a8979d22f5acbe7c6453263a8705e2cd277a81e4429aa0282",
        ),
        metadata:
            json!({ "hasRefreshToken": true, "scope": "a,b", "tokenType": "bearer", "expiresAt": 1000 })
                .to_string(),
        created_at: 7_000_000,
        updated_at: 8_000_000,
        social_connector: Some("c0nnector001".to_owned()),
        target: Some("acme".to_owned()),
        sso_connector: None,
        issuer: None,
        identity_id: Some("a1".to_owned()),
        is_linked: true,
    }
}

fn kek() -> Kek {
    Kek::from_base64(&SecretString::from("DtPWS09unRXGuRScB60qXqCSsrjd22dUlXt/0oZgxSo=")).unwrap()
}

#[test]
fn connectors_keep_id_and_age_and_what_is_unknown_stays_behind() {
    let (found, config) =
        connector(connector_row("oauth2", json!({ "clientId": "c" })), Family::Social, NOW).unwrap();
    assert_eq!((found.id.as_str(), found.target.as_str()), ("c0nnector001", "acme"));
    assert_eq!((found.created_at.as_secs(), found.updated_at), (5, NOW));
    assert_eq!((config, found.shown.config), (json!({ "clientId": "c" }), Value::Null));
    let (fixed, _) = connector(connector_row("github-universal", json!({})), Family::Social, NOW).unwrap();
    assert_eq!(fixed.target, "github");
    let (sso, _) = connector(connector_row("Okta", json!({})), Family::Sso, NOW).unwrap();
    assert_eq!(sso.target, "c0nnector001");

    let mail = ConnectorRow { stores_tokens: false, ..connector_row("smtp", json!({})) };
    assert!(!connector(mail, Family::Social, NOW).unwrap_err().is_loss);
    let bad: [(Change<ConnectorRow>, &str); 5] = [
        (|row| row.factory = "smtp".into(), "Lacre has no such kind of connector"),
        (|row| row.id = "a/b".into(), BAD_ID),
        (|row| row.metadata = "{}".into(), "metadata.target: Required"),
        (|row| row.metadata = r#"{"target":"a/b"}"#.into(), "metadata.target: must have 1 to 64"),
        (|row| row.config = "{".into(), "config: is not JSON"),
    ];
    for (change, reason) in bad {
        let mut row = connector_row("oauth2", json!({}));
        change(&mut row);
        let skip = connector(row, Family::Social, NOW).unwrap_err();
        assert!(skip.is_loss && skip.reason.starts_with(reason), "{skip:?}");
    }
}

#[test]
fn a_person_comes_with_all_identities() {
    let person = person(user_row(), &[sso_row()], &connectors(), NOW).unwrap();
    let Person { account, identities, told } = person;
    assert_eq!((account.user.username.as_deref(), account.user.primary_email), (Some("ana"), None));
    assert_eq!((account.user.created_at.as_secs(), account.user.has_password), (4, false));
    let shown: Vec<_> = identities
        .iter()
        .map(|one| (one.family, one.target.as_str(), one.identity_id.as_str(), one.issuer.as_deref()))
        .collect();
    assert_eq!(
        shown,
        [
            (Family::Social, "acme", "a1", None),
            (Family::Sso, "ssoc0nnector", "sub-1", Some("https://idp.example")),
        ]
    );
    assert_eq!(identities[1].id.as_str(), "ssoidentity0000000001");
    assert_eq!(identities[0].details, json!({ "name": "A" }));
    assert!(told.is_empty());
}

#[test]
fn what_is_not_taken_of_a_person_is_told_without_the_value() {
    let without: [Change<UserRow>; 3] = [
        |row| row.avatar = Some("javascript:alert(1)".into()),
        |row| row.name = Some("x\u{7}".into()),
        |row| (row.name, row.avatar) = (Some("x".repeat(200)), Some("none".into())),
    ];
    for change in without {
        let mut row = user_row();
        change(&mut row);
        let person = person(row, &[], &connectors(), NOW).unwrap();
        assert!(person.told.is_empty() && person.account.user.username.is_some());
        assert!(person.account.user.name.is_none() || person.account.user.avatar.is_none());
    }
    let refused: [(Change<UserRow>, &str); 5] = [
        (|row| row.id = "a b".into(), BAD_ID),
        (|row| row.username = Some("no name".into()), "username: must be"),
        (|row| row.primary_email = Some("nobody".into()), "primaryEmail: must be"),
        (|row| row.custom_data = "[]".into(), "customData: must be"),
        (|row| row.identities = "[]".into(), "identities: must be"),
    ];
    for (change, reason) in refused {
        let mut row = user_row();
        change(&mut row);
        let skip = person(row, &[], &connectors(), NOW).err().unwrap();
        assert!(skip.is_loss && skip.reason.starts_with(reason), "{skip:?}");
    }
    let mut row = user_row();
    row.password = Some("$2a$10$N9qo8uLOickgx2ZMRZoMye".to_owned());
    row.password_method = Some("Bcrypt".to_owned());
    row.identities = json!({ "a/b": { "userId": "x" }, "acme": { "userId": 1 }, "ok": { "userId": "x", "details": null } })
        .to_string();
    let elsewhere = SsoIdentityRow { connector_id: "gone".to_owned(), ..sso_row() };
    let person = person(row, &[elsewhere], &connectors(), NOW).unwrap();
    assert_eq!(person.identities.len(), 1);
    let told: Vec<_> = person.told.iter().map(|told| (told.kind, told.id.as_str())).collect();
    assert_eq!(
        told,
        [
            (Kind::Passwords, "us3r00000001"),
            (Kind::Identities, "us3r00000001/a/b"),
            (Kind::Identities, "us3r00000001/acme"),
            (Kind::SsoIdentities, "ssoidentity0000000001"),
        ]
    );
    assert!(matches!(&person.told[3].fate, Fate::Skipped(skip) if !skip.is_loss));
}

#[test]
fn a_token_set_keeps_id_times_and_metadata() {
    let (found, payload) = set(&secret_row(), &kek(), &connectors(), &HashSet::new()).unwrap();
    assert_eq!((found.id.as_str(), found.version), ("s3cret000000000000001", 1));
    assert_eq!((found.created_at.as_secs(), found.updated_at.as_secs()), (7, 8));
    assert_eq!((found.scope.as_deref(), found.token_type.as_deref()), (Some("a,b"), Some("bearer")));
    assert_eq!((found.expires_at, found.has_refresh_token), (Some(1000), true));
    assert!(found.refresh_at.is_some(), "its connector refreshes ahead");
    let payload: Value = serde_json::from_slice(&payload).unwrap();
    let expected = json!({
        "access_token": "at-1", "id_token": "it-1", "refresh_token": "rt-1",
        "connector": "c0nnector001", "identity": "a1", "sends_to": "https://idp.example",
    });
    assert_eq!(payload, expected);

    let mut row = secret_row();
    (row.sso_connector, row.social_connector, row.target) = (Some("ssoc0nnector".into()), None, None);
    row.issuer = Some("https://idp.example".into());
    let (found, _) = set(&row, &kek(), &connectors(), &HashSet::new()).unwrap();
    assert_eq!((found.connection.family, found.connection.target.as_str()), (Family::Sso, "ssoc0nnector"));
    assert_eq!(found.issuer.as_deref(), Some("https://idp.example"));
}

#[test]
fn a_token_set_that_cannot_be_taken_says_why() {
    let table: [(Change<SecretRow>, bool, &str); 9] = [
        (|row| row.kind = "note".into(), false, "secrets of that type are not known"),
        (|row| row.id = "a/b".into(), true, BAD_ID),
        (|row| row.user_id = "gone".into(), true, NO_USER),
        (|row| row.is_linked = false, true, NOT_LINKED),
        (|row| row.social_connector = Some("gone".into()), true, NO_CONNECTOR),
        (|row| row.social_connector = None, true, "it is not related to one connector"),
        (|row| row.target = Some("other".into()), true, "its connector has another target"),
        (|row| row.auth_tag[3] ^= 1, true, "does not decrypt under the KEK"),
        (|row| row.metadata = "[]".into(), true, "metadata: has another form"),
    ];
    let missing = HashSet::from(["gone".to_owned()]);
    for (change, is_loss, reason) in table {
        let mut row = secret_row();
        change(&mut row);
        let skip = set(&row, &kek(), &connectors(), &missing).err().unwrap();
        assert_eq!((skip.reason.as_ref(), skip.is_loss), (reason, is_loss));
    }
    let mut off = connectors();
    for connector in off.values_mut() {
        connector.stores_tokens = false;
    }
    let skip = set(&secret_row(), &kek(), &off, &missing).err().unwrap();
    assert_eq!(skip.reason, "its connector does not store tokens");
}

#[test]
fn private_keys_are_told_apart_by_status_or_else_by_place() {
    let told = |value: Value| {
        let keys = private_keys(&value.to_string())?;
        let told = keys.into_iter().map(|key| (key.id, key.status, key.pem.expose_secret().to_owned()));
        Some(told.map(|(id, status, pem)| format!("{id} {status:?} {pem}")).collect::<Vec<_>>())
    };
    let key = |id: &str, status: Value| json!({ "id": id, "value": "P", "createdAt": 1, "status": status });
    let legacy = json!([key("a", Value::Null), key("b", Value::Null)]);
    assert_eq!(told(legacy).unwrap(), ["b Previous P", "a Current P"]);
    let new = json!([key("n", "Next".into()), key("c", "Current".into()), key("p", "Previous".into())]);
    assert_eq!(told(new).unwrap(), ["n Next P", "p Previous P", "c Current P"]);
    assert_eq!(told(json!([])).unwrap(), Vec::<String>::new());
    for bad in [json!({}), json!([{ "id": "a" }]), json!([key("a", "Old".into())])] {
        assert!(told(bad.clone()).is_none(), "{bad}");
    }
    assert_eq!(cookie_keys(r#"[{"id":"k","value":"v","createdAt":1}]"#), ["k"]);
    assert!(cookie_keys("{}").is_empty());
}
