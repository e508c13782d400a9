//! `mansard.h` is what cbindgen makes of the sources; `UPDATE_DOCS=1` rewrites it.

use std::path::Path;

#[test]
fn the_header_is_current() {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let config = cbindgen::Config::from_file(here.join("cbindgen.toml")).unwrap();
    let mut generated = vec![];
    cbindgen::Builder::new().with_crate(here).with_config(config).generate().unwrap().write(&mut generated);
    let path = here.join("mansard.h");
    if std::env::var_os("UPDATE_DOCS").is_some() {
        std::fs::write(&path, &generated).unwrap();
    }
    let stored = std::fs::read(&path).unwrap_or_default();
    assert!(stored == generated, "mansard.h is out of date: run `UPDATE_DOCS=1 cargo test -p mansard-c --test header`");
}
