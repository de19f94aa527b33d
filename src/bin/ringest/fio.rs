//! fio with the parameters of a run, to compare with. Shared with `benches/read.rs`.

use crate::measure::Elapsed;
use crate::reading::{Order, Reads, Run};
use serde_json::Value;
use std::path::Path;
use std::process::Command;

/// fio's version, or why it cannot be run.
pub(crate) fn version() -> Result<String, String> {
    let output = Command::new("fio").arg("--version").output();
    let output = output.map_err(|error| format!("fio cannot be run ({error}): install it, or leave it out"))?;
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// One run on the same file. Throughput is what fio reports: bytes over its own clock, start-up not included.
pub(crate) fn run(path: &Path, order: Order, direct: bool, reads: &Reads) -> Result<Run, String> {
    let output = Command::new("fio").args(arguments(path, order, direct, reads)).output();
    let output = output.map_err(|error| format!("fio cannot be run: {error}"))?;
    if !output.status.success() {
        return Err(format!("fio failed ({}): {}", output.status, String::from_utf8_lossy(&output.stderr).trim()));
    }
    parse(&output.stdout)
}

fn arguments(path: &Path, order: Order, direct: bool, reads: &Reads) -> Vec<String> {
    // A colon separates files in fio's notation.
    let name = path.to_string_lossy().replace(':', "\\:");
    let mut arguments: Vec<String> =
        ["--name=read", "--ioengine=io_uring", "--fixedbufs=1", "--registerfiles=1", "--output-format=json"]
            .map(str::to_owned)
            .into();
    let rw = if order == Order::Random { "randread" } else { "read" };
    arguments.extend([
        format!("--filename={name}"),
        format!("--rw={rw}"),
        format!("--direct={}", u8::from(direct)),
        format!("--iodepth={}", reads.depth),
        format!("--bs={}", reads.block),
        format!("--size={}", reads.span),
        format!("--io_size={}", reads.bytes()),
    ]);
    if order == Order::Random {
        arguments.push("--norandommap".to_owned());
    }
    if !direct {
        // By default fio drops the file from the page cache first.
        arguments.push("--invalidate=0".to_owned());
    }
    arguments
}

fn parse(output: &[u8]) -> Result<Run, String> {
    // Warnings may precede the object.
    let start = output.iter().position(|&byte| byte == b'{').unwrap_or(0);
    let value: Value = serde_json::from_slice(&output[start..]).map_err(|error| format!("fio's output: {error}"))?;
    let job = &value["jobs"][0];
    let number = |value: &Value| value.as_f64().filter(|number| *number > 0.0);
    let rate = number(&job["read"]["bw_bytes"]).ok_or("fio reports no throughput")?;
    let bytes = number(&job["read"]["io_bytes"]).ok_or("fio reports no bytes")?;
    // `runtime` has milliseconds only; the rate is computed from finer time.
    let wall = bytes / rate;
    let percent = job["usr_cpu"].as_f64().unwrap_or(0.0) + job["sys_cpu"].as_f64().unwrap_or(0.0);
    Ok(Run {
        elapsed: Elapsed { wall, cpu: wall * percent / 100.0 },
        bytes: bytes as u64,
        reads: job["read"]["total_ios"].as_u64().unwrap_or(0),
        system_calls: 0,
        registered: true,
    })
}
