//! One io_uring, one thread, driven by the caller: submit, poll, a tail word.
//!
//! Data flows one way: `stream` takes requests, `flight` keeps the record of what is in flight and decides what each
//! completion means, `queue` hands reads to the kernel and holds their memory meanwhile, `ring` owns the io_uring and
//! its registrations, `tail` publishes.

mod direct;
mod file;
mod flight;
mod queue;
mod registry;
mod ring;
mod stream;
mod tail;

pub use file::{DirectAlignment, DirectMode, FileRef, InputFile};
pub use flight::{Completion, ReadPath, StreamStats};
pub(crate) use queue::count_leaked_queue;
pub use queue::{LeakStats, leak_stats};
pub use registry::SharedBuffers;
pub use ring::{IoUringState, RingFeatures, RingOptions, RingRegistrations, SqPoll};
pub use stream::{AsyncUringStream, CloseReport, MovableStream, StreamOptions};
pub use tail::{TailLine, TailWord};

#[cfg(feature = "testing")]
pub(crate) use {
    flight::{Flight, FlightOptions, Request, Segment},
    queue::{BounceSlot, Command, Op, Queue, Reaped, Target},
    registry::{BufferEntry, SPLIT},
};
