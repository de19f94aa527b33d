//! How far an ingest is, on stderr: a bar for people, a line a second for logs.

use crate::report::size;
use indicatif::{ProgressBar, ProgressStyle};
use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

const LINE_EVERY: Duration = Duration::from_secs(1);
/// indicatif limits its drawing; asking it costs a lock, so it is not asked for every read.
const BAR_EVERY: Duration = Duration::from_millis(50);

enum Display {
    None,
    Lines,
    Bar(ProgressBar),
}

/// See the module's text.
pub(crate) struct Progress {
    display: Display,
    total: u64,
    next: Instant,
}

impl Progress {
    pub(crate) fn new(total: u64, quiet: bool) -> Self {
        let display = if quiet {
            Display::None
        } else if std::io::stderr().is_terminal() {
            Display::Bar(bar(total))
        } else {
            Display::Lines
        };
        let first = if matches!(display, Display::Lines) { LINE_EVERY } else { BAR_EVERY };
        Self { display, total, next: Instant::now() + first }
    }

    pub(crate) fn at(&mut self, bytes: u64) {
        if matches!(self.display, Display::None) {
            return;
        }
        let now = Instant::now();
        if now < self.next {
            return;
        }
        match &self.display {
            Display::Bar(bar) => {
                bar.set_position(bytes);
                self.next = now + BAR_EVERY;
            }
            _ => {
                let percent = if self.total > 0 { bytes as f64 * 100.0 / self.total as f64 } else { 100.0 };
                let _ = writeln!(std::io::stderr(), "ringest: {} of {} ({percent:.0}%)", size(bytes), size(self.total));
                self.next = now + LINE_EVERY;
            }
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Display::Bar(bar) = &self.display {
            bar.finish_and_clear();
        }
    }
}

fn bar(total: u64) -> ProgressBar {
    let bar = ProgressBar::new(total);
    let template = "{bar:40} {binary_bytes} of {binary_total_bytes}, {binary_bytes_per_sec}, {eta} left";
    // The template is a constant: were it wrong, the default style would do.
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    bar
}
