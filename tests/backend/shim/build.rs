//! Keeps the module loaded once it was loaded.

fn main() {
    // A host may dlclose the module while the thread that watches the control file still runs in it.
    println!("cargo:rustc-cdylib-link-arg=-Wl,-z,nodelete");
    println!("cargo:rerun-if-changed=build.rs");
}
