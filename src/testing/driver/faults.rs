//! Each deliberate fault is noticed.

use super::super::harness::catching;
use super::{Fault, play};

/// Runs seeds with a deliberate fault until `wanted` of them had the opportunity; returns how many were noticed.
fn noticed(fault: Fault, wanted: usize) -> usize {
    let (mut fired, mut noticed) = (0, 0);
    for seed in 0..20_000 {
        match catching(|| play::run(seed, Some(fault), false)) {
            Ok(report) if !report.fired => continue,
            Ok(_) => {}
            Err(_) => noticed += 1,
        }
        fired += 1;
        if fired == wanted {
            println!("{fault:?}: {noticed} of {fired} noticed");
            return noticed;
        }
    }
    panic!("{fault:?} had {fired} opportunities only");
}

#[test]
fn nothing_is_noticed_where_nothing_is_wrong() {
    for seed in 0..200 {
        assert_eq!(catching(|| play::run(seed, None, false)).err(), None, "seed {seed}");
    }
}

#[test]
fn a_slot_published_before_its_bytes_are_there_is_noticed() {
    assert_eq!(noticed(Fault::PublishEarly, 100), 100);
}

#[test]
fn a_held_slot_that_is_filled_again_is_noticed() {
    assert_eq!(noticed(Fault::LandEarly, 50), 50);
}

#[test]
fn a_read_whose_end_is_lost_is_noticed() {
    assert_eq!(noticed(Fault::EndLost, 50), 50);
}

#[test]
fn a_poison_without_errno_is_noticed() {
    assert_eq!(noticed(Fault::ErrnoLost, 100), 100);
}

/// Unless the queue was closed.
#[test]
fn credit_that_no_consumer_gave_is_noticed() {
    assert!(noticed(Fault::CreditForged, 100) >= 80);
}

#[test]
fn a_write_to_a_published_slot_is_noticed() {
    assert_eq!(noticed(Fault::SlotSpoiled, 100), 100);
}

#[test]
fn a_published_descriptor_that_changes_is_noticed() {
    assert_eq!(noticed(Fault::DescriptorSpoiled, 100), 100);
}

#[test]
fn a_tail_that_is_wrong_is_noticed() {
    assert_eq!(noticed(Fault::TailAhead, 100), 100);
    assert_eq!(noticed(Fault::TailBack, 100), 100);
}

#[test]
fn an_end_too_soon_is_noticed() {
    assert_eq!(noticed(Fault::EndTooSoon, 100), 100);
}

#[test]
fn a_sequence_popped_twice_is_noticed() {
    assert!(noticed(Fault::TicketTwice, 100) >= 90);
}

#[test]
fn a_lost_record_and_a_double_one_are_noticed() {
    assert_eq!(noticed(Fault::RecordLost, 100), 100);
    assert_eq!(noticed(Fault::RecordTwice, 100), 100);
}
