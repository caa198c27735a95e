//! A new key of a ring: its row, its object, its place in the line.
//!
//! Row first, then the object under the id that the row says, then everything that the world learns, in one
//! transaction. Killed anywhere, [`Keys::settle`] goes on from the row. An import cannot be gone on with,
//! because its key is not kept anywhere: its row and what may be on the device are given up.

use std::sync::Arc;
use std::time::Duration;

use zeroize::Zeroizing;

use super::model::{Choice, Curve, End, ImportAs, Origin, Phase, Use};
use super::plan::{Refusal, Ring, Slot};
use super::store::Public;
use super::store::rings::{self as store, Entry};
use super::{Keys, KeysError, jwk};
use crate::audit::{Action, Event};
use crate::clock::Timestamp;
use crate::db::{DbError, Turn, TurnName};
use crate::identity::Caller;
use crate::ids::{SigningKeyId, TenantId};
use crate::seal::{Alg, KeyRef, KeySpec, PublicKey, SealError, shares_a_prime};

/// A key that is to be made.
pub(super) struct Order {
    pub(super) choice: Option<Choice>,
    pub(super) spec: KeySpec,
    pub(super) alg: Option<Alg>,
    pub(super) grace: Duration,
    pub(super) material: Material,
}

/// Where its private part comes from.
pub(super) enum Material {
    /// The device makes it.
    Generated,
    /// PKCS#8, and what becomes of it.
    Imported(Zeroizing<Vec<u8>>, ImportAs),
}

impl Order {
    /// What a rotation makes.
    pub(super) fn generated(used: Use, choice: Option<Choice>, grace: Duration, ring: &Ring) -> Self {
        let (choice, spec, alg) = match used {
            Use::Jwt => {
                let choice = choice.unwrap_or(ring.policy.algorithm);
                let (spec, alg) = choice.resolve(&ring.policy);
                (Some(choice), spec, Some(alg))
            }
            Use::Cookie => (None, KeySpec::HmacSha256, None),
        };
        Self { choice, spec, alg, grace, material: Material::Generated }
    }

    pub(super) const fn origin(&self) -> Origin {
        match self.material {
            Material::Generated => Origin::Generated,
            Material::Imported(..) => Origin::Imported,
        }
    }

    /// What a dry run shows of it.
    pub(super) fn entry(&self, device: KeyRef) -> Entry {
        Entry { choice: self.choice, origin: self.origin(), device, alg: self.alg, public: None }
    }

    /// What it does to a ring.
    pub(super) fn place(&self, ring: &mut Ring, id: &SigningKeyId, now: Timestamp) -> Result<(), Refusal> {
        ring.plan(id.clone(), self.grace, now)?;
        publish(ring, id, self.material.becomes(), now)
    }
}

impl Material {
    const fn becomes(&self) -> Option<ImportAs> {
        match self {
            Self::Generated => None,
            Self::Imported(_, becomes) => Some(*becomes),
        }
    }
}

fn publish(
    ring: &mut Ring,
    id: &SigningKeyId,
    becomes: Option<ImportAs>,
    now: Timestamp,
) -> Result<(), Refusal> {
    match becomes {
        None => ring.publish(id, Duration::ZERO, now),
        Some(ImportAs::Current { lifetime }) => ring.publish(id, lifetime, now),
        Some(ImportAs::Previous { lifetime }) => ring.publish_as_previous(id, lifetime, now),
    }
}

impl Keys {
    /// Makes a key and publishes it, if `wanted` still holds when it is this daemon's turn.
    pub(super) async fn add(
        &self,
        tenant: &TenantId,
        used: Use,
        order: Order,
        wanted: impl Fn(&Ring) -> bool,
    ) -> Result<Option<SigningKeyId>, KeysError> {
        let _one_at_a_time = self.rotating.lock().await;
        let turn = Arc::new(self.parts.db.turn(TurnName::DeviceKeys).await?);
        self.settle_in(tenant, used, &turn).await?;
        if !wanted(&self.look(tenant, used).await?.ring) {
            return Ok(None);
        }
        let (id, entry) = self.plan(tenant, used, &order).await?;
        match self.make(tenant, used, (&id, &entry), &order.material, &turn).await {
            Ok(()) => Ok(Some(id)),
            Err(error) => {
                // The caller is told that it failed. What nobody knows of stays planned, and upkeep goes on with it.
                if !matches!(error, KeysError::Seal(SealError::Unknown { .. }) | KeysError::Db(_)) {
                    self.give_up(tenant, used, &id).await;
                }
                Err(error)
            }
        }
    }

