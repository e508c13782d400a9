//! Which device a command runs on, and which of an artifact's code a GPU takes.

use super::Facts;
use mansard_ir::artifact::{Cubin, PtxCode};
use mansard_ir::{Error, Kind, Result, bail};
use std::fmt;
use std::str::FromStr;

/// What `--device` says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Choice {
    /// The workers of this process.
    #[default]
    Cpu,
    /// The first GPU where the artifact has code for it, else the CPU.
    Auto,
    /// That GPU, or an error.
    Cuda(usize),
}

impl FromStr for Choice {
    type Err = Error;

    fn from_str(text: &str) -> Result<Choice> {
        match text {
            "cpu" => return Ok(Choice::Cpu),
            "auto" => return Ok(Choice::Auto),
            "cuda" => return Ok(Choice::Cuda(0)),
            _ => {}
        }
        match text.strip_prefix("cuda:").map(str::parse) {
            Some(Ok(index)) => Ok(Choice::Cuda(index)),
            _ => bail!(Usage, "expected cpu, auto, or a GPU as in cuda:0, found `{text}`"),
        }
    }
}

impl fmt::Display for Choice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Choice::Cpu => f.write_str("cpu"),
            Choice::Auto => f.write_str("auto"),
            Choice::Cuda(index) => write!(f, "cuda:{index}"),
        }
    }
}

/// Refuses the number of a GPU that is not there.
///
/// # Errors
/// Then.
pub fn pick(index: usize, count: usize) -> Result<()> {
    if index < count {
        return Ok(());
    }
    let found = match count {
        0 => bail!(Unsupported, "no GPU: the NVIDIA driver finds none"),
        1 => "only cuda:0".into(),
        _ => format!("cuda:0 to cuda:{}", count - 1),
    };
    bail!(Usage, "expected a GPU of this machine, which has {found}, found cuda:{index}")
}

/// The oldest compute capability that code is made for.
const LEAST: (u32, u32) = (8, 0);

/// The CUDA version whose drivers first take some version of PTX: `8.4` came with 12.4, `9.0` with 13.0.
///
/// # Errors
/// Where that is no version.
pub fn needed_driver(ptx: &str) -> Result<(u32, u32)> {
    let parsed = ptx.split_once('.').and_then(|(major, minor)| Some((major.parse::<u32>().ok()?, minor.parse().ok()?)));
    match parsed {
        Some((major @ 7..100, minor)) => Ok((major + 4, minor)),
        _ => bail!(Input, "expected a version of PTX of 7.0 and later, found `{ptx}`"),
    }
}

/// The code that a GPU runs best: what is made for it alone (`sm_90a`), else the newest for its kind and older ones.
///
/// # Errors
/// Where there is none, or the GPU or its driver is too old.
pub fn choose<'a>(codes: &'a [PtxCode], facts: &Facts) -> Result<&'a PtxCode> {
    let Facts { name, capability, driver, .. } = facts;
    let (major, minor) = *capability;
    if *capability < LEAST {
        bail!(Unsupported, "{name} is of compute capability {major}.{minor}, expected 8.0 (A100) or later");
    }
    if codes.is_empty() {
        let error = Error::new(Kind::Unsupported, "the artifact has no code for GPUs");
        let chip = if *capability == (9, 0) { "sm_90a" } else { "sm_80" };
        return Err(error.help(format!("compile the model with --target native,{chip}")));
    }
    let runs = codes.iter().filter(|code| suits(&code.chip, *capability));
    let Some(code) = runs.max_by_key(|code| (code.chip.ends_with('a'), chip_number(&code.chip))) else {
        let chips: Vec<&str> = codes.iter().map(|code| code.chip.as_str()).collect();
        bail!(
            Unsupported,
            "the artifact has code for {}, which {name} of compute capability {major}.{minor} does not run",
            chips.join(", ")
        );
    };
    let needed = needed_driver(&code.version)?;
    if *driver < needed {
        let message = format!(
            "the driver of {name} is of CUDA {}.{}, expected {}.{} or later for PTX {}",
            driver.0, driver.1, needed.0, needed.1, code.version
        );
        return Err(Error::new(Kind::Unsupported, message).help("install a newer NVIDIA driver"));
    }
    Ok(code)
}

/// The chip's machine code, where a GPU that takes its PTX can run that, too: it is of the same major version as the chip, and
/// the driver knows CUDA's of the assembler.
pub fn cubin<'a>(code: &'a PtxCode, facts: &Facts) -> Option<&'a Cubin> {
    let cubin = code.cubin.as_ref()?;
    let cuda = cubin.version.split('.').next()?.parse::<u32>().ok()?;
    let same = chip_number(&code.chip)? / 10 == facts.capability.0;
    (same && cuda <= facts.driver.0).then_some(cubin)
}

