//! Types of the key service: what a key is for, what was asked for, how far it has come.
//!
//! A ring is a tenant's keys of one use. Its keys come and go through [`Phase`]; which phase follows when
//! is decided in `plan.rs`, what of it is kept where in `store.rs`.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::clock::Timestamp;
use crate::ids::SigningKeyId;
use crate::seal::{Alg, KeySpec};

/// What the keys of a ring do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Use {
    /// Signs tokens; verifiers know its keys from the JWKS.
    Jwt,
    /// Authenticates cookies (HMAC); only Lacre itself verifies them.
    Cookie,
}

impl Use {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Jwt, Self::Cookie];

    /// The name in database, audit log and command line.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Jwt => "jwt",
            Self::Cookie => "cookie",
        }
    }

    /// The use of that name.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|known| known.name() == name)
    }
}

/// What was asked for as `signingKeyAlgorithm` (contract, section 9.2), and is shown again as it was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Choice {
    /// ECDSA on the curve of the tenant's policy.
    #[serde(rename = "EC")]
    Ec,
    /// RSA with 4096 bits; signs RS256, and its JWK names no algorithm.
    #[serde(rename = "RSA")]
    Rsa,
    /// ECDSA on P-256.
    #[serde(rename = "ES256")]
    Es256,
    /// ECDSA on P-384.
    #[serde(rename = "ES384")]
    Es384,
    /// RSASSA-PKCS1-v1_5 with the key length of the policy.
    #[serde(rename = "RS256")]
    Rs256,
    /// RSASSA-PSS with the key length of the policy.
    #[serde(rename = "PS256")]
    Ps256,
    /// Ed25519, where the device has it.
    #[serde(rename = "EdDSA")]
    EdDsa,
}

impl Choice {
    /// All, in the order of the documentation.
    pub const ALL: [Self; 7] =
        [Self::Ec, Self::Rsa, Self::Es256, Self::Es384, Self::Rs256, Self::Ps256, Self::EdDsa];

    /// The name on the wire.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ec => "EC",
            Self::Rsa => "RSA",
            Self::Es256 => "ES256",
            Self::Es384 => "ES384",
            Self::Rs256 => "RS256",
            Self::Ps256 => "PS256",
            Self::EdDsa => "EdDSA",
        }
    }

    /// The choice of that name.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|known| known.name() == name)
    }

    /// The key to make, and how it signs.
    pub const fn resolve(self, policy: &Policy) -> (KeySpec, Alg) {
        let rsa = match policy.rsa_bits {
            RsaBits::B2048 => KeySpec::Rsa2048,
            RsaBits::B3072 => KeySpec::Rsa3072,
            RsaBits::B4096 => KeySpec::Rsa4096,
        };
        match self {
            Self::Ec => match policy.ec_curve {
                Curve::P256 => (KeySpec::EcP256, Alg::Es256),
                Curve::P384 => (KeySpec::EcP384, Alg::Es384),
            },
            Self::Es256 => (KeySpec::EcP256, Alg::Es256),
            Self::Es384 => (KeySpec::EcP384, Alg::Es384),
            Self::Rsa => (KeySpec::Rsa4096, Alg::Rs256),
            Self::Rs256 => (rsa, Alg::Rs256),
            Self::Ps256 => (rsa, Alg::Ps256),
            Self::EdDsa => (KeySpec::Ed25519, Alg::EdDsa),
        }
    }
}

/// What `EC` means.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Curve {
    /// Every verifier and every device has it.
    #[default]
    #[serde(rename = "P-256")]
    P256,
    /// What Logto makes.
    #[serde(rename = "P-384")]
    P384,
}

/// Key length of RS256 and PS256.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "u16", into = "u16")]
pub enum RsaBits {
    /// For verifiers that take no more.
    B2048,
    /// SP 800-57 part 1: beyond 2030.
    #[default]
    B3072,
    /// As Logto.
    B4096,
}

impl TryFrom<u16> for RsaBits {
    type Error = &'static str;

    fn try_from(bits: u16) -> Result<Self, Self::Error> {
        match bits {
            2048 => Ok(Self::B2048),
            3072 => Ok(Self::B3072),
            4096 => Ok(Self::B4096),
            _ => Err("must be 2048, 3072 or 4096"),
        }
    }
}

