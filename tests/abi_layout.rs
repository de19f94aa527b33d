//! The C structs and constants as Rust has them, against `c_tests/layout.def`, which the C side asserts of the header.

use ringest::ffi::{
    buffer, consumer, device_buffer, driver, file, gpu, io_queue, library, log, mapped, ring, stream, vmm,
};
use ringest::wire;
use std::collections::BTreeSet;
use std::mem::offset_of;
use std::path::Path;

fn read(path: &str) -> String {
    std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).unwrap()
}

fn size_of_field<T, F>(_: fn(&T) -> &F) -> usize {
    size_of::<F>()
}

macro_rules! name {
    ($name:ident) => {
        stringify!($name)
    };
    ($name:ident $c:ident) => {
        stringify!($c)
    };
}

/// Types of `wire` have other names in C.
macro_rules! structs {
    ($($module:ident::$name:ident $(as $c:ident)? { $($field:ident),* $(,)? })*) => {
        [$({
            let name = name!($name $($c)?);
            let mut lines = vec![format!("STRUCT({name}, {})", size_of::<$module::$name>())];
            $(lines.push(format!(
                "FIELD({name}, {}, {}, {})",
                stringify!($field),
                offset_of!($module::$name, $field),
                size_of_field(|value: &$module::$name| &value.$field),
            ));)*
            lines
        }),*]
        .concat()
    };
}

macro_rules! constants {
    ($($module:ident::$name:ident)*) => {
        vec![$(format!("CONSTANT({}, {})", prefixed(stringify!($name)), $module::$name)),*]
    };
}

/// Constants of `wire` have no prefix in Rust.
fn prefixed(name: &str) -> String {
    if name.starts_with("RINGEST_") { name.to_owned() } else { format!("RINGEST_{name}") }
}

