//! Wipes what tpm2-tss and the crate leave of a data key: they free and forget, they do not wipe.
//!
//! Four places, found by looking (tests/tpm/memory.rs): the library's copy of the last `TPM2_Create`, its answer
//! buffer after `TPM2_Unseal`, the block in which that answer was handed over, and the stack below this call.

#![expect(unsafe_code, reason = "blocks of the C library are wiped where they were freed")]

use tss_esapi::handles::KeyHandle;
use tss_esapi::interface_types::session_handles::AuthSession;
use tss_esapi::structures::{Public, SensitiveData};
use tss_esapi::tss2_esys::TPM2B_SENSITIVE_DATA;
use zeroize::Zeroize;

use super::link::Link;
use super::template;

/// The block that the library hands an unsealed secret over in.
const BLOCK: usize = size_of::<TPM2B_SENSITIVE_DATA>();
/// More freed blocks of a size than an allocator keeps at hand for a thread (7 in glibc): when those are all
/// there, the block was joined with its free neighbours, which are given out next.
const KEPT: usize = 64;
/// More than the library and its marshalling use below one call.
const STACK: usize = 128 << 10;
/// No resource has this number, so that the library refuses it without asking the TPM.
const NOBODY: u32 = 0x0077_7777;

/// To be called at the end of whatever had a secret go through the library, at the same depth.
pub(super) fn scrub(link: &mut Link) {
    wipe_blocks();
    overwrite_parameters(link);
    link.overwrite_answer();
    wipe_blocks();
    wipe_stack();
}

/// The library keeps the parameters of a `Create` to check the answer, and takes them before it looks at the
/// parent: one that it does not know replaces them at no cost.
fn overwrite_parameters(link: &mut Link) {
    let (Ok(public), Ok(data)) = (template::sealed(&[]), SensitiveData::try_from(&[0; 128][..])) else {
        return;
    };
    let parent = KeyHandle::from(NOBODY);
    let create = |public: Public| {
        // A session, or the call is refused before it takes the parameters.
        link.command("overwrite", (Some(AuthSession::Password), None), |context| {
            context.create(parent, public, None, Some(data), None, None)
        })
    };
    drop(create(public));
}

/// Blocks that were just freed are the first that are given out again. To be called right after the unsealing,
/// before others are freed on top of it.
pub(super) fn wipe_blocks() {
    let mut taken = [std::ptr::null_mut::<u8>(); KEPT];
    for place in &mut taken {
        // SAFETY: a block of this size, or null, which is looked at before it is used.
        *place = unsafe { libc::malloc(BLOCK) }.cast();
        if !place.is_null() {
            // SAFETY: the block is ours and `BLOCK` bytes long.
            unsafe { std::slice::from_raw_parts_mut(place.cast::<std::mem::MaybeUninit<u8>>(), BLOCK) }
                .zeroize();
        }
    }
    for place in taken {
        // SAFETY: from malloc above, or null.
        unsafe { libc::free(place.cast()) };
    }
}

#[inline(never)]
#[expect(clippy::large_stack_arrays, reason = "the stack is what is to be wiped")]
fn wipe_stack() {
    let mut below = [0_u8; STACK];
    below.zeroize();
    std::hint::black_box(&mut below);
}
