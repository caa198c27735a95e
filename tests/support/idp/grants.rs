//! What the provider has given out, and what it still stands by.

use std::collections::{HashMap, HashSet, VecDeque};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use base64::Engine;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use p256::ecdsa::signature::Signer;
use p256::ecdsa::{Signature, SigningKey};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use super::wire::Request;
use super::{CLIENT, Fault, KEY, Mode};

#[derive(Clone)]
pub(super) struct Grant {
    pub(super) subject: String,
    pub(super) scope: String,
    pub(super) nonce: Option<String>,
}

/// A code that was not redeemed.
pub(super) struct Pending {
    pub(super) grant: Grant,
    /// The redirect URI and the PKCE challenge that it is bound to.
    pub(super) asked: Option<(Option<String>, Option<String>)>,
}

#[derive(Clone)]
pub(super) struct Refreshable {
    pub(super) grant: Grant,
    pub(super) family: u64,
    pub(super) used: Option<(Instant, Value)>,
}

pub(super) struct State {
    pub(super) mode: Mode,
    pub(super) canary: String,
    pub(super) issuer: String,
    pub(super) client_secret: String,
    pub(super) key: SigningKey,
    pub(super) expires_in: u64,
    pub(super) is_offline: bool,
    pub(super) serial: u64,
    pub(super) codes: HashMap<String, Pending>,
    pub(super) refresh: HashMap<String, Refreshable>,
    pub(super) access: HashMap<String, (Grant, u64)>,
    /// Families that are no more, and those of them that ended by reuse.
    pub(super) ended: HashSet<u64>,
    pub(super) reused: HashSet<u64>,
    pub(super) requests: HashMap<String, usize>,
    pub(super) uses: HashMap<String, usize>,
    pub(super) revocations: Vec<String>,
    /// Whose refresh tokens were used, in that order.
    pub(super) order: Vec<String>,
    /// Requests at `/token` that have not ended, and the most of them at once.
    pub(super) open: usize,
    pub(super) most_open: usize,
    /// Requests at `/token` by a client that authenticated in the header.
    pub(super) by_header: usize,
    /// Each takes so long.
    pub(super) pace: Duration,
    /// How often each document was fetched.
    pub(super) fetched: HashMap<String, usize>,
    /// Members of the metadata that are other ones, and other keys.
    pub(super) said: Map<String, Value>,
    pub(super) keys: Option<Value>,
    pub(super) faults: VecDeque<Fault>,
    pub(super) hold_next: bool,
}

