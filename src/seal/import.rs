//! Private keys from outside: what is in a PKCS#8 key, looked at before a device is given it.
//!
//! The numbers are read in place, out of the buffer that the key came in, and no copy of them is made here. Whether they
//! belong together is aws-lc's judgement, in memory that it wipes.

use aws_lc_rs::rsa::KeyPair as RsaKeyPair;
use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_FIXED_SIGNING, ECDSA_P384_SHA384_FIXED_SIGNING, EcdsaKeyPair, Ed25519KeyPair, KeyPair,
};
use p256::pkcs8::PrivateKeyInfoRef;
use p256::pkcs8::der::asn1::{ObjectIdentifier, OctetStringRef, UintRef};
use p256::pkcs8::der::{Decode, Reader, SliceReader};

use crate::seal::key::{KeySpec, PublicKey};
use crate::seal::rsa_check::{WeakRsa, check_rsa};

/// The longest private key that is taken: PKCS#8 of RSA 4096 has 2.4 KiB.
pub const LARGEST_PRIVATE: usize = 8 << 10;

/// How long the secret of an imported MAC key may be, in octets: from the strength of the other keys to the block of
/// SHA-256, beyond which HMAC would shorten it.
pub const MAC_SECRET: std::ops::RangeInclusive<usize> = 16..=64;

const RSA: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.1.1");
const EC: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.10045.2.1");
const P256: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.10045.3.1.7");
const P384: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.132.0.34");
const ED25519: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.101.112");

/// Why a private key is not taken. Says nothing of the key itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadPrivateKey {
    /// No DER of an unencrypted PKCS#8 `PrivateKeyInfo` (RFC 5208).
    #[error("not an unencrypted PKCS#8 private key in DER")]
    Form,
    /// An algorithm, curve or size that keys do not have here.
    #[error("a private key of a kind that is not kept here")]
    Kind,
    /// An RSA key that anybody can factor.
    #[error("a weak RSA key: {0}")]
    Weak(WeakRsa),
    /// Its numbers do not belong together.
    #[error("the numbers of the private key do not belong together")]
    Inconsistent,
}

/// The public half of a PKCS#8 key in DER, once its numbers were found to belong together. Its
/// [`PublicKey::spec`] is the kind to plan for `KeyAdmin::import`.
///
/// # Errors
/// [`BadPrivateKey`]: such a key would not be imported either.
pub fn public_half(pkcs8: &[u8]) -> Result<PublicKey, BadPrivateKey> {
    read(pkcs8).map(|given| given.public)
}

/// A private key in numbers, in the buffer that it came in.
pub(crate) struct Given<'a> {
    pub(crate) spec: KeySpec,
    pub(crate) public: PublicKey,
    pub(crate) private: Private<'a>,
}

/// What a device needs of the private half.
pub(crate) enum Private<'a> {
    /// The scalar of an EC key, the seed of an Ed25519 key.
    Scalar(&'a [u8]),
    /// d, p, q, d mod p - 1, d mod q - 1, the inverse of q mod p.
    Rsa([&'a [u8]; 6]),
}

/// Reads a PKCS#8 key and judges it.
pub(crate) fn read(pkcs8: &[u8]) -> Result<Given<'_>, BadPrivateKey> {
    let info = PrivateKeyInfoRef::try_from(pkcs8).map_err(|_| BadPrivateKey::Form)?;
    let inner = info.private_key.as_bytes();
    if info.algorithm.oid == RSA {
        return rsa(pkcs8, inner);
    }
    if info.algorithm.oid == EC {
        let curve = info.algorithm.parameters_oid().map_err(|_| BadPrivateKey::Kind)?;
        return ec(pkcs8, inner, curve);
    }
    if info.algorithm.oid == ED25519 {
        return ed25519(pkcs8, inner);
    }
    Err(BadPrivateKey::Kind)
}

/// `ECPrivateKey` (RFC 5915): version, the scalar, and what may follow it.
fn ec<'a>(pkcs8: &'a [u8], inner: &'a [u8], curve: ObjectIdentifier) -> Result<Given<'a>, BadPrivateKey> {
    let (spec, algorithm) = match curve {
        P256 => (KeySpec::EcP256, &ECDSA_P256_SHA256_FIXED_SIGNING),
        P384 => (KeySpec::EcP384, &ECDSA_P384_SHA384_FIXED_SIGNING),
        _ => return Err(BadPrivateKey::Kind),
    };
    let scalar = sequence(inner, |reader| {
        let (_, scalar) = (u8::decode(reader)?, <&OctetStringRef>::decode(reader)?);
        reader.read_slice(reader.remaining_len())?;
        Ok(scalar.as_bytes())
    })?;
    let pair = EcdsaKeyPair::from_pkcs8(algorithm, pkcs8).map_err(|_| BadPrivateKey::Inconsistent)?;
    let [4, xy @ ..] = pair.public_key().as_ref() else { return Err(BadPrivateKey::Inconsistent) };
    let (x, y) = xy.split_at(xy.len() / 2);
    let public = PublicKey::Ec { spec, x: x.to_vec(), y: y.to_vec() };
    if scalar.len() != x.len() {
        return Err(BadPrivateKey::Form);
    }
    Ok(Given { spec, public, private: Private::Scalar(scalar) })
}

/// `RSAPrivateKey` of two primes (RFC 8017, appendix A.1.2).
fn rsa<'a>(pkcs8: &'a [u8], inner: &'a [u8]) -> Result<Given<'a>, BadPrivateKey> {
    let (n, e, private) = sequence(inner, |reader| {
        u8::decode(reader)?;
        let mut number = || UintRef::decode(reader).map(|number| number.as_bytes());
        let (n, e) = (number()?, number()?);
        Ok((n, e, [number()?, number()?, number()?, number()?, number()?, number()?]))
    })?;
    let public = PublicKey::Rsa { n: n.to_vec(), e: e.to_vec() };
    let spec = public.spec().ok_or(BadPrivateKey::Kind)?;
    check_rsa(n, e).map_err(BadPrivateKey::Weak)?;
    RsaKeyPair::from_pkcs8(pkcs8).map_err(|_| BadPrivateKey::Inconsistent)?;
    Ok(Given { spec, public, private: Private::Rsa(private) })
}

/// `CurvePrivateKey` (RFC 8410, section 7).
fn ed25519<'a>(pkcs8: &'a [u8], inner: &'a [u8]) -> Result<Given<'a>, BadPrivateKey> {
    let seed = <&OctetStringRef>::from_der(inner).map_err(|_| BadPrivateKey::Form)?.as_bytes();
    let pair = Ed25519KeyPair::from_pkcs8_maybe_unchecked(pkcs8).map_err(|_| BadPrivateKey::Inconsistent)?;
    let public = PublicKey::Ed { x: pair.public_key().as_ref().to_vec() };
    Ok(Given { spec: KeySpec::Ed25519, public, private: Private::Scalar(seed) })
}

/// Reads one SEQUENCE, which is all there is.
fn sequence<'a, T>(
    der: &'a [u8],
    read: impl FnOnce(&mut SliceReader<'a>) -> p256::pkcs8::der::Result<T>,
) -> Result<T, BadPrivateKey> {
    SliceReader::new(der)
        .and_then(|mut reader| {
            let value = reader.sequence(read)?;
            reader.finish()?;
            Ok(value)
        })
        .map_err(|_| BadPrivateKey::Form)
}
