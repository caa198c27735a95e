//! What administrators do with signing and cookie keys: list, rotate, cancel, revert, delete, revoke, import,
//! set the policy. Each change is recorded with its intent; a dry run changes nothing and is recorded as such.

use std::time::Duration;

use secrecy::{ExposeSecret, SecretString};
use zeroize::Zeroizing;

use super::make::{Material, Order};
use super::model::{Change, Choice, ImportAs, KeyView, Policy, PolicyPatch, Rotation, Use};
use super::plan::{Refusal, Ring, Slot};
use super::store::rings as store;
use super::{Keys, KeysError, pkcs8};
use crate::audit::{Action, Event, Outcome};
use crate::clock::Timestamp;
use crate::db::DbError;
use crate::identity::{Caller, Scope};
use crate::ids::SigningKeyId;
use crate::seal::{Alg, KeyRef, KeySpec};

/// Logto's longest session, and more than any token lives.
const LONGEST: Duration = Duration::from_secs(365 * 24 * 3600);

impl Keys {
    /// The ring's keys in the order Next, Current, Previous (newest first).
    ///
    /// # Errors
    /// [`KeysError::Forbidden`] without `signing-keys:admin`.
    pub async fn list(&self, caller: &Caller, used: Use) -> Result<Vec<KeyView>, KeysError> {
        self.admit(caller, Scope::SigningKeysAdmin, Action::KeyList, used.name())?;
        let view = self.look(&caller.tenant, used).await?;
        let event = Event::new(Action::KeyList, "ring", used.name());
        self.parts.audit.record_soon(caller, event, Outcome::Success);
        Ok(view.told(self.parts.clock.now()))
    }

    /// Makes a new key on the device and publishes it. It is called Current at once, or after its grace; it
    /// signs when every verifier can know it, which the answer tells.
    ///
    /// # Errors
    /// [`KeysError::Refused`], [`KeysError::Invalid`], [`KeysError::Quarantined`], [`KeysError::Forbidden`].
    pub async fn rotate(&self, caller: &Caller, used: Use, order: Rotation) -> Result<Change, KeysError> {
        self.admit(caller, Scope::SigningKeysAdmin, Action::KeyRotate, used.name())?;
        if used == Use::Cookie && order.grace.is_some() {
            return Err(invalid("grace", "cookie keys have none"));
        }
        let grace = order.grace.unwrap_or_default();
        if grace > LONGEST {
            return Err(invalid("grace", "must be 0 to 31536000 seconds"));
        }
        let view = self.look(&caller.tenant, used).await?;
        let choice = order.choice.filter(|_| used == Use::Jwt);
        let new = Order::generated(used, choice, grace, &view.ring);
        let event = Event::new(Action::KeyRotate, "ring", used.name())
            .detail("alg", new.choice.map_or("HS256", Choice::name))
            .detail("grace", grace.as_secs().to_string());
        self.add_for(caller, used, new, event, order.dry_run).await
    }

    /// Brings a private key (PKCS#8 PEM) into the device; its `kid` stays.
    ///
    /// # Errors
    /// [`KeysError::Invalid`] for what is not such a key.
    pub async fn import(
        &self,
        caller: &Caller,
        pem: SecretString,
        into: ImportAs,
        dry_run: bool,
    ) -> Result<Change, KeysError> {
        self.admit(caller, Scope::SigningKeysAdmin, Action::KeyImport, Use::Jwt.name())?;
        let Readable { der, choice, spec, alg } = Readable::of(&pem)?;
        if let Some(change) = self.has_already(caller, &der, dry_run).await? {
            return Ok(change);
        }
        let (ImportAs::Current { lifetime } | ImportAs::Previous { lifetime }) = into;
        if lifetime.is_zero() || lifetime > LONGEST {
            return Err(invalid("lifetime", "must be 1 to 31536000 seconds"));
        }
        let new = Order {
            choice: Some(choice),
            spec,
            alg: Some(alg),
            grace: Duration::ZERO,
            material: Material::Imported(der, into),
        };
        let event = Event::new(Action::KeyImport, "ring", Use::Jwt.name())
            .detail("alg", choice.name())
            .detail("as", if matches!(into, ImportAs::Previous { .. }) { "previous" } else { "current" })
            .detail("lifetime", lifetime.as_secs().to_string());
        self.add_for(caller, Use::Jwt, new, event, dry_run).await
    }

