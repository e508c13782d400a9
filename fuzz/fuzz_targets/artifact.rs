//! Any bytes as an artifact: an error, or one whose hashes hold.
#![no_main]

use mansard_runtime::{Artifact, OpenOptions};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.mansard");
    std::fs::write(&path, bytes).unwrap();
    let _either = Artifact::open(&path, &OpenOptions { verify_weights: true });
});
