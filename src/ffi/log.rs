//! The log callback: what the library says through `tracing`, as lines for C.

use super::options::UserPointer;
use super::{Failure, status};
use std::cell::Cell;
use std::ffi::{CString, c_char, c_void};
use std::fmt::Write as _;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError, RwLock};
use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::span::{Attributes, Id, Record};
use tracing::subscriber::Interest;
use tracing::{Event, Level, Metadata, Subscriber};

/// How much is logged: each level includes those before it.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ringest_log_level {
    /// Nothing.
    Off = 0,
    /// What went wrong for good (leaks).
    Error = 1,
    /// What needs attention.
    Warn = 2,
    /// Fall-backs taken.
    Info = 3,
    /// Set-up details.
    Debug = 4,
    /// Everything.
    Trace = 5,
}

/// Takes a log line: its level (enum ringest_log_level), the part of the library it comes from, and the text. The strings
/// are valid during the call. From any thread. It must not call ringest (what such calls would log is dropped), must not
/// throw or longjmp, and must not wait for a lock that is held around ringest_log_set_callback.
pub type ringest_log_fn =
    Option<unsafe extern "C" fn(user: *mut c_void, level: u32, target: *const c_char, message: *const c_char)>;

#[derive(Clone, Copy)]
struct Sink {
    callback: unsafe extern "C" fn(*mut c_void, u32, *const c_char, *const c_char),
    user: UserPointer,
    level: LevelFilter,
}

thread_local! {
    /// The callback is running on this thread.
    static CALLING: Cell<bool> = const { Cell::new(false) };
}

static SINK: RwLock<Option<Sink>> = RwLock::new(None);

/// Installs a log callback for the whole process, or removes it (callback NULL). level is an enum ringest_log_level.
///
/// When the call returns, the callback that was installed before is not running and will not be called again.
///
/// Any thread, but not from within the callback.
///
/// Errors: -EINVAL for a bad level; -EDEADLK from within the callback; -EBUSY when the program (in Rust) has a tracing subscriber of its own.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ringest_log_set_callback(callback: ringest_log_fn, user: *mut c_void, level: u32) -> i32 {
    status(|| {
        if CALLING.get() {
            return Err(Failure::new(libc::EDEADLK, "the log callback may not replace itself"));
        }
        let level = match level {
            0 => LevelFilter::OFF,
            1 => LevelFilter::ERROR,
            2 => LevelFilter::WARN,
            3 => LevelFilter::INFO,
            4 => LevelFilter::DEBUG,
            5 => LevelFilter::TRACE,
            other => return Err(Failure::new(libc::EINVAL, format!("log level {other}: use enum ringest_log_level"))),
        };
        install()?;
        let sink = callback.map(|callback| Sink { callback, user: UserPointer(user), level });
        *SINK.write().unwrap_or_else(PoisonError::into_inner) = sink;
        // Call sites remember whether anybody listens.
        tracing::callsite::rebuild_interest_cache();
        Ok(())
    })
}

fn install() -> Result<(), Failure> {
    static INSTALLING: Mutex<()> = Mutex::new(());
    static INSTALLED: AtomicBool = AtomicBool::new(false);
    let _one_at_a_time = INSTALLING.lock().unwrap_or_else(PoisonError::into_inner);
    if INSTALLED.load(Ordering::Relaxed) {
        return Ok(());
    }
    tracing::subscriber::set_global_default(Lines { spans: AtomicU64::new(1) })
        .map_err(|_| Failure::new(libc::EBUSY, "the program has a tracing subscriber: log through that"))?;
    INSTALLED.store(true, Ordering::Relaxed);
    Ok(())
}

/// A subscriber that turns events into lines. Spans are not used.
struct Lines {
    spans: AtomicU64,
}

fn level_number(level: Level) -> u32 {
    match level {
        Level::ERROR => 1,
        Level::WARN => 2,
        Level::INFO => 3,
        Level::DEBUG => 4,
        Level::TRACE => 5,
    }
}

fn wanted(metadata: &Metadata<'_>) -> bool {
    let sink = SINK.read().unwrap_or_else(PoisonError::into_inner);
    sink.is_some_and(|sink| *metadata.level() <= sink.level) && metadata.target().starts_with("ringest")
}

impl Subscriber for Lines {
    fn register_callsite(&self, metadata: &'static Metadata<'static>) -> Interest {
        // Asked each time: a site may be met first while a callback runs, which holds the lock.
        if CALLING.get() || wanted(metadata) { Interest::sometimes() } else { Interest::never() }
    }

    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        !CALLING.get() && wanted(metadata)
    }

    fn event(&self, event: &Event<'_>) {
        let mut line = Line::default();
        event.record(&mut line);
        let text = CString::new(line.text.replace('\0', " ")).unwrap_or_default();
        let target = CString::new(event.metadata().target()).unwrap_or_default();
        // Held during the call, so that replacing the callback waits for it.
        let sink = SINK.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(Sink { callback, user, level: most }) = *sink
            && *event.metadata().level() <= most
        {
            let level = level_number(*event.metadata().level());
            CALLING.set(true);
            // SAFETY: the C caller passed a function of this type, callable from any thread; the strings outlive the
            // call.
            unsafe { callback(user.0, level, target.as_ptr(), text.as_ptr()) };
            CALLING.set(false);
        }
    }

    fn new_span(&self, _attributes: &Attributes<'_>) -> Id {
        Id::from_u64(self.spans.fetch_add(1, Ordering::Relaxed).max(1))
    }

    fn record(&self, _span: &Id, _values: &Record<'_>) {}

    fn record_follows_from(&self, _span: &Id, _follows: &Id) {}

    fn enter(&self, _span: &Id) {}

    fn exit(&self, _span: &Id) {}
}

/// The message, then `name=value` for each field.
#[derive(Default)]
struct Line {
    text: String,
}

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        // Writing to a String does not fail.
        let _ = if field.name() == "message" {
            let fields = std::mem::take(&mut self.text);
            write!(self.text, "{value:?}{fields}")
        } else {
            write!(self.text, " {}={value:?}", field.name())
        };
    }
}
