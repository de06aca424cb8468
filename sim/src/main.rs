//! The simulator as a program; `cargo xtask sim` builds and runs it.

use std::process::ExitCode;

fn main() -> ExitCode {
    evictd_sim::cli::main()
}
