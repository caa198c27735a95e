//! Who is at the other end of a connection, before any token: a local user on the Unix socket, or
//! the holder of a client certificate. The rules that turn them into callers are configuration.

use std::any::Any;
use std::collections::HashMap;

use actix_tls::accept::rustls_0_23::TlsStream;
use actix_web::dev::Extensions;
use actix_web::rt::net::TcpStream;
use serde::{Deserialize, Deserializer, de};
use tokio::net::UnixStream;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::identity::{Principal, Scope, ScopeSet};
use crate::issuer::SigningPolicy;

/// What a local user may do on the Unix socket without a token.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LocalUser {
    /// The user id that the kernel reports for the peer.
    pub uid: u32,
    /// The rights, by their OAuth names.
    #[serde(deserialize_with = "scopes")]
    pub scopes: ScopeSet,
    /// What it may have signed; absent: nothing.
    pub signing: Option<SigningPolicy>,
}

/// What the holder of a client certificate may do without a token. Exactly one of `san_uri` and
/// `common_name` selects the certificate.
#[derive(Clone, Debug, Deserialize)]
#[serde(try_from = "CertificateRuleForm")]
pub struct CertificateRule {
    selector: Selector,
    name: String,
    scopes: ScopeSet,
    signing: Option<SigningPolicy>,
}

#[derive(Clone, Debug)]
enum Selector {
    SanUri(String),
    CommonName(String),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct CertificateRuleForm {
    san_uri: Option<String>,
    common_name: Option<String>,
    name: String,
    #[serde(deserialize_with = "scopes")]
    scopes: ScopeSet,
    signing: Option<SigningPolicy>,
}

impl TryFrom<CertificateRuleForm> for CertificateRule {
    type Error = &'static str;

    fn try_from(form: CertificateRuleForm) -> Result<Self, Self::Error> {
        let selector = match (form.san_uri, form.common_name) {
            (Some(uri), None) => Selector::SanUri(uri),
            (None, Some(name)) => Selector::CommonName(name),
            _ => return Err("a client rule needs exactly one of san_uri and common_name"),
        };
        if form.name.is_empty() || form.name.len() > 64 || !form.name.chars().all(|c| c.is_ascii_graphic()) {
            return Err("a client rule's name has 1 to 64 visible ASCII characters");
        }
        Ok(Self { selector, name: form.name, scopes: form.scopes, signing: form.signing })
    }
}

fn scopes<'de, D: Deserializer<'de>>(input: D) -> Result<ScopeSet, D::Error> {
    let names = Vec::<String>::deserialize(input)?;
    let parse =
        |name: &String| Scope::parse(name).ok_or_else(|| de::Error::custom(format!("{name} is not a scope")));
    names.iter().map(parse).collect()
}

/// The other end of a connection. Absent for plain TCP and for TLS without a client certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Peer {
    LocalUser(u32),
    /// Verified by TLS against the configured authority.
    Certificate {
        san_uris: Vec<String>,
        common_name: Option<String>,
    },
}

impl Peer {
    /// Who that is and what it may do, by the rules; `None` if no rule speaks of it.
    pub(super) fn admit(
        &self,
        users: &[LocalUser],
        certificates: &[CertificateRule],
    ) -> Option<(Principal, ScopeSet)> {
        match self {
            Self::LocalUser(uid) => users
                .iter()
                .find(|user| user.uid == *uid)
                .map(|user| (Principal::LocalUser(*uid), user.scopes)),
            Self::Certificate { san_uris, common_name } => certificates
                .iter()
                .find(|rule| match &rule.selector {
                    Selector::SanUri(uri) => san_uris.contains(uri),
                    Selector::CommonName(name) => common_name.as_ref() == Some(name),
                })
                .map(|rule| (Principal::Certificate(rule.name.clone()), rule.scopes)),
        }
    }
}

/// What callers without a token may have signed. Several rules may give one name: it has a policy if all of them
/// have the same one.
pub fn signing_policies(
    users: &[LocalUser],
    certificates: &[CertificateRule],
) -> HashMap<Principal, SigningPolicy> {
    let mut policies = HashMap::<Principal, Option<SigningPolicy>>::new();
    let users = users.iter().map(|user| (Principal::LocalUser(user.uid), &user.signing));
    let holders = certificates.iter().map(|rule| (Principal::Certificate(rule.name.clone()), &rule.signing));
    for (principal, policy) in users.chain(holders) {
        let known = policies.entry(principal).or_insert_with(|| policy.clone());
        if known != policy {
            *known = None;
        }
    }
    policies.into_iter().filter_map(|(principal, policy)| Some((principal, policy?))).collect()
}

