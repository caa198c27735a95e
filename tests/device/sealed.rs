//! Sealed values and a device: read and made by foreign code from the document alone, and every bit of
//! them turned (CB-2, CB-3, CB-10).

use aes_gcm::aead::{Aead, KeyInit, Payload};
use aes_gcm::{Aes256Gcm, Nonce};
use cryptoki_sys::CKO_SECRET_KEY;
use lacre::seal::{Context, Kek, KekId, SealError, Sealed};

use crate::stage::{HERE, stage};

/// The encoding of docs/formats/sealed-v1.md, written down again.
fn parts(parts: &[&[u8]]) -> Vec<u8> {
    let framed =
        parts.iter().map(|part| [&u32::try_from(part.len()).unwrap().to_be_bytes()[..], part].concat());
    framed.collect::<Vec<_>>().concat()
}

fn payload_aad(place: &Context<'_>) -> Vec<u8> {
    let version = place.version.to_be_bytes();
    let (tenant, kind, record) = (place.tenant.as_bytes(), place.kind.as_bytes(), place.record.as_bytes());
    parts(&[b"lacre/sealed/v1/payload", tenant, kind, record, &version])
}

fn wrap_aad(place: &Context<'_>, kek: &Kek) -> Vec<u8> {
    let (version, kek_version) = (place.version.to_be_bytes(), kek.version.to_be_bytes());
    let (tenant, kind, record) = (place.tenant.as_bytes(), place.kind.as_bytes(), place.record.as_bytes());
    let id = kek.id.as_bytes();
    parts(&[b"lacre/sealed/v1/wrap", tenant, kind, record, &version, id, &kek_version, b"A256GCM"])
}

#[tokio::test]
async fn foreign_code_opens_what_lacre_sealed_and_the_other_way_round() {
    let stage = stage().await;
    let device = stage.start();
    let kek = device.kek().await;
    let other = stage.other_session();
    let handle = other.find(CKO_SECRET_KEY, kek.key.id().as_bytes()).unwrap();

    let sealed = device.sealer.seal(&kek, &HERE, b"made by Lacre").await.unwrap().to_bytes();
    // Offsets as in the document's worked example.
    let mut dek = [0; 48];
    let read =
        other.gcm_open(handle, &sealed[34..46], &wrap_aad(&HERE, &kek), &sealed[47..95], &mut dek).unwrap();
    assert_eq!(read, 32);
    let cipher = Aes256Gcm::new_from_slice(&dek[..32]).unwrap();
    let iv: [u8; 12] = sealed[104..116].try_into().unwrap();
    let body = Payload { msg: &sealed[120..], aad: &payload_aad(&HERE) };
    assert_eq!(cipher.decrypt(&Nonce::from(iv), body).unwrap(), b"made by Lacre");

    let (dek, mut wrap_iv, iv) = ([0x5a; 32], [7; 12], [9; 12]);
    let wrapped = other.gcm_seal(handle, &mut wrap_iv, &wrap_aad(&HERE, &kek), &dek).unwrap();
    let body = Payload { msg: b"made elsewhere", aad: &payload_aad(&HERE) };
    let body = Aes256Gcm::new_from_slice(&dek).unwrap().encrypt(&Nonce::from(iv), body).unwrap();
    let made = [
        &b"LCRS\x01"[..],
        kek.id.as_bytes(),
        &kek.version.to_be_bytes(),
        b"\x07A256GCM\x0c",
        &wrap_iv,
        b"\x30",
        &wrapped,
        b"\x07A256GCM\x0c",
        &iv,
        &14_u32.to_be_bytes(),
        &body,
    ]
    .concat();
    let opened = device.sealer.open(&kek, &HERE, &Sealed::from_bytes(&made).unwrap()).await.unwrap();
    opened.with(|value| assert_eq!(value, b"made elsewhere"));
    assert_eq!(stage.control.count("bad_gcm_params"), 0);
}

#[tokio::test]
async fn every_turned_bit_is_rejected_in_the_same_way() {
    let stage = stage().await;
    let device = stage.start();
    let kek = device.kek().await;
    let sealed = device.sealer.seal(&kek, &HERE, b"16 bytes of text").await.unwrap();
    let columns = sealed.into_columns();
    let mut tried = 0;
    for column in 0..columns.len() {
        for bit in 0..columns[column].len() * 8 {
            let mut other = columns.clone();
            other[column][bit / 8] ^= 1 << (bit % 8);
            tried += 1;
            let [wrapped, iv, ciphertext, tag] = other;
            // Refused as bytes, or by the device: never opened, never an error that says which byte.
            let Ok(sealed) = Sealed::from_columns(&wrapped, &iv, ciphertext, &tag) else { continue };
            let answer = device.sealer.open(&kek, &HERE, &sealed).await;
            assert!(
                matches!(answer, Err(SealError::Rejected)),
                "column {column}, bit {bit}: {:?}",
                answer.err()
            );
        }
    }
    assert_eq!(tried, 8 * (95 + 12 + 16 + 16));
    opens_still(&device, &kek).await;
    assert_eq!(stage.control.count("bad_gcm_params"), 0);
}

async fn opens_still(device: &crate::stage::Running, kek: &Kek) {
    let sealed = device.sealer.seal(kek, &HERE, b"still well").await.unwrap();
    device.sealer.open(kek, &HERE, &sealed).await.unwrap().with(|value| assert_eq!(value, b"still well"));
}

#[tokio::test]
async fn every_single_part_of_the_place_and_of_the_kek_counts() {
    let stage = stage().await;
    for wrap in ["A256GCM", "A256KW-OBJ"] {
        let device = stage.try_start(serde_json::json!({}), serde_json::json!({ "wrap": wrap }), 64).unwrap();
        let kek = device.kek().await;
        let place = Context { tenant: "ab", kind: "c", record: "de", version: 7 };
        let sealed = device.sealer.seal(&kek, &place, b"value").await.unwrap();
        let others = [
            Context { tenant: "a", kind: "bc", ..place },
            Context { tenant: "ab\0", ..place },
            Context { tenant: "", ..place },
            Context { kind: "cd", record: "e", ..place },
            Context { kind: "C", ..place },
            Context { record: "d\u{e9}", ..place },
            Context { version: 8, ..place },
            Context { version: 7 << 32, ..place },
        ];
        for other in others {
            let answer = device.sealer.open(&kek, &other, &sealed).await;
            assert!(matches!(answer, Err(SealError::Rejected)), "{wrap} {other:?}: {:?}", answer.err());
        }
        // Relabelled as another version or another tenant's KEK, in the header and in what is asked
        // with: the same device key, and still another wrap AAD (CB-10).
        let mut relabelled = sealed.to_bytes();
        relabelled[24] = 2;
        let as_two = Kek { version: 2, ..kek.clone() };
        let answer = device.sealer.open(&as_two, &place, &Sealed::from_bytes(&relabelled).unwrap()).await;
        assert!(matches!(answer, Err(SealError::Rejected)), "{wrap}: {:?}", answer.err());
        let foreign = Kek { id: KekId::generate().unwrap(), ..kek.clone() };
        let mut relabelled = sealed.to_bytes();
        relabelled[5..21].copy_from_slice(foreign.id.as_bytes());
        let answer = device.sealer.open(&foreign, &place, &Sealed::from_bytes(&relabelled).unwrap()).await;
        assert!(matches!(answer, Err(SealError::Rejected)), "{wrap}: {:?}", answer.err());
        device.sealer.open(&kek, &place, &sealed).await.unwrap();
    }
}
