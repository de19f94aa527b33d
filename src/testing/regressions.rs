//! What the simulator once found, each told as a short story: a seed's meaning changes with the harness, these stay.

use crate::memory::{GpuMappedBuffer, HugePages, MappedBuffer, MappedOptions, Region};
use crate::sys::Errno;
use crate::uring::{
    BufferEntry, Command, DirectAlignment, FileRef, Flight, FlightOptions, Op, Queue, Reaped, Request, SPLIT, Segment,
    TailWord, Target,
};
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

/// A queue whose completions the test makes by hand.
#[derive(Default)]
struct Manual {
    unsubmitted: usize,
    #[allow(clippy::vec_box, reason = "as the flight hands them out")]
    held: Vec<Box<Op>>,
    done: VecDeque<Reaped>,
    cancels: Vec<u64>,
    enters: u32,
    clock: Duration,
}

impl Manual {
    /// Completes the command that reads at this offset of the file.
    fn complete(&mut self, file_offset: u64, result: i32) {
        let starts = |op: &Op| match op.command {
            Command::Bounce { file_offset, .. } => file_offset,
            _ => op.file_offset,
        };
        let index = self.held.iter().position(|op| starts(op) == file_offset);
        let index = index.unwrap_or_else(|| panic!("no command at {file_offset}: {:?}", self.held));
        self.done.push_back(Reaped { op: self.held.remove(index), result });
    }
}

impl Queue for Manual {
    fn make_room(&mut self) -> Result<bool, Errno> {
        Ok(true)
    }

    fn push(&mut self, op: Box<Op>, _segments: &[Segment]) {
        self.unsubmitted += 1;
        self.held.push(op);
    }

    fn cancel(&mut self, wanted: impl Fn(u64) -> bool) {
        self.cancels.extend(self.held.iter().map(|op| op.sequence).filter(|&sequence| wanted(sequence)));
    }

    fn has_unsubmitted(&mut self) -> bool {
        self.unsubmitted > 0
    }

    fn wants_enter(&mut self) -> bool {
        self.unsubmitted > 0
    }

    fn enter(&mut self, _wait: u32, _timeout: Option<Duration>) -> Result<(), Errno> {
        self.unsubmitted = 0;
        self.enters += 1;
        Ok(())
    }

    fn reap(&mut self) -> Option<Reaped> {
        self.done.pop_front()
    }

    fn in_kernel(&self) -> usize {
        self.held.len() + self.done.len()
    }

    fn now(&self) -> Duration {
        self.clock
    }

    fn adopt(&mut self, region: Arc<Region>) -> Target {
        Target::Plain(region)
    }

    fn has_readv_fixed(&self) -> bool {
        true
    }
}

const OPTIONS: FlightOptions = FlightOptions {
    depth: 16,
    window: 16,
    max_retries: 3,
    backoff: Duration::ZERO,
    strict: false,
    bounce_slots: 1,
    bounce_slot_bytes: 4096,
};

fn direct_file() -> FileRef {
    FileRef::simulated(0, Some(DirectAlignment { memory: 4, offset: 512 }))
}

fn memory() -> Target {
    let memory = MappedBuffer::<u8>::alloc(1 << 16).unwrap();
    Target::Plain(Arc::clone(GpuMappedBuffer::from(memory).region()))
}

fn submit(flight: &mut Flight<'_, Manual>, file: &FileRef, at: u64, target: &Target, segments: &[Segment]) -> u64 {
    let (file, target) = (file.clone(), Some(target.clone()));
    let request = Request { file, file_offset: at, target, segments, buffer_offset: 0, user_data: 0, slack: 0 };
    flight.submit(request).unwrap()
}

/// A read of 512 aligned bytes, then 1024, then a ragged end: the middle is one command, the end another.
fn with_ragged_end(tail: &AtomicU64) -> Flight<'_, Manual> {
    let mut flight = Flight::new(Manual::default(), TailWord::from(tail), memory(), OPTIONS);
    submit(&mut flight, &direct_file(), 0, &memory(), &[(0, 1536 + 100)]);
    flight
}

/// The ragged end met the end of the file first, and the short read of the middle was not continued: bytes that exist
/// were missing, and the count was wrong.
#[test]
fn the_end_of_file_in_one_part_does_not_stop_the_others() {
    let tail = AtomicU64::new(0);
    let mut flight = with_ragged_end(&tail);
    flight.queue.complete(1536, 0);
    flight.queue.complete(0, 512);
    flight.drive(0, None).unwrap();
    flight.queue.complete(512, 900);
    flight.drive(0, None).unwrap();
    // The rest of that block: 512 + 900 is in the middle of it.
    flight.queue.complete(1024, 388);
    flight.drive(0, None).unwrap();
    // Nothing new: the file ends there, and is found to end there again and again.
    for _ in 0..3 {
        assert!(flight.take().is_none());
        flight.queue.complete(1024, 388);
        flight.drive(0, None).unwrap();
    }
    let completion = flight.take().unwrap();
    assert_eq!((completion.status, completion.bytes), (-libc::ENODATA, 1412));
}

