//! What a return value means for the worker (hsm.md 4.3). One table; no other file knows the codes.

use cryptoki::error::{Error, RvError};
use cryptoki_sys::{
    CKR_CRYPTOKI_NOT_INITIALIZED, CKR_DATA_INVALID, CKR_DATA_LEN_RANGE, CKR_DEVICE_ERROR, CKR_DEVICE_MEMORY,
    CKR_DEVICE_REMOVED, CKR_ENCRYPTED_DATA_INVALID, CKR_ENCRYPTED_DATA_LEN_RANGE, CKR_FUNCTION_FAILED,
    CKR_GENERAL_ERROR, CKR_HOST_MEMORY, CKR_KEY_HANDLE_INVALID, CKR_OBJECT_HANDLE_INVALID,
    CKR_OPERATION_ACTIVE, CKR_OPERATION_NOT_INITIALIZED, CKR_PIN_EXPIRED, CKR_PIN_INCORRECT, CKR_PIN_INVALID,
    CKR_PIN_LEN_RANGE, CKR_PIN_LOCKED, CKR_SESSION_CLOSED, CKR_SESSION_COUNT, CKR_SESSION_HANDLE_INVALID,
    CKR_SIGNATURE_INVALID, CKR_SLOT_ID_INVALID, CKR_TOKEN_NOT_PRESENT, CKR_TOKEN_NOT_RECOGNIZED,
    CKR_USER_NOT_LOGGED_IN, CKR_USER_PIN_NOT_INITIALIZED, CKR_VENDOR_DEFINED, CKR_WRAPPED_KEY_INVALID,
    CKR_WRAPPED_KEY_LEN_RANGE,
};

use crate::seal::backend::BackendError;
use crate::seal::pkcs11::raw::Fail;

impl From<Fail> for BackendError {
    fn from(Fail { function, code }: Fail) -> Self {
        match code {
            CKR_SESSION_HANDLE_INVALID
            | CKR_SESSION_CLOSED
            | CKR_OPERATION_NOT_INITIALIZED
            | CKR_OPERATION_ACTIVE
            | CKR_USER_NOT_LOGGED_IN
            | CKR_OBJECT_HANDLE_INVALID
            | CKR_KEY_HANDLE_INVALID => Self::SessionLost { function, code },
            CKR_DEVICE_ERROR
            | CKR_DEVICE_MEMORY
            | CKR_DEVICE_REMOVED
            | CKR_TOKEN_NOT_PRESENT
            | CKR_TOKEN_NOT_RECOGNIZED
            | CKR_SLOT_ID_INVALID
            | CKR_FUNCTION_FAILED
            | CKR_GENERAL_ERROR
            | CKR_HOST_MEMORY
            | CKR_SESSION_COUNT
            | CKR_CRYPTOKI_NOT_INITIALIZED
            | CKR_VENDOR_DEFINED.. => Self::Away { function, code },
            _ => Self::Refused { function, code },
        }
    }
}

/// As the table above, for a call that opens wrapped bytes: here the codes for bad data, and the
/// two that some modules use for everything, say "rejected" until the canary has spoken (F3).
pub(super) fn from_unwrap(Fail { function, code }: Fail) -> BackendError {
    match code {
        CKR_GENERAL_ERROR
        | CKR_FUNCTION_FAILED
        | CKR_ENCRYPTED_DATA_INVALID
        | CKR_ENCRYPTED_DATA_LEN_RANGE
        | CKR_DATA_INVALID
        | CKR_DATA_LEN_RANGE
        | CKR_SIGNATURE_INVALID
        | CKR_WRAPPED_KEY_INVALID
        | CKR_WRAPPED_KEY_LEN_RANGE => BackendError::Rejected { function, code },
        _ => Fail { function, code }.into(),
    }
}

