//! This side of the io_queue: a driver kept full with the files' reads.

use crate::ingest::Planned;
use crate::progress::Progress;
use crate::report::{Failure, Outcome};
use ringest::{
    DirectMode, IngestCompletion, InputFile, NvmeGpuIngestDriver, NvmeGpuIngestTelemetry, PipelineError, StreamStats,
};
use std::path::Path;
use std::time::Duration;

/// A wait for completions ends at least this often, so that the progress display moves.
const LOOK_UP: Duration = Duration::from_millis(250);

/// System calls in a row that may fail for want of resources before the ingest gives up.
const STRIKES: u32 = 10_000;

/// What the driver counted.
#[derive(Debug)]
pub(crate) struct Produced {
    pub(crate) telemetry: NvmeGpuIngestTelemetry,
    pub(crate) stream: StreamStats,
}

/// See the module's text.
pub(crate) struct Producer<'a> {
    pub(crate) driver: NvmeGpuIngestDriver,
    pub(crate) plan: &'a [Planned<'a>],
    pub(crate) mode: DirectMode,
    pub(crate) progress: Progress,
    /// Bytes published.
    pub(crate) bytes: u64,
    pub(crate) strikes: u32,
}

impl Producer<'_> {
    /// Reads everything, or says what failed first. However it ends, the driver is closed then: consumers get END or
    /// ABORTED, and end too.
    pub(crate) fn run(mut self) -> Outcome<Produced> {
        for index in 0..self.plan.len() {
            // No slot for an empty file: there is nothing to say of it.
            if self.plan[index].len > 0 {
                self.file(index)?;
            }
        }
        self.driver.finish()?;
        // Records may be left when all requests have ended.
        while self.reap()? > 0 || self.outstanding() > 0 {}
        let (telemetry, stream) = (self.driver.telemetry_snapshot(), self.driver.stream_stats());
        Ok(Produced { telemetry, stream })
    }

    /// Submits every read of one file. The last of them are still in flight when the next file begins.
    fn file(&mut self, index: usize) -> Outcome<()> {
        let Planned { path, len, .. } = self.plan[index];
        let source = self.open(path)?;
        let mut offset = 0;
        while offset < len {
            match self.driver.submit_file(&source, offset, len - offset, index as u64) {
                Ok(accepted) => offset += accepted,
                Err(PipelineError::QueueFull { .. }) => drop(self.reap()?),
                // A consumer gave up, and says why.
                Err(error) => return Err(Failure::at(path, error)),
            }
        }
        Ok(())
    }

    /// Opens a file. Requests keep it open until they have ended, so as many are open as requests are on their way: with
    /// RLIMIT_NOFILE below that, some of these have to end first.
    fn open(&mut self, path: &Path) -> Outcome<InputFile> {
        loop {
            match InputFile::open(path, self.mode) {
                Err(error) if error.errno() == libc::EMFILE && self.outstanding() > 0 => drop(self.reap()?),
                opened => return Ok(opened?),
            }
        }
    }

    fn outstanding(&self) -> usize {
        self.driver.in_flight() + self.driver.queued()
    }

    /// Waits for records, looks at each, and says how many there were. Requests that wait for a slot start meanwhile.
    fn reap(&mut self) -> Outcome<usize> {
        let mut records = [IngestCompletion::default(); 64];
        let taken = match self.driver.wait_into(&mut records, 1, Some(LOOK_UP)) {
            Ok(taken) => taken,
            Err(error) => return self.tolerate(error).map(|()| 0),
        };
        for record in &records[..taken] {
            self.strikes = 0;
            self.bytes += u64::from(record.result().map_err(|error| self.read_failure(record, error))?);
        }
        self.progress.at(self.bytes);
        Ok(taken)
    }

    /// A timeout is a look-up; a kernel that is short of resources may have them soon.
    fn tolerate(&mut self, error: PipelineError) -> Outcome<()> {
        match error.errno() {
            libc::ETIMEDOUT => {
                self.progress.at(self.bytes);
                Ok(())
            }
            libc::EAGAIN | libc::EBUSY if self.strikes < STRIKES => {
                self.strikes += 1;
                std::thread::sleep(Duration::from_millis(1));
                Ok(())
            }
            _ => Err(error.into()),
        }
    }

    fn read_failure(&self, record: &IngestCompletion, error: PipelineError) -> Failure {
        let Planned { path, len, .. } = self.plan[record.tag as usize];
        match error {
            PipelineError::EndOfFile { file_offset, bytes, .. } => {
                let ended = match bytes {
                    0 => format!("it ended at or before offset {file_offset}"),
                    _ => format!("it ended at offset {}", file_offset + bytes),
                };
                Failure::at(path, format!("the file was truncated: {ended}, of {len} bytes planned"))
            }
            error => Failure::at(path, error),
        }
    }
}
