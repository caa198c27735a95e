//! The address of a sealed value and its encoding as associated data.
//!
//! One type and one encoder, so that no ciphertext exists whose place is not bound to it. The bytes
//! are frozen in `docs/formats/sealed-v1.md` and `tests/vectors/`.

use crate::seal::key::Kek;

const PAYLOAD_LABEL: &[u8] = b"lacre/sealed/v1/payload";
const WRAP_LABEL: &[u8] = b"lacre/sealed/v1/wrap";

/// Says what a ciphertext is for and where it is kept. A value opens only under the `Context` it
/// was sealed with, so a row copied over another row does not open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Context<'a> {
    /// The tenant that owns it.
    pub tenant: &'a str,
    /// What it is: `secret`, `external`, `data-key`, ...
    pub kind: &'a str,
    /// The record's id, or the caller's own context text.
    pub record: &'a str,
    /// The record's version.
    pub version: u64,
}

impl Context<'_> {
    /// AAD of the payload: the context alone, so that a rewrap does not touch the payload.
    pub fn payload_aad(&self) -> Vec<u8> {
        self.encode(PAYLOAD_LABEL, &[])
    }

    /// AAD of the wrap: the context, and the KEK id, KEK version and mechanism that wrapped it.
    pub fn wrap_aad(&self, kek: &Kek) -> Vec<u8> {
        let version = kek.version.to_be_bytes();
        self.encode(WRAP_LABEL, &[kek.id.as_bytes(), &version, kek.mechanism_name().as_bytes()])
    }

    /// Which queue of the worker this belongs to: one tenant's burst waits behind itself.
    pub(crate) fn flow(&self) -> u64 {
        // FNV-1a: fairness needs spread, not secrecy.
        self.tenant
            .bytes()
            .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
    }

    /// Every part is length-prefixed (32 bits, big endian): `("a", "bc")` and `("ab", "c")` differ.
    fn encode(&self, label: &[u8], more: &[&[u8]]) -> Vec<u8> {
        let version = self.version.to_be_bytes();
        let parts: [&[u8]; 5] =
            [label, self.tenant.as_bytes(), self.kind.as_bytes(), self.record.as_bytes(), &version];
        let parts = parts.iter().chain(more);
        let mut aad = Vec::with_capacity(160);
        for part in parts {
            #[expect(clippy::expect_used, reason = "the parts are limited far below 4 GiB at the edge")]
            let len = u32::try_from(part.len()).expect("context parts are far below 4 GiB");
            aad.extend_from_slice(&len.to_be_bytes());
            aad.extend_from_slice(part);
        }
        aad
    }
}

#[cfg(test)]
mod tests {
    use super::Context;

    fn context<'a>(tenant: &'a str, kind: &'a str) -> Context<'a> {
        Context { tenant, kind, record: "r", version: 1 }
    }

    #[test]
    fn shifted_boundaries_give_other_bytes() {
        assert_ne!(context("ab", "c").payload_aad(), context("a", "bc").payload_aad());
        assert_ne!(context("", "abc").payload_aad(), context("abc", "").payload_aad());
        assert_ne!(context("a\0", "b").payload_aad(), context("a", "\0b").payload_aad());
    }
}