/// A failed login: what the operator must be told. `None` for failures that are not about the PIN.
pub(super) fn pin_problem(code: u64) -> Option<&'static str> {
    match code {
        CKR_PIN_INCORRECT => Some("the PIN is wrong (one try was spent)"),
        CKR_PIN_INVALID | CKR_PIN_LEN_RANGE => Some("the token does not accept a PIN of this form"),
        CKR_PIN_EXPIRED => Some("the PIN has expired and must be changed"),
        CKR_PIN_LOCKED => Some("the PIN is locked"),
        CKR_USER_PIN_NOT_INITIALIZED => Some("the token has no user PIN yet"),
        _ => None,
    }
}

/// The failure of a `cryptoki` call as a [`Fail`], so that one table serves both ways of calling.
pub(super) fn fail(function: &'static str, error: &Error) -> Fail {
    let code = match error {
        Error::Pkcs11(rv, _) => code(*rv),
        // A null entry, a lost symbol or an answer that does not parse: the module cannot do it.
        _ => 0,
    };
    Fail { function, code }
}

/// The number of those return values that the tables know; others keep 0 and count as a refusal.
fn code(rv: RvError) -> u64 {
    match rv {
        RvError::HostMemory => CKR_HOST_MEMORY,
        RvError::SlotIdInvalid => CKR_SLOT_ID_INVALID,
        RvError::GeneralError => CKR_GENERAL_ERROR,
        RvError::FunctionFailed => CKR_FUNCTION_FAILED,
        RvError::DeviceError => CKR_DEVICE_ERROR,
        RvError::DeviceMemory => CKR_DEVICE_MEMORY,
        RvError::DeviceRemoved => CKR_DEVICE_REMOVED,
        RvError::TokenNotPresent => CKR_TOKEN_NOT_PRESENT,
        RvError::TokenNotRecognized => CKR_TOKEN_NOT_RECOGNIZED,
        RvError::CryptokiNotInitialized => CKR_CRYPTOKI_NOT_INITIALIZED,
        RvError::SessionHandleInvalid => CKR_SESSION_HANDLE_INVALID,
        RvError::SessionClosed => CKR_SESSION_CLOSED,
        RvError::SessionCount => CKR_SESSION_COUNT,
        RvError::OperationNotInitialized => CKR_OPERATION_NOT_INITIALIZED,
        RvError::OperationActive => CKR_OPERATION_ACTIVE,
        RvError::UserNotLoggedIn => CKR_USER_NOT_LOGGED_IN,
        RvError::ObjectHandleInvalid => CKR_OBJECT_HANDLE_INVALID,
        RvError::KeyHandleInvalid => CKR_KEY_HANDLE_INVALID,
        RvError::VendorDefined(code) => code,
        RvError::TemplateInconsistent => cryptoki_sys::CKR_TEMPLATE_INCONSISTENT,
        RvError::TemplateIncomplete => cryptoki_sys::CKR_TEMPLATE_INCOMPLETE,
        RvError::AttributeTypeInvalid => cryptoki_sys::CKR_ATTRIBUTE_TYPE_INVALID,
        RvError::AttributeValueInvalid => cryptoki_sys::CKR_ATTRIBUTE_VALUE_INVALID,
        RvError::MechanismInvalid => cryptoki_sys::CKR_MECHANISM_INVALID,
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::{BackendError, Fail, from_unwrap};

    #[test]
    fn a_general_error_is_the_device_except_when_unwrapping() {
        let fail = Fail { function: "C_Decrypt", code: 5 };
        assert!(matches!(BackendError::from(fail), BackendError::Away { .. }));
        assert!(matches!(from_unwrap(fail), BackendError::Rejected { .. }));
    }

    #[test]
    fn what_follows_a_restarted_token_is_a_lost_session() {
        for code in [0x60, 0x82, 0x90, 0x91, 0xB0, 0xB3, 0x101] {
            let error = BackendError::from(Fail { function: "C_Sign", code });
            assert!(matches!(error, BackendError::SessionLost { .. }), "{code:#x}");
        }
    }
}
