//! The code in the manual and the README is compiled and run, and the manual names every call.

#[path = "common/c.rs"]
mod c;

use std::path::Path;

fn text(name: &str) -> String {
    std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(name)).unwrap()
}

/// The fenced blocks of a language.
fn blocks(text: &str, language: &str) -> Vec<String> {
    let fence = format!("```{language}\n");
    text.split(&fence).skip(1).map(|rest| rest.split("```").next().unwrap_or_default().to_owned()).collect()
}

#[test]
fn the_programs_compile_and_run() {
    let folder = c::Folder::new("manual");
    let file = folder.0.join("input");
    let content: Vec<u8> = (0..1_000_000u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    std::fs::write(&file, content).unwrap();
    let mut ran = 0;
    for name in ["docs/manual.md", "README.md"] {
        let text = text(name);
        for (language, extension) in [("c", "c"), ("cpp", "cpp")] {
            for block in blocks(&text, language) {
                let source = folder.0.join(format!("block{ran}.{extension}"));
                std::fs::write(&source, block).unwrap();
                let Some(program) = c::compile(&source, &folder.0, c::Link::Shared) else {
                    println!("SKIP manual: there is no C compiler");
                    return;
                };
                c::run(&program, &folder.0, &[&file]);
                ran += 1;
            }
        }
    }
    assert!(ran >= 3, "only {ran} programs found");
}

#[test]
fn the_manual_names_every_call() {
    let (manual, symbols) = (text("docs/manual.md"), text("include/ringest.symbols"));
    let missing: Vec<_> = symbols.lines().filter(|call| !manual.contains(&format!("`{call}`"))).collect();
    assert!(missing.is_empty(), "not in the manual: {missing:?}");
}
