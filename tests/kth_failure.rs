//! Every system call of a run fails once, with several errnos: nothing panics, hangs, lies or leaks.

#![cfg(feature = "testing")]

use ringest::testing::{end_fault_plan, plan_fault, refuse_setup_flags};
use ringest::{
    AsyncUringStream, Completion, DirectMode, DriverOptions, FileRef, IngestCompletion, IngestRequest, InputFile,
    IoQueue, IoQueueOptions, IoUringState, MappedBuffer, NvmeGpuIngestDriver, Result, RingOptions, TailLine,
    leak_stats,
};
use std::fmt::Write;
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;
use std::sync::atomic::AtomicU64;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

const ERRNOS: [i32; 6] = [libc::EIO, libc::ENOMEM, libc::EINVAL, libc::EPERM, libc::EAGAIN, libc::EINTR];
const FILE: usize = 300_001;
const MEMORY: usize = 1 << 20;
/// Large enough for a transparent huge page, so that asking for one is a call too.
const LARGE: usize = 4 << 20;
/// A case takes milliseconds; whoever needs this long hangs.
const PATIENCE: Duration = Duration::from_secs(60);

/// IORING_SETUP_* flags that the kernel is to be thought to lack: none; SINGLE_ISSUER and DEFER_TASKRUN (before 6.0);
/// every flag the ladder knows (before 5.18).
const LACKING: [u32; 3] = [0, 1 << 12 | 1 << 13, 1 << 7 | 1 << 8 | 1 << 9 | 1 << 12 | 1 << 13];

/// A read that was reported whole: which memory, where, from where in the file, how long.
type Whole = (usize, usize, u64, usize);

/// One run over everything that makes system calls. `wholes` is filled as far as it gets.
fn script(path: &Path, memory: &mut [MappedBuffer<u8>; 2], wholes: &mut Vec<Whole>) -> Result<()> {
    let direct = InputFile::open(path, DirectMode::Auto)?;
    let buffered = InputFile::open(path, DirectMode::Off)?;
    let again = InputFile::from_fd(buffered.as_fd(), DirectMode::Auto)?;
    let line = TailLine::alloc()?;

    let mut ring = IoUringState::new(RingOptions { entries: 8, ..Default::default() })?;
    let half = memory[0].share().sub_region(0, MEMORY / 2)?;
    ring.register_buffers(&[&half])?;
    ring.register_files(&[direct.as_fd().as_raw_fd(), buffered.as_fd().as_raw_fd()])?;
    let mut second = IoUringState::new(RingOptions { entries: 8, movable: true, ..Default::default() })?;
    match ring.share_buffers().and_then(|shared| second.clone_buffers(&shared)) {
        // Before Linux 6.12.
        Err(error) if error.errno() == libc::EOPNOTSUPP => second.register_buffers(&[&half])?,
        cloned => cloned?,
    }

    let mut stream = AsyncUringStream::new(ring, half, line)?;
    let mut reads = Vec::new();
    let mut note = |sequence: u64, read: Whole| reads.push((sequence, read));
    // Aligned, unaligned, through registrations, by a raw descriptor whose alignment is learned, scattered.
    note(stream.submit_read_to_gpu(&direct, 0, 0, 8192)?, (0, 0, 0, 8192));
    note(stream.submit_read_to_gpu_at(&direct, 777, 8_192, 20_001)?, (0, 8_192, 777, 20_001));
    note(stream.submit_read_to_gpu_at(&buffered, 5, 40_000, 9_999)?, (0, 40_000, 5, 9_999));
    stream.flush_submissions()?;
    note(stream.submit_read_to_gpu_fixed_file(0, 4096, 53_248, 4096, 7)?, (0, 53_248, 4096, 4096));
    note(stream.submit_read_fixed(&again, 0, 0, 15, 4096)?, (0, 61_440, 0, 4096));
    let raw = FileRef::from(direct.as_fd().as_raw_fd());
    note(stream.submit_read_to_gpu_at(raw, 100, 65_536, 3_000)?, (0, 65_536, 100, 3_000));
    collect(&mut stream, &reads, wholes)?;
    let ranges = [(81_920, 4096), (73_728, 4096), (90_000, 501)];
    let scattered = stream.submit_read_to_gpu_scatter(&direct, 12_288, &ranges, 1)?;
    let parts = [(0, 81_920, 12_288, 4096), (0, 73_728, 16_384, 4096), (0, 90_000, 20_480, 501)];
    reads.extend(parts.map(|part| (scattered, part)));
    let scattered = stream.submit_read_to_gpu_scatter(&buffered, 7, &[(98_304, 100), (99_000, 200)], 2)?;
    reads.extend([(0, 98_304, 7, 100), (0, 99_000, 107, 200)].map(|part| (scattered, part)));
    collect(&mut stream, &reads, wholes)?;

    let large = memory[1].share();
    drop(stream.replace_buffer(large)?);
    let sequence = stream.submit_read_to_gpu_at(&direct, 4096, 0, 65_536)?;
    reads.push((sequence, (1, 0, 4096, 65_536)));
    let sequence = stream.submit_read_to_gpu_at(&direct, 8192, 131_072, 65_536)?;
    reads.push((sequence, (1, 131_072, 8192, 65_536)));
    // It may be too late for it.
    let _ = stream.cancel(sequence);
    collect(&mut stream, &reads, wholes)?;
    stream.finish()?;
    let mut ring = stream.close(Duration::from_secs(30))?.ring;
    ring.unregister_files()?;
    ring.unregister_buffers()?;
    drop(ring);

    let tail = AtomicU64::new(0);
    let upper = memory[0].share().sub_region(MEMORY / 2, MEMORY / 2)?;
    let mut stream = AsyncUringStream::new(second, upper, &tail)?;
    let first = stream.submit_read_to_gpu_at(&again, 512, 0, 10_000)?;
    let second = stream.submit_read_fixed(&buffered, 9, 0, 30, 4096)?;
    let reads = [(first, (0, MEMORY / 2, 512, 10_000)), (second, (0, 122_880, 9, 4096))];
    collect(&mut stream, &reads, wholes)?;
    stream.submit_read_to_gpu_at(&direct, 3, 65_536, 5_000)?;
    while stream.poll()? == 0 {}
    // Dropped with reads in flight.
    stream.submit_read_to_gpu_at(&direct, 0, 65_536, 65_536)?;
    stream.flush_submissions()?;
    drop(stream);
    Ok(())
}

