//! Any text as a program: an error, or a model that prints and parses to itself.
#![no_main]

use mansard_ir::text;

libfuzzer_sys::fuzz_target!(|source: &str| {
    if let Ok(model) = text::parse("input", source) {
        let printed = text::print_model(&model);
        let again = text::parse("printed", &printed).unwrap();
        assert_eq!(printed, text::print_model(&again));
        let _either = mansard_ir::verify::verify_model(&model);
    }
});