/// `sm_80` runs on everything from 8.0 on, `sm_90a` on 9.0 alone.
fn suits(chip: &str, (major, minor): (u32, u32)) -> bool {
    let own = 10 * major + minor;
    chip_number(chip).is_some_and(|number| if chip.ends_with('a') { number == own } else { number <= own })
}

fn chip_number(chip: &str) -> Option<u32> {
    chip.strip_prefix("sm_")?.trim_end_matches('a').parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn code(chip: &str) -> PtxCode {
        PtxCode {
            section: format!("code/{chip}"),
            chip: chip.into(),
            version: "9.0".into(),
            threads: 256,
            shared_bytes: vec![],
            cubin: None,
        }
    }

    fn gpu(capability: (u32, u32), driver: (u32, u32)) -> Facts {
        Facts { name: "a GPU".into(), capability, driver, ..Facts::default() }
    }

    #[test]
    fn a_gpu_takes_what_is_made_for_it() {
        let both = [code("sm_80"), code("sm_90a")];
        let chip = |capability| choose(&both, &gpu(capability, (13, 0))).unwrap().chip.as_str();
        assert_eq!([(8, 0), (8, 9), (9, 0), (10, 0)].map(chip), ["sm_80", "sm_80", "sm_90a", "sm_80"]);
        assert!(choose(&both[..1], &gpu((9, 0), (13, 2))).is_ok());
    }

    #[test]
    fn machine_code_is_for_chips_of_one_major_version() {
        let with = |version: &str| Some(Cubin { section: "cubin/sm_80".into(), version: version.into() });
        let fits = |code: &PtxCode, capability, driver| cubin(code, &gpu(capability, driver)).is_some();
        let old = PtxCode { cubin: with("13.2.1"), ..code("sm_80") };
        assert!(fits(&old, (8, 0), (13, 0)) && fits(&old, (8, 9), (14, 1)));
        assert!(!fits(&old, (9, 0), (13, 0)) && !fits(&old, (10, 0), (13, 0)));
        assert!(!fits(&PtxCode { cubin: with("14.0.1"), ..code("sm_80") }, (8, 0), (13, 2)));
        assert!(fits(&PtxCode { cubin: with("13.0.88"), ..code("sm_90a") }, (9, 0), (13, 0)));
        assert!(!fits(&code("sm_90a"), (9, 0), (13, 0)));
    }

    #[test]
    fn what_cannot_run_is_refused_with_the_reason() {
        let refused = |codes: &[PtxCode], capability, driver| {
            let error = choose(codes, &gpu(capability, driver)).unwrap_err();
            assert_eq!(error.exit_code(), 4);
            error.message().to_owned()
        };
        let both = [code("sm_80"), code("sm_90a")];
        let old = "a GPU is of compute capability 7.5, expected 8.0 (A100) or later";
        assert_eq!(refused(&both, (7, 5), (13, 0)), old);
        let driver = "the driver of a GPU is of CUDA 12.8, expected 13.0 or later for PTX 9.0";
        assert_eq!(refused(&both, (9, 0), (12, 8)), driver);
        assert_eq!(refused(&[], (9, 0), (13, 0)), "the artifact has no code for GPUs");
        let other = "the artifact has code for sm_90a, which a GPU of compute capability 8.0 does not run";
        assert_eq!(refused(&both[1..], (8, 0), (13, 0)), other);
        assert_eq!(needed_driver("8.4").unwrap(), (12, 4));
        assert!(needed_driver("6.5").is_err() && needed_driver("x").is_err());
    }

    #[test]
    fn devices_have_names() {
        let named = |text: &str| text.parse::<Choice>().unwrap();
        assert_eq!(
            ["cpu", "auto", "cuda", "cuda:3"].map(named),
            [Choice::Cpu, Choice::Auto, Choice::Cuda(0), Choice::Cuda(3)]
        );
        assert_eq!(named("cuda:3").to_string(), "cuda:3");
        assert!(pick(1, 2).is_ok());
        let far = pick(2, 2).unwrap_err();
        assert_eq!(
            (far.exit_code(), far.message()),
            (2, "expected a GPU of this machine, which has cuda:0 to cuda:1, found cuda:2")
        );
        assert_eq!(pick(0, 0).unwrap_err().exit_code(), 4);
        let error = "gpu".parse::<Choice>().unwrap_err();
        assert!(error.exit_code() == 2 && error.message().contains("cuda:0"), "{error}");
    }
}