/// An error of RFC 6749, section 5.2.
pub(super) struct Refused(pub(super) u16, pub(super) &'static str);

impl State {
    pub(super) fn new(mode: Mode, canary: &str, issuer: &str, client_secret: &str) -> Self {
        Self {
            mode,
            canary: canary.to_owned(),
            issuer: issuer.to_owned(),
            client_secret: client_secret.to_owned(),
            key: SigningKey::from_slice(&KEY).unwrap(),
            expires_in: 3600,
            is_offline: true,
            serial: 0,
            codes: HashMap::new(),
            refresh: HashMap::new(),
            access: HashMap::new(),
            ended: HashSet::new(),
            reused: HashSet::new(),
            requests: HashMap::new(),
            uses: HashMap::new(),
            revocations: Vec::new(),
            order: Vec::new(),
            open: 0,
            most_open: 0,
            by_header: 0,
            pace: Duration::ZERO,
            fetched: HashMap::new(),
            said: Map::new(),
            keys: None,
            faults: VecDeque::new(),
            hold_next: false,
        }
    }

    pub(super) fn next(&mut self, kind: &str) -> String {
        self.serial += 1;
        format!("{}-{kind}-{}", self.canary, self.serial)
    }

    pub(super) fn keep_code(&mut self, pending: Pending) -> String {
        let code = self.next("code");
        self.codes.insert(code.clone(), pending);
        code
    }

    pub(super) fn live_grant(&self, access_token: &str) -> Option<&Grant> {
        let (grant, family) = self.access.get(access_token)?;
        (!self.ended.contains(family)).then_some(grant)
    }

    pub(super) fn count(&mut self, request: &Request) {
        let form = request.form();
        let of = |name: &str| form.get(name).cloned().unwrap_or_default();
        *self.requests.entry(of("grant_type")).or_default() += 1;
        if let Some(token) = form.get("refresh_token") {
            *self.uses.entry(token.clone()).or_default() += 1;
            self.order.extend(self.refresh.get(token).map(|known| known.grant.subject.clone()));
        }
        self.by_header += usize::from(request.header("authorization").is_some());
        self.open += 1;
        self.most_open = self.most_open.max(self.open);
    }

    pub(super) fn grant(&mut self, request: &Request, keep: Option<bool>) -> Result<Value, Refused> {
        let form = request.form();
        if !self.knows(request, &form) {
            return Err(Refused(401, "invalid_client"));
        }
        let of = |name: &str| form.get(name).map_or("", String::as_str);
        match of("grant_type") {
            "authorization_code" => self.redeem(&form),
            "refresh_token" => self.refresh(of("refresh_token"), keep),
            "client_credentials" => {
                let (subject, scope) = (CLIENT.to_owned(), of("scope").to_owned());
                let family = self.serial;
                let mut made = self.make(&Grant { subject, scope, nonce: None }, family);
                made.as_object_mut().unwrap().remove("id_token");
                Ok(made)
            }
            _ => Err(Refused(400, "unsupported_grant_type")),
        }
    }

    pub(super) fn knows(&self, request: &Request, form: &HashMap<String, String>) -> bool {
        let basic =
            request.header("authorization").and_then(|header| header.strip_prefix("Basic ")).map(|text| {
                let decoded = String::from_utf8(STANDARD.decode(text).unwrap()).unwrap();
                let (id, secret) = decoded.split_once(':').unwrap();
                (id.to_owned(), secret.to_owned())
            });
        let post = || Some((form.get("client_id")?.clone(), form.get("client_secret")?.clone()));
        basic.or_else(post) == Some((CLIENT.to_owned(), self.client_secret.clone()))
    }

    pub(super) fn redeem(&mut self, form: &HashMap<String, String>) -> Result<Value, Refused> {
        let code = form.get("code").ok_or(Refused(400, "invalid_request"))?;
        let pending = self.codes.remove(code).ok_or(Refused(400, "invalid_grant"))?;
        let challenge =
            form.get("code_verifier").map(|verifier| URL_SAFE_NO_PAD.encode(Sha256::digest(verifier)));
        let brought = (form.get("redirect_uri").cloned(), challenge);
        if pending.asked.is_some_and(|asked| asked != brought) {
            return Err(Refused(400, "invalid_grant"));
        }
        let family = self.serial;
        let mut made = self.make(&pending.grant, family);
        if self.is_offline {
            made["refresh_token"] = json!(self.make_refresh(&pending.grant, family));
        }
        Ok(made)
    }

    /// `keep`: the token stays as it is, and is told again or not.
    pub(super) fn refresh(&mut self, token: &str, keep: Option<bool>) -> Result<Value, Refused> {
        const DEAD: Refused = Refused(400, "invalid_grant");
        let known = self.refresh.get(token).cloned().ok_or(DEAD)?;
        if self.ended.contains(&known.family) {
            return Err(DEAD);
        }
        if let Some((at, answer)) = known.used {
            if matches!(self.mode, Mode::Grace(time) if at.elapsed() < time) {
                return Ok(answer);
            }
            self.ended.insert(known.family);
            self.reused.insert(known.family);
            return Err(DEAD);
        }
        let mut made = self.make(&known.grant, known.family);
        match (keep, self.mode) {
            (Some(true), _) => made["refresh_token"] = json!(token),
            (Some(false), _) | (None, Mode::NonRotating) => {}
            (None, Mode::Strict | Mode::Grace(_)) => {
                made["refresh_token"] = json!(self.make_refresh(&known.grant, known.family));
                self.refresh.get_mut(token).unwrap().used = Some((Instant::now(), made.clone()));
            }
        }
        Ok(made)
    }

    pub(super) fn make(&mut self, grant: &Grant, family: u64) -> Value {
        let access = self.next("at");
        self.access.insert(access.clone(), (grant.clone(), family));
        let (expires_in, id_token) = (self.expires_in, self.id_token(grant));
        json!({ "access_token": access, "token_type": "bearer", "expires_in": expires_in,
                "scope": grant.scope, "id_token": id_token })
    }

    pub(super) fn make_refresh(&mut self, grant: &Grant, family: u64) -> String {
        let token = self.next("rt");
        let grant = grant.clone();
        self.refresh.insert(token.clone(), Refreshable { grant, family, used: None });
        token
    }

    /// The canary is in the header: claims become the user's profile, which is no secret.
    pub(super) fn id_token(&self, grant: &Grant) -> String {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
        let header = json!({ "alg": "ES256", "typ": "JWT", "kid": "fake-1", "canary": self.canary });
        let mut claims = json!({ "iss": self.issuer, "sub": grant.subject, "aud": CLIENT, "iat": now,
                                 "exp": now + 600, "name": "Ana Teste" });
        if let Some(nonce) = &grant.nonce {
            claims["nonce"] = json!(nonce);
        }
        signed(&self.key, &header, &claims)
    }

    pub(super) fn revoke(&mut self, token: String) {
        let family = self.refresh.get(&token).map(|known| known.family);
        let family = family.or_else(|| self.access.get(&token).map(|(_, family)| *family));
        self.ended.extend(family);
        self.revocations.push(token);
    }

    pub(super) fn metadata(&self) -> Value {
        let at = |path: &str| format!("{}{path}", self.issuer);
        let mut metadata = json!({
            "issuer": self.issuer,
            "authorization_endpoint": at("/auth"),
            "token_endpoint": at("/token"),
            "userinfo_endpoint": at("/userinfo"),
            "revocation_endpoint": at("/revoke"),
            "jwks_uri": at("/jwks"),
            "response_types_supported": ["code"],
            "subject_types_supported": ["public"],
            "id_token_signing_alg_values_supported": ["ES256"],
            "token_endpoint_auth_methods_supported": ["client_secret_basic", "client_secret_post"],
            "code_challenge_methods_supported": ["S256"],
        });
        metadata.as_object_mut().unwrap().extend(self.said.clone());
        metadata
    }

    pub(super) fn jwks(&self) -> Value {
        if let Some(keys) = &self.keys {
            return keys.clone();
        }
        let point = self.key.verifying_key().to_sec1_point(false);
        let [x, y] = [point.x(), point.y()].map(|number| URL_SAFE_NO_PAD.encode(number.unwrap()));
        json!({ "keys": [{ "kty": "EC", "crv": "P-256", "x": x, "y": y, "alg": "ES256", "use": "sig",
                           "kid": "fake-1" }] })
    }
}

/// A compact JWS by ES256.
pub(super) fn signed(key: &SigningKey, header: &Value, claims: &Value) -> String {
    let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
    let input = format!("{}.{}", part(header), part(claims));
    let signature: Signature = key.sign(input.as_bytes());
    format!("{input}.{}", URL_SAFE_NO_PAD.encode(signature.to_bytes()))
}
