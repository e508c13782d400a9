//! MLIR text -> LLVM IR, in one process: the one file that knows the raw edges of melior.
//!
//! ```text
//!  "func.func @k(...) {...}" --parse, verify--> MLIR --PIPELINE--> LLVM dialect --translate--> llvm::Module
//! ```
//!
//! Invariant: whatever the text, the answer is a module that LLVM's verifier accepts or an [`Error`] that quotes the line
//! of text that MLIR objected to. Nothing is printed. A context belongs to one thread; make one for each.
#![allow(unsafe_code)]

use inkwell::module::Module as LlvmModule;
use mansard_ir::{Error, Kind, Place, Result, bail};
use melior::diagnostic::{Diagnostic, DiagnosticSeverity};
use melior::ir::Module;
use melior::ir::operation::OperationLike;
use melior::pass::PassManager;
use melior::{Context, dialect::DialectRegistry, utility};
use std::sync::{Arc, Mutex, PoisonError};

/// What lowers `func`, `scf`, `arith`, `math` and one-dimensional `vector` operations to the LLVM dialect. Nothing is
/// simplified here: LLVM has to do it anyway, and does it faster.
pub const PIPELINE: &str = "builtin.module(convert-scf-to-cf,convert-to-llvm,reconcile-unrealized-casts)";

/// An MLIR context with every dialect loaded.
pub struct Mlir {
    context: Context,
    /// What the handler was told since the last call.
    diagnostics: Arc<Mutex<Vec<String>>>,
}

impl Mlir {
    /// A context; takes some milliseconds.
    ///
    /// # Errors
    /// Where this MLIR does not know the passes of [`PIPELINE`].
    pub fn new() -> Result<Mlir> {
        utility::register_all_passes(); // once per process, melior sees to that
        let registry = DialectRegistry::new();
        utility::register_all_dialects(&registry);
        let context = Context::new_with_registry(&registry, false);
        context.load_all_available_dialects();
        utility::register_all_llvm_translations(&context);
        let diagnostics = Arc::new(Mutex::new(vec![]));
        let heard = Arc::clone(&diagnostics);
        context.attach_diagnostic_handler(move |d| {
            if matches!(d.severity(), DiagnosticSeverity::Error) {
                heard.lock().unwrap_or_else(PoisonError::into_inner).push(located(&d));
            }
            true
        });
        let mlir = Mlir { context, diagnostics };
        mlir.pipeline()?;
        Ok(mlir)
    }

    /// Lowers a module given as text to LLVM IR. `name` is only for errors.
    ///
    /// # Errors
    /// Where the text does not parse, verify, lower or translate; with MLIR's words and the line they are about.
    pub fn lower_text<'l>(
        &self,
        name: &str,
        text: &str,
        llvm: &'l inkwell::context::Context,
    ) -> Result<LlvmModule<'l>> {
        self.take_diagnostics();
        if text.contains('\0') {
            bail!(Internal, "MLIR text of `{name}` holds a zero byte");
        }
        let fail = |what: &str| {
            let said = self.take_diagnostics();
            Error::new(Kind::Internal, explain(&said, text)).at(format!("MLIR of `{name}`, {what}"))
        };
        let mut module = Module::parse(&self.context, text).ok_or_else(|| fail("parsing"))?;
        if !module.as_operation().verify() {
            return Err(fail("verifying"));
        }
        self.pipeline()?.run(&mut module).map_err(|_| fail("lowering"))?;
        let operation = module.as_operation();
        // SAFETY: both handles are live for the whole call; the translation makes a new module in `llvm` or gives null.
        let raw = unsafe { mlir_sys::mlirTranslateModuleToLLVMIR(operation.to_raw(), llvm.raw() as *mut _) };
        if raw.is_null() {
            return Err(fail("translating"));
        }
        // SAFETY: `raw` is a module of `llvm` that nothing else owns.
        let module = unsafe { LlvmModule::new(raw as *mut _) };
        module.set_name(name);
        module.verify().map_err(|e| Error::new(Kind::Internal, e.to_string())).at(|| format!("LLVM IR of `{name}`"))?;
        Ok(module)
    }

    fn pipeline(&self) -> Result<PassManager<'_>> {
        let manager = PassManager::new(&self.context);
        utility::parse_pass_pipeline(manager.as_operation_pass_manager(), PIPELINE)
            .map_err(|e| Error::new(Kind::Internal, format!("MLIR pass pipeline: {e}")))?;
        Ok(manager)
    }

    fn take_diagnostics(&self) -> Vec<String> {
        std::mem::take(&mut self.diagnostics.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// `line: message`, or the message alone where MLIR gives no place in the text.
fn located(diagnostic: &Diagnostic<'_>) -> String {
    // Locations print as loc("-":12:5).
    let location = diagnostic.location().to_string();
    let line = location.split("\"-\":").nth(1).and_then(|rest| rest.split(':').next()).unwrap_or("");
    let mut message = format!("{line}: {diagnostic}");
    for note in (0..diagnostic.note_count()).filter_map(|i| diagnostic.note(i).ok()) {
        message.push_str(&format!("; {note}"));
    }
    message
}

/// The first diagnostic with the line of text it is about; the rest follow it as MLIR says them.
fn explain(said: &[String], text: &str) -> String {
    let Some(first) = said.first() else { return "MLIR refused without saying why".into() };
    let (line, message) = first.split_once(": ").unwrap_or(("", first));
    match line.parse::<usize>().ok().and_then(|n| Some((n, text.lines().nth(n.checked_sub(1)?)?))) {
        Some((n, source)) => format!("line {n}: {message}: `{}`", source.trim()),
        None => message.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lower(text: &str) -> Result<String> {
        let llvm = inkwell::context::Context::create();
        let module = Mlir::new()?.lower_text("m", text, &llvm)?;
        Ok(module.print_to_string().to_string())
    }

    #[test]
    fn text_becomes_llvm_ir() {
        let ir = lower("func.func @f(%0: i64) -> i64 {\n %1 = arith.addi %0, %0 : i64\n return %1 : i64\n}").unwrap();
        assert!(ir.contains("define i64 @f(i64 %0)") && ir.contains("add i64 %0, %0"), "{ir}");
    }

    #[test]
    fn errors_quote_the_line() {
        let unparsable = lower("func.func @f() {\n %1 = arith.addi %0 : i64\n return\n}").unwrap_err().to_string();
        assert!(unparsable.contains("parsing: line 2: ") && unparsable.contains("`%1 = arith.addi"), "{unparsable}");
        let ill_typed = "func.func @f(%0: f32) {\n %1 = arith.addi %0, %0 : f32\n return\n}";
        let ill_typed = lower(ill_typed).unwrap_err().to_string();
        assert!(ill_typed.contains("line 2"), "{ill_typed}");
        let unknown =
            "func.func @f(%0: i32) {\n llvm.call_intrinsic \"llvm.x86.nothing\"(%0) : (i32) -> ()\n return\n}";
        let unknown = lower(unknown).unwrap_err().to_string();
        assert!(unknown.contains("translating: line 2") && unknown.contains("llvm.x86.nothing"), "{unknown}");
        assert!(lower("\0").is_err());
    }
}