macro_rules! variants {
    ($($module:ident::$name:ident $(as $c:ident)? { $($variant:ident),* })*) => {
        [$({
            let name = name!($name $($c)?);
            vec![$(format!(
                "CONSTANT({}, {})",
                constant(name, stringify!($variant)),
                $module::$name::$variant as u32,
            )),*]
        }),*]
        .concat()
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
        library::ringest_leaks { rings, reads, bytes, queues }
        mapped::ringest_mapped_options { size, huge_pages, alignment, pinning, gpu, reserved }
        gpu::ringest_gpu_info {
            name, pci_address, memory, bar1, flags, compute_major, compute_minor, multiprocessors, copy_engines,
            host_numa_node, rdma_flush_options, rdma_writes_ordering, reserved,
        }
        device_buffer::ringest_device_buffer_options { size, flags, capacity, reserved }
        vmm::ringest_vmm_memory_options { size, flags, location, id, reserved }
        vmm::ringest_vmm_grant { location, id, access, reserved }
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
        io_queue::ringest_io_queue_options {
            size, slots, slot_bytes, alignment, mode, consumers, huge_pages, pinning, gpu, reserved,
        }
        io_queue::ringest_io_queue_sizes { control, credit, device, slots, slot_stride, reserved }
        io_queue::ringest_slot { sequence, offset, data, bytes, reserved }
        io_queue::ringest_slot_data {
            status, bytes, tag, file_offset, data_offset, crc32c, path, flags, nvme_status, reserved,
        }
        consumer::ringest_popped { sequence, data, bytes, reserved, descriptor }
        driver::ringest_driver_options {
            size, flags, depth, queue_limit, max_retries, reserved, retry_backoff_ns, credit_poll_ns, close_timeout_ns,
        }
        driver::ringest_ingest_request {
            file, file_offset, tag, timeout_ns, len, source, fd, file_index, reserved,
        }
        driver::ringest_ingest_completion {
            request, sequence, tag, file_offset, bounced, latency_ns, requested, bytes, status, path, reserved,
        }
        driver::ringest_driver_counters {
            submitted, submitted_bytes, completed, completed_bytes, failed, end_of_file, cancelled, timed_out, path_reads,
            path_bytes, bounce_bytes, short_reads, retries, published_slots, poisoned_slots, early_poisoned_slots,
            held_slots, leaked_reads, credit_stalls, credit_stall_ns, in_flight, max_in_flight, queued, max_queued,
            latency_count, latency_p50_ns, latency_p99_ns, latency_p999_ns, latency_max_ns, reserved,
        }
        wire::TailLineLayout as ringest_tail_line_words { tail, first_bad, state, error, end, reserved }
        wire::ControlHeader as ringest_control_header {
            magic, version, header_bytes, slot_count, slot_stride, slot_bytes, epoch, flags, reserved,
        }
        wire::ControlBlock as ringest_control_block {
            header, tail, first_bad, reserved_tail, state, error, end, reserved_state,
        }
        wire::Descriptor as ringest_descriptor {
            seq, status, bytes, tag, file_offset, data_offset, crc32c, path, flags, nvme_status, reserved,
        }
        wire::IoQueueView as ringest_io_queue_view {
            magic, version, mode, slot_count, slot_stride, slot_bytes, epoch, consumers, flags, control, credit, device,
            slots, reserved,
        }
    };
    lines.extend(constants! {
        ring::RINGEST_RING_SQPOLL ring::RINGEST_RING_SQPOLL_CPU ring::RINGEST_RING_IOPOLL ring::RINGEST_RING_MOVABLE
        ring::RINGEST_RING_BIG_ENTRIES
        ring::RINGEST_FEATURE_SINGLE_ISSUER ring::RINGEST_FEATURE_DEFER_TASKRUN ring::RINGEST_FEATURE_COOP_TASKRUN
        ring::RINGEST_FEATURE_TASKRUN_FLAG ring::RINGEST_FEATURE_SUBMIT_ALL ring::RINGEST_FEATURE_SQPOLL
        ring::RINGEST_FEATURE_IOPOLL ring::RINGEST_FEATURE_BIG_ENTRIES ring::RINGEST_FEATURE_REGISTERED_RING
        ring::RINGEST_FEATURE_SPARSE_BUFFERS ring::RINGEST_FEATURE_READV_FIXED ring::RINGEST_FEATURE_FELL_BACK
        stream::RINGEST_STREAM_UNREGISTERED stream::RINGEST_STREAM_STRICT stream::RINGEST_STREAM_NO_RETRY
        driver::RINGEST_DRIVER_UNREGISTERED driver::RINGEST_DRIVER_STRICT driver::RINGEST_DRIVER_NO_RETRY
        driver::RINGEST_DRIVER_CRC32C
        gpu::RINGEST_GPU_NONE gpu::RINGEST_GPU_INTEGRATED gpu::RINGEST_GPU_HOST_REGISTER gpu::RINGEST_GPU_STREAM_MEM_OPS
        gpu::RINGEST_GPU_VIRTUAL_MEMORY gpu::RINGEST_GPU_EXPORT_FD gpu::RINGEST_GPU_HOST_NUMA_MEMORY
        gpu::RINGEST_GPU_RDMA gpu::RINGEST_GPU_RDMA_VIRTUAL_MEMORY gpu::RINGEST_GPU_DMA_BUF
        vmm::RINGEST_VMM_PLANNING_GRANULARITY vmm::RINGEST_VMM_RDMA vmm::RINGEST_VMM_EXPORTABLE
        wire::IO_QUEUE_MAGIC wire::IO_QUEUE_VERSION wire::IO_QUEUE_DESCRIPTORS wire::IO_QUEUE_RELEASED
        wire::IO_QUEUE_TICKETS wire::IO_QUEUE_ALIGNMENT wire::IO_QUEUE_MIN_SLOTS wire::IO_QUEUE_MAX_SLOTS
        wire::IO_QUEUE_MAX_CONSUMERS wire::DESCRIPTOR_CRC32C wire::DESCRIPTOR_EARLY
    });
    lines.extend(variants! {
        file::ringest_direct { Auto, On, Off }
        mapped::ringest_huge_pages { Advise, Off, Require }
        mapped::ringest_pinning { Off, Auto, Gpu, HostAlloc }
        vmm::ringest_vmm_location { Own, Gpu, HostNuma, Host }
        vmm::ringest_vmm_access { None, Read, ReadWrite }
        log::ringest_log_level { Off, Error, Warn, Info, Debug, Trace }
        buffer::ringest_memory_kind { HostVisible, Bar1Peer }
        library::ringest_read_path { None, RegisteredRead, PlainRead }
        driver::ringest_ingest_source { File, Descriptor, FixedFile }
        driver::ringest_native_read_path { RegisteredMappedRead, GpuDirectNvmePassthrough }
        wire::State as ringest_state { Open, End, Aborted }
        wire::ConsumeMode as ringest_consume_mode { Single, Partitioned, Claimed, Broadcast }
        wire::Outcome as ringest_outcome { Ok, End, Aborted, Poison, Timeout }
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
fn the_table_leaves_nothing_of_the_headers_out() {
    let (header, table) = (read("include/ringest.h") + &read("include/ringest_wire.h"), read("c_tests/layout.def"));
    let mut seen = 0;
    for line in header.lines() {
        let word = |prefix: &str| line.strip_prefix(prefix)?.split([' ', ',']).next().map(str::to_owned);
        if let Some(name) = word("struct ").filter(|_| line.ends_with('{')) {
            assert!(table.contains(&format!("STRUCT({name}, ")), "struct {name}");
            seen += 1;
        }
        // Guards have no value, and versions change.
        let constant = word("#define ")
            .filter(|name| line.len() > "#define ".len() + name.len() && !name.contains(['(']))
            .filter(|name| !name.starts_with("RINGEST_VERSION"))
            .or_else(|| word("    RINGEST_").map(|n| format!("RINGEST_{n}")));
        if let Some(name) = constant {
            assert!(table.contains(&format!("CONSTANT({name}, ")), "constant {name}");
            seen += 1;
        }
    }
    assert_eq!(seen, table.matches("STRUCT(").count() - 1 + table.matches("CONSTANT(").count() - 1);
}
