//! What the simulation once found in the driver, each told as a short story.

use crate::error::{PipelineError, Result};
use crate::ingest::{Core, CoreOptions, IngestRequest, IoQueue, IoQueueOptions, Reads, SlotRead};
use crate::uring::{Completion, FileRef, StreamStats};
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

/// Reads whose ends the test makes by hand; those of no bytes end at once.
#[derive(Default)]
struct Manual {
    clock: Duration,
    flying: Vec<Completion>,
    ended: VecDeque<Completion>,
    numbers: u64,
    pauses: u32,
    turns: u32,
    /// What every turn answers from now on.
    fails: bool,
    /// What consumers do while the driver naps.
    nap: Option<Box<dyn FnMut(u32)>>,
}

impl Manual {
    /// The oldest read ends.
    fn end(&mut self, status: i32, bounced: u64) {
        let read = self.flying.remove(0);
        let bytes = if status == 0 { read.requested } else { 0 };
        self.ended.push_back(Completion { status, bytes, bounced, ..read });
    }
}

impl Reads for Manual {
    fn submit(&mut self, read: SlotRead) -> Result<u64> {
        let (sequence, requested) = (self.numbers, read.len as u64);
        self.numbers += 1;
        let completion = Completion { sequence, requested, user_data: read.user_data, ..Completion::default() };
        match read.len {
            0 => self.ended.push_back(completion),
            _ => self.flying.push(completion),
        }
        Ok(sequence)
    }

    fn turn(
        &mut self,
        _min: usize,
        timeout: Option<Duration>,
        mut each: impl FnMut(&Completion, &dyn Fn() -> Duration),
    ) -> Result<()> {
        let now = self.clock;
        self.ended.drain(..).for_each(|completion| each(&completion, &|| now));
        self.turns += 1;
        assert!(self.turns < 1000, "turns for ever");
        match self.fails {
            // At once, as `io_uring_enter` does: no time passes.
            true => Err(PipelineError::IoUringSyscall { call: "io_uring_enter", errno: libc::EBADF, fix: "".into() }),
            false => {
                self.clock += timeout.unwrap_or_default();
                Ok(())
            }
        }
    }

    fn resolve(&self, file: FileRef) -> Result<FileRef> {
        Ok(file)
    }

    fn count_user(&mut self, _file: &FileRef, _change: i32) {}

    fn cancel(&mut self, _number: u64) {}

    fn in_flight(&self) -> usize {
        self.flying.len()
    }

    fn now(&self) -> Duration {
        self.clock
    }

    fn pause(&mut self, time: Duration) {
        self.clock += time;
        self.pauses += 1;
        assert!(self.pauses < 1000, "naps for ever");
        if let Some(nap) = &mut self.nap {
            nap(self.pauses);
        }
    }

    fn stats(&self) -> StreamStats {
        StreamStats::default()
    }
}

const OPTIONS: CoreOptions =
    CoreOptions { depth: 2, queue_limit: 4, credit_poll: Duration::from_micros(50), crc32c: false };

fn driver() -> (Core<Manual>, Arc<IoQueue>) {
    let options = IoQueueOptions { slots: 2, slot_bytes: 512, alignment: 128, ..IoQueueOptions::default() };
    let queue = IoQueue::new(options).unwrap();
    (Core::new(Manual::default(), Arc::clone(&queue), OPTIONS), queue)
}

fn request(len: u32) -> IngestRequest {
    IngestRequest::new(FileRef::simulated(0, None), 0, len, 7)
}

/// While the driver napped for want of a slot it looked for credit only: the end of a read that needs no command, begun
/// meanwhile, was never found.
#[test]
fn an_empty_read_that_begins_while_the_driver_naps_ends() {
    let (mut core, queue) = driver();
    let mut consumer = queue.consumer(0).unwrap();
    for _ in 0..2 {
        core.submit(request(100)).unwrap();
        core.reads.end(0, 0);
    }
    core.turn(2, None).unwrap();
    while core.take().is_some() {}
    core.submit(request(0)).unwrap();
    assert_eq!(core.queued(), 1);
    core.reads.nap = Some(Box::new(move |pauses| {
        if pauses == 3 {
            let slot = consumer.try_pop().unwrap();
            consumer.release(slot).unwrap();
        }
    }));
    core.turn(1, None).unwrap();
    assert_eq!(core.take().map(|record| (record.sequence, record.status)), Some((2, 0)));
}

/// Bytes that went through the bounce buffer after their request's deadline were not counted.
#[test]
fn bounced_bytes_of_a_read_that_was_given_up_count() {
    let (mut core, _queue) = driver();
    core.submit(IngestRequest { timeout: Some(Duration::from_micros(1)), ..request(100) }).unwrap();
    core.turn(1, None).unwrap();
    assert_eq!(core.take().map(|record| record.status), Some(-libc::ETIMEDOUT));
    assert_eq!((core.held(), core.telemetry().bounce_bytes), (1, 0));
    core.reads.end(0, 100);
    core.turn(0, None).unwrap();
    assert_eq!((core.held(), core.telemetry().bounce_bytes), (0, 100));
}

/// With a record there, the error of the system call waited for a call that had none, which a wait for more records never
/// came to.
#[test]
fn a_wait_on_a_ring_that_errs_for_good_ends() {
    let (mut core, _queue) = driver();
    core.submit(request(100)).unwrap();
    core.submit(request(100)).unwrap();
    core.reads.end(0, 0);
    core.reads.fails = true;
    assert_eq!(core.turn(2, None).unwrap_err().errno(), libc::EBADF);
    assert_eq!((core.ready(), core.in_flight()), (1, 1));
}

/// For the same reason closing spun until its time was over.
#[test]
fn closing_a_ring_that_errs_for_good_gives_up() {
    let (mut core, queue) = driver();
    core.submit(request(100)).unwrap();
    core.submit(request(100)).unwrap();
    core.reads.end(0, 0);
    core.reads.fails = true;
    assert!(!core.shut(Duration::from_secs(10)));
    assert_eq!((core.held(), queue.tail()), (1, 2));
    assert_eq!(
        std::iter::from_fn(|| core.take()).map(|record| record.status).collect::<Vec<_>>(),
        [0, -libc::ECANCELED]
    );
}
