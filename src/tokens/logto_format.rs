//! Token sets as Logto stores them, for import and for the way back.
//!
//! One KEK from the environment wraps one DEK per row, both with AES-256-GCM and without associated data: a row
//! does not know whose it is. That is why Lacre only reads and writes this format at its border, and binds
//! the set to its user as soon as it has it. Randomness comes from the caller, so that the vectors are exact.
//!
//! Start with [`Kek::open`]; [`SealedSet::from_transport`] reads what verification records carry.

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use base64::Engine;
use base64::alphabet;
use base64::engine::general_purpose::STANDARD;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use secrecy::{ExposeSecret, SecretString};
use serde::Deserialize;
use serde_json::{Value, json};
use zeroize::Zeroizing;

const KEY_LEN: usize = 32;
const IV_LEN: usize = 12;
const TAG_LEN: usize = 16;
const WRAPPED_LEN: usize = IV_LEN + KEY_LEN + TAG_LEN;

/// Environment files are written by hand: padding is often lost there.
const LENIENT: GeneralPurpose = GeneralPurpose::new(
    &alphabet::STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// The text is not the base64 of 32 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not the base64 form of a 32-byte key")]
pub struct BadKek;

/// The bytes were not made under this KEK, or were altered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not made under this key, or altered")]
pub struct NotOurs;

/// What was decrypted, or was to carry it, does not have the form of a token set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a token set in the format of Logto")]
pub struct BadTokenSet;

/// The value of `SECRET_VAULT_KEK`; wiped when dropped.
pub struct Kek(Zeroizing<[u8; KEY_LEN]>);

/// The four columns of a row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SealedSet {
    /// IV, wrapped DEK and tag: 60 bytes.
    pub encrypted_dek: Vec<u8>,
    /// IV of the payload: 12 bytes.
    pub iv: Vec<u8>,
    /// Tag of the payload: 16 bytes.
    pub auth_tag: Vec<u8>,
    /// The payload.
    pub ciphertext: Vec<u8>,
}

/// The random part of a new row. None of it may be used twice.
pub struct Fresh {
    /// The DEK.
    pub dek: Zeroizing<[u8; KEY_LEN]>,
    /// For the DEK under the KEK.
    pub wrap_iv: [u8; IV_LEN],
    /// For the payload under the DEK.
    pub data_iv: [u8; IV_LEN],
}

/// The decrypted set.
#[derive(Deserialize)]
#[expect(clippy::struct_field_names, reason = "the names of RFC 6749, which the format has")]
pub(super) struct TokenSet {
    /// May be empty: such a set counts as none.
    pub access_token: SecretString,
    /// Absent unless issued.
    pub id_token: Option<SecretString>,
    /// Absent unless issued.
    pub refresh_token: Option<SecretString>,
}

/// [`SealedSet`] inside verification records, each value in base64.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Transport {
    iv: String,
    auth_tag: String,
    ciphertext: String,
    encrypted_dek: String,
}

impl Kek {
    /// Reads standard base64, with or without padding, and white space around it.
    ///
    /// # Errors
    /// `BadKek` unless it is the form of 32 bytes. Logto notices that at first use only.
    pub fn from_base64(text: &SecretString) -> Result<Self, BadKek> {
        let bytes = Zeroizing::new(LENIENT.decode(text.expose_secret().trim()).map_err(|_| BadKek)?);
        let mut key = Zeroizing::new([0; KEY_LEN]);
        if bytes.len() != KEY_LEN {
            return Err(BadKek);
        }
        key.copy_from_slice(&bytes);
        Ok(Self(key))
    }

    /// Decrypts a row: the UTF-8 JSON that `TokenSet::from_json` reads.
    ///
    /// # Errors
    /// `NotOurs` for other keys, other lengths and any altered bit.
    pub fn open(
        &self,
        encrypted_dek: &[u8],
        iv: &[u8],
        auth_tag: &[u8],
        ciphertext: &[u8],
    ) -> Result<Zeroizing<Vec<u8>>, NotOurs> {
        if encrypted_dek.len() != WRAPPED_LEN {
            return Err(NotOurs);
        }
        let (wrap_iv, wrapped) = encrypted_dek.split_at(IV_LEN);
        let (wrapped, wrap_tag) = wrapped.split_at(KEY_LEN);
        let dek = decrypt(self.0.as_slice(), wrap_iv, wrap_tag, wrapped)?;
        decrypt(&dek, iv, auth_tag, ciphertext)
    }

    /// Encrypts a row for Logto.
    ///
    /// # Errors
    /// `BadTokenSet` for a plaintext longer than AES-GCM can take.
    pub fn seal(&self, plaintext: &[u8], fresh: &Fresh) -> Result<SealedSet, BadTokenSet> {
        let (wrapped, wrap_tag) = encrypt(self.0.as_slice(), fresh.wrap_iv, fresh.dek.as_slice())?;
        let (ciphertext, auth_tag) = encrypt(fresh.dek.as_slice(), fresh.data_iv, plaintext)?;
        Ok(SealedSet {
            encrypted_dek: [&fresh.wrap_iv[..], &wrapped, &wrap_tag].concat(),
            iv: fresh.data_iv.to_vec(),
            auth_tag,
            ciphertext,
        })
    }
}

