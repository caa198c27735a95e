//! What the daemon asks the sealer process, and what that answers, as bytes.
//!
//! A frame is a head (length of meta, length of body, id), a meta part that is never secret and a body
//! that may be. Both sides are the same program, so there is one version of it and it is not stored
//! anywhere. The daemon takes nothing for granted all the same: a vendor's module lives in the other
//! process, and lengths and texts from there are bounded before they are used.

use std::borrow::Cow;

use serde::Serialize;
use zeroize::Zeroizing;

use crate::seal::child::transfer::{Address, Parcel};
use crate::seal::context::Context;
use crate::seal::driver::Count;
use crate::seal::envelope::{BadSealed, Payload, Reader, WrappedKey};
use crate::seal::guarded::{LARGEST, SecretBuf};
use crate::seal::key::{Alg, Kek, KekId, KeyRef, KeySpec, PublicKey};

/// Length of a frame's head.
pub(super) const HEAD: usize = 16;
/// Longest meta part: a report on a device, or a request with a caller's own context text.
pub(super) const LARGEST_META: usize = 1 << 20;
/// Longest body: the largest value, and what is not secret and a little longer.
pub(super) const LARGEST_BODY: usize = LARGEST + (64 << 10);

/// Ids below are no requests.
pub(super) const FIRST_ID: u64 = 16;
/// The id of what nobody asked for: start, hello, status.
pub(super) const NO_ID: u64 = 0;

/// The other side broke the protocol. It is given up.
#[derive(Debug, thiserror::Error)]
#[error("a message that is not one: {0}")]
pub(super) struct Garbled(pub(super) &'static str);

impl From<BadSealed> for Garbled {
    fn from(_: BadSealed) -> Self {
        Self("cut or overlong")
    }
}

/// The part of a frame that may be secret.
pub(super) enum Body {
    /// Nothing.
    None,
    /// Plaintext.
    Secret(SecretBuf),
    /// Ciphertext and the like; wiped all the same, because messages to be authenticated are sent so.
    Plain(Zeroizing<Vec<u8>>),
    /// Read and thrown away: nobody waits for it, or there is no room.
    Skip(usize),
}

impl Body {
    pub(super) fn len(&self) -> usize {
        match self {
            Self::None => 0,
            Self::Secret(buf) => buf.len(),
            Self::Plain(bytes) => bytes.len(),
            Self::Skip(len) => *len,
        }
    }

    /// Copies `from..` into `out`, as much as fits; how much that was.
    pub(super) fn copy_out(&self, from: usize, out: &mut [u8]) -> usize {
        let copy = |bytes: &[u8], out: &mut [u8]| {
            let rest = bytes.get(from..).unwrap_or_default();
            let len = rest.len().min(out.len());
            out[..len].copy_from_slice(&rest[..len]);
            len
        };
        match self {
            Self::Secret(buf) => buf.with(|bytes| copy(bytes, out)),
            Self::Plain(bytes) => copy(bytes, out),
            Self::None | Self::Skip(_) => 0,
        }
    }

    /// Writes `part` at `at`. The caller has compared the lengths.
    pub(super) fn copy_in(&mut self, at: usize, part: &[u8]) {
        match self {
            Self::Secret(buf) => buf.with_mut(|bytes| bytes[at..at + part.len()].copy_from_slice(part)),
            Self::Plain(bytes) => bytes[at..at + part.len()].copy_from_slice(part),
            Self::None | Self::Skip(_) => {}
        }
    }
}

/// One message.
pub(super) struct Frame {
    pub(super) id: u64,
    pub(super) meta: Vec<u8>,
    pub(super) body: Body,
}

impl Frame {
    pub(super) fn head(&self) -> [u8; HEAD] {
        let mut head = [0; HEAD];
        let [meta, body] =
            [self.meta.len(), self.body.len()].map(|len| u32::try_from(len).unwrap_or(u32::MAX));
        head[..4].copy_from_slice(&meta.to_le_bytes());
        head[4..8].copy_from_slice(&body.to_le_bytes());
        head[8..].copy_from_slice(&self.id.to_le_bytes());
        head
    }

    /// Of the daemon's first message and of the other side's unasked ones: a kind and JSON.
    pub(super) fn note(kind: Kind, text: &impl Serialize) -> Self {
        let mut meta = vec![kind as u8];
        // What is sent so are structs of texts and numbers, which JSON can always say.
        serde_json::to_writer(&mut meta, text).unwrap_or_default();
        Self { id: NO_ID, meta, body: Body::None }
    }
}

/// What a message from the sealer process is, or one to it that is no request: the first byte of its meta part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Kind {
    /// The answer to a request.
    Answer = 1,
    /// The error that is the answer to a request.
    Error = 2,
    /// The device has ended the call of a request, answered or not.
    Ended = 3,
    /// The device was started: its status.
    Hello = 4,
    /// The device could not be started and no waiting heals it.
    Failed = 5,
    /// The device's status, sent when it changes and as a sign of life.
    Status = 6,
    /// A sign of life during the start.
    Starting = 7,
    /// To the process: what it is to log from now on.
    LogFilter = 8,
}

