//! Who owns a ring: thread identity that survives neither thread exit nor fork.

use std::cell::OnceCell;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};

static FORKS: AtomicU64 = AtomicU64::new(0);

extern "C" fn after_fork_in_child() {
    // Relaxed: the child has one thread, and it runs this before anything else.
    FORKS.fetch_add(1, Ordering::Relaxed);
}

/// A process, told apart from its forked children.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Process(u64);

impl Process {
    pub(crate) fn current() -> Self {
        // Not a `Once`: a child forked while another thread is inside would wait for ever. Threads that come here at the
        // same time may install the handler twice, and forks then count double, which is as good.
        static INSTALLED: AtomicBool = AtomicBool::new(false);
        if !INSTALLED.load(Ordering::Relaxed) {
            // SAFETY: the handler is async-signal-safe: one atomic add. Failure (ENOMEM) only loses the check in a
            // forked child, where the ring's memory is absent anyway (MADV_DONTFORK).
            unsafe { libc::pthread_atfork(None, None, Some(after_fork_in_child)) };
            INSTALLED.store(true, Ordering::Relaxed);
        }
        Self(FORKS.load(Ordering::Relaxed))
    }

    /// Whether it is the calling process.
    #[inline]
    pub(crate) fn is_current(self) -> bool {
        self.0 == FORKS.load(Ordering::Relaxed)
    }
}

thread_local! {
    static SELF: OnceCell<Arc<()>> = const { OnceCell::new() };
}

/// The thread that created a ring.
#[derive(Debug, Clone)]
pub(crate) struct Owner {
    token: Weak<()>,
    process: Process,
}

impl Owner {
    pub(crate) fn current() -> Self {
        let token = SELF.with(|cell| Arc::downgrade(cell.get_or_init(Arc::default)));
        Self { token, process: Process::current() }
    }

    /// Whether the calling thread is the owner, in the process that created the ring.
    #[inline]
    pub(crate) fn is_current(&self) -> bool {
        if self.is_forked() {
            return false;
        }
        // Each thread's token has an address of its own for as long as a `Weak` to it exists.
        SELF.try_with(|cell| cell.get().is_some_and(|token| Arc::as_ptr(token) == self.token.as_ptr())).unwrap_or(false)
    }

    /// Whether the owning thread has exited.
    pub(crate) fn is_gone(&self) -> bool {
        self.token.strong_count() == 0
    }

    /// Whether the calling process is a fork of the one that created the ring.
    #[inline]
    pub(crate) fn is_forked(&self) -> bool {
        !self.process.is_current()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ownership_is_the_creating_threads_alone() {
        let owner = Owner::current();
        assert!(owner.is_current() && !owner.is_gone());
        let elsewhere = owner.clone();
        std::thread::spawn(move || assert!(!elsewhere.is_current())).join().unwrap();
        let gone = std::thread::spawn(Owner::current).join().unwrap();
        assert!(gone.is_gone() && !gone.is_current());
    }
}
