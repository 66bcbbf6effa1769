//! Find libu2moe in U2MOE_DIR, which is the prefix of an installation, or through pkg-config.
use std::{env, process::Command};

fn main() {
    println!("cargo:rerun-if-env-changed=U2MOE_DIR");
    println!("cargo:rerun-if-env-changed=PKG_CONFIG_PATH");
    let folder = env::var("U2MOE_DIR").map(|prefix| format!("{prefix}/lib")).or_else(|_| {
        let ask = Command::new("pkg-config").args(["--variable=libdir", "u2moe"]).output();
        let found = ask.ok().filter(|done| done.status.success()).and_then(|done| String::from_utf8(done.stdout).ok());
        found.map(|text| text.trim().to_owned()).ok_or(())
    });
    let folder = folder.expect("libu2moe not found: set U2MOE_DIR to its installation prefix, or PKG_CONFIG_PATH to the folder of u2moe.pc");
    println!("cargo:rustc-link-search=native={folder}");
    println!("cargo:rustc-link-lib=dylib=u2moe");
    println!("cargo:libdir={folder}"); // DEP_U2MOE_LIBDIR, for the rpath of programs
}