/// The same of a driver: every slot that is published whole has the file's bytes, every request ends, every consumer
/// comes to its end.
fn driver_script(path: &Path, data: &[u8], wholes: &mut usize) -> Result<()> {
    let direct = InputFile::open(path, DirectMode::Auto)?;
    let buffered = InputFile::open(path, DirectMode::Off)?;
    let queue = IoQueue::new(IoQueueOptions { slots: 4, slot_bytes: 20_001, ..IoQueueOptions::default() })?;
    let mut consumer = queue.consumer(0)?;
    let ring = IoUringState::new(RingOptions { entries: 8, ..Default::default() })?;
    let options = DriverOptions { queue_limit: 16, crc32c: true, ..DriverOptions::default() };
    let mut driver = NvmeGpuIngestDriver::new(ring, queue, options)?;
    driver.ring_mut()?.register_files(&[buffered.as_fd().as_raw_fd()])?;
    let raw = FileRef::from(direct.as_fd().as_raw_fd());
    let sources = [FileRef::from(&direct), FileRef::from(&buffered), raw, driver.registered_file(0)?];
    for request in 0..12u64 {
        let source = sources[request as usize % 4].clone();
        let timeout = (request % 3 == 0).then_some(PATIENCE);
        let (offset, len) = (request * 777, 20_001 - request as u32 * 1_500);
        driver.submit(IngestRequest { timeout, ..IngestRequest::new(source, offset, len, request) })?;
    }
    driver.finish()?;
    let mut records = 0;
    let mut out = [IngestCompletion::default(); 16];
    let mut errors = Vec::new();
    let driven = loop {
        // Whatever the call says, what is published is looked at.
        let driven = driver.wait_into(&mut out, 1, Some(Duration::from_secs(10)));
        while let Ok(slot) = consumer.try_pop() {
            let (at, payload) = (slot.descriptor().file_offset as usize, consumer.payload(&slot));
            if slot.status() == 0 {
                assert!(payload == &data[at..at + payload.len()], "wrong bytes in a slot published whole");
                *wholes += 1;
            }
            consumer.release(slot)?;
        }
        match driven {
            Ok(0) if driver.in_flight() + driver.queued() == 0 => break Ok(()),
            Ok(count) => {
                records += count;
                errors.extend(out[..count].iter().filter_map(|record| record.result().err()));
            }
            Err(error) => break Err(error),
        }
    };
    let report = driver.close(Duration::from_secs(30))?;
    records += report.completions.len();
    assert_eq!(records, 12, "every request ends once");
    loop {
        match consumer.wait_pop(Duration::from_secs(10)) {
            Ok(slot) => consumer.release(slot)?,
            Err(outcome) => {
                assert_ne!(outcome, ringest::wire::Outcome::Timeout, "a consumer waits for what cannot come");
                break;
            }
        }
    }
    drop(consumer);
    drop(report.ring?);
    report.queue.destroy().map_err(|(_, error)| error)?;
    driven?;
    errors.pop().map_or(Ok(()), Err)
}

