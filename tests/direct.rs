//! O_DIRECT: any offset, length and address, and never a byte outside the caller's range.

mod common;

use common::*;
use ringest::{
    AsyncUringStream, Completion, DirectMode, FileRef, GpuMappedBuffer, InputFile, ReadPath, RingOptions, StreamOptions,
};
use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};

const FILE: usize = 700_000;
const BUFFER: usize = 800_000;
const GUARD: u8 = 0xee;

/// (file offset, buffer offset, length) of reads that fit the test file.
fn requests() -> Vec<(u64, usize, usize)> {
    let mut requests = Vec::new();
    for offset in [0, 1, 511, 512, 513, 4095, 4096, 4097, 12_345] {
        for at in [0, 1, 3, 511, 512, 4095, 4096, 4097, 54_321] {
            for len in [1, 2, 511, 512, 513, 4096, 4097, 8191, 20_480, 65_537] {
                requests.push((offset, at, len));
            }
        }
    }
    // Larger than a bounce slot, congruent and not; up to the last byte of the file.
    requests.extend([
        (7, 7, 600_000),
        (7, 8, 600_000),
        (4096, 8192, 600_064),
        (1, 0, FILE - 1),
        (FILE as u64 - 1, 9, 1),
    ]);
    requests
}

/// Reads every request from `source` and looks at every byte of the buffer.
fn read_all(stream: &mut AsyncUringStream<'_>, source: &FileRef, requests: &[(u64, usize, usize)]) -> Vec<Completion> {
    let mut done = Vec::new();
    for &(offset, at, len) in requests {
        stream.submit_read_to_gpu_at(source.clone(), offset, at, len).unwrap();
        let completion = take_one(stream);
        assert_eq!((completion.status, completion.bytes), (0, len as u64), "{completion:?}");
        assert!(completion.bounced <= completion.bytes);
        // SAFETY: nothing is in flight, and the handle to the memory is the stream's alone meanwhile.
        let got = unsafe { std::slice::from_raw_parts_mut(stream.buffer().as_host_ptr(), BUFFER) };
        check(&got[at..at + len], offset);
        let near = at.saturating_sub(70_000)..(at + len + 70_000).min(BUFFER);
        assert!(near.clone().all(|i| (at..at + len).contains(&i) || got[i] == GUARD), "a neighbour of {completion:?}");
        got[at..at + len].fill(GUARD);
        done.push(completion);
    }
    done
}

#[test]
fn input_files_take_any_offset_length_and_address() {
    let file = TempFile::new(FILE);
    let input = direct!(file);
    let alignment = input.direct().unwrap();
    assert!(alignment.memory.is_power_of_two() && alignment.offset.is_power_of_two());
    for unregistered in [false, true] {
        let tail = AtomicU64::new(0);
        let mut memory = filled(BUFFER, GUARD);
        let options = StreamOptions { unregistered, ..StreamOptions::default() };
        let mut stream = AsyncUringStream::with_options(ring!(), memory.share(), &tail, options).unwrap();
        let requests = requests();
        let done = read_all(&mut stream, &(&input).into(), &requests);
        assert_eq!(tail.load(Ordering::Acquire), requests.len() as u64);
        let (block, memory_alignment) = (u64::from(alignment.offset), alignment.memory as usize);
        let path = if unregistered { ReadPath::PlainRead } else { ReadPath::RegisteredRead };
        for (completion, &(offset, at, len)) in done.iter().zip(&requests) {
            assert_eq!(completion.path, path);
            let aligned = offset % block == 0 && (len as u64).is_multiple_of(block) && at % memory_alignment == 0;
            assert_eq!(completion.bounced == 0, aligned, "{completion:?}");
            // Only ragged ends are bounced where offset and address are congruent.
            if offset % block == at as u64 % block {
                assert!(completion.bounced <= 2 * block, "{completion:?}");
            }
        }
        // Whole buffer: nothing but the guard is left.
        assert!(bytes(&stream).iter().all(|&byte| byte == GUARD));
    }
}

#[test]
fn registered_files_take_any_offset_length_and_address() {
    let file = TempFile::new(FILE);
    let input = direct!(file);
    let mut ring = ring!();
    ring.register_files(&[input.as_fd().as_raw_fd()]).unwrap();
    let tail = AtomicU64::new(0);
    let mut memory = filled(BUFFER, GUARD);
    let mut stream = AsyncUringStream::new(ring, memory.share(), &tail).unwrap();
    let source = stream.registered_file(0).unwrap();
    read_all(&mut stream, &source, &requests());
    assert!(stream.stats().bounced_bytes > 0);
}