    /// Whether this private key (PKCS#8 PEM) is in the ring that signs tokens. Changes and records nothing.
    ///
    /// # Errors
    /// [`KeysError::Invalid`] for what could not be imported.
    pub async fn has(&self, caller: &Caller, pem: &SecretString) -> Result<bool, KeysError> {
        caller.require(Scope::SigningKeysAdmin)?;
        let Readable { der, .. } = Readable::of(pem)?;
        Ok(self.has_already(caller, &der, true).await?.is_some())
    }

    /// The ring as it is, if the key is in it: an import may be repeated.
    async fn has_already(
        &self,
        caller: &Caller,
        der: &[u8],
        dry_run: bool,
    ) -> Result<Option<Change>, KeysError> {
        let Some(kid) = pkcs8::kid(der) else { return Ok(None) };
        let view = self.look(&caller.tenant, Use::Jwt).await?;
        let is_it = |slot: &&Slot| {
            let public = view.entries.get(&slot.id).and_then(|entry| entry.public.as_ref());
            slot.phase.is_published() && public.is_some_and(|public| public.kid == kid)
        };
        let found = view.ring.slots.iter().find(is_it);
        Ok(found.map(|_| view.change(self.parts.clock.now(), None, dry_run)))
    }

    async fn add_for(
        &self,
        caller: &Caller,
        used: Use,
        new: Order,
        event: Event,
        dry_run: bool,
    ) -> Result<Change, KeysError> {
        let now = self.parts.clock.now();
        if dry_run {
            let view = self.look(&caller.tenant, used).await?;
            let (mut ring, id) = (view.ring.clone(), SigningKeyId::generate());
            new.place(&mut ring, &id, now).map_err(KeysError::Refused)?;
            let device = KeyRef::plan(new.spec).map_err(|_| DbError::Unavailable(None))?;
            let slot = Slot::planned(id, Duration::ZERO, now);
            let would_be = view.would_be(ring, Some((&slot, new.entry(device))));
            self.parts.audit.record_soon(caller, event.detail("dry_run", "true"), Outcome::Success);
            return Ok(would_be.change(now, None, true));
        }
        let added = self.parts.audit.around(caller, event, async |note| {
            let (tenant, grace) = (&caller.tenant, new.grace);
            // Before a key is made that could not be used.
            self.look(tenant, used).await?.ring.clone().plan(SigningKeyId::generate(), grace, now).or_else(
                |refusal| {
                    if refusal == Refusal::Busy { Ok(()) } else { Err(KeysError::Refused(refusal)) }
                },
            )?;
            if let Some(id) = self.add(tenant, used, new, |_| true).await? {
                note.add("key", id.as_str());
            }
            Ok::<_, KeysError>(())
        });
        added.await?;
        Ok(self.look(&caller.tenant, used).await?.change(self.parts.clock.now(), None, false))
    }

    /// Cancels the pending Next key.
    ///
    /// # Errors
    /// [`KeysError::Refused`] if there is none.
    pub async fn cancel(&self, caller: &Caller, used: Use, dry_run: bool) -> Result<Change, KeysError> {
        let event = Event::new(Action::KeyCancel, "ring", used.name());
        self.admit(caller, Scope::SigningKeysAdmin, Action::KeyCancel, used.name())?;
        self.alter(caller, used, event, dry_run, None, |ring, now| ring.cancel(now).map(|_| false)).await
    }

