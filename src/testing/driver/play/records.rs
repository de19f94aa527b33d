//! What each record must say.

use super::super::super::harness::{Check, ensure};
use super::super::super::sim::SimFile;
use super::super::Fault;
use super::super::reads::SimReads;
use super::Play;
use crate::ingest::IngestCompletion;
use crate::uring::{DirectAlignment, ReadPath};
use crate::wire::{NO_SEQUENCE, state};
use std::time::Duration;

impl Play {
    pub(super) fn take(&mut self, count: usize) -> Check {
        let SimReads { flight, world, .. } = &mut self.core.reads;
        world.scan(&flight.queue)?;
        for _ in 0..count {
            let (ready, status) = (self.core.ready(), self.core.peek_status());
            let Some(record) = self.core.take() else {
                ensure!(ready == 0 && status.is_none(), "no record although {ready} are ready");
                break;
            };
            self.note("take", record);
            ensure!(status == Some(record.status), "peeked {status:?} before {record:?}");
            if self.world().mischief.now(Fault::RecordLost) {
                continue;
            }
            let times = if self.world().mischief.now(Fault::RecordTwice) { 2 } else { 1 };
            for _ in 0..times {
                self.recorded(&record).map_err(|what| format!("{what}: {record:?}"))?;
            }
        }
        Ok(())
    }

    fn recorded(&mut self, record: &IngestCompletion) -> Check {
        let IngestCompletion { request, sequence, status, bytes, bounced, latency, path, .. } = *record;
        let now = self.clock();
        let index = request as usize;
        let asked = self.asked.get(index).ok_or("a record of no request")?;
        ensure!(!asked.ended, "a request ended twice");
        ensure!(
            (record.tag, record.file_offset, record.requested) == (asked.tag, asked.file_offset, asked.len),
            "another request's record"
        );
        let passed = Duration::from_nanos(now - asked.at);
        // A request was submitted a few calls of the clock before this was noted.
        ensure!(latency <= passed + Duration::from_micros(200), "it took {passed:?} at most");
        let over = asked.timeout.is_some_and(|timeout| latency >= timeout);
        match -status {
            0 => ensure!(bytes == asked.len, "whole, with {bytes} bytes"),
            libc::ETIMEDOUT => ensure!(over, "its time was not over"),
            libc::ECANCELED => {
                let world = &self.core.reads.world;
                let closed = world.words.state() == state::ABORTED || world.words.abort() != 0 || self.ended_outside;
                ensure!(asked.cancel_asked || closed, "nobody cancelled it");
            }
            _ => {}
        }
        if sequence == NO_SEQUENCE {
            ensure!(matches!(-status, libc::ECANCELED | libc::ETIMEDOUT), "no slot, and status {status}");
            ensure!((bytes, bounced, path) == (0, 0, ReadPath::None), "bytes without a slot");
        } else {
            self.recorded_slot(record)?;
        }
        self.asked[index].ended = true;
        self.taken += 1;
        self.count(record);
        Ok(())
    }

    fn recorded_slot(&mut self, record: &IngestCompletion) -> Check {
        let IngestCompletion { request, status, bytes, bounced, path, .. } = *record;
        let asked = &self.asked[request as usize];
        let SimReads { flight, world, .. } = &self.core.reads;
        let sim = &flight.queue;
        let sequence = world.sequence(record.sequence).ok_or("a sequence that nobody reserved")?;
        ensure!(sequence.request.is_none(), "the sequence carries request {:?}", sequence.request);
        let found = sequence.published.ok_or("its sequence is not published")?;
        ensure!(
            (found.tag, found.file_offset, found.status, found.bytes, found.path)
                == (asked.tag, asked.file_offset, status, bytes, path as u16),
            "the slot says {found:?}"
        );
        ensure!(sequence.file == asked.file, "read from file {}", sequence.file);
        let file = &sim.files[asked.file];
        if sequence.early() {
            ensure!(bounced == 0, "bounced bytes of a read that goes on");
        } else if let Ok(number) = sequence.number {
            let attempt = &sim.attempts[number as usize];
            ensure!(bounced == attempt.bounced, "{} bytes were bounced", attempt.bounced);
            let known = !file.late && file.truncated.is_none();
            let fits = |direct: DirectAlignment| direct.offset.max(direct.memory) <= self.setup.queue.alignment;
            if file.direct.is_some_and(fits) && known {
                ensure!(bounced == 0, "blocks that fit the slots were bounced");
            }
            let exist = |size: u64| size.saturating_sub(asked.file_offset).min(asked.len.into());
            let (least, most) = (exist(file.size_at(sim.clock())), exist(file.size));
            let plausible = |errno: i32| attempt.errors.contains(&errno);
            match -status {
                0 => ensure!(u64::from(bytes) <= most, "{most} bytes exist"),
                libc::ENODATA => {
                    ensure!((least..=most).contains(&bytes.into()), "{least} to {most} bytes exist");
                    ensure!(plausible(libc::ENODATA), "the file did not end");
                }
                libc::EINVAL => {
                    let large = |file: &SimFile| {
                        file.direct.is_some_and(|direct| direct.offset as usize > self.bounce_slot_bytes)
                    };
                    ensure!(sim.files.iter().any(large), "nothing was wrong with the command");
                }
                libc::ENOMEM if self.strict && !sim.nature.adopts => {}
                libc::EINTR | libc::EAGAIN => {
                    let count = attempt.errors.iter().filter(|&&it| it == libc::EINTR || it == libc::EAGAIN).count();
                    ensure!(
                        count > usize::from(self.max_retries) && plausible(-status),
                        "given up after {count} tries"
                    );
                }
                libc::ECANCELED => {}
                errno => ensure!(plausible(errno), "the kernel never said so"),
            }
        } else {
            ensure!(bounced == 0, "bounced bytes of a read that was refused");
        }
        self.core.reads.world.sequences[record.sequence as usize].request = Some(request);
        Ok(())
    }

    fn count(&mut self, record: &IngestCompletion) {
        let telemetry = &mut self.sums.telemetry;
        let bytes = u64::from(record.bytes);
        match -record.status {
            0 => {
                for count in [&mut telemetry.completed, &mut telemetry.paths[record.path as usize]] {
                    count.reads += 1;
                    count.bytes += bytes;
                }
                self.sums.latencies.push(record.latency);
            }
            errno => {
                telemetry.failed += 1;
                telemetry.end_of_file += u64::from(errno == libc::ENODATA);
                telemetry.cancelled += u64::from(errno == libc::ECANCELED);
                telemetry.timed_out += u64::from(errno == libc::ETIMEDOUT);
                self.report.failures += 1;
            }
        }
    }
}
