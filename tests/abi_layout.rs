//! The C structs and constants as Rust has them, against `c_tests/layout.def`, which the C side asserts of the header.

use ringest::ffi::{buffer, file, library, log, mapped, ring, stream, tail};
use std::collections::BTreeSet;
use std::mem::offset_of;
use std::path::Path;

fn read(path: &str) -> String {
    std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).unwrap()
}

fn size_of_field<T, F>(_: fn(&T) -> &F) -> usize {
    size_of::<F>()
}

macro_rules! structs {
    ($($module:ident::$name:ident { $($field:ident),* $(,)? })*) => {
        vec![$(
            format!("STRUCT({}, {})", stringify!($name), size_of::<$module::$name>()),
            $(format!(
                "FIELD({}, {}, {}, {})",
                stringify!($name),
                stringify!($field),
                offset_of!($module::$name, $field),
                size_of_field(|value: &$module::$name| &value.$field),
            ),)*
        )*]
    };
}

macro_rules! constants {
    ($($module:ident::$name:ident)*) => { vec![$(format!("CONSTANT({}, {})", stringify!($name), $module::$name)),*] };
}

macro_rules! variants {
    ($($module:ident::$name:ident { $($variant:ident),* })*) => {
        vec![$($(format!("CONSTANT({}, {})", constant(stringify!($name), stringify!($variant)), $module::$name::$variant as u32),)*)*]
    };
}

/// `ringest_read_path`, `PlainRead`: `RINGEST_READ_PATH_PLAIN_READ`.
fn constant(name: &str, variant: &str) -> String {
    let mut text = name.to_uppercase();
    for letter in variant.chars() {
        if letter.is_uppercase() {
            text.push('_');
        }
        text.push(letter.to_ascii_uppercase());
    }
    text
}

fn rust() -> BTreeSet<String> {
    let mut lines = structs! {
        library::ringest_leaks { rings, reads, bytes }
        mapped::ringest_mapped_options { size, huge_pages, alignment }
        ring::ringest_ring_options {
            size, flags, entries, cq_entries, sqpoll_idle_ms, sqpoll_cpu, buffer_slots, reserved,
        }
        ring::ringest_features { sq_entries, cq_entries, flags, reserved }
        stream::ringest_stream_options {
            size, flags, depth, window, max_retries, reserved, retry_backoff_ns, close_timeout_ns,
        }
        stream::ringest_range { offset, len }
        stream::ringest_completion {
            sequence, user_data, buffer_offset, file_offset, requested, bytes, bounced, status, path, reserved,
        }
        stream::ringest_stream_counters {
            submitted, completed, failed, end_of_file, cancelled, skipped, bytes, registered_bytes, plain_bytes,
            bounced_bytes, commands, short_reads, retries, enters, reserved,
        }
        tail::ringest_tail_line_words { tail, first_bad, state, error, end, reserved }
    };
    lines.extend(constants! {
        ring::RINGEST_RING_SQPOLL ring::RINGEST_RING_SQPOLL_CPU ring::RINGEST_RING_IOPOLL ring::RINGEST_RING_MOVABLE
        ring::RINGEST_RING_BIG_ENTRIES
        ring::RINGEST_FEATURE_SINGLE_ISSUER ring::RINGEST_FEATURE_DEFER_TASKRUN ring::RINGEST_FEATURE_COOP_TASKRUN
        ring::RINGEST_FEATURE_TASKRUN_FLAG ring::RINGEST_FEATURE_SUBMIT_ALL ring::RINGEST_FEATURE_SQPOLL
        ring::RINGEST_FEATURE_IOPOLL ring::RINGEST_FEATURE_BIG_ENTRIES ring::RINGEST_FEATURE_REGISTERED_RING
        ring::RINGEST_FEATURE_SPARSE_BUFFERS ring::RINGEST_FEATURE_READV_FIXED ring::RINGEST_FEATURE_FELL_BACK
        stream::RINGEST_STREAM_UNREGISTERED stream::RINGEST_STREAM_STRICT stream::RINGEST_STREAM_NO_RETRY
    });
    lines.extend(variants! {
        file::ringest_direct { Auto, On, Off }
        mapped::ringest_huge_pages { Advise, Off, Require }
        log::ringest_log_level { Off, Error, Warn, Info, Debug, Trace }
        buffer::ringest_memory_kind { HostVisible, Bar1Peer }
        library::ringest_read_path { None, RegisteredRead, PlainRead }
        tail::ringest_state { Open, End, Aborted }
    });
    lines.into_iter().collect()
}

#[test]
fn rust_and_c_agree_on_every_size_offset_and_value() {
    let table = read("c_tests/layout.def");
    let table: BTreeSet<String> = table.lines().filter(|line| !line.starts_with("//")).map(str::to_owned).collect();
    let rust = rust();
    let differences: Vec<_> = rust.symmetric_difference(&table).collect();
    assert!(differences.is_empty(), "c_tests/layout.def and the Rust types differ: {differences:#?}");
}

#[test]
fn the_table_leaves_nothing_of_the_header_out() {
    let (header, table) = (read("include/ringest.h"), read("c_tests/layout.def"));
    let mut seen = 0;
    for line in header.lines() {
        let word = |prefix: &str| line.strip_prefix(prefix)?.split([' ', ',']).next().map(str::to_owned);
        if let Some(name) = word("struct ").filter(|_| line.ends_with('{')) {
            assert!(table.contains(&format!("STRUCT({name}, ")), "struct {name}");
            seen += 1;
        }
        let constant = word("#define ")
            .filter(|_| line.ends_with(')'))
            .or_else(|| word("    RINGEST_").map(|n| format!("RINGEST_{n}")));
        if let Some(name) = constant {
            assert!(table.contains(&format!("CONSTANT({name}, ")), "constant {name}");
            seen += 1;
        }
    }
    assert_eq!(seen, table.matches("STRUCT(").count() - 1 + table.matches("CONSTANT(").count() - 1);
}
