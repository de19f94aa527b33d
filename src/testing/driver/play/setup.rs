//! What a seed chooses once: the queue, its consumers, the files and the kernel.

use super::super::super::harness::{Check, make_file, make_nature, text};
use super::super::super::rng::Rng;
use super::super::super::sim::{Sim, SimFile};
use super::super::actors::{Actor, Temper};
use super::super::reads::SimReads;
use super::super::words::RawWords;
use super::super::world::{Mischief, World};
use super::super::{DriverSimReport, Fault, Setup};
use super::{Play, Sums};
use crate::ingest::{Core, CoreOptions, IoQueue, IoQueueOptions};
use crate::memory::HugePages;
use crate::uring::{BufferEntry, FileRef, Flight, FlightOptions, TailWord, Target};
use crate::wire::ConsumeMode;
use std::sync::Arc;
use std::time::Duration;

fn make_setup(rng: &mut Rng) -> Check<Setup> {
    let slots = rng.pick(&[2, 2, 4, 4, 8, 16]);
    let slot_bytes = rng.pick(&[1, 40, 300, 700, 700, 1_500, 4_096]);
    let mode = rng.pick(&[ConsumeMode::Single, ConsumeMode::Partitioned, ConsumeMode::Claimed, ConsumeMode::Broadcast]);
    let queue = IoQueueOptions {
        slots,
        slot_bytes,
        alignment: rng.pick(&[128, 128, 512, 512, 1024, 4096]),
        mode,
        consumers: if mode == ConsumeMode::Single { 1 } else { rng.range(1, 4) as u32 },
        huge_pages: HugePages::Off,
    };
    Ok(Setup {
        stride: queue.layout().map_err(text)?.slot_stride,
        queue,
        depth: rng.sized(1, slots as usize),
        queue_limit: rng.pick(&[0, 0, 1, 3, 8, 40]),
        crc32c: rng.chance(500),
        refuse: rng.pick(&[0, 0, 0, 30]),
        host_abort: rng.pick(&[0, 0, 0, 0, 0, 0, 2]),
    })
}

fn make_actors(rng: &mut Rng, world: &mut World, gentle: bool) -> Check<bool> {
    let Setup { queue: IoQueueOptions { consumers, slots, .. }, .. } = world.setup;
    let aborts = if rng.chance(60) { 8 } else { 0 };
    let stuck = rng.chance(200).then(|| rng.below(consumers.into()));
    let mut lively = true;
    for index in 0..consumers {
        let mut temper = Temper::new(rng, slots as usize);
        if !gentle {
            temper.aborts = aborts;
            if stuck == Some(index.into()) || stuck.is_some() && rng.chance(300) {
                match rng.chance(500) {
                    true => temper.stuck_after = rng.below(12),
                    false => temper.never_releases = true,
                }
            }
        }
        lively &= temper.is_lively();
        let actor = Actor::new(world, index, temper)?;
        world.actors.push(Some(actor));
    }
    Ok(lively)
}

impl Play {
    pub(super) fn new(seed: u64, fault: Option<Fault>, trace: bool) -> Check<Self> {
        let mut rng = Rng::new(seed ^ 0x6472_6976_6572);
        let gentle = fault.is_some();
        let mut setup = make_setup(&mut rng)?;
        if gentle {
            (setup.refuse, setup.host_abort) = (0, 0);
        }
        let mut made: Vec<(FileRef, SimFile)> =
            (0..rng.range(1, 3)).map(|id| make_file(&mut rng, 1000 + id, setup.queue.slot_bytes as usize)).collect();
        for (_, file) in &mut made {
            // Small files are for the end of the file; most reads are to be whole.
            if file.size < 4 * u64::from(setup.queue.slot_bytes) && rng.chance(600) {
                file.size += rng.range(4, 20) * u64::from(setup.queue.slot_bytes);
            }
        }
        // Reads are told apart by the number, which is the descriptor where the alignment is learned late.
        made.sort_by_key(|(_, file)| file.id);
        made.dedup_by_key(|(_, file)| file.id);
        let (files, sim_files): (Vec<_>, Vec<_>) = made.into_iter().unzip();
        let block = sim_files.iter().filter_map(|file| file.direct).map(|direct| direct.offset as usize).max();
        let mut bounce_slot_bytes = rng.pick(&[512, 1024, 4096, 8192]);
        if !rng.chance(60) {
            bounce_slot_bytes = bounce_slot_bytes.max(block.unwrap_or(1));
        }
        let options = FlightOptions {
            depth: setup.depth as u32,
            window: setup.queue.slots,
            max_retries: rng.pick(&[0, 1, 3, 10]),
            backoff: Duration::from_nanos(rng.pick(&[0, 1_000, 50_000])),
            strict: rng.chance(300),
            bounce_slots: rng.pick(&[1, 1, 2, 8]),
            bounce_slot_bytes,
        };
        let nature = make_nature(&mut rng);
        let mut sim = Sim::new(Rng::new(rng.next()), nature, sim_files, TailWord::None);
        sim.strict = options.strict;
        sim.trace = trace;
        let queue = IoQueue::new(setup.queue).map_err(text)?;
        let slots = queue.slot_memory();
        let home = match rng.chance(500) {
            true => Target::Registered(BufferEntry::simulated(slots, 3)),
            false => Target::Plain(Arc::clone(slots.region())),
        };
        // SAFETY: the world has the queue, and is not used once that is destroyed.
        let words = unsafe { RawWords::new(queue.host_view()) };
        let mischief = Mischief::new(fault, &mut rng);
        let mut world = World::new(Rng::new(rng.next()), Arc::clone(&queue), words, setup.clone(), mischief);
        world.trace = trace;
        if trace {
            eprintln!("{setup:?}\n{options:?}\n{:?}\n{:?}", sim.nature, sim.files);
        }
        if gentle {
            sim.be_gentle();
        }
        let lively = make_actors(&mut rng, &mut world, gentle)?;
        let deadlines = if gentle { fault == Some(Fault::LandEarly) } else { rng.chance(300) };
        let core_options = CoreOptions {
            depth: setup.depth,
            queue_limit: setup.queue_limit,
            credit_poll: Duration::from_nanos(rng.pick(&[1_000, 50_000])),
            crc32c: setup.crc32c,
        };
        let flight = Flight::new(sim, TailWord::None, home, options);
        Ok(Self {
            rng,
            core: Core::new(SimReads::new(flight, world), queue, core_options),
            files,
            setup,
            max_retries: options.max_retries,
            strict: options.strict,
            bounce_slot_bytes,
            asked: Vec::new(),
            taken: 0,
            sums: Sums::default(),
            finishing: false,
            ended_outside: false,
            deadlines,
            lively,
            gentle,
            errors_before: 0,
            report: DriverSimReport::default(),
            trace,
        })
    }
}
