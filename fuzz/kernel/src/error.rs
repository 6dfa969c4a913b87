//! Errors.

/// An errno.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Error(i32);

/// A result with such an error.
pub type Result<T = (), E = Error> = core::result::Result<T, E>;

impl Error {
    /// From what a function of the kernel returned.
    pub fn from_errno(errno: i32) -> Self {
        Self(errno)
    }
}

/// An error if a function of the kernel returned one.
pub fn to_result(errno: i32) -> Result {
    if errno < 0 {
        Err(Error::from_errno(errno))
    } else {
        Ok(())
    }
}

/// The errors that there are.
pub mod code {
    use super::Error;

    /// Invalid argument.
    pub const EINVAL: Error = Error(-22);
    /// Result not representable.
    pub const ERANGE: Error = Error(-34);
}
