//! Foreign code that accepts a signature or does not: the openssl command, and aws-lc for many rounds.

use std::fs;
use std::path::Path;
use std::process::Command;

use aws_lc_rs::rsa::PublicKeyComponents;
use aws_lc_rs::signature as aws;
use lacre::seal::{Alg, KeySpec, PublicKey};

fn tlv(tag: u8, body: &[u8]) -> Vec<u8> {
    let len = body.len().to_be_bytes();
    let short: Vec<u8> = len.into_iter().skip_while(|byte| *byte == 0).collect();
    let len = match body.len() {
        0..=127 => vec![u8::try_from(body.len()).unwrap()],
        _ => [&[0x80 | u8::try_from(short.len()).unwrap()], short.as_slice()].concat(),
    };
    [&[tag], len.as_slice(), body].concat()
}

fn integer(number: &[u8]) -> Vec<u8> {
    let mut bytes: Vec<u8> = number.iter().copied().skip_while(|byte| *byte == 0).collect();
    if bytes[0] & 0x80 != 0 {
        bytes.insert(0, 0);
    }
    tlv(2, &bytes)
}

/// `SubjectPublicKeyInfo` (RFC 5280, RFC 5480, RFC 8017), written from the numbers.
fn spki(key: &PublicKey) -> Vec<u8> {
    const EC: &[u8] = &[0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01];
    const P256: &[u8] = &[0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07];
    const P384: &[u8] = &[0x06, 0x05, 0x2b, 0x81, 0x04, 0x00, 0x22];
    const RSA: &[u8] = &[0x06, 0x09, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x01, 0x05, 0x00];
    let (algorithm, bits) = match key {
        PublicKey::Ec { spec, x, y } => {
            let curve = if *spec == KeySpec::EcP256 { P256 } else { P384 };
            (tlv(0x30, &[EC, curve].concat()), [&[4], x.as_slice(), y].concat())
        }
        PublicKey::Rsa { n, e } => (tlv(0x30, RSA), tlv(0x30, &[integer(n), integer(e)].concat())),
        // RFC 8410.
        PublicKey::Ed { x } => (tlv(0x30, &[0x06, 0x03, 0x2b, 0x65, 0x70]), x.clone()),
    };
    tlv(0x30, &[algorithm, tlv(3, &[&[0], bits.as_slice()].concat())].concat())
}

/// `r || s` as the DER that OpenSSL wants (RFC 3279, section 2.2.3).
fn der(signature: &[u8]) -> Vec<u8> {
    let (r, s) = signature.split_at(signature.len() / 2);
    tlv(0x30, &[integer(r), integer(s)].concat())
}

/// Whether the openssl command verifies the signature; `dir` is for its files.
pub fn verifies(dir: &Path, key: &PublicKey, alg: Alg, message: &[u8], signature: &[u8]) -> bool {
    let [public, message_file, signature_file] =
        ["public.der", "message", "signature"].map(|name| dir.join(name));
    fs::write(&public, spki(key)).unwrap();
    fs::write(&message_file, message).unwrap();
    let ecdsa = matches!(alg, Alg::Es256 | Alg::Es384);
    fs::write(&signature_file, if ecdsa { der(signature) } else { signature.to_vec() }).unwrap();
    let mut command = Command::new("openssl");
    if alg == Alg::EdDsa {
        command.args(["pkeyutl", "-verify", "-pubin", "-keyform", "DER", "-rawin", "-inkey"]).arg(public);
        command.arg("-sigfile").arg(&signature_file).arg("-in").arg(&message_file);
        return command.output().expect("openssl is installed").status.success();
    }
    command.args(["dgst", if alg == Alg::Es384 { "-sha384" } else { "-sha256" }, "-keyform", "DER"]);
    if alg == Alg::Ps256 {
        command.args(["-sigopt", "rsa_padding_mode:pss", "-sigopt", "rsa_pss_saltlen:32"]);
    }
    command.arg("-verify").arg(public).arg("-signature").arg(&signature_file).arg(&message_file);
    command.output().expect("openssl is installed").status.success()
}

/// The same by aws-lc, in this process.
pub fn verifies_here(key: &PublicKey, alg: Alg, message: &[u8], signature: &[u8]) -> bool {
    match key {
        PublicKey::Ec { x, y, .. } => {
            let point = [&[4], x.as_slice(), y].concat();
            let fixed: &'static dyn aws::VerificationAlgorithm = match alg {
                Alg::Es384 => &aws::ECDSA_P384_SHA384_FIXED,
                _ => &aws::ECDSA_P256_SHA256_FIXED,
            };
            aws::UnparsedPublicKey::new(fixed, point).verify(message, signature).is_ok()
        }
        PublicKey::Rsa { n, e } => {
            let padding = match alg {
                Alg::Ps256 => &aws::RSA_PSS_2048_8192_SHA256,
                _ => &aws::RSA_PKCS1_2048_8192_SHA256,
            };
            PublicKeyComponents { n, e }.verify(padding, message, signature).is_ok()
        }
        PublicKey::Ed { x } => {
            aws::UnparsedPublicKey::new(&aws::ED25519, x).verify(message, signature).is_ok()
        }
    }
}