impl Kind {
    pub(super) fn of(meta: &[u8]) -> Result<Self, Garbled> {
        const ALL: [Kind; 8] = [
            Kind::Answer,
            Kind::Error,
            Kind::Ended,
            Kind::Hello,
            Kind::Failed,
            Kind::Status,
            Kind::Starting,
            Kind::LogFilter,
        ];
        let kind = meta.first().and_then(|code| ALL.into_iter().find(|kind| *kind as u8 == *code));
        kind.ok_or(Garbled("unknown kind"))
    }
}

/// A request. What is secret in it travels as the frame's body.
#[derive(Clone, PartialEq)]
pub(super) enum Ask<'a> {
    /// The body is the plaintext.
    Seal {
        kek: Kek,
        context: Context<'a>,
    },
    /// The body is the ciphertext.
    Open {
        kek: Kek,
        context: Context<'a>,
        key: WrappedKey,
        iv: [u8; 12],
        tag: [u8; 16],
    },
    Rewrap {
        from: Kek,
        to: Kek,
        context: Context<'a>,
        key: WrappedKey,
    },
    Sign {
        key: KeyRef,
        alg: Alg,
        digest: Cow<'a, [u8]>,
    },
    /// The body is the message.
    Mac {
        key: KeyRef,
    },
    PublicKey {
        key: KeyRef,
    },
    /// The body is the key, if it is given.
    Generate {
        planned: KeyRef,
        is_given: bool,
    },
    Destroy {
        key: KeyRef,
    },
    Inspect {
        key: KeyRef,
    },
    Capabilities,
    List,
    Count(Count),
    /// Where DEKs for this process are encrypted to. The device is not asked.
    Address,
    /// Unwraps a DEK and encrypts it for another process, which will wrap it under `aad`.
    Export {
        from: Kek,
        context: Context<'a>,
        key: WrappedKey,
        address: Address,
        aad: Cow<'a, [u8]>,
    },
    /// Wraps a DEK that another process has encrypted for this one.
    Import {
        to: Kek,
        context: Context<'a>,
        parcel: Parcel,
    },
}

/// Appends length-prefixed parts; [`Reader`] reads them.
struct Parts(Vec<u8>);

impl Parts {
    fn part(&mut self, bytes: &[u8]) -> &mut Self {
        // A part beyond 4 GiB would be refused as an overlong frame anyway.
        self.0.extend_from_slice(&u32::try_from(bytes.len()).unwrap_or(u32::MAX).to_be_bytes());
        self.0.extend_from_slice(bytes);
        self
    }

    fn kek(&mut self, kek: &Kek) -> &mut Self {
        self.0.extend_from_slice(kek.id.as_bytes());
        self.0.extend_from_slice(&kek.version.to_be_bytes());
        self.part(&kek.key.to_bytes())
    }

    fn context(&mut self, context: &Context<'_>) -> &mut Self {
        self.0.extend_from_slice(&context.version.to_be_bytes());
        self.part(context.tenant.as_bytes()).part(context.kind.as_bytes()).part(context.record.as_bytes())
    }
}

fn key(reader: &mut Reader<'_>) -> Result<KeyRef, Garbled> {
    KeyRef::from_bytes(reader.long()?).ok_or(Garbled("not a key"))
}

fn kek(reader: &mut Reader<'_>) -> Result<Kek, Garbled> {
    let id = KekId::from_bytes(reader.take(16)?).ok_or(Garbled("not a KEK"))?;
    Ok(Kek { id, version: u32::from_be_bytes(reader.array()?), key: key(reader)? })
}

fn context<'a>(reader: &mut Reader<'a>) -> Result<Context<'a>, Garbled> {
    let version = u64::from_be_bytes(reader.array()?);
    let mut text = || std::str::from_utf8(reader.long()?).map_err(|_| Garbled("not UTF-8"));
    Ok(Context { tenant: text()?, kind: text()?, record: text()?, version })
}