/// Given to actix's `on_connect`: remembers who connected for all requests of the connection.
pub fn on_connect(io: &dyn Any, kept: &mut Extensions) {
    let peer = if let Some(unix) = io.downcast_ref::<UnixStream>() {
        unix.peer_cred().ok().map(|peer| Peer::LocalUser(peer.uid()))
    } else if let Some(tls) = io.downcast_ref::<TlsStream<TcpStream>>() {
        let chain = tls.get_ref().1.peer_certificates();
        chain.and_then(<[_]>::first).and_then(|certificate| read_certificate(certificate))
    } else {
        None
    };
    if let Some(peer) = peer {
        kept.insert(peer);
    }
}

fn read_certificate(der: &[u8]) -> Option<Peer> {
    let (_, certificate) = X509Certificate::from_der(der).ok()?;
    let names = certificate.subject_alternative_name().ok().flatten();
    let san_uris = names.map_or_else(Vec::new, |names| {
        let uris = names.value.general_names.iter().filter_map(|name| match name {
            GeneralName::URI(uri) => Some((*uri).to_owned()),
            _ => None,
        });
        uris.collect()
    });
    let common_name = certificate.subject().iter_common_name().next();
    let common_name = common_name.and_then(|name| name.as_str().ok()).map(str::to_owned);
    Some(Peer::Certificate { san_uris, common_name })
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, DnType, KeyPair, SanType};

    use super::*;

    fn rule(json: &str) -> Result<CertificateRule, serde_json::Error> {
        serde_json::from_str(json)
    }

    #[test]
    fn a_certificate_is_known_by_its_uri_or_its_common_name() {
        let mut params = CertificateParams::new(Vec::<String>::new()).unwrap();
        params.subject_alt_names = vec![SanType::URI("spiffe://corp/ci".try_into().unwrap())];
        params.distinguished_name.push(DnType::CommonName, "ci");
        let certificate = params.self_signed(&KeyPair::generate().unwrap()).unwrap();
        let peer = read_certificate(certificate.der()).unwrap();

        let by_uri = rule(r#"{"san_uri":"spiffe://corp/ci","name":"ci","scopes":["crypto:use"]}"#).unwrap();
        let by_name = rule(r#"{"common_name":"ci","name":"ci2","scopes":[]}"#).unwrap();
        let other = rule(r#"{"common_name":"c","name":"c","scopes":[]}"#).unwrap();

        let (principal, scopes) = peer.admit(&[], &[other.clone(), by_uri]).unwrap();
        assert_eq!((principal.to_string().as_str(), scopes.to_string().as_str()), ("cert:ci", "crypto:use"));
        assert_eq!(peer.admit(&[], &[by_name]).unwrap().0.to_string(), "cert:ci2");
        assert!(peer.admit(&[], &[other]).is_none());
    }

    #[test]
    fn a_rule_selects_by_one_thing_only() {
        assert!(rule(r#"{"name":"x","scopes":[]}"#).is_err());
        assert!(rule(r#"{"san_uri":"a:b","common_name":"c","name":"x","scopes":[]}"#).is_err());
        assert!(rule(r#"{"san_uri":"a:b","name":"x","scopes":["all"]}"#).is_err());
    }

    #[test]
    fn a_policy_is_a_names_own_only_if_all_its_rules_agree() {
        let with = |uri: &str, name: &str, policy: &str| {
            let policy = if policy.is_empty() { String::new() } else { format!(r#","signing":{policy}"#) };
            rule(&format!(r#"{{"san_uri":"{uri}","name":"{name}","scopes":["cookies:sign"]{policy}}}"#))
                .unwrap()
        };
        let cookies = r#"{"cookies":{"names":["a"],"max_age":1}}"#;
        let rules = [
            with("a:1", "one", cookies),
            with("a:2", "two", cookies),
            with("a:3", "two", ""),
            with("a:4", "three", cookies),
            with("a:5", "three", cookies),
        ];

        let policies = signing_policies(&[], &rules);

        let mut names: Vec<_> = policies.keys().map(ToString::to_string).collect();
        names.sort();
        assert_eq!(names, ["cert:one", "cert:three"]);
        assert!(rule(r#"{"san_uri":"a:b","name":"x","scopes":[],"signing":{"cookies":{}}}"#).is_err());
    }

    #[test]
    fn a_local_user_without_a_rule_is_nobody() {
        let root = LocalUser { uid: 0, scopes: ScopeSet::all(), signing: None };
        assert!(Peer::LocalUser(0).admit(std::slice::from_ref(&root), &[]).is_some());
        assert!(Peer::LocalUser(1000).admit(&[root], &[]).is_none());
    }
}