/// End of file in one part hid an I/O error in another, so that the bytes looked complete.
#[test]
fn the_end_of_file_hides_no_error() {
    let tail = AtomicU64::new(0);
    let mut flight = with_ragged_end(&tail);
    flight.queue.complete(1536, 0);
    flight.queue.complete(0, -libc::EIO);
    flight.drive(0, None).unwrap();
    assert_eq!(flight.take().unwrap().status, -libc::EIO);
}

/// Work on a kernel thread that is cancelled ends with EINTR, which was reported.
#[test]
fn a_cancelled_read_that_was_interrupted_says_cancelled() {
    for errno in [libc::EINTR, libc::EAGAIN, libc::ECANCELED] {
        let tail = AtomicU64::new(0);
        let mut flight = Flight::new(Manual::default(), TailWord::from(&tail), memory(), OPTIONS);
        let sequence = submit(&mut flight, &FileRef::simulated(0, None), 0, &memory(), &[(0, 100)]);
        flight.cancel(sequence).unwrap();
        assert_eq!(flight.queue.cancels, [sequence]);
        flight.queue.complete(0, -errno);
        flight.drive(0, None).unwrap();
        assert_eq!(flight.take().unwrap().status, -libc::ECANCELED);
    }
}

/// An op in line for a bounce slot whose submission had failed meanwhile took the turn and not the slot: those behind
/// it waited for ever, and a wait span.
#[test]
fn a_lost_op_in_line_for_a_bounce_slot_passes_it_on() {
    let tail = AtomicU64::new(0);
    let mut flight = Flight::new(Manual::default(), TailWord::from(&tail), memory(), OPTIONS);
    let (file, target) = (direct_file(), memory());
    submit(&mut flight, &file, 0, &target, &[(1, 100), (201, 100), (401, 100), (601, 100)]);
    submit(&mut flight, &file, 5120, &target, &[(1001, 100)]);
    assert_eq!(flight.queue.held.len(), 1, "one slot");
    flight.queue.complete(0, -libc::EIO);
    flight.drive(0, None).unwrap();
    // The second range was already in when the first one's error was counted; the others are lost.
    flight.queue.complete(0, 512);
    flight.drive(0, None).unwrap();
    assert_eq!(flight.take().map(|completion| completion.status), Some(-libc::EIO));
    flight.queue.complete(5120, 512);
    flight.drive(1, None).unwrap();
    assert_eq!(flight.take().map(|completion| completion.status), Some(0));
}

/// A wait without time neither submitted nor looked: a caller who only ever does that got nowhere.
#[test]
fn a_wait_without_time_still_submits() {
    let tail = AtomicU64::new(0);
    let mut flight = Flight::new(Manual::default(), TailWord::from(&tail), memory(), OPTIONS);
    submit(&mut flight, &FileRef::simulated(0, None), 0, &memory(), &[(0, 100)]);
    assert_eq!(flight.drive(1, Some(Duration::ZERO)).unwrap_err().errno(), libc::ETIMEDOUT);
    assert_eq!((flight.queue.enters, flight.queue.unsubmitted), (1, 0));
}

/// A scatter read whose first range lies across a split of the registration left the registered path, strict or not.
#[test]
fn a_strict_scatter_read_across_a_split_stays_registered() {
    let options = MappedOptions { huge_pages: HugePages::Off, ..MappedOptions::default() };
    let memory = MappedBuffer::<u8>::alloc_with(SPLIT + 8192, options).unwrap();
    let target = Target::Registered(BufferEntry::simulated(&GpuMappedBuffer::from(memory), 5));
    let tail = AtomicU64::new(0);
    let strict = FlightOptions { strict: true, ..OPTIONS };
    let mut flight = Flight::new(Manual::default(), TailWord::from(&tail), target.clone(), strict);
    submit(&mut flight, &FileRef::simulated(0, None), 0, &target, &[(SPLIT - 50, 100), (SPLIT + 500, 100)]);
    while let Some(op) = flight.queue.held.first() {
        let Command::Direct { len, slot: Some(slot) } = op.command else { panic!("unregistered: {op:?}") };
        assert_eq!(slot, if op.target_offset < SPLIT { 5 } else { 6 });
        flight.queue.complete(op.file_offset, len as i32);
        flight.drive(0, None).unwrap();
    }
    assert_eq!(flight.take().map(|completion| (completion.status, completion.bytes)), Some((0, 200)));
}