impl SealedSet {
    /// Reads the member `encryptedTokenSetBase64`.
    ///
    /// # Errors
    /// `BadTokenSet` for anything but the base64 of that JSON.
    pub fn from_transport(text: &str) -> Result<Self, BadTokenSet> {
        let bytes = |text: &str| STANDARD.decode(text).map_err(|_| BadTokenSet);
        let transport: Transport = serde_json::from_slice(&bytes(text)?).map_err(|_| BadTokenSet)?;
        Ok(Self {
            encrypted_dek: bytes(&transport.encrypted_dek)?,
            iv: bytes(&transport.iv)?,
            auth_tag: bytes(&transport.auth_tag)?,
            ciphertext: bytes(&transport.ciphertext)?,
        })
    }

    /// The member `encryptedTokenSetBase64`.
    pub fn to_transport(&self) -> String {
        let transport = json!({
            "iv": STANDARD.encode(&self.iv),
            "authTag": STANDARD.encode(&self.auth_tag),
            "ciphertext": STANDARD.encode(&self.ciphertext),
            "encryptedDek": STANDARD.encode(&self.encrypted_dek),
        });
        STANDARD.encode(transport.to_string())
    }

    /// [`Kek::open`] on these columns.
    pub fn open(&self, kek: &Kek) -> Result<Zeroizing<Vec<u8>>, NotOurs> {
        kek.open(&self.encrypted_dek, &self.iv, &self.auth_tag, &self.ciphertext)
    }
}

impl TokenSet {
    /// Reads the plaintext of a row.
    ///
    /// # Errors
    /// `BadTokenSet` if it is not such a JSON. The cause is left out: it could quote a token.
    pub(super) fn from_json(plaintext: &[u8]) -> Result<Self, BadTokenSet> {
        serde_json::from_slice(plaintext).map_err(|_| BadTokenSet)
    }

    /// The plaintext of a row, its members in Logto's order.
    #[cfg_attr(not(test), expect(dead_code, reason = "for the way back to Logto, which is not written yet"))]
    pub(super) fn to_json(&self) -> Zeroizing<String> {
        let rest = [("id_token", &self.id_token), ("refresh_token", &self.refresh_token)];
        let members = [("access_token", Some(&self.access_token))]
            .into_iter()
            .chain(rest.map(|(name, token)| (name, token.as_ref())))
            .filter_map(|(name, token)| token.map(|token| (name, token.expose_secret())));
        let mut json = Zeroizing::new(String::from("{"));
        for (name, token) in members {
            let comma = if json.len() > 1 { "," } else { "" };
            let quoted = Zeroizing::new(Value::from(token).to_string());
            json.extend([comma, "\"", name, "\":", &quoted]);
        }
        json.push('}');
        json
    }
}

fn aead(key: &[u8]) -> Option<LessSafeKey> {
    UnboundKey::new(&AES_256_GCM, key).ok().map(LessSafeKey::new)
}

fn decrypt(key: &[u8], iv: &[u8], tag: &[u8], ciphertext: &[u8]) -> Result<Zeroizing<Vec<u8>>, NotOurs> {
    let nonce = Nonce::try_assume_unique_for_key(iv).map_err(|_| NotOurs)?;
    // A shorter tag would be easier to forge.
    if tag.len() != TAG_LEN {
        return Err(NotOurs);
    }
    let mut buffer = Zeroizing::new(ciphertext.to_vec());
    let key = aead(key).ok_or(NotOurs)?;
    key.open_in_place_separate_tag(nonce, Aad::empty(), tag, &mut buffer).map_err(|_| NotOurs)?;
    Ok(buffer)
}

fn encrypt(key: &[u8], iv: [u8; IV_LEN], plaintext: &[u8]) -> Result<(Vec<u8>, Vec<u8>), BadTokenSet> {
    let mut buffer = Zeroizing::new(plaintext.to_vec());
    let key = aead(key).ok_or(BadTokenSet)?;
    let nonce = Nonce::assume_unique_for_key(iv);
    let tag = key.seal_in_place_separate_tag(nonce, Aad::empty(), &mut buffer).map_err(|_| BadTokenSet)?;
    Ok((buffer.to_vec(), tag.as_ref().to_vec()))
}

#[cfg(test)]
mod tests {
    use super::*;

    // The contract's vector (section 6.6); a running Logto server decrypted a row of this kind.
    const KEK: &str = "DtPWS09unRXGuRScB60qXqCSsrjd22dUlXt/0oZgxSo=";
    const PLAIN: &str = r#"{"access_token":"at-1","id_token":"it-1","refresh_token":"rt-1"}"#;
    const ENCRYPTED_DEK: &str = "a0a1a2a3a4a5a6a7a8a9aaab8861dcd1aceb8f9afa5810809a4eb7dde421573b9556df469b7209d94a1902f9d8bbcf97817f12034b61a1a44cab19c0";
    const IV: &str = "b0b1b2b3b4b5b6b7b8b9babb";
    const TAG: &str = "6f418834a624ec0a4e17ddf709ba8b07";
    const CIPHERTEXT: &str = "e2773bc88fa8c82c188cf8c9a833aaf8a65d3dff240ca31737aadd8533e997782771015317f3979a8979d22f5acbe7c6453263a8705e2cd277a81e4429aa0282";

