//! How a DEK gets from one sealer process to another when a record moves between devices.
//!
//! The daemon carries it and never has it: the process that unwraps encrypts it for the process that will wrap
//! it. Each process has a key pair for as long as it lives (X25519, RFC 7748). The DEK goes under a key of its own
//! (HKDF-SHA256, RFC 5869, over the agreement and both public keys; AES-256-GCM), bound to context and KEK of
//! the new wrap. Against a daemon that lies this protects nothing: it could ask for the value itself. What
//! is sent to a process can be opened with its key for as long as it lives.

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use aws_lc_rs::agreement::{PrivateKey, UnparsedPublicKey, X25519, agree};
use aws_lc_rs::hkdf::{HKDF_SHA256, Salt};

use crate::seal::SealError;
use crate::seal::envelope::DEK_LEN;
use crate::seal::guarded::SecretBuf;

const LABEL: &[u8] = b"lacre/dek-transfer/v1";
const PUBLIC_LEN: usize = 32;
const TAG_LEN: usize = 16;

/// Where DEKs for a process are encrypted to: its public key.
pub(crate) type Address = [u8; PUBLIC_LEN];

/// A DEK on its way: the sender's public key, the encrypted DEK, the tag.
pub(crate) type Parcel = [u8; PUBLIC_LEN + DEK_LEN + TAG_LEN];

/// The parcel is for another process, such as one that has ended since, or was altered.
#[derive(Debug)]
pub(crate) struct Undeliverable;

/// The receiving end of a process.
pub(crate) struct Mailbox {
    private: PrivateKey,
    pub(crate) address: Address,
}

impl Mailbox {
    pub(crate) fn new() -> Result<Self, SealError> {
        let private = PrivateKey::generate(&X25519).map_err(|_| SealError::no_randomness())?;
        let address = public(&private).ok_or_else(SealError::no_randomness)?;
        Ok(Self { private, address })
    }

    /// Decrypts into the beginning of `out`, which has room for a DEK.
    pub(crate) fn open(&self, parcel: &Parcel, aad: &[u8], out: &mut SecretBuf) -> Result<(), Undeliverable> {
        let (sender, rest) = parcel.split_at(PUBLIC_LEN);
        let key = key(&self.private, sender, (sender, &self.address))?;
        let (cipher, tag) = rest.split_at(DEK_LEN);
        out.with_mut(|out| {
            let dek = out.get_mut(..DEK_LEN).ok_or(Undeliverable)?;
            dek.copy_from_slice(cipher);
            let opened = key.open_in_place_separate_tag(nonce(), Aad::from(aad), tag, dek);
            opened.map(drop).map_err(|_| Undeliverable)
        })
    }
}

/// Encrypts the DEK at the beginning of `dek` for `to`, in place: no copy of it is made.
pub(crate) fn pack(dek: &mut SecretBuf, to: &Address, aad: &[u8]) -> Result<Parcel, Undeliverable> {
    let private = PrivateKey::generate(&X25519).map_err(|_| Undeliverable)?;
    let sender = public(&private).ok_or(Undeliverable)?;
    let key = key(&private, to, (&sender, to))?;
    let mut parcel = [0; PUBLIC_LEN + DEK_LEN + TAG_LEN];
    let (head, rest) = parcel.split_at_mut(PUBLIC_LEN);
    head.copy_from_slice(&sender);
    let (cipher, end) = rest.split_at_mut(DEK_LEN);
    dek.with_mut(|dek| {
        let dek = dek.get_mut(..DEK_LEN).ok_or(Undeliverable)?;
        let tag = key.seal_in_place_separate_tag(nonce(), Aad::from(aad), dek).map_err(|_| Undeliverable)?;
        cipher.copy_from_slice(dek);
        end.copy_from_slice(tag.as_ref());
        Ok(())
    })?;
    Ok(parcel)
}

fn public(private: &PrivateKey) -> Option<Address> {
    private.compute_public_key().ok()?.as_ref().try_into().ok()
}

/// Each key encrypts one DEK, so its nonce may be the same.
fn nonce() -> Nonce {
    Nonce::assume_unique_for_key([0; 12])
}

fn key(
    own: &PrivateKey,
    other: &[u8],
    (sender, receiver): (&[u8], &[u8]),
) -> Result<LessSafeKey, Undeliverable> {
    agree(own, UnparsedPublicKey::new(&X25519, other), Undeliverable, |shared| {
        let secret = Salt::new(HKDF_SHA256, LABEL).extract(shared);
        let parts = [sender, receiver];
        let derived = secret.expand(&parts, &AES_256_GCM).map_err(|_| Undeliverable)?;
        Ok(LessSafeKey::new(UnboundKey::from(derived)))
    })
}

#[cfg(test)]
mod tests {
    use super::{DEK_LEN, Mailbox, Parcel, pack};
    use crate::seal::guarded::{Arena, Options, SecretBuf};

    fn dek(arena: &Arena) -> SecretBuf {
        let mut dek = arena.try_take(64).unwrap();
        dek.with_mut(|bytes| bytes[..DEK_LEN].fill(7));
        dek
    }

    #[test]
    fn a_parcel_opens_for_its_process_and_its_place_only() {
        let arena = Arena::new(&Options { slots: 8, allow_unlocked: true, ..Options::default() }).unwrap();
        let (mailbox, other) = (Mailbox::new().unwrap(), Mailbox::new().unwrap());
        let mut sent = dek(&arena);
        let parcel = pack(&mut sent, &mailbox.address, b"here").unwrap();
        assert!(sent.with(|bytes| bytes[..DEK_LEN] != [7; DEK_LEN]), "it was encrypted in its place");
        assert!(!parcel.windows(8).any(|part| part == [7; 8]));
        // The same DEK never looks the same.
        assert_ne!(parcel, pack(&mut dek(&arena), &mailbox.address, b"here").unwrap());

        let opens = |mailbox: &Mailbox, parcel: &Parcel, aad: &[u8]| {
            let mut out = arena.try_take(64).unwrap();
            mailbox.open(parcel, aad, &mut out).is_ok() && out.with(|bytes| bytes[..DEK_LEN] == [7; DEK_LEN])
        };
        assert!(opens(&mailbox, &parcel, b"here") && opens(&mailbox, &parcel, b"here"));
        assert!(!opens(&mailbox, &parcel, b"there") && !opens(&other, &parcel, b"here"));
        for at in 0..parcel.len() {
            let mut altered = parcel;
            altered[at] ^= 1;
            assert!(!opens(&mailbox, &altered, b"here"), "byte {at}");
        }
    }
}