    /// Takes the previous key back into use.
    ///
    /// # Errors
    /// [`KeysError::Refused`] if there is none, or while a Next key is pending.
    pub async fn revert(&self, caller: &Caller, used: Use, dry_run: bool) -> Result<Change, KeysError> {
        let event = Event::new(Action::KeyRevert, "ring", used.name());
        self.admit(caller, Scope::SigningKeysAdmin, Action::KeyRevert, used.name())?;
        if self.parts.db.read::<_, DbError, _>(store::is_quarantined).await? {
            return Err(KeysError::Quarantined);
        }
        self.alter(caller, used, event, dry_run, None, |ring, now| ring.revert(now).map(|_| false)).await
    }

    /// Deletes a key; what it signed is not valid any more. One that signs until another can take over goes then.
    ///
    /// # Errors
    /// [`KeysError::Refused`] in the contract's order.
    pub async fn delete(
        &self,
        caller: &Caller,
        used: Use,
        id: &SigningKeyId,
        dry_run: bool,
    ) -> Result<Change, KeysError> {
        self.admit(caller, Scope::SigningKeysAdmin, Action::KeyDelete, id.as_str())?;
        let key = id.clone();
        let event = Event::new(Action::KeyDelete, "key", id.as_str()).detail("purpose", used.name());
        let decide = move |ring: &mut Ring, now| ring.delete(&key, now).map(|()| false);
        self.alter(caller, used, event, dry_run, Some(id), decide).await
    }

    /// Revokes a key at once, whatever it does. Says how many live tokens die.
    ///
    /// # Errors
    /// [`KeysError::Forbidden`] without `signing-keys:revoke`; [`KeysError::Refused`] for an unknown key.
    pub async fn revoke(
        &self,
        caller: &Caller,
        used: Use,
        id: &SigningKeyId,
        dry_run: bool,
    ) -> Result<Change, KeysError> {
        self.admit(caller, Scope::SigningKeysRevoke, Action::KeyRevoke, id.as_str())?;
        let key = id.clone();
        let event = Event::new(Action::KeyRevoke, "key", id.as_str()).detail("purpose", used.name());
        let decide = move |ring: &mut Ring, now| ring.revoke(&key, now);
        let change = self.alter(caller, used, event, dry_run, Some(id), decide).await?;
        if !dry_run {
            tracing::warn!(key = %id, used = used.name(), tokens = change.dead_tokens, "a key was revoked");
        }
        Ok(change)
    }

    /// A recorded change. Where `decide` says that a new key is needed, it is made; if that fails, upkeep makes it.
    async fn alter(
        &self,
        caller: &Caller,
        used: Use,
        event: Event,
        dry_run: bool,
        kills: Option<&SigningKeyId>,
        decide: impl Fn(&mut Ring, Timestamp) -> Result<bool, Refusal> + Send + Sync + 'static,
    ) -> Result<Change, KeysError> {
        let (tenant, now) = (&caller.tenant, self.parts.clock.now());
        if dry_run {
            let view = self.look(tenant, used).await?;
            let mut ring = view.ring.clone();
            decide(&mut ring, self.decided_at()).map_err(KeysError::Refused)?;
            self.parts.audit.record_soon(caller, event.detail("dry_run", "true"), Outcome::Success);
            return Ok(view.would_be(ring, None).change(now, self.killed(kills).await, true));
        }
        let altered = self.parts.audit.around(caller, event, async |note| {
            let needs_another = self.change(tenant, used, decide).await?;
            // The count is told where it can be; nothing waits for it.
            let dead = self.killed(kills).await;
            if let Some(dead) = dead {
                note.add("tokens", dead.to_string());
            }
            Ok::<_, KeysError>((needs_another, dead))
        });
        let (needs_another, dead) = altered.await?;
        if needs_another && let Err(error) = self.replace(tenant, used).await {
            tracing::error!(%error, used = used.name(), "no key signs: a new one could not be made yet");
        }
        Ok(self.look(tenant, used).await?.change(self.parts.clock.now(), dead, false))
    }

