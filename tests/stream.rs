//! The stream on real files.

use ringest::{AsyncUringStream, Completion, DirectMode, InputFile, IoUringState, MappedBuffer, RingOptions};
use std::sync::atomic::{AtomicU64, Ordering};

fn pattern(len: usize) -> Vec<u8> {
    (0..len as u64).map(|i| (i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8).collect()
}

#[test]
fn reads_whole_files_both_ways() {
    let data = pattern(3_000_001);
    let path = std::env::temp_dir().join(format!("ringest-stream-{}", std::process::id()));
    std::fs::write(&path, &data).unwrap();
    for mode in [DirectMode::Off, DirectMode::On] {
        let file = InputFile::open(&path, mode).unwrap();
        let mut memory = MappedBuffer::<u8>::alloc(data.len()).unwrap();
        let tail = AtomicU64::new(9);
        let ring = IoUringState::new(RingOptions::default()).unwrap();
        println!("{}", ring.features());
        let mut stream = AsyncUringStream::new(ring, memory.share(), &tail).unwrap();
        let chunk = 100_003;
        let mut n = 0;
        for (i, part) in data.chunks(chunk).enumerate() {
            stream.submit_read_to_gpu_at(&file, (i * chunk) as u64, i * chunk, part.len()).unwrap();
            n += 1;
        }
        assert_eq!(stream.wait_for_completion(n, None).unwrap(), n);
        let mut out = [Completion::default(); 64];
        assert_eq!(stream.poll_into(&mut out).unwrap(), n);
        assert!(out[..n].iter().all(|c| c.status == 0), "{:?}", &out[..n]);
        assert_eq!(tail.load(Ordering::Acquire), n as u64);
        println!("{mode:?} {:?} footprint {}", stream.stats(), stream.footprint());
        drop(stream);
        assert!(memory.as_slice().unwrap()[..data.len()] == data[..]);
    }
    std::fs::remove_file(&path).unwrap();
}
