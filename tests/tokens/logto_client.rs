//! The client that Logto publishes for its Management API (npm `@logto/api`), unchanged, against `lacre dev`:
//! `tests/idp/management.mjs`.

use serde_json::{Value, json};

use crate::idp::Mode;
use crate::scripts;
use crate::stage::{ACME, NOTHING, Stage, refused, text};

/// What each step must have been answered.
const STATUSES: [(&str, u16); 29] = [
    ("createUser", 200),
    ("getUser", 200),
    ("listUsers", 200),
    ("updateUser", 200),
    ("createSubjectToken", 201),
    ("putIdentity", 201),
    ("putIdentityAgain", 200),
    ("getIdentity", 200),
    ("deleteIdentity", 200),
    ("getIdentityThatIsGone", 404),
    ("getSecret", 200),
    ("allIdentities", 200),
    ("deleteSecret", 204),
    ("deleteSecretAgain", 404),
    ("createConnector", 200),
    ("getConnector", 200),
    ("listConnectors", 200),
    ("factories", 200),
    ("updateConnector", 200),
    ("deleteConnector", 204),
    ("getConnectorThatIsGone", 404),
    ("createApplication", 200),
    ("getApplication", 200),
    ("listApplications", 200),
    ("deleteApplication", 204),
    ("getAccountCenter", 200),
    ("updateAccountCenter", 200),
    ("oidcKeys", 200),
    ("deleteUser", 204),
];

#[tokio::test]
async fn the_published_client_walks_the_management_api_unchanged() {
    let stage = Stage::dev(Mode::Strict).await;
    let ana = stage.linked("ana").await;
    let management = stage.daemon().dev_json()["management"].clone();
    let mut command = scripts::node("management.mjs");
    command.env("LACRE_URL", &stage.daemon().url).env("LACRE_USER", &ana.id).env("LACRE_TARGET", ACME);
    command.env("LACRE_CLIENT_ID", text(&management["client_id"]));
    command.env("LACRE_CLIENT_SECRET", text(&management["client_secret"]));
    command.env("LACRE_RESOURCE", text(&management["resource"]));
    command.env("LACRE_CONNECTOR", stage.config().to_string());
    let output = scripts::run(&mut command, "");
    let complaints = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{complaints}");
    assert!(!complaints.contains("is not equal to the expected value"), "{complaints}");
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();

    assert_eq!(report["scope"], "all");
    let steps = &report["steps"];
    for (name, status) in STATUSES {
        assert_eq!(steps[name]["status"], status, "{name}: {}", steps[name]["body"]);
    }
    assert_eq!(steps["getUserThatIsGone"]["status"], 404);
    let of = |name: &str| steps[name]["body"].clone();
    assert_eq!(
        (&of("getUser")["id"], &of("getUser")["username"]),
        (&of("createUser")["id"], &json!("by_the_client"))
    );
    assert_eq!(of("updateUser")["name"], "Another name");
    assert_eq!(of("listUsers").as_array().unwrap().len(), 2);
    assert!(text(&of("createSubjectToken")["subjectToken"]).starts_with("sub_"));
    assert_eq!(of("createSubjectToken")["expiresIn"], 600);
    assert_eq!(of("putIdentity")[ACME]["userId"], "idp-by-the-client");
    assert_eq!(of("getIdentity")["identity"]["userId"], "idp-by-the-client");
    assert_eq!(of("deleteIdentity")["identities"], json!({}));
    assert_eq!(of("getIdentityThatIsGone")["code"], "user.identity_not_exist");
    assert_eq!(of("getSecret")["tokenSecret"]["type"], "federated_token_set");
    assert_eq!(of("allIdentities")["socialIdentities"][0]["tokenSecret"], of("getSecret")["tokenSecret"]);
    assert_eq!(of("deleteSecretAgain")["code"], "entity.not_found");
    assert_eq!(
        (&of("createConnector")["target"], &of("createConnector")["enableTokenStorage"]),
        (&json!("by-the-client"), &json!(true))
    );
    assert_eq!(of("updateConnector")["enableTokenStorage"], false);
    assert_eq!(of("createApplication")["type"], "MachineToMachine");
    assert_eq!(of("getAccountCenter")["fields"]["social"], "Edit");
    assert_eq!(of("updateAccountCenter")["fields"]["social"], "ReadOnly");
    assert_eq!(of("oidcKeys")[0]["status"], "Current");
    // What the client deleted is gone, and it was shown no value.
    refused(stage.read(&ana).await, 404, NOTHING).await;
    assert!(!report.to_string().contains(&stage.daemon().canary));
    stage.finish().await;
}