fn wrapped(reader: &mut Reader<'_>) -> Result<WrappedKey, Garbled> {
    Ok(WrappedKey::from_bytes(reader.long()?)?)
}

/// The code of the request whose body is a private key.
const GIVEN: u8 = 15;

impl<'a> Ask<'a> {
    /// The name in errors and metrics.
    pub(super) const fn name(&self) -> &'static str {
        match self {
            Self::Seal { .. } | Self::Import { .. } => "wrap",
            Self::Open { .. } | Self::Export { .. } => "unwrap",
            Self::Rewrap { .. } => "rewrap",
            Self::Sign { .. } => "sign",
            Self::Mac { .. } => "mac",
            Self::PublicKey { .. } => "public_key",
            Self::Generate { is_given: false, .. } => "generate",
            Self::Generate { is_given: true, .. } => "import",
            Self::List => "list",
            Self::Destroy { .. } => "destroy",
            Self::Inspect { .. } => "inspect",
            Self::Capabilities => "capabilities",
            Self::Count(_) => "count",
            Self::Address => "address",
        }
    }

    /// Whether it goes through the lane that makes and destroys keys.
    pub(super) const fn is_admin(&self) -> bool {
        matches!(
            self,
            Self::Generate { .. }
                | Self::Destroy { .. }
                | Self::Inspect { .. }
                | Self::Capabilities
                | Self::List
                | Self::Count(_)
        )
    }

    /// Whether it changes what is on the device.
    pub(super) const fn alters(&self) -> bool {
        matches!(
            self,
            Self::Generate { .. } | Self::Destroy { .. } | Self::Count(Count::Make | Count::Advance { .. })
        )
    }

    /// Whether the body of a request with this meta part is plaintext.
    pub(super) fn has_secret(meta: &[u8]) -> bool {
        matches!(meta.first(), Some(&(1 | GIVEN)))
    }

    pub(super) fn encode(&self) -> Vec<u8> {
        let mut out = Parts(Vec::with_capacity(512));
        match self {
            Self::Seal { kek, context } => {
                out.0.push(1);
                out.kek(kek).context(context);
            }
            Self::Open { kek, context, key, iv, tag } => {
                out.0.push(2);
                out.kek(kek).context(context).part(&key.to_bytes());
                out.0.extend_from_slice(iv);
                out.0.extend_from_slice(tag);
            }
            Self::Rewrap { from, to, context, key } => {
                out.0.push(3);
                out.kek(from).kek(to).context(context).part(&key.to_bytes());
            }
            Self::Sign { key, alg, digest } => {
                let alg = Alg::ALL.iter().position(|known| known == alg).unwrap_or_default();
                out.0.extend_from_slice(&[4, u8::try_from(alg).unwrap_or_default()]);
                out.part(&key.to_bytes()).part(digest);
            }
            Self::Mac { key } => out.keyed(5, key),
            Self::PublicKey { key } => out.keyed(6, key),
            Self::Generate { planned, is_given } => out.keyed(if *is_given { GIVEN } else { 7 }, planned),
            Self::List => out.0.push(16),
            Self::Destroy { key } => out.keyed(8, key),
            Self::Inspect { key } => out.keyed(9, key),
            Self::Capabilities => out.0.push(10),
            Self::Address => out.0.push(12),
            Self::Export { from, context, key, address, aad } => {
                out.0.push(13);
                out.kek(from).context(context).part(&key.to_bytes()).part(aad);
                out.0.extend_from_slice(address);
            }
            Self::Import { to, context, parcel } => {
                out.0.push(14);
                out.kek(to).context(context);
                out.0.extend_from_slice(parcel);
            }
            Self::Count(count) => {
                let (kind, from) = match count {
                    Count::Read => (1, 0),
                    Count::Make => (2, 0),
                    Count::Advance { from } => (3, *from),
                };
                out.0.extend_from_slice(&[11, kind]);
                out.0.extend_from_slice(&from.to_be_bytes());
            }
        }
        out.0
    }

    pub(super) fn decode(meta: &'a [u8]) -> Result<Self, Garbled> {
        let mut reader = Reader::new(meta);
        let r = &mut reader;
        let [code] = r.array()?;
        let ask = match code {
            1 => Self::Seal { kek: kek(r)?, context: context(r)? },
            2 => Self::Open {
                kek: kek(r)?,
                context: context(r)?,
                key: wrapped(r)?,
                iv: r.array()?,
                tag: r.array()?,
            },
            3 => Self::Rewrap { from: kek(r)?, to: kek(r)?, context: context(r)?, key: wrapped(r)? },
            4 => {
                let [alg] = r.array()?;
                let alg = *Alg::ALL.get(usize::from(alg)).ok_or(Garbled("unknown algorithm"))?;
                Self::Sign { alg, key: key(r)?, digest: Cow::Borrowed(r.long()?) }
            }
            5 => Self::Mac { key: key(r)? },
            6 => Self::PublicKey { key: key(r)? },
            7 => Self::Generate { planned: key(r)?, is_given: false },
            GIVEN => Self::Generate { planned: key(r)?, is_given: true },
            16 => Self::List,
            8 => Self::Destroy { key: key(r)? },
            9 => Self::Inspect { key: key(r)? },
            10 => Self::Capabilities,
            11 => {
                let [kind] = r.array()?;
                let from = u64::from_be_bytes(r.array()?);
                Self::Count(match (kind, from) {
                    (1, 0) => Count::Read,
                    (2, 0) => Count::Make,
                    (3, from) => Count::Advance { from },
                    _ => return Err(Garbled("unknown count")),
                })
            }
            12 => Self::Address,
            13 => Self::Export {
                from: kek(r)?,
                context: context(r)?,
                key: wrapped(r)?,
                aad: Cow::Borrowed(r.long()?),
                address: r.array()?,
            },
            14 => Self::Import { to: kek(r)?, context: context(r)?, parcel: r.array()? },
            _ => return Err(Garbled("unknown request")),
        };
        reader.end()?;
        Ok(ask)
    }
}