/// A raw descriptor tells nothing: its alignment is learned from the kernel's EINVAL.
#[test]
fn raw_descriptors_take_any_offset_length_and_address() {
    let file = TempFile::new(FILE);
    let Ok(raw) = file.raw(libc::O_DIRECT) else { skip!("no O_DIRECT on this file system") };
    let tail = AtomicU64::new(0);
    let mut memory = filled(BUFFER, GUARD);
    let mut stream = AsyncUringStream::new(ring!(), memory.share(), &tail).unwrap();
    read_all(&mut stream, &raw.as_raw_fd().into(), &requests());
    assert!(stream.stats().bounced_bytes > 0);
}

/// Many unaligned reads at once share the few bounce slots.
#[test]
fn unaligned_reads_in_flight_together_do_not_mix() {
    const COUNT: usize = 64;
    let file = TempFile::new(FILE);
    let input = direct!(file);
    let tail = AtomicU64::new(0);
    let mut memory = filled(COUNT * 12_000, GUARD);
    let mut stream = AsyncUringStream::new(ring!(), memory.share(), &tail).unwrap();
    for round in 0..20u64 {
        for chunk in 0..COUNT {
            let offset = (chunk as u64 * 9973 + round * 17) % (FILE as u64 - 12_000);
            let len = 1 + (chunk * 191 + round as usize * 7) % 11_000;
            stream
                .submit_read_to_gpu_at_with_user_data(&input, offset, chunk * 12_000 + chunk % 5, len, offset)
                .unwrap();
        }
        for completion in take(&mut stream, COUNT) {
            assert_eq!(completion.status, 0);
            // SAFETY: nothing is in flight.
            let got = unsafe { std::slice::from_raw_parts(stream.buffer().as_host_ptr(), COUNT * 12_000) };
            let at = completion.buffer_offset as usize;
            check(&got[at..at + completion.bytes as usize], completion.user_data);
        }
    }
    // A stream's bounce memory is bounded, whatever was in flight.
    assert_eq!(tail.load(Ordering::Acquire), 20 * COUNT as u64);
}

/// Reads that failed while others of the same submission waited for a bounce slot must not keep those behind them from
/// ever getting one.
#[test]
fn unaligned_reads_beyond_the_end_all_fail() {
    let file = TempFile::new(10_000);
    let input = direct!(file);
    let tail = AtomicU64::new(0);
    let mut memory = filled(64 * 20_000, GUARD);
    let mut stream = AsyncUringStream::new(ring!(), memory.share(), &tail).unwrap();
    for chunk in 0..63 {
        stream
            .submit_read_to_gpu_at(&input, 1_000_001 + chunk, (chunk as usize) * 20_000 + 1 + chunk as usize, 19_000)
            .unwrap();
    }
    stream.submit_read_to_gpu_at(&input, 1, 63 * 20_000, 5000).unwrap();
    let mut done = take(&mut stream, 64);
    done.sort_by_key(|completion| completion.sequence);
    assert!(done[..63].iter().all(|c| (c.status, c.bytes) == (-libc::ENODATA, 0)), "{done:?}");
    assert_eq!((done[63].status, done[63].bytes), (0, 5000));
    let got = bytes(&stream);
    check(&got[63 * 20_000..][..5000], 1);
    assert!(got[..63 * 20_000].iter().all(|&byte| byte == GUARD));
}

#[test]
fn the_end_of_the_file_is_exact() {
    let file = TempFile::new(10_001);
    let mut sources: Vec<(FileRef, Option<File>)> = vec![((&direct!(file)).into(), None)];
    let raw = file.raw(libc::O_DIRECT).unwrap();
    sources.push((raw.as_raw_fd().into(), Some(raw)));
    for (source, _keep) in &sources {
        let tail = AtomicU64::new(0);
        let mut memory = filled(65_536, GUARD);
        let mut stream = AsyncUringStream::new(ring!(), memory.share(), &tail).unwrap();
        let mut expected = 0;
        for offset in [0u64, 1, 4096, 9728, 10_000, 10_001, 10_240, 1 << 33] {
            for at in [0usize, 1, 512] {
                for len in [1usize, 700, 4096, 20_000, 20_480] {
                    stream.submit_read_to_gpu_at(source.clone(), offset, at, len).unwrap();
                    let completion = take_one(&mut stream);
                    let exist = 10_001u64.saturating_sub(offset).min(len as u64);
                    let status = if exist == len as u64 { 0 } else { -libc::ENODATA };
                    assert_eq!((completion.status, completion.bytes), (status, exist), "{completion:?}");
                    let got = bytes(&stream);
                    check(&got[at..at + exist as usize], offset);
                    // Nothing outside the range asked for; inside it, what lies beyond the file is not ours to say.
                    assert!(got[..at].iter().chain(&got[at + len..]).all(|&byte| byte == GUARD), "{completion:?}");
                    // SAFETY: nothing is in flight.
                    unsafe { std::ptr::write_bytes(stream.buffer().as_host_ptr(), GUARD, 65_536) };
                    if status == 0 {
                        expected += 1;
                    } else {
                        stream.skip(completion.sequence).unwrap();
                    }
                }
            }
        }
        assert_eq!(stream.stats().completed, expected);
    }
}