/// A block that was read short, before the bytes that were wanted of it, was taken for the end of the file.
#[test]
fn a_short_block_is_not_the_end_of_the_file() {
    let tail = AtomicU64::new(0);
    let mut flight = Flight::new(Manual::default(), TailWord::from(&tail), memory(), OPTIONS);
    let file = FileRef::simulated(0, Some(DirectAlignment { memory: 4096, offset: 4096 }));
    submit(&mut flight, &file, 3000, &memory(), &[(0, 100)]);
    flight.queue.complete(0, 512);
    flight.drive(0, None).unwrap();
    flight.queue.complete(0, 4096);
    flight.drive(0, None).unwrap();
    let completion = flight.take().unwrap();
    assert_eq!((completion.status, completion.bytes), (0, 100));
}

/// EAGAIN is retried a bounded number of times, each after twice the wait of the one before.
#[test]
fn retries_are_bounded_and_back_off() {
    let tail = AtomicU64::new(0);
    let options = FlightOptions { backoff: Duration::from_millis(1), max_retries: 3, ..OPTIONS };
    let mut flight = Flight::new(Manual::default(), TailWord::from(&tail), memory(), options);
    submit(&mut flight, &FileRef::simulated(0, None), 0, &memory(), &[(0, 100)]);
    for wait in [1, 2, 4] {
        flight.queue.complete(0, -libc::EAGAIN);
        flight.drive(0, None).unwrap();
        flight.queue.clock += Duration::from_micros(wait * 1000 - 1);
        flight.drive(0, None).unwrap();
        assert!(flight.queue.held.is_empty(), "retried before {wait} ms were over");
        flight.queue.clock += Duration::from_micros(1);
        flight.drive(0, None).unwrap();
        assert_eq!(flight.queue.held.len(), 1);
    }
    flight.queue.complete(0, -libc::EAGAIN);
    flight.drive(0, None).unwrap();
    assert_eq!((flight.take().unwrap().status, flight.stats().retries), (-libc::EAGAIN, 3));
}

/// An absurd back-off overflowed.
#[test]
fn a_back_off_without_end_is_no_panic() {
    let tail = AtomicU64::new(0);
    let options = FlightOptions { backoff: Duration::MAX, ..OPTIONS };
    let mut flight = Flight::new(Manual::default(), TailWord::from(&tail), memory(), options);
    let sequence = submit(&mut flight, &FileRef::simulated(0, None), 0, &memory(), &[(0, 100)]);
    flight.queue.complete(0, -libc::EAGAIN);
    flight.drive(0, None).unwrap();
    flight.cancel(sequence).unwrap();
    assert_eq!(flight.take().unwrap().status, -libc::ECANCELED);
}

/// Each read in line that was refused the bounce slot handed it to the next by a call deeper.
#[test]
fn a_long_line_for_the_bounce_buffer_is_no_recursion() {
    let tail = AtomicU64::new(0);
    let options = FlightOptions { strict: true, depth: 65_536, window: 65_536, ..OPTIONS };
    let mut flight = Flight::new(Manual::default(), TailWord::from(&tail), memory(), options);
    let registered = MappedBuffer::<u8>::alloc(1 << 16).unwrap();
    let registered = Target::Registered(BufferEntry::simulated(&GpuMappedBuffer::from(registered), 5));
    submit(&mut flight, &direct_file(), 1, &memory(), &[(0, 100)]);
    for _ in 0..60_000 {
        submit(&mut flight, &direct_file(), 1025, &registered, &[(0, 100)]);
    }
    flight.queue.complete(0, 512);
    flight.drive(0, None).unwrap();
    assert_eq!(flight.ready(), 60_001);
}

/// A cancellation that the kernel did not heed was never repeated.
#[test]
fn a_cancellation_is_repeated_until_it_is_heeded() {
    let tail = AtomicU64::new(0);
    let mut flight = Flight::new(Manual::default(), TailWord::from(&tail), memory(), OPTIONS);
    let sequence = submit(&mut flight, &FileRef::simulated(0, None), 0, &memory(), &[(0, 100)]);
    flight.cancel(sequence).unwrap();
    for asked in 2..6 {
        flight.queue.clock += Duration::from_secs(1);
        flight.drive(0, None).unwrap();
        assert_eq!(flight.queue.cancels.len(), asked);
    }
    flight.queue.complete(0, -libc::ECANCELED);
    flight.drive(0, None).unwrap();
    flight.queue.clock += Duration::from_secs(9);
    flight.drive(0, None).unwrap();
    assert_eq!((flight.queue.cancels.len(), flight.take().unwrap().status), (5, -libc::ECANCELED));
}
