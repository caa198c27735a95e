//! Signing with a ring's current key: tokens and cookies. The caller has recorded the intent.
//!
//! Before a key signs something that lives longer than anything it has signed so far, that is made durable:
//! it decides how long the key stays published. A key that is out of the JWKS by then signs nothing.

use std::sync::{Arc, PoisonError};
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::Serialize;
use subtle::ConstantTimeEq;
use zeroize::Zeroizing;

use super::model::{Phase, Use};
use super::plan::Slot;
use super::rings::View;
use super::store::rings::Entry;
use super::{Keys, KeysError, SigningKey};
use crate::clock::Timestamp;
use crate::db::DbError;
use crate::ids::{SigningKeyId, TenantId};
use crate::seal::{Alg, KeyRef};

/// A signed token.
pub struct SignedToken {
    /// The compact JWS (RFC 7515, section 3.1).
    pub jws: String,
    /// The key that signed it.
    pub kid: String,
}

/// A token that somebody else has built: everything but the signature.
pub struct JwsInput<'a> {
    /// `BASE64URL(header) . BASE64URL(payload)`.
    pub signing_input: &'a str,
    /// The header's `kid`.
    pub kid: &'a str,
    /// The header's `alg`.
    pub alg: &'a str,
    /// How long the token lives from now on.
    pub lifetime: Duration,
}

/// The signature of a cookie.
pub struct SignedCookie {
    /// base64url of HMAC-SHA256 over `name=value`.
    pub signature: String,
    /// The key that made it.
    pub key: SigningKeyId,
}

/// What the check of a cookie gave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CookieCheck {
    /// The newest key signed it.
    Valid,
    /// An older key signed it: sign it again.
    Stale,
    /// No key of the tenant did.
    Invalid,
}

#[derive(Serialize)]
struct JwsHeader<'a> {
    alg: &'static str,
    typ: &'a str,
    kid: &'a str,
}

/// What a signature is made with.
struct Signer {
    id: SigningKeyId,
    entry: Arc<Entry>,
}

impl Signer {
    fn device(&self) -> &KeyRef {
        &self.entry.device
    }

    /// Algorithm and `kid` of a key that signs tokens.
    fn names(&self) -> Result<(Alg, &str), DbError> {
        let impossible = || DbError::impossible("signing_keys", self.id.as_str());
        let public = self.entry.public.as_ref().ok_or_else(impossible)?;
        Ok((self.entry.alg.ok_or_else(impossible)?, &public.kid))
    }
}

impl Keys {
    /// The key that signs the tenant's tokens now.
    ///
    /// # Errors
    /// [`KeysError::NoSigner`]; [`KeysError::ClockSuspect`].
    pub async fn signer(&self, tenant: &TenantId) -> Result<SigningKey, KeysError> {
        self.check_clock()?;
        let view = self.ring(tenant, Use::Jwt).await?;
        let (slot, entry) = view.signer()?;
        let key = SigningKey::of(entry);
        key.ok_or_else(|| DbError::impossible("signing_keys", slot.id.as_str()).into())
    }

    /// Signs a token with the tenant's current key. `typ` goes into the header; `claims` is the payload, which
    /// expires after `lifetime`.
    ///
    /// # Errors
    /// If the device cannot sign, or nothing may be signed.
    pub async fn sign_jwt(
        &self,
        tenant: &TenantId,
        typ: &str,
        claims: &serde_json::Value,
        lifetime: Duration,
    ) -> Result<SignedToken, KeysError> {
        let signer = self.signing(tenant, Use::Jwt, lifetime, |view| Ok(view.signer()?.0)).await?;
        let (alg, kid) = signer.names()?;
        let input = signing_input(&JwsHeader { alg: alg.name(), typ, kid }, &claims.to_string());
        self.sign_token(&signer, input, lifetime).await
    }

    /// Signs a token that was built elsewhere, if it names the key in use. The one before it passes for as
    /// long as a daemon may take to learn of a change: who builds tokens elsewhere learns of it no sooner.
    ///
    /// # Errors
    /// [`KeysError::NotCurrent`] if it names another key or algorithm.
    pub async fn sign_jws(&self, tenant: &TenantId, input: JwsInput<'_>) -> Result<SignedToken, KeysError> {
        // As late as it may be: a clock that was set back must not keep the old key passing.
        let now = self.decided_at();
        let named = |view: &View, slot: &Slot| {
            let entry = view.entries.get(&slot.id)?;
            let is_it = entry.public.as_ref()?.kid == input.kid && entry.alg?.name() == input.alg;
            is_it.then_some(())
        };
        let signer = self.signing(tenant, Use::Jwt, input.lifetime, |view| {
            let (signer, entry) = view.signer()?;
            let (now, grace) = (view.ring.clock(now), view.ring.policy.propagation);
            let has_just_stopped = |slot: &&Slot| {
                slot.phase == Phase::Previous && slot.signs_until.is_some_and(|until| now < until.plus(grace))
            };
            let just_stopped = view.ring.slots.iter().filter(has_just_stopped);
            let found = std::iter::once(signer).chain(just_stopped).find(|slot| named(view, slot).is_some());
            found.ok_or_else(|| {
                let kid = entry.public.as_ref().map(|public| public.kid.clone()).unwrap_or_default();
                KeysError::NotCurrent { kid, alg: entry.alg.map_or("", Alg::name) }
            })
        });
        self.sign_token(&signer.await?, input.signing_input.to_owned(), input.lifetime).await
    }