    /// Goes on with a key that was planned and not made, unless somebody else is at it.
    pub(super) async fn settle(&self, tenant: &TenantId, used: Use) -> Result<(), KeysError> {
        let Ok(_one_at_a_time) = self.rotating.try_lock() else { return Ok(()) };
        let turn = Arc::new(self.parts.db.turn(TurnName::DeviceKeys).await?);
        self.settle_in(tenant, used, &turn).await
    }

    async fn settle_in(&self, tenant: &TenantId, used: Use, turn: &Arc<Turn>) -> Result<(), KeysError> {
        let view = self.look(tenant, used).await?;
        let Some(slot) = view.ring.slots.iter().find(|slot| slot.phase == Phase::Planned) else {
            return Ok(());
        };
        let entry = view.entry(slot)?;
        if entry.origin == Origin::Imported {
            self.give_up(tenant, used, &slot.id).await;
            return Ok(());
        }
        match self.make(tenant, used, (&slot.id, entry), &Material::Generated, turn).await {
            // The device says that it cannot, and will say so again.
            Err(error @ KeysError::Seal(SealError::Refused { .. } | SealError::KeyUnfit { .. })) => {
                tracing::error!(key = %slot.id, %error, "a planned key cannot be made");
                self.give_up(tenant, used, &slot.id).await;
                Ok(())
            }
            other => other,
        }
    }

    async fn plan(
        &self,
        tenant: &TenantId,
        used: Use,
        order: &Order,
    ) -> Result<(SigningKeyId, Arc<Entry>), KeysError> {
        let device = KeyRef::plan(order.spec).map_err(|_| DbError::Unavailable(None))?;
        let entry = Arc::new(order.entry(device.on(self.parts.placement.clone())));
        let (id, grace) = (SigningKeyId::generate(), order.grace);
        let (row, decided) = ((tenant.clone(), id.clone(), Arc::clone(&entry)), id.clone());
        let insert = move |conn: &mut _, ring: &Ring| {
            // A key in the place of one that was lost is no rotation.
            if ring.signer().is_some() && store::is_quarantined(conn)? {
                return Err(KeysError::Quarantined);
            }
            let (tenant, id, entry) = &row;
            let slot = ring.slot(id).ok_or_else(|| DbError::impossible("signing_keys", id.as_str()))?;
            Ok(store::insert(conn, tenant, used, slot, entry)?)
        };
        let decide = move |ring: &mut Ring, now| ring.plan(decided.clone(), grace, now);
        self.change_with(tenant, used, insert, decide).await?;
        Ok((id, entry))
    }

    /// Makes the object of a planned key, or finds the one that was made, and publishes the key. The turn
    /// lasts until the device has ended its call, also where that is long after this gave up.
    async fn make(
        &self,
        tenant: &TenantId,
        used: Use,
        (id, entry): (&SigningKeyId, &Entry),
        material: &Material,
        turn: &Arc<Turn>,
    ) -> Result<(), KeysError> {
        let caller = Caller::system("keys", tenant.clone());
        let event = Event::new(Action::KeyCreate, "key", id.as_str())
            .detail("purpose", used.name())
            .detail("alg", entry.alg.map_or("HS256", Alg::name))
            .detail("origin", entry.origin.name())
            .detail("device", entry.device.device().as_str())
            .detail("device_id", entry.device.id().to_string());
        let made = self.parts.audit.around(&caller, event, async |note| {
            let (admin, held) = (&self.parts.admin, Arc::clone(turn));
            let device = match material {
                Material::Generated => admin.generate_holding(&entry.device, held).await?,
                Material::Imported(pkcs8, _) => admin.import_holding(&entry.device, pkcs8, held).await?,
            };
            let public = match entry.alg {
                Some(alg) => {
                    let key = self.parts.sealer.public_key(&device).await?;
                    self.check_primes(tenant, used, &device, &key).await?;
                    Some(Public::of(&key, alg, entry.choice))
                }
                None => None,
            };
            if let Some(public) = &public {
                note.add("kid", public.kid.as_str());
            }
            self.publish(tenant, used, id, (device, public), material.becomes()).await
        });
        made.await?;
        self.note_proven(id);
        Ok(())
    }

