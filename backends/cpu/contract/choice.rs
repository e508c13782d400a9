//! The choice of a kernel: checked, named, and what may be tried instead. Every component of a kernel has the same choice, or
//! the formulas' for itself.

use super::{Component, Respect, components, shape};
use mansard_ir::plan::Kernel;
use mansard_ir::{Choice, Result, Target, bail};

/// The tiles of a component; the formulas' where nothing is chosen.
///
/// # Errors
/// Where the choice is none that the component has.
pub fn chosen(kernel: &Kernel, target: &Target, component: &Component, choice: Option<Choice>) -> Result<Choice> {
    let (dots, most) = (&component.dots, kernel.range.max);
    match choice {
        None => Ok(shape::formula(target, dots, most)),
        Some(choice) if shape::fits(target, dots, most, choice) => Ok(choice),
        Some(choice) => {
            bail!(Input, "expected tiles that {} has registers and caches for, found {choice:?}", target.name)
        }
    }
}

/// The register tiles of a kernel, for people: `8x1` tokens by strips, of each component that differs.
///
/// # Errors
/// As [`emit`].
pub fn tiles(kernel: &Kernel, target: &Target, choice: Option<Choice>) -> Result<String> {
    let mut tiles: Vec<String> = vec![];
    for component in components(&kernel.body)?.iter().filter(|c| !c.dots.is_empty()) {
        let choice = chosen(kernel, target, component, choice)?;
        let shapes = shape::shapes(&component.dots, kernel.range.max, choice);
        let tile = format!("{}x{}", shapes[0].tokens, shapes[0].strips);
        if !tiles.contains(&tile) {
            tiles.push(tile);
        }
    }
    Ok(tiles.join("/"))
}

/// What may be tried instead of `from` (`None`: the formulas' choice), differing in one respect: nothing for kernels whose
/// components have formulas of their own.
///
/// # Errors
/// As [`emit`].
pub fn alternatives(kernel: &Kernel, target: &Target, from: Option<Choice>, respect: Respect) -> Result<Vec<Choice>> {
    let mut components = components(&kernel.body)?;
    components.retain(|c| !c.dots.is_empty());
    let most = kernel.range.max;
    let choices = components.iter().map(|c| chosen(kernel, target, c, from)).collect::<Result<Vec<Choice>>>()?;
    let Some(first) = choices.first().filter(|first| choices.iter().all(|c| c == *first)) else { return Ok(vec![]) };
    let mut found = shape::alternatives(target, &components[0].dots, most, *first, respect);
    found.retain(|choice| components.iter().all(|c| shape::fits(target, &c.dots, most, *choice)));
    Ok(found)
}
