//! Builds the project's own guest programs: freestanding static ELFs, made with the host's target because no other
//! may be installed, and embedded by src/programs.rs.

use std::env;
use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::Command;

/// For all programs: no standard library and no start files, no unwinding, fixed addresses.
const FREESTANDING: &[&str] = &[
    "--edition=2024",
    "--crate-type=bin",
    "-Cpanic=abort",
    "-Copt-level=s",
    "-Crelocation-model=static",
    "-Cforce-unwind-tables=no",
    "-Cstrip=debuginfo",
    "-Clink-arg=-nostartfiles",
    "-Clink-arg=-static",
    "-Clink-arg=-no-pie",
    "-Clink-arg=-Wl,--build-id=none",
    "-Clink-arg=freestanding.ld",
];

/// For code at CPL 0 that KVM's instruction emulator may have to run: no vector instructions; and exception handlers
/// use the stack of the code they interrupt.
const BARE_METAL: &[&str] =
    &["-Cno-redzone=yes", "-Cno-vectorize-loops", "-Cno-vectorize-slp", "-Clink-arg=-Tbare-metal.ld"];

fn main() -> Result<(), Box<dyn Error>> {
    let target = env::var("TARGET")?;
    if !target.starts_with("x86_64-") {
        return Err(format!("The guest programs are x86-64 code; {target} cannot build them").into());
    }
    println!("cargo::rerun-if-changed=programs");
    let sources = Path::new(&env::var("CARGO_MANIFEST_DIR")?).join("programs");
    compile(&sources, &target, "demo", BARE_METAL)?;
    compile(&sources, &target, "bench", BARE_METAL)?;
    compile(&sources, &target, "ticker", BARE_METAL)?;
    compile(&sources, &target, "workload", &[])?;
    compile(&sources, &target, "init", &[])?;
    Ok(())
}

/// Compiles `programs/NAME/main.rs` to `OUT_DIR/NAME.elf`. Paths are relative to `programs`, so that none of this
/// machine's gets into the program.
fn compile(sources: &Path, target: &str, name: &str, flags: &[&str]) -> Result<(), Box<dyn Error>> {
    let output = PathBuf::from(env::var("OUT_DIR")?).join(format!("{name}.elf"));
    let mut rustc = Command::new(env::var("RUSTC")?);
    rustc
        .current_dir(sources)
        .arg(format!("{name}/main.rs"))
        .args(["--crate-name", name, "--target", target])
        .args(FREESTANDING)
        .args(flags)
        .arg("-o")
        .arg(&output);
    if let Ok(linker) = env::var("RUSTC_LINKER") {
        rustc.arg(format!("-Clinker={linker}"));
    }
    let result = rustc.output()?;
    let messages = String::from_utf8_lossy(&result.stderr);
    if !result.status.success() {
        return Err(format!("Cannot build the guest program {name} ({}):\n{messages}", result.status).into());
    }
    for line in messages.lines() {
        println!("cargo::warning={name}: {line}");
    }
    Ok(())
}
