//! The command-line tool: what it reads is right whoever consumes it, and what goes wrong is said once.

#![cfg(feature = "cli")]

use serde_json::Value;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

const TOOL: &str = env!("CARGO_BIN_EXE_ringest");

/// A directory that goes away with the test.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("tool-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    /// A file of so many bytes, and its CRC32C.
    fn file(&self, name: &str, len: usize) -> (PathBuf, String) {
        let seed = name.bytes().fold(1, |seed: u32, byte| seed.wrapping_mul(31).wrapping_add(byte.into()));
        let bytes: Vec<u8> = (0..len as u32).map(|at| ((at ^ seed).wrapping_mul(2_654_435_761) >> 13) as u8).collect();
        let path = self.0.join(name);
        std::fs::write(&path, &bytes).unwrap();
        (path, format!("{:08x}", crc32c::crc32c(&bytes)))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn ingest(files: impl IntoIterator<Item = PathBuf>, options: &str) -> Output {
    Command::new(TOOL).arg("ingest").args(files).args(options.split_whitespace()).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn json(output: &Output) -> Value {
    assert!(output.status.success(), "{}", text(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn sums(value: &Value) -> Vec<String> {
    let files = value["files"].as_array().unwrap();
    files.iter().map(|file| file["crc32c"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn every_mode_gives_every_file_its_checksum() {
    let folder = Folder::new("modes");
    let lens = [0, 1, 999, 1000, 1001, 4096, 0, 123_457, 300_000];
    let files: Vec<_> = lens.iter().enumerate().map(|(index, &len)| folder.file(&format!("{index}"), len)).collect();
    let (paths, expected): (Vec<_>, Vec<_>) = files.into_iter().unzip();
    for options in [
        "",
        "--consumers 3",
        "--slots 2 --mode claimed",
        "--slots 4 --slot-bytes 1000 --depth 3",
        "--slots 4 --slot-bytes 1000 --consumers 3 --mode partitioned",
        "--slots 8 --slot-bytes 512 --consumers 4 --mode claimed --direct off",
        "--slots 2 --slot-bytes 4k --consumers 2 --mode broadcast",
        "--slots 16 --slot-bytes 4096 --consumers 20 --mode partitioned",
    ] {
        let value = json(&ingest(paths.clone(), &format!("--json --verify {options}")));
        assert_eq!(sums(&value), expected, "{options}");
        let (slot, telemetry) = (value["slot_bytes"].as_u64().unwrap(), &value["telemetry"]);
        let reads: u64 = lens.iter().map(|&len| (len as u64).div_ceil(slot)).sum();
        let bytes: usize = lens.iter().sum();
        for (name, number) in [("published_slots", reads), ("poisoned_slots", 0), ("failed", 0), ("in_flight", 0)] {
            assert_eq!(telemetry[name], number, "{options}: {name}");
        }
        assert_eq!(telemetry["completed"], serde_json::json!({ "reads": reads, "bytes": bytes }), "{options}");
        assert!(value["files"].as_array().unwrap().iter().all(|file| file["verified"] == true), "{options}");
    }
    let said = ingest(paths, "--consumers 2");
    assert!(text(&said.stdout).contains("2 consumers (claimed)"), "{}", text(&said.stdout));
}

#[test]
fn a_gpu_is_used_or_the_report_says_why_not() {
    let folder = Folder::new("gpu");
    let lens = [0, 1, 15, 16, 17, 4095, 4096, 4097, 123_457, 3_000_001];
    let files: Vec<_> = lens.iter().enumerate().map(|(index, &len)| folder.file(&format!("{index}"), len)).collect();
    let (paths, expected): (Vec<_>, Vec<_>) = files.into_iter().unzip();
    for options in [
        "",
        "--slots 4 --slot-bytes 1000",
        "--slots 64 --slot-bytes 4096 --direct off",
        "--slots 8 --slot-bytes 100k --consumers 3 --mode partitioned",
        "--consumers 1",
        "--consumers 5 --slot-bytes 8193",
    ] {
        let value = json(&ingest(paths.clone(), &format!("--json --gpu 0 {options}")));
        assert_eq!(sums(&value), expected, "{options}");
        let (used, verified) = (value["gpu"]["name"].is_string(), &value["files"][1]["verified"]);
        assert_eq!(verified, used, "what a GPU found is compared, always");
        assert_ne!(used, value["gpu"]["refused"].is_string(), "{}", value["gpu"]);
    }
    let said = ingest(paths.clone(), "--gpu 0");
    assert!(said.status.success() && text(&said.stdout).contains("\ngpu "), "{}", text(&said.stdout));
    let refused = ingest(paths.clone(), "--gpu 0 --mode broadcast");
    assert!(!refused.status.success() && text(&refused.stderr).contains("--mode broadcast"));
    assert!(json(&ingest(paths, "--json"))["gpu"].is_null());
}

#[test]
fn more_files_than_may_be_open() {
    let folder = Folder::new("many");
    let files: Vec<_> = (0..1200).map(|index| folder.file(&format!("{index}"), index % 7)).collect();
    let (paths, expected): (Vec<_>, Vec<_>) = files.into_iter().unzip();
    let limited = ["-c", "ulimit -n 40 && exec \"$0\" \"$@\"", TOOL, "ingest", "--json", "--consumers", "2", "--"];
    let value = json(&Command::new("sh").args(limited).args(paths).output().unwrap());
    assert_eq!(sums(&value), expected);
}

#[test]
fn a_file_that_is_truncated_while_it_is_read_fails_once_and_by_name() {
    let folder = Folder::new("truncated");
    let path = folder.0.join("sparse");
    let file = File::create(&path).unwrap();
    file.set_len(1 << 38).unwrap();
    for options in ["--consumers 1", "--consumers 2 --mode claimed", "--consumers 2 --mode broadcast"] {
        file.set_len(1 << 38).unwrap();
        let mut tool = Command::new(TOOL)
            .arg("ingest")
            .arg(&path)
            .args(options.split_whitespace())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stderr = BufReader::new(tool.stderr.take().unwrap());
        let mut line = String::new();
        // The first sign of progress.
        stderr.read_line(&mut line).unwrap();
        assert!(line.contains(" of 256 GiB"), "{line}");
        file.set_len(4096).unwrap();
        let mut rest = String::new();
        stderr.read_to_string(&mut rest).unwrap();
        assert_eq!(tool.wait().unwrap().code(), Some(1));
        let said: Vec<_> = rest.lines().filter(|line| !line.contains(" of 256 GiB")).collect();
        let [said] = said[..] else { panic!("said {said:?}") };
        assert!(said.contains("sparse: the file was truncated") && said.contains("offset"), "{said}");
    }
}

#[test]
fn what_cannot_be_read_is_named_with_a_remedy() {
    let folder = Folder::new("errors");
    let (good, _) = folder.file("good", 5000);
    let cases = [
        (folder.0.join("absent"), "", ["absent", "No such file", "check the path"]),
        (folder.0.clone(), "", ["tool-errors", "directory", "name a file"]),
        ("/proc/self/status".into(), "", ["/proc/self/status", "no size", "by offset"]),
        (good.clone(), "--consumers 3 --mode single", ["3 consumers", "--mode single", "another mode"]),
        (good.clone(), "--slots 65536 --slot-bytes 1G", ["65536 slots", "1 GiB", "at most 4 GiB"]),
        (good, "--slots 6", ["--slots", "'6'", "power of two"]),
    ];
    for (path, options, words) in cases {
        let output = ingest([path], options);
        let said = text(&output.stderr);
        assert!(!output.status.success() && output.stdout.is_empty(), "{said}");
        assert!(words.iter().all(|word| said.contains(word)), "{words:?} {said}");
    }
}
