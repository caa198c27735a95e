//! Kryoptic as a loadable module.
//!
//! A cdylib that is built as a dependency gives no file, and `kryoptic-lib` exports nothing: the three
//! entry points that loaders look up by name are exported here and forward to it.

use kryoptic_lib::{fns::general as module, pkcs11::*};

/// The function list of PKCS#11 2.40.
#[unsafe(no_mangle)]
pub extern "C" fn C_GetFunctionList(list: CK_FUNCTION_LIST_PTR_PTR) -> CK_RV {
    module::fn_get_function_list(list)
}

/// The list of interfaces (PKCS#11 3.0).
#[unsafe(no_mangle)]
pub extern "C" fn C_GetInterfaceList(list: CK_INTERFACE_PTR, count: CK_ULONG_PTR) -> CK_RV {
    module::fn_get_interface_list(list, count)
}

/// One interface (PKCS#11 3.0).
#[unsafe(no_mangle)]
pub extern "C" fn C_GetInterface(
    name: CK_UTF8CHAR_PTR,
    version: CK_VERSION_PTR,
    interface: CK_INTERFACE_PTR_PTR,
    flags: CK_FLAGS,
) -> CK_RV {
    module::fn_get_interface(name, version, interface, flags)
}