    /// Two keys with a prime in common are two broken keys (KL-9).
    async fn check_primes(
        &self,
        tenant: &TenantId,
        used: Use,
        device: &KeyRef,
        key: &PublicKey,
    ) -> Result<(), KeysError> {
        let PublicKey::Rsa { n, .. } = key else { return Ok(()) };
        let view = self.look(tenant, used).await?;
        let others = view.entries.values().filter(|other| other.device.id() != device.id());
        let moduli = others.filter_map(|other| jwk::modulus(&other.public.as_ref()?.jwk));
        // The same key is another matter: its `kid` is taken.
        let moduli: Vec<_> = moduli.filter(|other| other != n).collect();
        match shares_a_prime(n, moduli.iter().map(Vec::as_slice)) {
            None => Ok(()),
            Some(_) => {
                let reason = "it has a prime in common with another key".to_owned();
                Err(SealError::KeyUnfit { key: device.id(), reason }.into())
            }
        }
    }

    async fn publish(
        &self,
        tenant: &TenantId,
        used: Use,
        id: &SigningKeyId,
        (device, public): (KeyRef, Option<Public>),
        becomes: Option<ImportAs>,
    ) -> Result<(), KeysError> {
        let device_spec = (device.spec(), device.is_imported());
        let (row, decided) = ((id.clone(), device, public), id.clone());
        let keep = move |conn: &mut _, _: &Ring| match store::made(conn, &row.0, &row.1, row.2.as_ref()) {
            Err(DbError::Duplicate) => Err(KeysError::Invalid {
                field: "pem",
                reason: "the tenant has, or had, this key".to_owned(),
            }),
            other => Ok(other?),
        };
        let goes_on_in_p384 =
            device_spec == (KeySpec::EcP384, true) && matches!(becomes, Some(ImportAs::Current { .. }));
        let place = move |ring: &mut Ring, now| {
            publish(ring, &decided, becomes, now)?;
            if goes_on_in_p384 {
                // What comes from Logto goes on as it was (contract, section 2, row 13).
                ring.policy.ec_curve = Curve::P384;
            }
            Ok(())
        };
        self.change_with(tenant, used, keep, place).await
    }

    /// Gives up a planned key. What may be on the device is destroyed by upkeep.
    async fn give_up(&self, tenant: &TenantId, used: Use, id: &SigningKeyId) {
        let decided = id.clone();
        let given_up = self.change(tenant, used, move |ring, _| {
            if ring.slot(&decided).is_some_and(|slot: &Slot| slot.phase == Phase::Planned) {
                ring.give_up(&decided, End::Failed);
            }
            Ok(())
        });
        if let Err(error) = given_up.await {
            tracing::warn!(key = %id, %error, "a planned key is not given up yet");
        }
    }

    /// Makes the ring's first key, or one in the place of what was lost.
    pub(super) async fn ensure(&self, tenant: &TenantId, used: Use) -> Result<(), KeysError> {
        let lacks = |ring: &Ring| !ring.slots.iter().any(|slot| slot.phase.is_published());
        let view = self.look(tenant, used).await?;
        if !lacks(&view.ring) {
            return Ok(());
        }
        let order = Order::generated(used, None, Duration::ZERO, &view.ring);
        self.add(tenant, used, order, lacks).await?;
        Ok(())
    }
}