    fn kek(text: &str) -> Result<Kek, BadKek> {
        Kek::from_base64(&SecretString::from(text))
    }

    fn bytes(text: &str) -> Vec<u8> {
        hex::decode(text).unwrap()
    }

    fn vector() -> SealedSet {
        SealedSet {
            encrypted_dek: bytes(ENCRYPTED_DEK),
            iv: bytes(IV),
            auth_tag: bytes(TAG),
            ciphertext: bytes(CIPHERTEXT),
        }
    }

    fn fresh() -> Fresh {
        let from = |first: u8| std::array::from_fn(|i| first + u8::try_from(i).unwrap());
        let dek = Zeroizing::new(std::array::from_fn(|i| u8::try_from(i).unwrap()));
        Fresh { dek, wrap_iv: from(0xa0), data_iv: from(0xb0) }
    }

    #[test]
    fn the_vector_opens_and_is_made_again() {
        let kek = kek(KEK).unwrap();
        assert_eq!(vector().open(&kek).unwrap().as_slice(), PLAIN.as_bytes());
        assert!(kek.seal(PLAIN.as_bytes(), &fresh()).unwrap() == vector());
    }

    #[test]
    fn every_flipped_bit_is_refused() {
        let kek = kek(KEK).unwrap();
        let columns: [fn(&mut SealedSet) -> &mut Vec<u8>; 4] =
            [|s| &mut s.encrypted_dek, |s| &mut s.iv, |s| &mut s.auth_tag, |s| &mut s.ciphertext];
        for column in columns {
            for bit in 0..column(&mut vector()).len() * 8 {
                let mut altered = vector();
                column(&mut altered)[bit / 8] ^= 1 << (bit % 8);
                assert_eq!(altered.open(&kek), Err(NotOurs), "bit {bit}");
            }
            for cut in [0, 1, column(&mut vector()).len() - 1] {
                let mut altered = vector();
                column(&mut altered).truncate(cut);
                assert_eq!(altered.open(&kek), Err(NotOurs), "cut to {cut}");
            }
            let mut altered = vector();
            column(&mut altered).push(0);
            assert_eq!(altered.open(&kek), Err(NotOurs), "one byte more");
        }
    }

    #[test]
    fn a_key_is_32_bytes_and_nothing_else() {
        let unpadded = KEK.trim_end_matches('=');
        for good in [KEK, unpadded, &format!(" {KEK}\n")] {
            assert!(vector().open(&kek(good).unwrap()).is_ok(), "{good}");
        }
        for bad in ["", "AAAA", &KEK[4..], &format!("AAAA{KEK}"), "not base64 at all", &"=".repeat(44)] {
            assert_eq!(kek(bad).err(), Some(BadKek), "{bad}");
        }
        let other = kek(&STANDARD.encode([7; 32])).unwrap();
        assert_eq!(vector().open(&other), Err(NotOurs));
    }

    #[test]
    fn a_token_set_is_read_and_written_in_logtos_order() {
        for text in [PLAIN, r#"{"access_token":"a\"\n"}"#, r#"{"access_token":"","refresh_token":"r"}"#] {
            let set = TokenSet::from_json(text.as_bytes()).unwrap();
            assert_eq!(set.to_json().as_str(), text);
        }
        let set = TokenSet::from_json(br#"{"x":1,"refresh_token":"r","access_token":"a","id_token":null}"#);
        assert_eq!(set.unwrap().to_json().as_str(), r#"{"access_token":"a","refresh_token":"r"}"#);
        for bad in [
            "",
            "[]",
            "{}",
            "null",
            r#"{"access_token":null}"#,
            r#"{"access_token":1}"#,
            "{\"access_token\":\"\u{0}\"}",
        ] {
            assert!(TokenSet::from_json(bad.as_bytes()).is_err(), "{bad}");
        }
        assert!(TokenSet::from_json(br#"{"access_token":"a","access_token":"b"}"#).is_err());
    }

    #[test]
    fn the_transport_form_goes_both_ways() {
        let text = vector().to_transport();
        let json = String::from_utf8(STANDARD.decode(&text).unwrap()).unwrap();
        assert!(json.starts_with(r#"{"iv":"sLGys7S1tre4ubq7","authTag":"b0"#), "{json}");
        assert!(SealedSet::from_transport(&text).unwrap() == vector());
        for bad in ["", "e30=", "!", &STANDARD.encode(json.replace("b0G", "b0!")), &json] {
            assert_eq!(SealedSet::from_transport(bad).err(), Some(BadTokenSet), "{bad}");
        }
    }
}