impl Parts {
    fn keyed(&mut self, code: u8, key: &KeyRef) {
        self.0.push(code);
        self.part(&key.to_bytes());
    }
}

/// What was sealed, in an answer; the ciphertext is its body.
pub(super) fn encode_sealed(key: &WrappedKey, payload: &Payload) -> Vec<u8> {
    let mut out = Parts(vec![Kind::Answer as u8]);
    out.part(&key.to_bytes());
    out.0.extend_from_slice(&payload.iv);
    out.0.extend_from_slice(&payload.tag);
    out.0
}

/// A counter's value in an answer: nothing if there is none.
pub(super) fn encode_count(value: Option<u64>) -> Vec<u8> {
    let mut out = vec![Kind::Answer as u8];
    out.extend(value.map(u64::to_be_bytes).into_iter().flatten());
    out
}

/// Reads [`encode_count`] without its kind.
pub(super) fn decode_count(bytes: &[u8]) -> Result<Option<u64>, Garbled> {
    match bytes {
        [] => Ok(None),
        _ => {
            bytes.try_into().map(|value| Some(u64::from_be_bytes(value))).map_err(|_| Garbled("not a count"))
        }
    }
}

/// Names of keys in an answer.
pub(super) fn encode_keys(keys: &[KeyRef]) -> Vec<u8> {
    let mut out = Parts(vec![Kind::Answer as u8]);
    for key in keys {
        out.part(&key.to_bytes());
    }
    out.0
}

/// Reads [`encode_keys`] without its kind.
pub(super) fn decode_keys(bytes: &[u8]) -> Result<Vec<KeyRef>, Garbled> {
    let mut reader = Reader::new(bytes);
    let mut keys = Vec::new();
    while !reader.is_at_end() {
        keys.push(key(&mut reader)?);
    }
    Ok(keys)
}

/// A public key in an answer.
pub(super) fn encode_public_key(key: &PublicKey) -> Vec<u8> {
    let mut out = Parts(vec![Kind::Answer as u8]);
    match key {
        PublicKey::Ed { x } => {
            out.0.push(4);
            out.part(x).part(&[]);
        }
        PublicKey::Ec { spec, x, y } => {
            out.0.push(if *spec == KeySpec::EcP256 { 1 } else { 2 });
            out.part(x).part(y);
        }
        PublicKey::Rsa { n, e } => {
            out.0.push(3);
            out.part(n).part(e);
        }
    }
    out.0
}

