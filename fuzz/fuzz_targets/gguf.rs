//! Any bytes as a GGUF file: a model whose weights can be read, or an error.
#![no_main]

use mansard_frontend::{Options, open};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    std::fs::write(&path, bytes).unwrap();
    if let Ok(model) = open(&path, &Options::default()) {
        mansard_ir::verify::verify_model(&model).unwrap();
        for (_, weight) in model.weights.iter() {
            weight.read_all().unwrap();
        }
    }
});
