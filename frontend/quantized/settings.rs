//! `quantization_config` -> [`Settings`]. What would change values and is not done here is refused.

use super::Settings;
use crate::config::Config;
use mansard_ir::{Result, bail};

/// Reads and checks the settings of `method`.
///
/// # Errors
/// Where one has no meaning, or one that is not supported.
pub fn read(method: &str, section: &Config) -> Result<Settings> {
    let group = match section.get("group_size").map(|v| (v.as_i64(), v.clone())) {
        None | Some((Some(-1), _)) => None,
        Some((Some(n), _)) if n > 0 => Some(n as usize),
        Some((_, found)) => bail!(Input, "`group_size`: expected a positive number or -1, found {found}"),
    };
    let bits = section.opt_size("bits")?.unwrap_or(4);
    let mut settings = Settings { bits, group, symmetric: true, zero_offset: 0, block: None, excluded: vec![] };
    match method {
        "gptq" => {
            refuse(section, "dynamic")?; // other settings for some modules
            section.only("pack_dtype", "int32")?;
            settings.symmetric = section.flag_or("sym", true)?;
            settings.zero_offset = match section.text("checkpoint_format")?.unwrap_or("gptq") {
                "gptq" => 1, // stored less one, by AutoGPTQ
                "gptq_v2" => 0,
                other => bail!(Unsupported, "`checkpoint_format` is {other}; supported: gptq, gptq_v2"),
            };
        }
        "awq" => match section.text("version")?.unwrap_or("gemm").to_lowercase().as_str() {
            "gemm" => {
                section.only("zero_point", true)?;
                settings.symmetric = false;
            }
            other => bail!(Unsupported, "`version` is {other}; supported: gemm"),
        },
        "fp8" => {
            section.only("activation_scheme", "dynamic")?;
            settings.block = match section.list("weight_block_size")? {
                None => None,
                Some(list) => match list.iter().map(serde_json::Value::as_u64).collect::<Vec<_>>()[..] {
                    [Some(rows @ 1..=65536), Some(columns @ 1..=65536)] => Some((rows as usize, columns as usize)),
                    _ => bail!(Input, "`weight_block_size`: expected two positive numbers, found {list:?}"),
                },
            };
        }
        _ => {
            let format = section.text("format")?.unwrap_or("pack-quantized");
            const KNOWN: [&str; 7] = [
                "pack-quantized",
                "int-quantized",
                "float-quantized",
                "naive-quantized",
                "nvfp4-pack-quantized",
                "mxfp4-pack-quantized",
                "mixed-precision",
            ];
            if !KNOWN.contains(&format) {
                bail!(Unsupported, "`format` is {format}; supported: {}", KNOWN.join(", "));
            }
            section.only("quantization_status", "compressed")?;
            refuse(section, "kv_cache_scheme")?;
            refuse(section, "transform_config")?;
            activations(section)?;
            if let Some(sparse) = section.section("sparsity_config")? {
                sparse.only("format", "dense")?;
            }
        }
    }
    for key in ["modules_to_not_convert", "ignored_layers", "ignore"] {
        let names = section.list(key)?.unwrap_or_default().iter().filter_map(serde_json::Value::as_str);
        settings.excluded.extend(names.map(str::to_owned));
    }
    if !["gptq", "awq"].contains(&method) || settings.bits == 4 || method == "gptq" && settings.bits == 8 {
        return Ok(settings);
    }
    bail!(Unsupported, "`bits` is {}; supported: {}", settings.bits, if method == "gptq" { "4, 8" } else { "4" })
}

/// Refuses a setting that asks for anything.
fn refuse(section: &Config, key: &str) -> Result<()> {
    match section.get(key) {
        Some(found) if found.as_object().is_none_or(|map| !map.is_empty()) => bail!(Unsupported, "`{key}` is {found}"),
        _ => Ok(()),
    }
}

/// Refuses quantized outputs, and inputs whose scales were fixed beforehand. With scales of their own for each token they get
/// those of this compiler's int8, or none.
fn activations(section: &Config) -> Result<()> {
    let Some(groups) = section.section("config_groups")? else { return Ok(()) };
    for name in groups.settings().keys() {
        let Some(group) = groups.section(name)? else { continue };
        refuse(&group, "output_activations")?;
        if let Some(inputs) = group.section("input_activations")? {
            match inputs.get("dynamic") {
                Some(serde_json::Value::Bool(true)) => {}
                found => bail!(
                    Unsupported,
                    "`config_groups.{name}.input_activations.dynamic` is {}; supported: true",
                    found.unwrap_or(&serde_json::Value::Bool(false))
                ),
            }
        }
    }
    Ok(())
}
