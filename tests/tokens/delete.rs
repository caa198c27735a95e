//! What ends a set ends all of it: rows, sealed values, and what was parked for it (contract, section 6.2); also
//! while a refresh is on its way (ID-15).

use std::time::Duration;

use reqwest::{Method, Response};
use serde_json::{Value, json};

use crate::idp::Mode;
use crate::stage::{ACME, Engine, NOTHING, Stage, User, body, patch, path, put_token, refused, text, until};

/// What may end a set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Unlink,
    UnlinkByAdmin,
    AnotherAccount,
    User,
    Connector,
    Storage,
    Secret,
}

const ENDS: [End; 7] = [
    End::Unlink,
    End::UnlinkByAdmin,
    End::AnotherAccount,
    End::User,
    End::Connector,
    End::Storage,
    End::Secret,
];

/// A user linked through a connector of the case's own.
struct Case {
    user: User,
    connector: String,
    name: String,
    secret: String,
}

impl Case {
    async fn new(stage: &Stage, end: End) -> Self {
        let name = format!("{end:?}").to_lowercase();
        let connector = stage.connect(&name).await;
        let user = stage.linked_at(&connector, &name).await;
        let secret = text(&stage.metadata(&user, &name).await["id"]);
        Self { user, connector, name, secret }
    }

    async fn end(&self, stage: &Stage, end: End) {
        let Self { user, connector, name, secret } = self;
        let by_admin = format!("/api/users/{}/identities/{name}", user.id);
        let answer: Response = match end {
            End::Unlink => user.api.delete(&format!("/api/my-account/identities/{name}")).await,
            End::UnlinkByAdmin => stage.admin.delete(&by_admin).await,
            End::AnotherAccount => {
                let other = json!({ "userId": "another-account", "details": {} });
                stage.admin.request(Method::PUT, &by_admin).json(&other).send().await.unwrap()
            }
            End::User => stage.admin.delete(&format!("/api/users/{}", user.id)).await,
            End::Connector => stage.admin.delete(&format!("/api/connectors/{connector}")).await,
            End::Storage => {
                let path = format!("/api/connectors/{connector}");
                assert_eq!(
                    patch(&stage.admin, &path, &json!({ "enableTokenStorage": false })).await["enableTokenStorage"],
                    false
                );
                return;
            }
            End::Secret => stage.admin.delete(&format!("/api/secrets/{secret}")).await,
        };
        assert!(answer.status().is_success(), "{end:?}: {}", answer.text().await.unwrap());
    }

    fn rows(&self, stage: &Stage) -> usize {
        let of_user = format!("SELECT id AS t FROM token_sets WHERE user_id = '{}'", self.user.id);
        stage.ground.texts(&of_user).len()
    }

    /// A user who is gone has no session; anybody else has nothing stored.
    async fn is_over(&self, end: End) {
        let answer = self.user.api.get(&path(&self.name)).await;
        match end {
            End::User => refused(answer, 401, "auth.unauthorized").await,
            _ => refused(answer, 404, NOTHING).await,
        };
    }
}

/// How many sealed values there are.
fn sealed(stage: &Stage) -> usize {
    stage.ground.texts("SELECT secret_id AS t FROM secret_versions").len()
}

async fn every_end(stage: Stage) {
    for end in ENDS {
        let before = sealed(&stage);
        let case = Case::new(&stage, end).await;
        // A consent that was given and not used yet has its tokens parked.
        let parked = stage.verified_at(&case.user, &case.connector, &case.name, None).await;
        assert!(case.rows(&stage) == 1 && sealed(&stage) > before, "{end:?}: nothing is there to be ended");

        case.end(&stage, end).await;

        assert_eq!(case.rows(&stage), 0, "{end:?}");
        case.is_over(end).await;
        refused(stage.admin.delete(&format!("/api/secrets/{}", case.secret)).await, 404, "entity.not_found")
            .await;
        let used = put_token(&case.user, &case.name, &parked).send().await.unwrap();
        assert!(used.status().is_client_error(), "{end:?}: what was parked came back");
        // A consent to the connector itself outlives a set that was deleted or is another account's.
        if end != End::Secret && end != End::AnotherAccount {
            let parked = format!("connector_id = '{}' AND user_id = '{}'", case.connector, case.user.id);
            let parked = format!("SELECT id AS t FROM verification_records WHERE {parked}");
            assert_eq!(stage.ground.texts(&parked), Vec::<String>::new(), "{end:?}: parked");
            // A connector may keep its own secret; what was the user's is gone.
            let limit = if end == End::Connector { before } else { before + 1 };
            until(&format!("{end:?}: the end of what was parked"), Duration::from_secs(10), async || {
                sealed(&stage) <= limit
            })
            .await;
        }
        if end == End::Connector || end == End::Storage {
            let identities =
                body(stage.admin.get(&format!("/api/users/{}/all-identities", case.user.id)).await, 200);
            let identities = identities.await;
            assert_eq!(identities["socialIdentities"][0]["target"], case.name.as_str(), "the identity stays");
            assert_eq!(identities["socialIdentities"][0].get("tokenSecret"), None);
        }
    }
    assert_eq!((stage.sets(), stage.idp.refreshes()), (0, 0));
    stage.finish().await;
}

