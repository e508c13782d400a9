//! The programs in `docs/embedding.md`, which tests run.

use std::path::Path;

/// The one in that language.
pub fn program(language: &str) -> String {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/embedding.md");
    let page = std::fs::read_to_string(page).unwrap();
    let found: Vec<&str> = page.split(&format!("\n```{language}\n")).skip(1).collect();
    assert_eq!(found.len(), 1, "programs in {language}");
    found[0].split("\n```").next().unwrap().to_string() + "\n"
}