/// Waits for everything, notes what is whole, and gives each failed read three more chances before it skips it.
fn collect(stream: &mut AsyncUringStream<'_>, reads: &[(u64, Whole)], wholes: &mut Vec<Whole>) -> Result<()> {
    let mut out = [Completion::default(); 8];
    let mut failures = 0;
    let mut last = Ok(());
    loop {
        let waited = stream.wait_for_completion(1, Some(Duration::from_secs(30)));
        let count = stream.poll_into(&mut out)?;
        for completion in &out[..count] {
            if completion.status == 0 {
                let of_it = reads.iter().filter(|(sequence, _)| *sequence == completion.sequence);
                wholes.extend(of_it.map(|(_, whole)| *whole));
                continue;
            }
            failures += 1;
            last = completion.result().map(drop);
            match failures {
                0..4 => stream.resubmit(completion.sequence)?,
                _ => stream.skip(completion.sequence)?,
            }
        }
        waited?;
        if stream.inflight() == 0 && count == 0 {
            assert_eq!(stream.tail(), stream.submitted());
            return if failures < 4 { Ok(()) } else { last };
        }
    }
}

fn open_files() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// Bytes mapped and kept out of forks, which all memory and rings of ringest are.
fn mapped() -> usize {
    let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let (mut size, mut sum) = (0, 0);
    for line in smaps.lines() {
        if let Some(kilobytes) = line.strip_prefix("Size:") {
            size = kilobytes.trim().trim_end_matches(" kB").parse().unwrap();
        } else if line.strip_prefix("VmFlags:").is_some_and(|flags| flags.split_whitespace().any(|flag| flag == "dc")) {
            sum += size;
        }
    }
    sum << 10
}

/// Pages of the process, by any mapping.
fn virtual_pages() -> usize {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    statm.split_whitespace().next().unwrap().parse().unwrap()
}

struct Outcome {
    /// The errno the script ended with.
    ended: Option<(i32, String)>,
    calls: Vec<&'static str>,
    wholes: usize,
}

/// Runs the script with the `k`-th call failing, and compares what it says with the file.
fn attempt(path: &Path, data: &[u8], lacking: u32, k: u64, errno: i32) -> Outcome {
    let (mut wholes, mut slots, mut memory) = (Vec::new(), 0, None);
    refuse_setup_flags(lacking);
    plan_fault(k, errno);
    let result = (|| {
        let memory = memory.insert([MappedBuffer::alloc(MEMORY)?, MappedBuffer::alloc(LARGE)?]);
        script(path, memory, &mut wholes)?;
        driver_script(path, data, &mut slots)
    })();
    let calls = end_fault_plan();
    if let Some(memory) = &memory {
        for &(which, at, from, len) in &wholes {
            let bytes = memory[which].as_slice().expect("the script is over, and nothing shares the memory");
            let file = &data[from as usize..from as usize + len];
            assert!(bytes[at..at + len] == *file, "wrong bytes in a read reported whole: {:?}", (which, at, from, len));
        }
    }
    let ended = result.err().map(|error| (error.errno(), error.to_string()));
    Outcome { ended, calls, wholes: wholes.len() + slots }
}

