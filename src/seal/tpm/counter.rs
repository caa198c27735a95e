//! The chip's counter for a roll-back anchor: an index of its non-volatile memory that only grows.
//!
//! The TPM keeps that promise also where the index is deleted and defined again: a new counter starts above
//! the highest value that any counter of this TPM has ever had (part 1, section 37.2.4).

use tss_esapi::constants::NvIndexType;
use tss_esapi::handles::{NvIndexHandle, NvIndexTpmHandle, TpmHandle};
use tss_esapi::interface_types::resource_handles::NvAuth;

use super::error::Fail;
use super::link::{Id, Link};
use super::salt::{NV_AUTHORIZATION, NV_RANGE, NV_UNINITIALIZED, define_index, nv_index_of, refused};
use crate::seal::backend::BackendError;
use crate::seal::driver::Count;

const LEN: u16 = 8;
/// What the index's number is made of, together with the installation's secret: several installations may
/// share a TPM, and the number is nowhere that somebody who alters the database could reach.
const OWNER: Id = *b"lacre/anchor/v1\0";

/// What the index holds.
enum Kept {
    Nothing,
    /// Defined, and not counted yet: a crash came in between.
    Unwritten,
    Value(u64),
}

fn index(link: &Link) -> Result<NvIndexTpmHandle, BackendError> {
    let auth = link.auth(OWNER).map_err(|_| refused("NV index of the counter"))?;
    let digest = auth.value();
    nv_index_of(*digest.first_chunk().ok_or_else(|| refused("NV index of the counter"))?)
}

/// Runs `call` with the handle of the index, which is there.
fn with_handle<T>(
    link: &mut Link,
    index: NvIndexTpmHandle,
    call: impl FnOnce(&mut Link, NvIndexHandle) -> Result<T, Fail>,
) -> Result<T, Fail> {
    let fail = |error| Fail::new("NV index", error);
    let mut handle = link.context.tr_from_tpm_public(TpmHandle::NvIndex(index)).map_err(fail)?;
    let result = call(link, handle.into());
    link.context.tr_close(&mut handle).map_err(fail)?;
    result
}

fn look(link: &mut Link, index: NvIndexTpmHandle) -> Result<Kept, BackendError> {
    // Proven: a wrong answer would read as a counter that is gone.
    if !link.handles_for_sure(u32::from(index))?.contains(&TpmHandle::NvIndex(index)) {
        return Ok(Kept::Nothing);
    }
    let read = with_handle(link, index, |link, handle| {
        // Without a session: read_public is no secret, and it must not cost a session's turn.
        let public =
            link.command("TPM2_NV_ReadPublic", (None, None), |context| context.nv_read_public(handle))?;
        let is_counter = public.0.attributes().index_type() == Ok(NvIndexType::Counter);
        let sessions = link.as_owner();
        let value =
            link.command("TPM2_NV_Read", sessions, |context| context.nv_read(NvAuth::Owner, handle, LEN, 0));
        Ok((is_counter, value))
    })?;
    let foreign = || refused("the NV index of the counter, which something else has");
    match read {
        (true, Ok(data)) => {
            let bytes = data.value().try_into().map_err(|_| foreign())?;
            Ok(Kept::Value(u64::from_be_bytes(bytes)))
        }
        (true, Err(fail)) if fail.code & 0xFFFF == NV_UNINITIALIZED => Ok(Kept::Unwritten),
        (false, _) => Err(foreign()),
        (_, Err(fail)) if [NV_RANGE, NV_AUTHORIZATION].contains(&(fail.code & 0xFFFF)) => Err(foreign()),
        (_, Err(fail)) => Err(fail.into()),
    }
}

fn define(link: &mut Link, index: NvIndexTpmHandle) -> Result<(), BackendError> {
    let mut handle = define_index(link, index, NvIndexType::Counter, usize::from(LEN))?;
    Ok(link.context.tr_close(&mut handle).map_err(|error| Fail::new("NV index", error))?)
}

fn increment(link: &mut Link, index: NvIndexTpmHandle) -> Result<(), BackendError> {
    // Nothing to encrypt here, and the TPM refuses a second session that does nothing.
    let sessions = (link.as_owner().0, None);
    let count = with_handle(link, index, |link, handle| {
        link.command("TPM2_NV_Increment", sessions, |context| context.nv_increment(NvAuth::Owner, handle))
    });
    count.map_err(|fail| match BackendError::from(fail) {
        // It may have counted: whoever asked looks before it asks again.
        BackendError::Away { function, code } => BackendError::Unknown { function, code },
        other => other,
    })
}

/// The counter's value after `count`; `None` if there is none.
pub(super) fn count(link: &mut Link, count: Count) -> Result<Option<u64>, BackendError> {
    let index = index(link)?;
    match (look(link, index)?, count) {
        // Somebody else counted, or an earlier call whose answer was lost: that value is the answer.
        (Kept::Value(value), Count::Advance { from }) if value != from => return Ok(Some(value)),
        (Kept::Value(value), Count::Read | Count::Make) => return Ok(Some(value)),
        (Kept::Value(_), Count::Advance { .. }) | (Kept::Unwritten, Count::Make) => {}
        (Kept::Nothing, Count::Make) => define(link, index)?,
        (Kept::Nothing | Kept::Unwritten, Count::Read | Count::Advance { .. }) => return Ok(None),
    }
    increment(link, index)?;
    match look(link, index)? {
        Kept::Value(value) => Ok(Some(value)),
        Kept::Nothing | Kept::Unwritten => Err(refused("TPM2_NV_Increment")),
    }
}
