//! Nothing but a build script: see `build.rs`.