/// Peer memory cannot be bounced into: what cannot go there directly fails, without a byte written.
#[test]
fn peer_memory_takes_aligned_reads_only() {
    let file = TempFile::new(FILE);
    let input = direct!(file);
    let map = Map::new(65_536, libc::PROT_READ | libc::PROT_WRITE);
    let base = map.base;
    // SAFETY: plain memory that poses as a peer's, owned by `map`.
    let peer = unsafe { GpuMappedBuffer::from_bar1_peer_with_owner(base, 65_536, 1 << 44, map) }.unwrap();
    // SAFETY: only looks, while nothing is in flight.
    let got = || unsafe { std::slice::from_raw_parts(base, 65_536) };
    let mut ring = ring!();
    assert_eq!(errno(ring.register_buffers(&[&peer])), libc::EOPNOTSUPP);
    let tail = AtomicU64::new(0);
    let mut stream = AsyncUringStream::new(ring, peer, &tail).unwrap();
    assert!(!stream.is_registered());
    stream.submit_read_to_gpu_at(&input, 8192, 4096, 16_384).unwrap();
    let completion = take_one(&mut stream);
    assert_eq!((completion.status, completion.path), (0, ReadPath::PlainRead));
    check(&got()[4096..20_480], 8192);
    for (offset, at, len) in [(8192, 4097, 4096), (1, 0, 100), (0, 0, 100)] {
        stream.submit_read_to_gpu_at(&input, offset, at, len).unwrap();
        let completion = take_one(&mut stream);
        assert_eq!((completion.status, completion.bytes), (-libc::EINVAL, 0), "{completion:?}");
        stream.skip(completion.sequence).unwrap();
    }
    check(&got()[4096..20_480], 8192);
    assert!(got()[..4096].iter().chain(&got()[20_480..]).all(|&byte| byte == 0));
}

#[test]
fn modes_are_kept() {
    let file = TempFile::new(4096);
    let direct_flag = |input: &InputFile| {
        // SAFETY: F_GETFL takes no argument.
        unsafe { libc::fcntl(input.as_fd().as_raw_fd(), libc::F_GETFL) & libc::O_DIRECT != 0 }
    };
    assert!(!direct_flag(&file.open(DirectMode::Off)) && file.open(DirectMode::Off).direct().is_none());
    let auto = file.open(DirectMode::Auto);
    assert_eq!(direct_flag(&auto), auto.direct().is_some());
    // The caller's descriptor keeps its flags; the input file has its own.
    let own = file.raw(0).unwrap();
    let input = InputFile::from_fd(own.as_fd(), DirectMode::Auto).unwrap();
    assert_ne!(input.as_fd().as_raw_fd(), own.as_raw_fd());
    // SAFETY: as above.
    assert_eq!(unsafe { libc::fcntl(own.as_raw_fd(), libc::F_GETFL) } & libc::O_DIRECT, 0);
    assert_eq!(input.len(), 4096);
    // /proc has no O_DIRECT.
    assert_eq!(errno(InputFile::open("/proc/self/status", DirectMode::On)), libc::EOPNOTSUPP);
    assert!(InputFile::open("/proc/self/status", DirectMode::Auto).unwrap().direct().is_none());
}

// Block devices

/// A loop device over a backing file, detached on drop.
struct Loop {
    device: PathBuf,
}

impl Loop {
    fn new(backing: &Path, block: u32) -> Result<Self, String> {
        if !is_root() {
            return Err("loop devices need root".into());
        }
        let mut command = Command::new("losetup");
        command.args(["--find", "--show", "--direct-io=on", "-b", &block.to_string()]).arg(backing);
        let output = command.output().map_err(|error| format!("losetup: {error}"))?;
        if !output.status.success() {
            return Err(format!("losetup: {}", String::from_utf8_lossy(&output.stderr).trim()));
        }
        Ok(Self { device: PathBuf::from(String::from_utf8(output.stdout).unwrap().trim()) })
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("-d").arg(&self.device).status();
    }
}

