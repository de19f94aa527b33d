//! The other side of the io_queue: threads that pop slots, as a kernel on a GPU would, and checksum what is in them.

use crate::sums::Sums;
use ringest::{IoQueueConsumer, wire};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// A wait that ends with nothing is begun again.
const PATIENCE: Duration = Duration::from_secs(1);

/// What one consumer did.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Consumed {
    /// Slots popped.
    pub(crate) slots: u64,
    /// Of these, poisoned: their reads failed, which is the producer's to tell.
    pub(crate) poisoned: u64,
    /// The queue came to its end; otherwise one side gave up.
    pub(crate) end: bool,
}

/// Pops until the queue has ended, and adds each payload's CRC32C. It knows what the queue tells and nothing else.
pub(crate) fn run(consumer: IoQueueConsumer, sums: &Mutex<Sums>) -> Result<Consumed, String> {
    let mut consumer = Guard(consumer);
    let mut consumed = Consumed::default();
    loop {
        let slot = match consumer.0.wait_pop(PATIENCE) {
            Ok(slot) => slot,
            Err(wire::Outcome::Timeout) => continue,
            Err(outcome) => {
                consumed.end = outcome == wire::Outcome::End;
                let broken = matches!(-consumer.0.error(), libc::EPROTO | libc::ESTALE);
                return if broken { Err("the io_queue's words make no sense".to_owned()) } else { Ok(consumed) };
            }
        };
        consumed.slots += 1;
        if slot.is_poison() {
            consumed.poisoned += 1;
        } else {
            let wire::Descriptor { tag, file_offset, bytes, .. } = *slot.descriptor();
            let crc = crc32c::crc32c(consumer.0.payload(&slot));
            let added = sums.lock().unwrap_or_else(PoisonError::into_inner).add(tag, file_offset, bytes.into(), crc);
            if !added {
                let sequence = slot.sequence();
                consumer.0.abort(libc::EBADMSG);
                return Err(format!(
                    "slot {sequence}: {bytes} bytes at offset {file_offset} of file {tag} are not wanted"
                ));
            }
        }
        consumer.0.release(slot).map_err(|error| error.to_string())?;
    }
}

/// A consumer that panics gives up, so that nobody waits for the slots it would have released.
struct Guard(IoQueueConsumer);

impl Drop for Guard {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.abort(libc::ENOTRECOVERABLE);
        }
    }
}