/// The errnos that may come of a failed call, beside its own.
fn documented(call: &str, errno: i32, ended: i32) -> bool {
    let mapped = match call {
        // "ENOMEM when the system has no such memory", whatever the kernel's reason.
        "mmap" | "madvise" => ended == libc::ENOMEM,
        // A refused O_DIRECT is "not supported"; a refused registration makes tables that cannot be updated or shared.
        "open" | "openat" => ended == libc::EOPNOTSUPP,
        // So is one whose alignment cannot be learned; a read of a raw descriptor that the kernel refused stays refused.
        "statx" | "fcntl" => matches!(ended, libc::EOPNOTSUPP | libc::EINVAL),
        "io_uring_register" => matches!(ended, libc::EOPNOTSUPP | libc::EBUSY),
        _ => false,
    };
    ended == errno || mapped
}

/// Were they blind, nothing would ever leak.
fn the_counters_count(files: usize, bytes: usize) {
    let memory = MappedBuffer::<u8>::alloc(MEMORY).unwrap();
    assert_eq!(mapped(), bytes + MEMORY);
    let ring = IoUringState::new(RingOptions::default()).unwrap();
    assert_eq!(open_files(), files + 1);
    assert!(mapped() > bytes + MEMORY);
    drop((memory, ring));
    assert_eq!((open_files(), mapped()), (files, bytes));
}

#[test]
fn every_system_call_may_fail_once() {
    let data: Vec<u8> = (0..FILE as u64).map(|i| (i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8).collect();
    // Not in /tmp, which may have no O_DIRECT.
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("kth-failure-{}", std::process::id()));
    std::fs::write(&path, &data).unwrap();

    // A thread for each case: the fault plan and the kernel's table of registered rings belong to threads.
    let case = |lacking: u32, k: u64, errno: i32| -> Outcome {
        let (done, over) = channel();
        let (path, data) = (path.clone(), data.clone());
        let thread = std::thread::spawn(move || {
            let outcome = attempt(&path, &data, lacking, k, errno);
            let _ = done.send(());
            outcome
        });
        if let Err(RecvTimeoutError::Timeout) = over.recv_timeout(PATIENCE) {
            eprintln!("hang: system call {k} failing with errno {errno}, without flags {lacking:#x}");
            std::process::abort();
        }
        thread.join().unwrap_or_else(|_| panic!("panic: system call {k} failing with errno {errno}"))
    };

    assert_eq!(case(0, 0, 0).ended, None, "without a fault");
    let (files, bytes, leaks) = (open_files(), mapped(), leak_stats());
    the_counters_count(files, bytes);
    let pages = virtual_pages();
    let (mut pairs, mut tolerated, mut problems) = (0, 0, String::new());
    for lacking in LACKING {
        let clean = case(lacking, 0, 0);
        assert_eq!(clean.ended, None, "without a fault and without flags {lacking:#x}");
        for (errno, k) in ERRNOS.iter().flat_map(|&errno| (1..=clean.calls.len() as u64).map(move |k| (errno, k))) {
            let Outcome { ended, calls, wholes } = case(lacking, k, errno);
            let call = calls.get(k as usize - 1).copied().unwrap_or("(not reached)");
            pairs += 1;
            tolerated += u64::from(ended.is_none());
            let mut problem = |what: String| {
                writeln!(problems, "call {k} ({call}) failing with errno {errno}, without flags {lacking:#x}: {what}")
                    .unwrap();
            };
            match &ended {
                Some((now, text)) if !documented(call, errno, *now) => problem(format!("ended with {now}: {text}")),
                // A signal is no failure.
                Some(_) if errno == libc::EINTR && matches!(call, "io_uring_enter" | "open") => {
                    problem("EINTR was not retried".to_owned());
                }
                None if wholes < clean.wholes - 1 => problem(format!("{wholes} reads of {}", clean.wholes)),
                _ => {}
            }
            if leak_stats() != leaks {
                problem(format!("leaked: {:?}", leak_stats()));
            }
            if open_files() != files {
                problem(format!("{} descriptors instead of {files}", open_files()));
            }
            if mapped() != bytes {
                problem(format!("{} bytes mapped instead of {bytes}", mapped()));
            }
        }
    }
    std::fs::remove_file(&path).unwrap();
    println!("{pairs} failures injected, {tolerated} of them tolerated");
    assert!(problems.is_empty(), "\n{problems}");
    // Threads come and go, and their stacks and heaps with them; a leaked buffer per case would be gigabytes.
    let grown = virtual_pages().saturating_sub(pages);
    assert!(grown < 64 << 8, "the process has grown by {grown} pages");
}
