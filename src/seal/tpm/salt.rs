//! What the chip keeps of a KEK: 32 bytes of its template, in an index of its non-volatile memory.
//!
//! The template is what a primary is computed from, so with the index the KEK is gone for good, and what it
//! had sealed stays shut, in backups too.

use tss_esapi::Context;
use tss_esapi::attributes::NvIndexAttributesBuilder;
use tss_esapi::constants::NvIndexType;
use tss_esapi::handles::{NvIndexTpmHandle, ObjectHandle, TpmHandle};
use tss_esapi::interface_types::algorithm::HashingAlgorithm;
use tss_esapi::interface_types::resource_handles::{NvAuth, Provision};
use tss_esapi::structures::{MaxNvBuffer, NvPublicBuilder};

use super::error::Fail;
use super::link::Link;
use crate::seal::backend::BackendError;
use crate::seal::key::KeyId;

/// The owner's indices (registry of reserved TPM handles, section 2.2.2): 22 bits of a key's id choose one.
const NV_FIRST: u32 = 0x0180_0000;
const NV_BITS: u32 = 0x003F_FFFF;
/// A key's id and 32 random bytes.
const NV_LEN: usize = 16 + 32;
/// `TPM_RC_NV_RANGE`, `TPM_RC_NV_AUTHORIZATION`, `TPM_RC_NV_UNINITIALIZED`.
pub(super) const NV_RANGE: u32 = 0x146;
pub(super) const NV_AUTHORIZATION: u32 = 0x149;
pub(super) const NV_UNINITIALIZED: u32 = 0x14A;

pub(super) fn refused(function: &'static str) -> BackendError {
    BackendError::Refused { function, code: 0 }
}

fn nv_index(id: KeyId) -> Result<NvIndexTpmHandle, BackendError> {
    let [a, b, c, ..] = *id.as_bytes();
    nv_index_of([a, b, c])
}

/// The owner's index that 22 of these bits choose.
pub(super) fn nv_index_of([a, b, c]: [u8; 3]) -> Result<NvIndexTpmHandle, BackendError> {
    NvIndexTpmHandle::new(NV_FIRST | (u32::from_be_bytes([0, a, b, c]) & NV_BITS))
        .map_err(|_| refused("NV index"))
}

/// What an index holds.
enum Kept {
    /// There is no such index.
    Nothing,
    /// It was defined and never written: a crash came in between.
    Unwritten,
    /// The salt of this KEK.
    Salt([u8; 32]),
    /// Something of somebody else, or of another KEK.
    Foreign,
}

fn look(link: &mut Link, id: KeyId) -> Result<Kept, BackendError> {
    let index = nv_index(id)?;
    // An error is no answer: only a TPM that lists its indices, and proves that it is its list, can be without one.
    if !link.handles_for_sure(u32::from(index))?.contains(&TpmHandle::NvIndex(index)) {
        return Ok(Kept::Nothing);
    }
    let fail = |error| Fail::new("TPM2_NV_Read", error);
    let mut handle = link.context.tr_from_tpm_public(TpmHandle::NvIndex(index)).map_err(fail)?;
    let sessions = link.as_owner();
    let len = u16::try_from(NV_LEN).unwrap_or(u16::MAX);
    let read = link
        .command("TPM2_NV_Read", sessions, |context| context.nv_read(NvAuth::Owner, handle.into(), len, 0));
    link.context.tr_close(&mut handle).map_err(fail)?;
    match read {
        Ok(data) => Ok(match data.value().split_first_chunk::<16>() {
            Some((owner, salt)) if owner == id.as_bytes() => {
                salt.try_into().map_or(Kept::Foreign, Kept::Salt)
            }
            _ => Kept::Foreign,
        }),
        Err(fail) => match fail.code & 0xFFFF {
            NV_UNINITIALIZED => Ok(Kept::Unwritten),
            // Of another size, or not the owner's to read.
            NV_RANGE | NV_AUTHORIZATION => Ok(Kept::Foreign),
            _ => Err(fail.into()),
        },
    }
}

