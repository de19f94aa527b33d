//! Memory given back by a dropped stream is written to by nobody any more.

mod common;

use common::*;
use ringest::{AsyncUringStream, DirectMode, FileRef, InputFile, RingOptions, SqPoll, StreamOptions, leak_stats};
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

const LEN: usize = 1 << 20;
const PATTERN: u8 = 0xa5;

/// Submits reads of many kinds, drops the stream at once, reuses the memory and watches it.
fn rounds(options: RingOptions, rounds: u64) -> Result<(), ringest::PipelineError> {
    let file = TempFile::new(LEN);
    let mut sources: Vec<FileRef> = vec![(&file.open(DirectMode::Off)).into()];
    sources.extend(InputFile::open(file.path(), DirectMode::On).iter().map(FileRef::from));
    let before = leak_stats();
    let mut memory = filled(LEN, 0);
    for round in 0..rounds {
        let pipe = Pipe::new();
        let ring = ringest::IoUringState::new(options)?;
        let tail = AtomicU64::new(0);
        let stream_options = StreamOptions { unregistered: round % 3 == 0, depth: 32, ..StreamOptions::default() };
        let mut stream = AsyncUringStream::with_options(ring, memory.share(), &tail, stream_options)?;
        for chunk in 0..32usize {
            let at = chunk * 32_768;
            match chunk % 4 {
                0 => stream.submit_read_to_gpu_at(pipe.fd(), 0, at, 4096)?,
                1 => stream.submit_read_to_gpu_scatter(
                    sources[chunk / 4 % sources.len()].clone(),
                    round,
                    &[(at, 5000), (at + 10_000, 6000)],
                    0,
                )?,
                _ => {
                    let ragged = usize::from(chunk % 8 == 3) * 77;
                    let source = sources[(chunk / 2 + round as usize) % sources.len()].clone();
                    stream.submit_read_to_gpu_at(source, at as u64 + ragged as u64, at + ragged, 32_000)?
                }
            };
        }
        // Not handed over, handed over, or partly completed.
        match round % 3 {
            0 => {}
            1 => drop(stream.flush_submissions()?),
            _ => drop(stream.poll()?),
        }
        drop(stream);
        // The pipe's reads would land only now.
        memory.as_mut_slice().unwrap().fill(PATTERN);
        pipe.feed(0, 16_384);
        let watch = Instant::now();
        loop {
            let bad = memory.as_slice().unwrap().iter().position(|&byte| byte != PATTERN);
            assert_eq!(bad, None, "round {round}: written to after the drop");
            if watch.elapsed() > Duration::from_millis(1) {
                break;
            }
        }
    }
    assert_eq!(leak_stats(), before, "something had to be leaked");
    Ok(())
}

#[test]
fn nothing_lands_after_a_drop() {
    drop(ring!());
    rounds(RingOptions::default(), 300).unwrap();
}

#[test]
fn nothing_lands_after_a_drop_of_a_tiny_ring() {
    drop(ring!());
    rounds(RingOptions { entries: 2, ..RingOptions::default() }, 150).unwrap();
}

#[test]
fn nothing_lands_after_a_drop_of_a_movable_ring() {
    drop(ring!());
    rounds(RingOptions { movable: true, ..RingOptions::default() }, 150).unwrap();
}

#[test]
fn nothing_lands_after_a_drop_with_sqpoll() {
    let options = RingOptions { sqpoll: Some(SqPoll { idle_ms: 1, cpu: None }), ..RingOptions::default() };
    drop(ring!(options));
    rounds(options, 100).unwrap();
}
