//! What a response code means for the worker (TPM 2.0 library, part 2, section 6.6). One table.

use tss_esapi::Error;
use tss_esapi::constants::response_code::Tss2ResponseCode;

use crate::seal::backend::BackendError;

const BAD_AUTH: u32 = 0x22;
const AUTH_FAIL: u32 = 0x0E;
const INTEGRITY: u32 = 0x1F;
const POLICY_FAIL: u32 = 0x1D;
const PCR_CHANGED: u32 = 0x128;

/// A code with what the worker needs of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Fail {
    /// The command.
    pub(super) function: &'static str,
    /// The whole code, layer included; 0 where the crate itself refused an answer.
    pub(super) code: u32,
}

impl Fail {
    pub(super) fn new(function: &'static str, error: Error) -> Self {
        let code = match error {
            Error::Tss2Error(Tss2ResponseCode::FormatZero(code)) => number(&code.to_string()),
            Error::Tss2Error(Tss2ResponseCode::FormatOne(code)) => number(&code.to_string()),
            Error::Tss2Error(Tss2ResponseCode::Success) | Error::WrapperError(_) => 0,
        };
        Self { function, code }
    }

    /// Whether the TPM itself answered, or its resource manager; everything else is on the way there. That has one of
    /// two bits set: format one, or the version that is not TPM 1.2.
    fn is_of_tpm(self) -> bool {
        matches!(self.code >> 16, 0 | 0x0B | 0x0C) && self.code & 0x180 != 0
    }

    /// The number of a format-one code, without the parameter, handle or session it is about.
    fn format_one(self) -> Option<u32> {
        (self.is_of_tpm() && self.code & 0x80 != 0).then_some(self.code & 0x3F)
    }

    /// No room for another object or session: something is to be flushed, then it can be repeated.
    pub(super) fn is_full(self) -> bool {
        self.is_of_tpm() && matches!(self.code & 0xFFFF, 0x902..=0x906)
    }

    /// `TPM_RC_SESSION_HANDLES`: every number for a session is given out.
    pub(super) fn is_out_of_sessions(self) -> bool {
        self.is_of_tpm() && self.code & 0xFFFF == 0x905
    }

    /// `TPM_RC_TESTING`, `TPM_RC_NEEDS_TEST`: no failure was found so far.
    pub(super) fn is_testing(self) -> bool {
        self.is_of_tpm() && matches!(self.code & 0xFFFF, 0x90A | 0x153)
    }

    /// `TPM_RC_FAILURE`: the chip has found that it is broken.
    pub(super) fn is_failure(self) -> bool {
        self.is_of_tpm() && self.code & 0xFFFF == 0x101
    }

    /// The authorisation did not match: another value, or a session that is out of step.
    pub(super) fn is_auth(self) -> bool {
        matches!(self.format_one(), Some(BAD_AUTH | AUTH_FAIL))
    }

    /// The PCRs, or an approval of them, are not those of the policy.
    pub(super) fn is_policy(self) -> bool {
        self.format_one() == Some(POLICY_FAIL) || self.code & 0xFFFF == PCR_CHANGED
    }

    /// A blob that this TPM did not make, or that was altered (a code about a parameter).
    pub(super) fn is_bad_blob(self) -> bool {
        self.format_one() == Some(INTEGRITY) || (self.format_one().is_some() && self.code & 0x40 != 0)
    }
}

/// The crate shows the number only in its text.
fn number(text: &str) -> u32 {
    text.rsplit("0x").next().and_then(|digits| u32::from_str_radix(digits, 16).ok()).unwrap_or(0)
}

impl From<Fail> for BackendError {
    fn from(fail: Fail) -> Self {
        let Fail { function, code } = fail;
        let code = u64::from(code);
        if !fail.is_of_tpm() {
            // The connection, the marshalling of a cut answer, or an answer that the crate refused.
            return Self::Away { function, code };
        }
        if fail.is_auth() {
            return Self::SessionLost { function, code };
        }
        match fail.code & 0xFFFF {
            // REFERENCE_H0 to S6: a handle or session that the TPM does not have, as after a reset.
            0x910..=0x91E => Self::SessionLost { function, code },
            // INITIALIZE, FAILURE, LOCKOUT, full although flushed, RETRY, TESTING, NV_RATE, NV_UNAVAILABLE.
            0x100 | 0x101 | 0x900..=0x90A | 0x920..=0x923 => Self::Away { function, code },
            _ => match fail.format_one() {
                // HANDLE, and CURVE or VALUE about a handle: the object is not there any more.
                Some(0x0B) => Self::SessionLost { function, code },
                Some(0x04) if fail.code & 0x40 == 0 => Self::SessionLost { function, code },
                _ => Self::Refused { function, code },
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{BackendError, Fail};

    fn fail(code: u32) -> Fail {
        Fail { function: "TPM2_Load", code }
    }

    #[test]
    fn codes_are_told_apart_by_what_is_to_be_done() {
        assert!(fail(0x902).is_full() && fail(0x903).is_full() && !fail(0x921).is_full());
        assert!(
            fail(0x905).is_full() && fail(0x905).is_out_of_sessions() && !fail(0x903).is_out_of_sessions()
        );
        assert!(fail(0x9A2).is_auth() && fail(0x98E).is_auth() && !fail(0x921).is_auth());
        assert!(fail(0x1DF).is_bad_blob() && fail(0x2D5).is_bad_blob() && !fail(0x18B).is_bad_blob());
        assert!(fail(0x99D).is_policy());
        // A resource manager puts its own layer before the TPM's code.
        assert!(fail(0x000B_0902).is_full());
    }

    #[test]
    fn a_reset_tpm_is_a_lost_session_and_a_broken_connection_is_away() {
        for code in [0x910, 0x918, 0x18B, 0x9A2] {
            assert!(matches!(BackendError::from(fail(code)), BackendError::SessionLost { .. }), "{code:#x}");
        }
        for code in [0x000A_000A, 0x0007_0007, 0x921, 0x101, 0, 1] {
            assert!(matches!(BackendError::from(fail(code)), BackendError::Away { .. }), "{code:#x}");
        }
        assert!(matches!(BackendError::from(fail(0x2C4)), BackendError::Refused { .. }));
    }
}
