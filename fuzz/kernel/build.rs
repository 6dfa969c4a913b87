//! Takes the kernel's own parsers from its source: what they accept is to be known, not believed.

use std::env;
use std::error::Error;
use std::fs;
use std::path::Path;
use std::path::PathBuf;

/// Headers that `lib/kstrtox.c` includes and that `c/shim.h` stands for. Programs have `linux/errno.h` and
/// `linux/types.h`, too.
const SHIMMED: [&str; 6] = [
    "compiler", "export", "kstrtox", "math64", "overflow", "uaccess",
];

/// Headers that are taken as they are.
const TAKEN: [&str; 2] = ["args", "ctype"];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-env-changed=KSM_RS_KERNEL_SOURCE");
    println!("cargo::rerun-if-changed=c/shim.h");
    let source = PathBuf::from(
        env::var_os("KSM_RS_KERNEL_SOURCE")
            .ok_or("KSM_RS_KERNEL_SOURCE is not set to the source of a kernel; use `make fuzz`")?,
    );
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("no OUT_DIR")?);
    let read = |path: &str| {
        let path = source.join(path);
        println!("cargo::rerun-if-changed={}", path.display());
        fs::read_to_string(&path).map_err(|error| format!("{}: {error}", path.display()))
    };

    let headers = out.join("include/linux");
    fs::create_dir_all(&headers)?;
    for name in SHIMMED {
        fs::write(headers.join(format!("{name}.h")), "#include \"shim.h\"\n")?;
    }
    for name in TAKEN {
        let text = read(&format!("include/linux/{name}.h"))?;
        fs::write(headers.join(format!("{name}.h")), text)?;
    }
    // The only function that is wanted of a file that needs half of the kernel.
    let helpers = read("lib/string_helpers.c")?;
    let streq = function(&helpers, "bool sysfs_streq(")?;
    fs::write(
        out.join("sysfs_streq.c"),
        format!("#include \"shim.h\"\n{streq}"),
    )?;
    for file in ["lib/ctype.c", "lib/kstrtox.c", "lib/kstrtox.h"] {
        read(file)?;
    }
    cc::Build::new()
        .file(source.join("lib/ctype.c"))
        .file(source.join("lib/kstrtox.c"))
        .file(out.join("sysfs_streq.c"))
        .include(out.join("include"))
        .include("c")
        .warnings(false)
        .compile("kernel_parsers");

    // Of a module parameter; a series before it was the kernel's had it somewhere else.
    let parse_int = "rust/kernel/str/parse_int.rs";
    read(parse_int)?;
    let path = absolute(&source.join(parse_int))?;
    fs::write(
        out.join("parse_int.rs"),
        format!("#[path = {path:?}]\npub mod parse_int;\n"),
    )?;
    Ok(())
}

/// The text of a function, from its declaration to the brace at the start of a line that ends it.
fn function<'a>(text: &'a str, declaration: &str) -> Result<&'a str, String> {
    let missing = || format!("there is no function `{declaration}`");
    let start = text.find(declaration).ok_or_else(missing)?;
    let end = text[start..].find("\n}\n").ok_or_else(missing)?;
    Ok(&text[start..start + end + 3])
}

fn absolute(path: &Path) -> Result<String, Box<dyn Error>> {
    let path = fs::canonicalize(path)?;
    Ok(path.to_str().ok_or("a path that is not UTF-8")?.to_owned())
}