#[test]
fn block_devices_take_any_offset_length_and_address() {
    for block in [512, 4096] {
        let backing = TempFile::new(FILE.next_multiple_of(4096));
        let device = match Loop::new(backing.path(), block) {
            Ok(device) => device,
            Err(reason) => skip!("{reason}"),
        };
        let input = InputFile::open(&device.device, DirectMode::On).unwrap();
        assert_eq!(input.len(), FILE.next_multiple_of(4096) as u64);
        assert_eq!(input.direct().unwrap().offset, block);
        let raw = OpenOptions::new().read(true).open(&device.device).unwrap();
        // SAFETY: sets flags of a descriptor of ours.
        assert_eq!(unsafe { libc::fcntl(raw.as_raw_fd(), libc::F_SETFL, libc::O_DIRECT) }, 0);
        let tail = AtomicU64::new(0);
        let mut memory = filled(BUFFER, GUARD);
        let mut stream = AsyncUringStream::new(ring!(), memory.share(), &tail).unwrap();
        let some: Vec<_> = requests().into_iter().step_by(7).collect();
        read_all(&mut stream, &(&input).into(), &some);
        read_all(&mut stream, &raw.as_raw_fd().into(), &some);
        // Beyond its end a device ends like a file.
        stream.submit_read_to_gpu_at(&input, input.len() - 100, 1, 4096).unwrap();
        let completion = take_one(&mut stream);
        assert_eq!((completion.status, completion.bytes), (-libc::ENODATA, 100));
        check(&bytes(&stream)[1..101], input.len() - 100);
    }
}

/// A device that loses half of its blocks: what is left reads well, the rest fails, nothing hangs or is made up.
#[test]
fn a_device_whose_blocks_are_gone_fails_cleanly() {
    const LEN: usize = 1 << 20;
    let backing = TempFile::new(LEN);
    let device = match Loop::new(backing.path(), 512) {
        Ok(device) => device,
        Err(reason) => skip!("{reason}"),
    };
    let input = InputFile::open(&device.device, DirectMode::On).unwrap();
    backing.writable().set_len(LEN as u64 / 2).unwrap();
    let tail = AtomicU64::new(0);
    let mut memory = filled(64 * 20_000, GUARD);
    let mut stream = AsyncUringStream::new(ring!(RingOptions::default()), memory.share(), &tail).unwrap();
    for chunk in 0..64 {
        // Alternately in the half that is there and the one that is not, all of them ragged.
        let offset = (chunk as u64 / 2) * 8000 + if chunk % 2 == 0 { 3 } else { LEN as u64 / 2 + 5 };
        stream.submit_read_to_gpu_at_with_user_data(&input, offset, chunk * 20_000 + 3, 15_000, offset).unwrap();
    }
    let done = take(&mut stream, 64);
    let got = bytes(&stream);
    for completion in &done {
        if completion.sequence % 2 == 0 {
            assert_eq!(completion.status, 0, "{completion:?}");
            check(&got[completion.buffer_offset as usize..][..15_000], completion.user_data);
        } else if completion.status == 0 {
            // A loop device may answer zeros beyond the end of its backing file; that is what it holds, then.
            let range = &got[completion.buffer_offset as usize..][..15_000];
            assert!(range.iter().all(|&byte| byte == 0), "made-up bytes in {completion:?}");
        } else {
            assert!([-libc::EIO, -libc::ENODATA].contains(&completion.status), "{completion:?}");
            assert!(completion.result().is_err());
        }
    }
    assert!(tail.load(Ordering::Acquire) == stream.tail());
    // Grown again, what failed can be read again.
    let file = backing.writable();
    file.set_len(LEN as u64).unwrap();
    file.write_all_at(&pattern(LEN as u64 / 2, LEN / 2), LEN as u64 / 2).unwrap();
    file.sync_all().unwrap();
    let failed: Vec<_> = done.iter().filter(|completion| completion.status != 0).collect();
    for completion in &failed {
        stream.resubmit(completion.sequence).unwrap();
    }
    for completion in take(&mut stream, failed.len()) {
        assert_eq!(completion.status, 0, "{completion:?}");
        check(&bytes(&stream)[completion.buffer_offset as usize..][..15_000], completion.user_data);
    }
    assert_eq!(tail.load(Ordering::Acquire), 64);
}

#[test]
fn dropping_device_reads_in_flight_writes_nothing_afterwards() {
    let backing = TempFile::new(1 << 20);
    let device = match Loop::new(backing.path(), 4096) {
        Ok(device) => device,
        Err(reason) => skip!("{reason}"),
    };
    let input = InputFile::open(&device.device, DirectMode::On).unwrap();
    for round in 0..50 {
        let tail = AtomicU64::new(0);
        let mut memory = filled(1 << 20, GUARD);
        let mut stream = AsyncUringStream::new(ring!(), memory.share(), &tail).unwrap();
        for chunk in 0..32u64 {
            stream.submit_read_to_gpu(&input, chunk * 32_768 + round % 3, chunk as usize, 32_000).unwrap();
        }
        stream.flush_submissions().unwrap();
        drop(stream);
        memory.as_mut_slice().unwrap().fill(1);
        std::thread::yield_now();
        assert!(memory.as_slice().unwrap().iter().all(|&byte| byte == 1));
    }
}