    async fn sign_token(
        &self,
        signer: &Signer,
        mut jws: String,
        lifetime: Duration,
    ) -> Result<SignedToken, KeysError> {
        let (alg, kid) = signer.names()?;
        let signature = self.parts.sealer.sign(signer.device(), alg, jws.as_bytes()).await?;
        self.count_token(&signer.id, lifetime);
        jws.push('.');
        URL_SAFE_NO_PAD.encode_string(signature.as_bytes(), &mut jws);
        Ok(SignedToken { jws, kid: kid.to_owned() })
    }

    /// Signs a cookie that lives for `max_age`: HMAC-SHA256 over `name=value`. A cookie's name has no `=`, so
    /// no cookie is another one.
    ///
    /// # Errors
    /// If the device cannot.
    pub async fn sign_cookie(
        &self,
        tenant: &TenantId,
        name: &str,
        value: &str,
        max_age: Duration,
    ) -> Result<SignedCookie, KeysError> {
        let signer = self.signing(tenant, Use::Cookie, max_age, |view| Ok(view.signer()?.0)).await?;
        let mac = self.parts.sealer.mac(signer.device(), &cookie(name, value)).await?;
        self.count_token(&signer.id, max_age);
        Ok(SignedCookie { signature: URL_SAFE_NO_PAD.encode(mac), key: signer.id })
    }

    /// Checks a cookie's signature with all keys that may have signed it, in constant time each.
    ///
    /// # Errors
    /// If the device cannot.
    pub async fn verify_cookie(
        &self,
        tenant: &TenantId,
        name: &str,
        value: &str,
        signature: &str,
    ) -> Result<CookieCheck, KeysError> {
        let view = self.ring(tenant, Use::Cookie).await?;
        let signature = URL_SAFE_NO_PAD.decode(signature).ok();
        let Some(signature) = signature.and_then(|bytes| <[u8; 32]>::try_from(bytes).ok()) else {
            return Ok(CookieCheck::Invalid);
        };
        let message = cookie(name, value);
        let mut slots: Vec<_> = view.ring.slots.iter().filter(|slot| slot.phase.is_published()).collect();
        slots.sort_by_key(|slot| (slot.phase != Phase::Current, std::cmp::Reverse(slot.signs_from)));
        for slot in slots {
            let mac = self.parts.sealer.mac(&view.entry(slot)?.device, &message).await?;
            if bool::from(mac.ct_eq(&signature)) {
                let is_newest = matches!(slot.phase, Phase::Current | Phase::Next);
                return Ok(if is_newest { CookieCheck::Valid } else { CookieCheck::Stale });
            }
        }
        Ok(CookieCheck::Invalid)
    }

    /// The key that `choose` finds, once it may sign what lives for `lifetime`.
    async fn signing(
        &self,
        tenant: &TenantId,
        used: Use,
        lifetime: Duration,
        choose: impl Fn(&View) -> Result<&Slot, KeysError>,
    ) -> Result<Signer, KeysError> {
        self.check_clock()?;
        let mut view = self.ring(tenant, used).await?;
        for _ in 0..2 {
            let slot = choose(&view)?;
            if self.may_live(tenant, used, slot, lifetime).await? {
                return Ok(Signer { id: slot.id.clone(), entry: Arc::clone(view.entry(slot)?) });
            }
            // It was taken out of the JWKS elsewhere: on with what is there now.
            view = self.look(tenant, used).await?;
        }
        Err(KeysError::NoSigner)
    }

    fn check_clock(&self) -> Result<(), KeysError> {
        self.reading().suspect.map_or(Ok(()), |reason| Err(KeysError::ClockSuspect(reason)))
    }

    /// Counts what was signed by when it expires, with a grain of a sixtieth of its life.
    fn count_token(&self, id: &SigningKeyId, lifetime: Duration) {
        let grain = i64::try_from(lifetime.as_secs() / 60).unwrap_or(1).clamp(1, 3600);
        let expires = self.parts.clock.now().plus(lifetime).as_secs();
        let grain_end = (expires.div_euclid(grain) + 1).saturating_mul(grain).saturating_mul(1_000_000);
        let mut counts = self.rings.counts.lock().unwrap_or_else(PoisonError::into_inner);
        *counts.entry((id.clone(), Timestamp::from_micros(grain_end))).or_default() += 1;
    }
}

fn cookie(name: &str, value: &str) -> Zeroizing<Vec<u8>> {
    let mut message = Zeroizing::new(Vec::with_capacity(name.len() + 1 + value.len()));
    for part in [name.as_bytes(), b"=", value.as_bytes()] {
        message.extend_from_slice(part);
    }
    message
}

/// `BASE64URL(header) . BASE64URL(payload)`, with room for the signature.
fn signing_input(header: &JwsHeader<'_>, claims: &str) -> String {
    // Three texts always serialise.
    let header = serde_json::to_string(header).unwrap_or_default();
    let mut jws = String::with_capacity((header.len() + claims.len() + 512) * 4 / 3 + 8);
    URL_SAFE_NO_PAD.encode_string(header, &mut jws);
    jws.push('.');
    URL_SAFE_NO_PAD.encode_string(claims, &mut jws);
    jws
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{JwsHeader, cookie, signing_input};

    #[test]
    fn the_signing_input_is_that_of_a_compact_jws() {
        let header = JwsHeader { alg: "ES256", typ: "at+jwt", kid: "k-1" };
        let input = signing_input(&header, &json!({ "iss": "i" }).to_string());

        // printf '{"alg":"ES256","typ":"at+jwt","kid":"k-1"}' | basenc --base64url
        assert_eq!(input, "eyJhbGciOiJFUzI1NiIsInR5cCI6ImF0K2p3dCIsImtpZCI6ImstMSJ9.eyJpc3MiOiJpIn0");
    }

    #[test]
    fn a_cookie_is_signed_with_its_name() {
        assert_eq!(*cookie("sid", "abc"), *b"sid=abc");
    }
}
