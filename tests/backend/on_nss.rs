//! NSS softokn, the module inside Firefox: initialised with parameters, and strange in other ways.

use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

use crate::stage::{Backend, first_of, random_pin, run, write_private};

/// NSS from the distribution.
pub const BACKEND: Backend = Backend {
    title: "NSS softokn 3.87",
    install,
    deviations: &[
        (
            "no KEK by A256CBC+HS256",
            "of two secret keys with one id the second takes the first one's place; it has GCM, which is chosen",
        ),
        ("CKA_COPYABLE cannot be read", "it does not know the attribute; it exports every key anyhow"),
        ("CKA_LOCAL is false", "it says so of every secret key it makes; Lacre made them, and pins each"),
        (
            "exports keys that are not extractable",
            "a holder of the PIN gets every key out of it, as out of its files",
        ),
    ],
    own_process: false,
};

fn install(dir: &Path) -> Value {
    let (database, pin_file) = (dir.join("nss"), dir.join("pin"));
    fs::create_dir(&database).unwrap();
    write_private(&pin_file, &random_pin());
    let database = format!("sql:{}", database.display());
    run(Command::new("certutil").args(["-N", "-d", &database, "-f"]).arg(&pin_file));
    let module = first_of(
        &[
            "/usr/lib/x86_64-linux-gnu/libsoftokn3.so",
            "/usr/lib/aarch64-linux-gnu/libsoftokn3.so",
            "/usr/lib64/libsoftokn3.so",
        ],
        "libnss3",
    );
    json!({ "pkcs11": {
        "module": module,
        "token": "NSS Certificate DB",
        "pin_source": format!("file:{}", pin_file.display()),
        "init_parameters":
            format!("configdir='{database}' certPrefix='' keyPrefix='' secmod='secmod.db' flags="),
        "without_evidence": ["CKA_LOCAL", "CKA_COPYABLE"],
    }})
}
