//! Signing for other systems: tokens and cookies, as far as the caller's policy goes.
//!
//! Nothing signs bytes as they come: `jwt.rs`, `jws.rs` and `cookies.rs` decide what is a token or a cookie
//! that the caller may have, and each is recorded before it is signed, one record for each, never with its
//! content. The policy of an application comes with the cached application, that of a local user or a
//! certificate from the configuration; whoever has none has nothing signed, whatever its scopes.
//!
//! A batch costs one wait for the audit log and is then at the device as a whole.

mod claims;
mod cookies;
pub(super) mod json;
mod jws;
mod jwt;
mod policy;

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use uuid::Uuid;

use super::store::App;
use super::{Issuer, IssuerError};
use crate::audit::{Action, AuditError, Event, Note, Outcome};
use crate::clock::Timestamp;
use crate::identity::{Caller, Principal, Scope};
use crate::keys::{CookieCheck, JwsInput, SignedCookie, SignedToken, SigningKey};

use claims::Own;

pub use claims::NotSigned;
pub use cookies::{CookieProof, CookieRequest};
pub use jwt::JwtRequest;
pub use policy::*;

/// One result for each item, in their order.
type Results<T> = Vec<Result<T, IssuerError>>;

/// A token that Lacre has made.
pub struct SignedJwt {
    /// The token.
    pub signed: SignedToken,
    /// Its id.
    pub jti: String,
    /// When it ends.
    pub expires_at: Timestamp,
}

/// Where the policy of a caller is.
enum Holder<'a> {
    App(Arc<App>),
    Peer(&'a SigningPolicy),
    Nobody,
}

impl Holder<'_> {
    fn policy(&self) -> Option<&SigningPolicy> {
        match self {
            Self::App(app) => app.info.signing.as_ref(),
            Self::Peer(policy) => Some(policy),
            Self::Nobody => None,
        }
    }
}

impl Issuer {
    /// Makes and signs tokens in Lacre's own name.
    ///
    /// # Errors
    /// [`IssuerError::Forbidden`] without `tokens:sign`, or what the log says; everything else, such as
    /// [`IssuerError::Refused`], is a result of its item.
    pub async fn sign_jwts(
        &self,
        caller: &Caller,
        items: &[JwtRequest<'_>],
    ) -> Result<Results<SignedJwt>, IssuerError> {
        let holder = self.holder(caller, Scope::TokensSign, Action::JwtSign).await?;
        let rules = holder.policy().and_then(SigningPolicy::jwt).ok_or(NotSigned::NoPolicy("jwt"));
        let now = self.inner.clock.now();
        let decide =
            |item: &JwtRequest<'_>| jwt::order(rules?, *item, self.own(), (Uuid::now_v7().to_string(), now));
        let describe = |order: &jwt::JwtOrder| {
            let facts = Facts { typ: &order.typ, subject: order.subject.as_deref(), expires: order.expires };
            facts.event(Action::JwtSign, &order.jti)
        };
        let orders = items.iter().map(decide).collect();
        self.carry_out(caller, Action::JwtSign, orders, describe, async |order, note| {
            let keys = &self.inner.keys;
            let signed = keys.sign_jwt(&caller.tenant, &order.typ, &order.claims, order.lifetime).await?;
            note.add("kid", signed.kid.as_str());
            Ok(SignedJwt { signed, jti: order.jti, expires_at: moment(order.expires) })
        })
        .await
    }

    /// Signs tokens that the application has built but for the signature.
    ///
    /// # Errors
    /// As [`Issuer::sign_jwts`].
    pub async fn sign_jws(
        &self,
        caller: &Caller,
        items: &[&str],
    ) -> Result<Results<SignedToken>, IssuerError> {
        let holder = self.holder(caller, Scope::TokensSign, Action::JwsSign).await?;
        let rules = holder.policy().and_then(SigningPolicy::jws).ok_or(NotSigned::NoPolicy("jws"));
        let now = self.inner.clock.now();
        let orders = items.iter().map(|input| jws::order(rules?, input, self.own(), now)).collect();
        let describe = |order: &jws::JwsOrder<'_>| {
            let facts = Facts { typ: &order.typ, subject: order.subject.as_deref(), expires: order.expires };
            // Somebody else's id: only what looks like one.
            let jti = order.jti.as_deref().filter(|jti| jti.len() <= 128).unwrap_or_default();
            facts.event(Action::JwsSign, jti)
        };
        self.carry_out(caller, Action::JwsSign, orders, describe, async |order, note| {
            let jws::JwsOrder { signing_input, kid, alg, lifetime, .. } = order;
            let input = JwsInput { signing_input, kid: &kid, alg: &alg, lifetime };
            let signed = self.inner.keys.sign_jws(&caller.tenant, input).await?;
            note.add("kid", signed.kid.as_str());
            Ok(signed)
        })
        .await
    }

