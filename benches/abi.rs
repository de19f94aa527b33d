//! What the C ABI costs over the Rust API, per submit and poll: the same calls, in turns, in one process.
//!
//! `cargo bench --bench abi`; `-- --quick` for fewer rounds.

use ringest::ffi::{buffer, mapped, ring, stream};
use ringest::{AsyncUringStream, Completion, IoUringState, MappedBuffer, RingOptions};
use std::hint::black_box;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::ptr::{null, null_mut};
use std::sync::atomic::AtomicU64;
use std::time::Instant;

const BYTES: usize = 4096;

/// The calls as a C program makes them: through pointers that the compiler cannot see through.
struct Abi {
    submit: extern "C" fn(*mut stream::ringest_stream, i32, u64, usize, usize, u64) -> i64,
    poll_into: unsafe extern "C" fn(*mut stream::ringest_stream, *mut stream::ringest_completion, u32) -> i64,
    tail: extern "C" fn(*const stream::ringest_stream) -> i64,
    handle: *mut stream::ringest_stream,
}

impl Abi {
    #[inline(never)]
    fn pairs(&self, fd: i32, len: usize, count: usize) -> f64 {
        let mut record = stream::ringest_completion::default();
        let start = Instant::now();
        for _ in 0..count {
            assert!((self.submit)(self.handle, fd, 0, 0, black_box(len), 1) >= 0);
            // SAFETY: `record` is a place for one record.
            while unsafe { (self.poll_into)(self.handle, &mut record, 1) } == 0 {}
            assert!(record.status == 0);
        }
        start.elapsed().as_nanos() as f64 / count as f64
    }

    #[inline(never)]
    fn tails(&self, count: usize) -> f64 {
        let start = Instant::now();
        for _ in 0..count {
            assert!(black_box((self.tail)(self.handle)) >= 0);
        }
        start.elapsed().as_nanos() as f64 / count as f64
    }
}

#[inline(never)]
fn rust_pairs(stream: &mut AsyncUringStream<'_>, fd: i32, len: usize, count: usize) -> f64 {
    let mut record = [Completion::default()];
    let start = Instant::now();
    for _ in 0..count {
        stream.submit_read_to_gpu_at_with_user_data(fd, 0, 0, black_box(len), 1).unwrap();
        while stream.poll_into(black_box(&mut record)).unwrap() == 0 {}
        assert!(record[0].status == 0);
    }
    start.elapsed().as_nanos() as f64 / count as f64
}

#[inline(never)]
fn rust_tails(stream: &AsyncUringStream<'_>, count: usize) -> f64 {
    let start = Instant::now();
    for _ in 0..count {
        black_box(black_box(stream).tail());
    }
    start.elapsed().as_nanos() as f64 / count as f64
}

/// Median, least and greatest.
fn spread(mut values: Vec<f64>) -> (f64, f64, f64) {
    values.sort_unstable_by(f64::total_cmp);
    (values[values.len() / 2], values[0], values[values.len() - 1])
}

/// Rounds in turns, each of both kinds back to back, in changing order.
fn compare(name: &str, rounds: usize, mut rust: impl FnMut() -> f64, mut abi: impl FnMut() -> f64) -> f64 {
    let (mut a, mut b, mut differences) = (Vec::new(), Vec::new(), Vec::new());
    rust();
    abi();
    for round in 0..rounds {
        let (r, c) = if round % 2 == 0 {
            let r = rust();
            (r, abi())
        } else {
            let c = abi();
            (rust(), c)
        };
        a.push(r);
        b.push(c);
        differences.push(c - r);
    }
    let (difference, low, high) = spread(differences);
    println!(
        "figure: abi {name}: rust {:.1} ns, C ABI {:.1} ns, difference {difference:+.1} ns ({low:+.1} to {high:+.1}, \
         {rounds} rounds)",
        spread(a).0,
        spread(b).0
    );
    difference
}

fn main() {
    let quick = std::env::args().any(|argument| argument == "--quick");
    let (rounds, scale) = if quick { (9, 1) } else { (31, 4) };
    let path = std::env::temp_dir().join(format!("ringest-abi-{}", std::process::id()));
    let mut file = std::fs::File::options().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    file.write_all(&[7; BYTES]).unwrap();
    let fd = file.as_raw_fd();

    let tail = AtomicU64::new(0);
    let mut memory = MappedBuffer::<u8>::alloc(BYTES).unwrap();
    let ring = match IoUringState::new(RingOptions::default()) {
        Ok(ring) => ring,
        Err(error) => return println!("SKIP abi benchmark: {error}"),
    };
    let rust = std::cell::RefCell::new(AsyncUringStream::new(ring, memory.share(), &tail).unwrap());

    let (mut own, mut bytes, mut into, mut handle) = (null_mut(), null_mut(), null_mut(), null_mut());
    let mut word = 0u64;
    // SAFETY: every out pointer is a valid place, and the word outlives the stream.
    unsafe {
        assert_eq!(ring::ringest_ring_create(null(), &mut own), 0);
        assert_eq!(mapped::ringest_mapped_alloc(BYTES, null(), &mut bytes), 0);
        assert_eq!(mapped::ringest_mapped_share(bytes, &mut into), 0);
        assert_eq!(stream::ringest_stream_create_u64(own, into, &mut word, null(), &mut handle), 0);
    }
    let abi = black_box(Abi {
        submit: stream::ringest_stream_submit_read,
        poll_into: stream::ringest_stream_poll_into,
        tail: stream::ringest_stream_tail,
        handle,
    });

    let reads = 5_000 * scale;
    let read = compare(
        "submit and poll_into of 4 KiB from the page cache",
        rounds,
        || rust_pairs(&mut rust.borrow_mut(), fd, BYTES, reads),
        || abi.pairs(fd, BYTES, reads),
    );
    let calls = 100_000 * scale;
    let pair = compare(
        "submit and poll_into without a command",
        rounds,
        || rust_pairs(&mut rust.borrow_mut(), fd, 0, calls),
        || abi.pairs(fd, 0, calls),
    );
    compare("tail", rounds, || rust_tails(&rust.borrow(), calls), || abi.tails(calls));
    // Submit and poll are two calls.
    println!(
        "figure: abi overhead per call: {:.1} ns with a read, {:.1} ns alone; goal of at most 30 ns {}",
        read / 2.0,
        pair / 2.0,
        if read.max(pair) <= 60.0 { "met" } else { "missed" }
    );

    assert_eq!(stream::ringest_stream_destroy(handle), 0);
    assert_eq!(ring::ringest_ring_destroy(own), 0);
    assert_eq!(buffer::ringest_buffer_release(into), 0);
    assert_eq!(mapped::ringest_mapped_free(bytes), 0);
}
