//! Loading and unloading ksm_rs.

use std::ffi::CString;
use std::fs;
use std::fs::File;
use std::path::PathBuf;

use anyhow::Context;
use anyhow::Result;
use anyhow::bail;
use anyhow::ensure;
use nix::errno::Errno;
use nix::kmod::DeleteModuleFlags;
use nix::kmod::ModuleInitFlags;
use nix::kmod::delete_module;
use nix::kmod::finit_module;
use nix::kmod::init_module;

use crate::kmsg::Log;
use crate::wait;
use crate::wait::PATIENCE;

/// The module's name.
pub const NAME: &str = "ksm_rs";

/// The module's file, which the environment variable `KSM_RS_KO` names.
pub fn file() -> Result<PathBuf> {
    let path = std::env::var_os("KSM_RS_KO").context("set KSM_RS_KO to the path of ksm_rs.ko")?;
    Ok(PathBuf::from(path))
}

/// Whether the module is loaded.
pub fn loaded() -> Result<bool> {
    let modules = fs::read_to_string("/proc/modules")?;
    Ok(modules
        .lines()
        .any(|line| line.split_whitespace().next() == Some(NAME)))
}

/// Loads the module with these parameters (`"run=1 drop_in=0"`), and says what the kernel said. The outer error
/// is one of the test's own.
pub fn try_load(parameters: &str) -> Result<Result<(), Errno>> {
    let path = file()?;
    let file = File::open(&path).with_context(|| path.display().to_string())?;
    Ok(finit_module(
        &file,
        &CString::new(parameters)?,
        ModuleInitFlags::empty(),
    ))
}

/// The same for a module that is in memory.
pub fn try_load_image(image: &[u8], parameters: &str) -> Result<Result<(), Errno>> {
    Ok(init_module(image, &CString::new(parameters)?))
}

/// Tries to load, expects to be refused with this error, and returns the one line in the log that says why.
pub fn expect_refusal(
    wanted: Errno,
    load: impl FnOnce() -> Result<Result<(), Errno>>,
) -> Result<String> {
    let mut log = Log::from_now()?;
    let result = load()?;
    ensure!(result == Err(wanted), "{result:?} instead of {wanted:?}");
    ensure!(!loaded()?, "the module is there though it was refused");
    let lines = log.lines()?;
    // The kernel says once since boot that there are modules which are not its own.
    let ours: Vec<&String> = lines
        .iter()
        .filter(|line| line.contains(NAME) && !line.contains("taint"))
        .collect();
    let [line] = ours[..] else {
        bail!("the log should have one line about it: {lines:#?}");
    };
    line.strip_prefix("ksm_rs: ")
        .map(str::to_owned)
        .with_context(|| format!("the line does not say whose it is: {line:?}"))
}

/// Loads the module with these parameters.
pub fn load(parameters: &str) -> Result<()> {
    try_load(parameters)?.with_context(|| format!("loading the module with {parameters:?}"))
}

/// Unloads the module. While somebody still has one of its sysfs files open the kernel refuses, so that is tried
/// again for a while.
pub fn unload() -> Result<()> {
    let name = CString::new(NAME)?;
    wait::until_or_explain("the module is unloaded", PATIENCE, || {
        match delete_module(&name, DeleteModuleFlags::O_NONBLOCK) {
            Ok(()) => Ok(None),
            Err(errno @ (Errno::EAGAIN | Errno::EBUSY)) => Ok(Some(errno.to_string())),
            Err(errno) => Err(errno).context("unloading the module"),
        }
    })
}