    /// Signs cookies.
    ///
    /// # Errors
    /// As [`Issuer::sign_jwts`], with `cookies:sign`.
    pub async fn sign_cookies(
        &self,
        caller: &Caller,
        items: Vec<CookieRequest>,
    ) -> Result<Results<SignedCookie>, IssuerError> {
        let holder = self.holder(caller, Scope::CookiesSign, Action::CookieSign).await?;
        let rules = holder.policy().and_then(SigningPolicy::cookies).ok_or(NotSigned::NoPolicy("cookies"));
        let decide = |item: CookieRequest| cookies::age(rules?, &item).map(|age| (item, age));
        let orders = items.into_iter().map(decide).collect();
        let describe = |(item, age): &(CookieRequest, Duration)| {
            let name = claims::recorded(&item.name);
            let event = Event::new(Action::CookieSign, kind(Action::CookieSign), name);
            event.detail("max_age", age.as_secs().to_string())
        };
        self.carry_out(caller, Action::CookieSign, orders, describe, async |(item, age), note| {
            let signed = self.inner.keys.sign_cookie(&caller.tenant, &item.name, &item.value, age).await?;
            note.add("key", signed.key.as_str());
            Ok(signed)
        })
        .await
    }

    /// Checks cookies that came back. Makes no signature, so it is not in the audit log.
    ///
    /// # Errors
    /// As [`Issuer::sign_cookies`].
    pub async fn verify_cookies(
        &self,
        caller: &Caller,
        items: &[CookieProof],
    ) -> Result<Results<CookieCheck>, IssuerError> {
        let holder = self.holder(caller, Scope::CookiesSign, Action::CookieSign).await?;
        let rules = holder.policy().and_then(SigningPolicy::cookies).ok_or(NotSigned::NoPolicy("cookies"));
        let checks = items.iter().map(|item| async move {
            if let Err(refusal) = rules.and_then(|rules| cookies::check(rules, &item.name, &item.value)) {
                self.record_refused(caller, Action::CookieSign, refusal);
                return Err(refusal.into());
            }
            let CookieProof { name, value, signature } = item;
            Ok(self.inner.keys.verify_cookie(&caller.tenant, name, value, signature).await?)
        });
        Ok(join_all(checks).await)
    }

    /// The key that signs now, for a provider that builds its own tokens.
    ///
    /// # Errors
    /// [`IssuerError::Forbidden`] without `tokens:sign`; [`IssuerError::Keys`].
    pub async fn current_key(&self, caller: &Caller) -> Result<SigningKey, IssuerError> {
        caller.require(Scope::TokensSign)?;
        Ok(self.inner.keys.signer(&caller.tenant).await?)
    }

    fn own(&self) -> Own<'_> {
        Own { issuer: &self.inner.config.issuer, api: &self.inner.api }
    }

    /// Whether the caller has the scope, and where its policy is.
    async fn holder(&self, caller: &Caller, scope: Scope, action: Action) -> Result<Holder<'_>, IssuerError> {
        if let Err(missing) = caller.require(scope) {
            let event = Event::new(action, kind(action), "").detail("missing", missing.0.name());
            self.inner.audit.record(caller, event, Outcome::Denied("forbidden")).await?;
            return Err(missing.into());
        }
        Ok(match &caller.principal {
            Principal::Application(client) => match self.inner.clients.find(&caller.tenant, client).await? {
                Some(app) => Holder::App(app),
                None => Holder::Nobody,
            },
            peer => self.inner.config.peers.get(peer).map_or(Holder::Nobody, Holder::Peer),
        })
    }

    /// Records all that may be signed, then asks for all signatures at once. What is refused is recorded too,
    /// and nothing waits for that: nothing was done.
    async fn carry_out<O, T>(
        &self,
        caller: &Caller,
        action: Action,
        orders: Vec<Result<O, NotSigned>>,
        describe: impl Fn(&O) -> Event,
        sign: impl AsyncFn(O, Note) -> Result<T, IssuerError>,
    ) -> Result<Results<T>, IssuerError> {
        let events = orders.iter().filter_map(|order| order.as_ref().ok()).map(describe);
        let events: Vec<_> = events.collect();
        let mut intents = self.inner.audit.begin_all(caller, events).await?.into_iter();
        let sign = &sign;
        let work: Vec<_> = orders
            .into_iter()
            .map(|order| {
                let intent = if order.is_ok() { intents.next() } else { None };
                async move {
                    match (order, intent) {
                        (Ok(order), Some(intent)) => intent.run(|note| sign(order, note)).await,
                        // There is an intent for each order.
                        (Ok(_), None) => Err(IssuerError::Audit(AuditError::Unavailable)),
                        (Err(refusal), _) => {
                            self.record_refused(caller, action, refusal);
                            Err(refusal.into())
                        }
                    }
                }
            })
            .collect();
        Ok(join_all(work).await)
    }

    fn record_refused(&self, caller: &Caller, action: Action, refusal: NotSigned) {
        let event = Event::new(action, kind(action), "").detail("refused", refusal.to_string());
        self.inner.audit.record_soon(caller, event, Outcome::Denied(refusal.code()));
    }
}

/// What a record says of a token.
struct Facts<'a> {
    typ: &'a str,
    subject: Option<&'a str>,
    expires: i64,
}

impl Facts<'_> {
    fn event(&self, action: Action, jti: &str) -> Event {
        let event = Event::new(action, kind(action), jti).detail("type", self.typ);
        let event = event.detail("exp", self.expires.to_string());
        match self.subject {
            Some(subject) => event.detail("sub", claims::recorded(subject)),
            None => event,
        }
    }
}

/// What a record is about.
const fn kind(action: Action) -> &'static str {
    if matches!(action, Action::CookieSign) { "cookie" } else { "token" }
}

fn moment(seconds: i64) -> Timestamp {
    Timestamp::from_micros(seconds.saturating_mul(1_000_000))
}