#[tokio::test]
async fn whatever_ends_a_set_leaves_nothing_of_it_with_lacre_dev() {
    every_end(Stage::dev(Mode::Strict).await).await;
}

#[tokio::test]
async fn whatever_ends_a_set_leaves_nothing_of_it_on_postgresql() {
    every_end(Stage::serve(Engine::Postgres, Mode::Strict, "").await).await;
}

#[tokio::test]
async fn a_set_that_ends_while_it_is_refreshed_does_not_come_back() {
    let stage = Stage::dev(Mode::Strict).await;
    for end in ENDS {
        let case = Case::new(&stage, end).await;
        stage.expire();
        stage.idp.pause_before_answer();
        let reading = tokio::spawn(case.user.api.request(Method::GET, &path(&case.name)).send());
        stage.idp.wait_for_request().await;
        let ending = tokio::time::timeout(Duration::from_secs(10), case.end(&stage, end)).await;
        assert!(ending.is_ok(), "{end:?} waits for the provider");
        stage.idp.release();

        let answer = reading.await.unwrap().unwrap();
        assert!(answer.status().is_client_error(), "{end:?}: {}", answer.text().await.unwrap());
        // The answer gave tokens to nobody, so the provider is told.
        until(&format!("{end:?}: the revocation"), Duration::from_secs(15), async || {
            stage.idp.live_tokens_of(&case.name).is_empty()
        })
        .await;
        assert_eq!(case.rows(&stage), 0, "{end:?}: the set came back");
        case.is_over(end).await;
    }
    assert!(stage.idp.revocations().len() >= ENDS.len(), "{} revocations", stage.idp.revocations().len());
    assert_eq!((stage.sets(), stage.idp.families_revoked()), (0, 0));
    stage.finish().await;
}

#[tokio::test]
async fn a_revocation_that_cannot_be_told_keeps_nobody_waiting() {
    let stage = Stage::dev(Mode::Strict).await;
    let mut config = stage.config();
    config["revocationEndpoint"] = json!("http://127.0.0.1:9/revoke");
    let connector = stage.connect_with("oauth2", "mute", config).await;
    let user = stage.linked_at(&connector, "ana").await;
    stage.expire();
    stage.idp.pause_before_answer();
    let reading = tokio::spawn(user.api.request(Method::GET, &path("mute")).send());
    stage.idp.wait_for_request().await;
    assert_eq!(user.api.delete("/api/my-account/identities/mute").await.status(), 204);
    stage.idp.release();
    assert!(reading.await.unwrap().unwrap().status().is_client_error());
    assert_eq!(stage.sets(), 0);
    refused(user.api.get(&path("mute")).await, 404, NOTHING).await;
    stage.finish().await;
}

#[tokio::test]
async fn the_last_way_to_sign_in_is_not_unlinked() {
    let stage = Stage::dev(Mode::Strict).await;
    let made = body(stage.admin.post("/api/users", &json!({})).await, 200).await;
    let id = text(&made["id"]);
    let user = User { api: stage.session(&id, "openid identities").await, id };
    let other = stage.connect("other").await;
    for (connector, subject) in [(&stage.connector, "one"), (&other, "two")] {
        let record = stage.verified_at(&user, connector, subject, None).await;
        assert_eq!(stage.link(&user, &record).await.status(), 204);
    }
    assert_eq!(
        user.api.delete("/api/my-account/identities/other").await.status(),
        204,
        "a second one is enough"
    );
    let last = user.api.delete("/api/my-account/identities/acme").await;
    refused(last, 400, "user.last_sign_in_method_required").await;
    assert_ne!(stage.metadata(&user, ACME).await, Value::Null);
    stage.token(&user).await;
    stage.finish().await;
}