impl From<RsaBits> for u16 {
    fn from(bits: RsaBits) -> Self {
        match bits {
            RsaBits::B2048 => 2048,
            RsaBits::B3072 => 3072,
            RsaBits::B4096 => 4096,
        }
    }
}

/// How the keys of one ring are made and changed. Kept per tenant and use.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Policy {
    /// What a rotation makes that names no algorithm.
    pub algorithm: Choice,
    /// What `EC` means.
    pub ec_curve: Curve,
    /// Key length of RS256 and PS256.
    pub rsa_bits: RsaBits,
    /// A new key takes over when the last one was called Current for so long; `None`: only by hand.
    #[serde(with = "optional_seconds")]
    pub rotate_every: Option<Duration>,
    /// How long a scheduled rotation shows its key as Next; a rotation by hand says so itself.
    #[serde(with = "seconds")]
    pub grace: Duration,
    /// `max-age` of the JWKS: how long a verifier may go without looking.
    #[serde(with = "seconds")]
    pub jwks_max_age: Duration,
    /// How long after a change a daemon may still serve and use what was before.
    #[serde(with = "seconds")]
    pub propagation: Duration,
    /// How far the clocks of daemons and verifiers may be apart.
    #[serde(with = "seconds")]
    pub skew: Duration,
    /// How long a session, and so a signed cookie, lives at the most.
    #[serde(with = "seconds")]
    pub session_ttl: Duration,
    /// The policy was more careful before: documents with a longer `max-age` were served, or daemons may still use
    /// what was there before for longer. That has passed then,
    pub careful_until: Option<Timestamp>,
    /// and after so long, whatever the clock says.
    #[serde(with = "seconds")]
    pub careful_for: Duration,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            algorithm: Choice::Ec,
            ec_curve: Curve::default(),
            rsa_bits: RsaBits::default(),
            rotate_every: None,
            grace: Duration::from_secs(4 * 3600),
            jwks_max_age: Duration::ZERO,
            propagation: Duration::from_secs(30),
            skew: Duration::from_secs(60),
            session_ttl: Duration::from_secs(14 * 24 * 3600),
            careful_until: None,
            careful_for: Duration::ZERO,
        }
    }
}

impl Policy {
    /// How long a key is published before it signs: until every daemon serves it and no verifier has a
    /// document without it (invariant I1).
    pub fn lead(&self, used: Use, now: Timestamp) -> Duration {
        let max_age = if used == Use::Jwt { self.jwks_max_age } else { Duration::ZERO };
        // A policy that was more careful a moment ago holds for what was served under it.
        let left = self.careful_until.map_or(Duration::ZERO, |until| until.since(now)).min(self.careful_for);
        (max_age + self.propagation + self.skew).max(left)
    }

    /// What is added to the end of the last token's life before a key goes: a daemon may use it a little
    /// longer than another one, and who builds tokens elsewhere (`/v1/jws`) a little longer than that.
    pub fn margin(&self) -> Duration {
        2 * self.propagation + self.skew
    }
}

/// How far a key has come. The names in parentheses are those of SP 800-57 part 1, section 7.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Phase {
    /// Recorded; the device may or may not have made it yet.
    Planned,
    /// Published, and does not sign yet (pre-active).
    Next,
    /// The one key that signs (active).
    Current,
    /// Published, because what it signed may live; may be taken back into use (suspended).
    Previous,
    /// Out of the JWKS, for good (deactivated; compromised if it was revoked).
    Retired,
    /// Gone from the device (destroyed).
    Destroyed,
}

impl Phase {
    /// All, in order.
    pub const ALL: [Self; 6] =
        [Self::Planned, Self::Next, Self::Current, Self::Previous, Self::Retired, Self::Destroyed];

    /// The name in the database.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Planned => "planned",
            Self::Next => "next",
            Self::Current => "current",
            Self::Previous => "previous",
            Self::Retired => "retired",
            Self::Destroyed => "destroyed",
        }
    }

    /// The phase of that name.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|known| known.name() == name)
    }

    /// Whether keys of this phase are in the JWKS.
    pub const fn is_published(self) -> bool {
        matches!(self, Self::Next | Self::Current | Self::Previous)
    }

    /// Whether a key may go from this phase to that one.
    pub const fn may_become(self, next: Self) -> bool {
        matches!(
            (self, next),
            (Self::Planned, Self::Next | Self::Current | Self::Previous | Self::Retired)
                | (Self::Next, Self::Current | Self::Previous | Self::Retired)
                | (Self::Current, Self::Previous | Self::Retired)
                | (Self::Previous, Self::Current | Self::Retired)
                | (Self::Retired, Self::Destroyed)
        )
    }
}

