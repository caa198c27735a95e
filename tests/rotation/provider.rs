//! An OpenID provider (npm `oidc-provider`) that builds its own tokens and has Lacre sign them, and a relying party
//! (npm `openid-client`), over several rotations: `docs/guides/oidc-provider.md`.

use std::io::{BufRead, BufReader};
use std::process::{Child, Stdio};
use std::time::Duration;

use serde_json::json;

use crate::daemon::{TestDaemon, free_port};
use crate::{Script, app, count, hurry, idp, is_well, nothing_failed, rotate};

const ROTATIONS: usize = 4;
/// Longer than a key is published before it signs.
const BETWEEN: Duration = Duration::from_secs(7);

struct Provider {
    child: Child,
    facts: Vec<(String, String)>,
}

impl Provider {
    fn start(port: u16, environment: &[(&str, &str)]) -> Self {
        let mut command = idp::node("external.mjs");
        command.arg(port.to_string()).envs(environment.iter().copied());
        // It ends when its input does, however this process ends.
        command.env("IDP_DIE_WITH_STDIN", "1").stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert!(line.starts_with("idp ready "), "the provider did not start: {line:?}");
        let words = line.split_whitespace().filter_map(|word| word.split_once('='));
        let facts = words.map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
        Self { child, facts }
    }

    fn fact(&self, name: &str) -> &str {
        &self.facts.iter().find(|(known, _)| known == name).unwrap().1
    }
}

impl Drop for Provider {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[tokio::test]
async fn a_providers_tokens_are_signed_by_the_device_over_rotations() {
    let daemon = TestDaemon::dev().await;
    let admin = daemon.api().await;
    hurry(&admin, 2).await;
    let port = free_port();
    let issuer = format!("http://127.0.0.1:{port}");
    let policy = json!({ "jws": { "issuers": [issuer], "types": ["", "at+jwt"], "max_lifetime": 20 } });
    let (client, secret) = app(&admin, policy).await;
    let provider = Provider::start(
        port,
        &[
            ("LACRE_URL", &daemon.url),
            ("LACRE_CLIENT_ID", &client),
            ("LACRE_CLIENT_SECRET", &secret),
            ("LACRE_POLL_MS", "500"),
            ("IDP_RESOURCE", "https://api.example"),
            ("IDP_ACCESS_TOKEN_TTL", "20"),
            ("IDP_ID_TOKEN_TTL", "20"),
        ],
    );
    let mut relying = idp::node("relying.mjs");
    relying.env("IDP_ISSUER", provider.fact("issuer")).env("IDP_CLIENT_ID", provider.fact("client_id"));
    relying.env("IDP_CLIENT_SECRET", provider.fact("client_secret"));
    let relying = Script::start(relying);

    for rotation in 0..ROTATIONS {
        tokio::time::sleep(BETWEEN).await;
        // Another algorithm in between: the provider offers what the key can do.
        rotate(&admin, Some(["ES256", "ES384"][rotation % 2])).await;
    }
    tokio::time::sleep(BETWEEN * 2).await;

    let report = relying.report();
    nothing_failed("openid-client", &report);
    assert_eq!(count(&report, "kids"), ROTATIONS + 1, "the provider followed each rotation");
    assert!(count(&report, "signed_in") > 20 && count(&report, "checks") > 200, "{report}");
    let signed = admin.audit_lines().await;
    let signed = signed.iter().filter(|line| line.contains("\"jws.sign\"") && line.contains("\"success\""));
    assert!(signed.count() >= 2 * count(&report, "signed_in"), "each token is on record");
    is_well(&daemon);
    daemon.finish().await;
}