/// What the chip keeps of a KEK; `None` if it keeps nothing under that id.
pub(super) fn read_salt(link: &mut Link, id: KeyId) -> Result<Option<[u8; 32]>, BackendError> {
    Ok(match look(link, id)? {
        Kept::Salt(salt) => Some(salt),
        Kept::Nothing | Kept::Unwritten | Kept::Foreign => None,
    })
}

/// Defines an index that is the owner's to read and write.
pub(super) fn define_index(
    link: &mut Link,
    index: NvIndexTpmHandle,
    kind: NvIndexType,
    len: usize,
) -> Result<ObjectHandle, BackendError> {
    let attributes = NvIndexAttributesBuilder::new()
        .with_nv_index_type(kind)
        .with_owner_write(true)
        .with_owner_read(true)
        .with_no_da(true)
        .build()
        .map_err(|_| refused("NV attributes"))?;
    let public = NvPublicBuilder::new()
        .with_nv_index(index)
        .with_index_name_algorithm(HashingAlgorithm::Sha256)
        .with_index_attributes(attributes)
        .with_data_area_size(len)
        .build()
        .map_err(|_| refused("NV template"))?;
    let sessions = link.as_owner();
    let define = |context: &mut Context| context.nv_define_space(Provision::Owner, None, public);
    Ok(link.command("TPM2_NV_DefineSpace", sessions, define)?.into())
}

/// Gives the chip something to keep for a KEK; repeated, it is what is there already.
pub(super) fn make_salt(link: &mut Link, id: KeyId) -> Result<(), BackendError> {
    let found = match look(link, id)? {
        // Written over, a salt would be lost; and that there is none is a code, which the TPM does not prove.
        Kept::Unwritten => look(link, id)?,
        found => found,
    };
    let is_defined = match found {
        Kept::Salt(_) => return Ok(()),
        Kept::Nothing => false,
        Kept::Unwritten => true,
        // What is there may be the salt of a KEK that works: written over, that one would be lost for good.
        Kept::Foreign => return Err(refused("the NV index of this key's id, which something else has")),
    };
    let index = nv_index(id)?;
    let mut data = [0; NV_LEN];
    data[..16].copy_from_slice(id.as_bytes());
    getrandom::fill(&mut data[16..]).map_err(|_| refused("getrandom"))?;
    let data = MaxNvBuffer::try_from(&data[..]).map_err(|_| refused("NV data"))?;
    let defined = if is_defined {
        let handle = link.context.tr_from_tpm_public(TpmHandle::NvIndex(index));
        handle.map_err(|error| Fail::new("NV index", error))?
    } else {
        define_index(link, index, NvIndexType::Ordinary, NV_LEN)?
    };
    let mut handle = defined;
    let sessions = link.as_owner();
    let written = link.command("TPM2_NV_Write", sessions, |context| {
        context.nv_write(NvAuth::Owner, handle.into(), data, 0)
    });
    link.context.tr_close(&mut handle).map_err(|error| Fail::new("NV index", error))?;
    Ok(written?)
}

pub(super) fn destroy_salt(link: &mut Link, id: KeyId) -> Result<(), BackendError> {
    if read_salt(link, id)?.is_none() {
        return Ok(());
    }
    let fail = |error| Fail::new("TPM2_NV_UndefineSpace", error);
    let handle = link.context.tr_from_tpm_public(TpmHandle::NvIndex(nv_index(id)?)).map_err(fail)?;
    // Nothing to encrypt here, and the TPM refuses a second session that does nothing.
    let sessions = (link.as_owner().0, None);
    Ok(link.command("TPM2_NV_UndefineSpace", sessions, |context| {
        context.nv_undefine_space(Provision::Owner, handle.into())
    })?)
}
