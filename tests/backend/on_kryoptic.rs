//! Kryoptic, the soft token in Rust, behind the wrapper in `tests/backend/kryoptic`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use crate::stage::{Backend, random_pin, run, write_private};

/// Kryoptic, in the version that the wrapper's `Cargo.lock` has.
pub const BACKEND: Backend = Backend {
    title: "Kryoptic 1.5.4",
    install,
    deviations: &[
        ("no KEK by A256KW", NO_WORD),
        ("no KEK by A256KWP", NO_WORD),
        ("no KEK by A256KW-OBJ", NO_WORD),
    ],
    own_process: false,
};

const NO_WORD: &str =
    "of altered bytes it says DEVICE_ERROR, which a device that fails says, too; it has GCM, which is chosen";

const LABEL: &str = "backend";

fn install(dir: &Path) -> Value {
    let (module, conf, pin_file) = (module(), dir.join("kryoptic.toml"), dir.join("pin"));
    let lines = format!(
        "[ec_point_encoding]\nencoding = \"Der\"\n[[slots]]\nslot = 42\ndbtype = \"sqlite\"\ndbargs = \"{}\"\n",
        dir.join("token.sql").display()
    );
    fs::write(&conf, lines).unwrap();
    let (pin, so_pin) = (random_pin(), random_pin());
    write_private(&pin_file, &pin);
    let tool = |args: &[&str]| {
        let mut command = Command::new("pkcs11-tool");
        run(command.env("KRYOPTIC_CONF", &conf).arg("--module").arg(&module).args(args))
    };
    tool(&["--slot", "42", "--init-token", "--label", LABEL, "--so-pin", &so_pin]);
    tool(&[
        "--slot",
        "42",
        "--login",
        "--login-type",
        "so",
        "--so-pin",
        &so_pin,
        "--init-pin",
        "--new-pin",
        &pin,
    ]);
    json!({ "pkcs11": {
        "module": module,
        "token": LABEL,
        "pin_source": format!("file:{}", pin_file.display()),
        // Not by the environment: it takes the path in the reserved pointer of C_Initialize, too.
        "init_parameters": format!("kryoptic_conf={}", conf.display()),
    }})
}

/// The wrapper's file, built at the first call. `make deps` has built it before; then cargo only looks.
fn module() -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let target = root.join("target/kryoptic");
    let mut cargo = Command::new(env!("CARGO"));
    cargo.args(["build", "--release", "--locked", "--quiet", "--manifest-path"]);
    run(cargo.arg(root.join("tests/backend/kryoptic/Cargo.toml")).arg("--target-dir").arg(&target));
    target.join("release/liblacre_kryoptic.so")
}
