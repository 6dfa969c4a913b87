//! Synchronisation.

/// Atomics, as the kernel's crate spells them.
pub mod atomic {
    use std::sync::Mutex;
    use std::sync::PoisonError;

    /// The weakest order.
    pub struct Relaxed;

    /// A value that any thread may replace.
    pub struct Atomic<T>(Mutex<T>);

    /// A truth value that any thread may replace.
    pub type AtomicFlag = Atomic<bool>;

    impl<T: Copy> Atomic<T> {
        /// With a first value.
        pub const fn new(value: T) -> Self {
            Self(Mutex::new(value))
        }

        /// The value.
        pub fn load(&self, _: Relaxed) -> T {
            *self.0.lock().unwrap_or_else(PoisonError::into_inner)
        }

        /// Replaces the value.
        pub fn store(&self, value: T, _: Relaxed) {
            *self.0.lock().unwrap_or_else(PoisonError::into_inner) = value;
        }
    }
}
