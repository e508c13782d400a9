//! `mansard-gpu-check FOLDER`: the whole check on cuda:0; its report is JSON on standard output.
#![forbid(unsafe_code)]

use mansard_ir::Result;
use mansard_runtime::device::cuda;
use std::path::PathBuf;
use std::process::ExitCode;

fn main() -> ExitCode {
    let Some(folder) = std::env::args_os().nth(1).map(PathBuf::from) else {
        eprintln!("error: expected the folder that `pack.py` has filled");
        return ExitCode::from(2);
    };
    match check(&folder) {
        Ok(is_right) => ExitCode::from(u8::from(!is_right)),
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(error.exit_code())
        }
    }
}

fn check(folder: &std::path::Path) -> Result<bool> {
    let driver = cuda::open(0)?;
    let report = mansard_gpu_check::run(folder, &mut |_| Ok(driver.clone()), &mut || Ok(driver.clone()))?;
    println!("{:#}", report.json);
    Ok(report.is_right)
}
