//! The `lacre` program: everything is in the library, so that tests and benches can use it.

fn main() -> std::process::ExitCode {
    lacre::cli::main()
}