    /// How many live tokens a key has out that is taken away.
    async fn killed(&self, key: Option<&SigningKeyId>) -> Option<u64> {
        self.live_tokens(key?).await.ok()
    }

    async fn live_tokens(&self, id: &SigningKeyId) -> Result<u64, DbError> {
        self.flush_counts().await?;
        let (id, now) = (id.clone(), self.parts.clock.now());
        self.parts.db.read(move |conn| store::live_tokens(conn, &id, now)).await
    }

    /// The ring's rules.
    ///
    /// # Errors
    /// [`KeysError::Forbidden`] without `signing-keys:admin`.
    pub async fn policy(&self, caller: &Caller, used: Use) -> Result<Policy, KeysError> {
        self.admit(caller, Scope::SigningKeysAdmin, Action::KeyList, used.name())?;
        let view = self.look(&caller.tenant, used).await?;
        self.parts.audit.record_soon(
            caller,
            Event::new(Action::KeyList, "ring", used.name()).detail("what", "policy"),
            Outcome::Success,
        );
        Ok(view.ring.policy.clone())
    }

    /// Changes the ring's rules. Keys that are there keep their times.
    ///
    /// # Errors
    /// [`KeysError::Invalid`] names the member that is out of range.
    pub async fn set_policy(
        &self,
        caller: &Caller,
        used: Use,
        patch: PolicyPatch,
    ) -> Result<Policy, KeysError> {
        self.admit(caller, Scope::SigningKeysAdmin, Action::KeyPolicy, used.name())?;
        let now = self.decided_at();
        let view = self.look(&caller.tenant, used).await?;
        let new = view.ring.policy.patched(&patch, now).map_err(|(field, reason)| invalid(field, reason))?;
        let event = Event::new(Action::KeyPolicy, "ring", used.name())
            .detail("from", told(&view.ring.policy))
            .detail("to", told(&new));
        let set = self.parts.audit.around(caller, event, async |_| {
            let decide = move |ring: &mut Ring, now| match ring.policy.patched(&patch, now) {
                Ok(policy) => {
                    ring.policy = policy.clone();
                    Ok(policy)
                }
                // It was in range a moment ago, and ranges do not move.
                Err(_) => Err(Refusal::Busy),
            };
            self.change(&caller.tenant, used, decide).await
        });
        set.await
    }

    pub(super) fn admit(
        &self,
        caller: &Caller,
        scope: Scope,
        action: Action,
        object: &str,
    ) -> Result<(), KeysError> {
        let Err(missing) = caller.require(scope) else { return Ok(()) };
        let event = Event::new(action, "key", object).detail("missing", missing.0.name());
        self.parts.audit.record_soon(caller, event, Outcome::Denied("forbidden"));
        Err(missing.into())
    }
}

/// The key in a PEM and what kind it is.
struct Readable {
    der: Zeroizing<Vec<u8>>,
    choice: Choice,
    spec: KeySpec,
    alg: Alg,
}

impl Readable {
    fn of(pem: &SecretString) -> Result<Self, KeysError> {
        let der = pkcs8::from_pem(pem.expose_secret())
            .ok_or_else(|| invalid("pem", "must be one PKCS#8 private key"))?;
        let (choice, spec, alg) = pkcs8::kind(&der).ok_or_else(|| {
            invalid("pem", "must be EC P-256 or P-384, RSA with 2048, 3072 or 4096 bits, or Ed25519")
        })?;
        Ok(Self { der, choice, spec, alg })
    }
}

fn invalid(field: &'static str, reason: &str) -> KeysError {
    KeysError::Invalid { field, reason: reason.to_owned() }
}

/// A policy in one line of a record.
fn told(policy: &Policy) -> String {
    serde_json::to_string(policy).unwrap_or_default()
}