/// Why a key was retired.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum End {
    /// Nothing that it signed can be alive.
    Expired,
    /// An administrator deleted it.
    Deleted,
    /// It was cancelled, or another one took its place, before it ever signed.
    Cancelled,
    /// It must not be trusted any more.
    Revoked,
    /// The device would not make it.
    Failed,
    /// Its device was lost.
    Lost,
}

impl End {
    /// All, in the order of the documentation.
    pub const ALL: [Self; 6] =
        [Self::Expired, Self::Deleted, Self::Cancelled, Self::Revoked, Self::Failed, Self::Lost];

    /// The name in database and audit log.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Expired => "expired",
            Self::Deleted => "deleted",
            Self::Cancelled => "cancelled",
            Self::Revoked => "revoked",
            Self::Failed => "failed",
            Self::Lost => "lost",
        }
    }

    /// The reason of that name.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|known| known.name() == name)
    }
}

/// Where a key comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Origin {
    /// Made in the device.
    Generated,
    /// Brought in: somebody may have a copy.
    Imported,
}

impl Origin {
    /// The name in database, API and audit log.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Generated => "generated",
            Self::Imported => "imported",
        }
    }

    /// The origin of that name.
    pub fn parse(name: &str) -> Option<Self> {
        [Self::Generated, Self::Imported].into_iter().find(|known| known.name() == name)
    }
}

/// What the world is told of a published key (contract, section 9.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Status {
    /// Comes next.
    Next,
    /// The newest that is due, though it may still wait for verifiers to know it before it signs.
    Current,
    /// An older one.
    Previous,
}

impl Status {
    /// The name on the wire.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Next => "Next",
            Self::Current => "Current",
            Self::Previous => "Previous",
        }
    }
}

/// A key as administrators see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyView {
    /// The row's id: 21 characters of `0-9a-z`. Not the `kid`.
    pub id: SigningKeyId,
    /// What it does.
    pub used: Use,
    /// Next, Current or Previous.
    pub status: Status,
    /// What was asked for; `None` for cookie keys.
    pub choice: Option<Choice>,
    /// RFC 7638 thumbprint; `None` for cookie keys.
    pub kid: Option<String>,
    /// JOSE name of the algorithm.
    pub alg: &'static str,
    /// Made in the device or brought in.
    pub origin: Origin,
    /// The device that holds it.
    pub device: String,
    /// When its row was written.
    pub created_at: Timestamp,
    /// From when it is called Current.
    pub effective_at: Timestamp,
    /// Whether it is the one that signs now.
    pub is_signing: bool,
    /// When it signs, or signed last, from.
    pub signs_from: Timestamp,
    /// Until when it signs, or signed, if that is known.
    pub signs_until: Option<Timestamp>,
    /// Until when it is published, if that is known.
    pub published_until: Option<Timestamp>,
    /// Why a key that is called Current does not sign yet.
    pub waits_for: Option<String>,
}

/// What a change led to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// The ring afterwards (in a dry run: as it would be), in the order Next, Current, Previous.
    pub keys: Vec<KeyView>,
    /// How many tokens that would have been valid are not any more: at least so many. Only for revocation
    /// and deletion.
    pub dead_tokens: Option<u64>,
    /// Whether nothing was changed.
    pub dry_run: bool,
}

/// A rotation that is asked for.
#[derive(Clone, Copy, Debug, Default)]
pub struct Rotation {
    /// What to make; the policy's algorithm if absent.
    pub choice: Option<Choice>,
    /// How long the new key is Next; `None`: the configured default, and for cookie keys nothing else.
    pub grace: Option<Duration>,
    /// Only tell what would come.
    pub dry_run: bool,
}

/// What an imported key becomes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImportAs {
    /// It takes over, as after a rotation, and stays afterwards for what it has signed elsewhere.
    Current {
        /// The longest lifetime of a token that it has signed elsewhere.
        lifetime: Duration,
    },
    /// It verifies only, for as long as tokens of the given lifetime live from now on.
    Previous {
        /// The longest lifetime of a token that it has signed elsewhere.
        lifetime: Duration,
    },
}