/// Reads [`encode_public_key`] without its kind.
pub(super) fn decode_public_key(bytes: &[u8]) -> Result<PublicKey, Garbled> {
    let mut reader = Reader::new(bytes);
    let [code] = reader.array()?;
    let (one, two) = (reader.long()?.to_vec(), reader.long()?.to_vec());
    reader.end()?;
    match code {
        1 => Ok(PublicKey::Ec { spec: KeySpec::EcP256, x: one, y: two }),
        2 => Ok(PublicKey::Ec { spec: KeySpec::EcP384, x: one, y: two }),
        3 => Ok(PublicKey::Rsa { n: one, e: two }),
        4 if two.is_empty() => Ok(PublicKey::Ed { x: one }),
        _ => Err(Garbled("unknown public key")),
    }
}

#[cfg(test)]
mod tests {
    use std::borrow::Cow;

    use super::{Ask, Count, decode_public_key, encode_public_key};
    use crate::seal::Context;
    use crate::seal::envelope::WrappedKey;
    use crate::seal::key::{
        Alg, Fingerprint, Kek, KekId, KeyRef, KeySpec, Pin, PublicKey, WrapMechanism, WrappedDek,
    };

    fn kek() -> Kek {
        let canary = WrappedDek { mechanism: WrapMechanism::AesGcm, iv: vec![7; 12], bytes: vec![9; 48] };
        let key = KeyRef::plan(KeySpec::Kek).unwrap().pinned(Pin::Canary(canary));
        Kek { id: KekId::generate().unwrap(), version: 3, key }
    }

    fn all() -> Vec<Ask<'static>> {
        let (kek, other) = (kek(), kek());
        let dek = WrappedDek { mechanism: WrapMechanism::AesGcm, iv: vec![1; 12], bytes: vec![2; 48] };
        let wrapped = WrappedKey::new(&kek, dek);
        let context = Context { tenant: "t", kind: "secret", record: "r\u{e9}", version: 9 };
        let key = KeyRef::plan(KeySpec::EcP384).unwrap().pinned(Pin::Fingerprint(Fingerprint([3; 32])));
        vec![
            Ask::Seal { kek: kek.clone(), context },
            Ask::Open { kek: kek.clone(), context, key: wrapped.clone(), iv: [4; 12], tag: [5; 16] },
            Ask::Rewrap { from: kek.clone(), to: other.clone(), context, key: wrapped.clone() },
            Ask::Sign { key: key.clone(), alg: Alg::Es384, digest: Cow::Owned(vec![6; 48]) },
            Ask::Mac { key: key.clone() },
            Ask::PublicKey { key: key.clone() },
            Ask::Generate { planned: KeyRef::plan(KeySpec::Rsa4096).unwrap(), is_given: false },
            Ask::Generate { planned: KeyRef::plan(KeySpec::Ed25519).unwrap(), is_given: true },
            Ask::List,
            Ask::Destroy { key: key.clone() },
            Ask::Inspect { key },
            Ask::Capabilities,
            Ask::Address,
            Ask::Export {
                from: kek.clone(),
                context,
                key: wrapped.clone(),
                address: [8; 32],
                aad: Cow::Owned(vec![1; 90]),
            },
            Ask::Import { to: other.clone(), context, parcel: [9; 80] },
            Ask::Count(Count::Read),
            Ask::Count(Count::Make),
            Ask::Count(Count::Advance { from: u64::MAX }),
        ]
    }

    #[test]
    fn a_request_survives_its_bytes_and_no_other_length_of_them() {
        for ask in all() {
            let bytes = ask.encode();
            assert!(Ask::decode(&bytes).unwrap() == ask, "{}", ask.name());
            let is_secret = matches!(ask, Ask::Seal { .. } | Ask::Generate { is_given: true, .. });
            assert_eq!(Ask::has_secret(&bytes), is_secret);
            for len in 0..bytes.len() {
                assert!(Ask::decode(&bytes[..len]).is_err(), "{} cut to {len}", ask.name());
            }
            assert!(Ask::decode(&[bytes, vec![0]].concat()).is_err(), "{} with more behind it", ask.name());
        }
    }

    #[test]
    fn a_public_key_survives_its_bytes() {
        let ec = |spec| PublicKey::Ec { spec, x: vec![1; 32], y: vec![2; 32] };
        let rsa = PublicKey::Rsa { n: vec![3; 256], e: vec![1, 0, 1] };
        let ed = PublicKey::Ed { x: vec![4; 32] };
        for key in [ec(KeySpec::EcP256), ec(KeySpec::EcP384), rsa, ed] {
            assert_eq!(decode_public_key(&encode_public_key(&key)[1..]).unwrap(), key);
        }
    }
}