impl ImportAs {
    /// What is assumed of a key that takes over if nothing is said: more than tokens live by default, elsewhere too.
    pub const LIFETIME: Duration = Duration::from_secs(24 * 3600);
}

/// What is changed of a policy; absent members stay.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PolicyPatch {
    /// See [`Policy::algorithm`].
    pub algorithm: Option<Choice>,
    /// See [`Policy::ec_curve`].
    pub ec_curve: Option<Curve>,
    /// See [`Policy::rsa_bits`].
    pub rsa_bits: Option<RsaBits>,
    /// Seconds; 0 ends scheduled rotation. See [`Policy::rotate_every`].
    pub rotate_every: Option<u64>,
    /// Seconds. See [`Policy::grace`].
    pub grace: Option<u64>,
    /// Seconds. See [`Policy::jwks_max_age`].
    pub jwks_max_age: Option<u64>,
    /// Seconds. See [`Policy::propagation`].
    pub propagation: Option<u64>,
    /// Seconds. See [`Policy::skew`].
    pub skew: Option<u64>,
    /// Seconds. See [`Policy::session_ttl`].
    pub session_ttl: Option<u64>,
}

const DAY: u64 = 24 * 3600;

impl Policy {
    /// The policy with the changes of `patch`.
    ///
    /// # Errors
    /// The member that is out of its range, and the range.
    pub fn patched(&self, patch: &PolicyPatch, now: Timestamp) -> Result<Self, (&'static str, &'static str)> {
        let within = |name, value: Option<u64>, old: Duration, (low, high), told| match value {
            None => Ok(old),
            Some(seconds) if (low..=high).contains(&seconds) => Ok(Duration::from_secs(seconds)),
            Some(_) => Err((name, told)),
        };
        let jwks_max_age =
            within("jwks_max_age", patch.jwks_max_age, self.jwks_max_age, (0, DAY), "must be 0 to 86400")?;
        let rotate_every = match patch.rotate_every {
            None => self.rotate_every,
            Some(0) => None,
            Some(seconds) if (60..=3650 * DAY).contains(&seconds) => Some(Duration::from_secs(seconds)),
            Some(_) => return Err(("rotate_every", "must be 0 (never) or 60 to 315360000")),
        };
        let mut new = Self {
            algorithm: patch.algorithm.unwrap_or(self.algorithm),
            ec_curve: patch.ec_curve.unwrap_or(self.ec_curve),
            rsa_bits: patch.rsa_bits.unwrap_or(self.rsa_bits),
            rotate_every,
            grace: within("grace", patch.grace, self.grace, (0, 365 * DAY), "must be 0 to 31536000")?,
            jwks_max_age,
            propagation: within(
                "propagation",
                patch.propagation,
                self.propagation,
                (2, 3600),
                "must be 2 to 3600",
            )?,
            skew: within("skew", patch.skew, self.skew, (0, 3600), "must be 0 to 3600")?,
            session_ttl: within(
                "session_ttl",
                patch.session_ttl,
                self.session_ttl,
                (1, 365 * DAY),
                "must be 1 to 31536000",
            )?,
            careful_until: self.careful_until,
            careful_for: self.careful_for,
        };
        let parts = |policy: &Self| [policy.jwks_max_age, policy.propagation, policy.skew];
        if parts(&new).iter().zip(parts(self)).any(|(new, old)| *new < old) {
            new.careful_for = parts(self).into_iter().sum::<Duration>().max(self.careful_for);
            let until = now.plus(new.careful_for);
            new.careful_until = Some(self.careful_until.map_or(until, |known| known.max(until)));
        }
        Ok(new)
    }
}

/// Durations as whole seconds in JSON.
mod seconds {
    use std::time::Duration;

    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(span: &Duration, out: S) -> Result<S::Ok, S::Error> {
        out.serialize_u64(span.as_secs())
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(input: D) -> Result<Duration, D::Error> {
        u64::deserialize(input).map(Duration::from_secs)
    }
}

/// The same for what may be absent.
mod optional_seconds {
    use std::time::Duration;

    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    #[expect(clippy::ref_option, reason = "serde asks for it")]
    pub(super) fn serialize<S: Serializer>(span: &Option<Duration>, out: S) -> Result<S::Ok, S::Error> {
        span.map(|span| span.as_secs()).serialize(out)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(input: D) -> Result<Option<Duration>, D::Error> {
        Ok(Option::<u64>::deserialize(input)?.map(Duration::from_secs))
    }
}
