//! LLVM IR of a GPU kernel -> host code that calls the emulated machine.
//!
//! Every intrinsic of NVVM gets a body that packs its arguments into slots of 64 bits; before every load and store its address
//! and size are reported. Address spaces need nothing: on the host they are all the same.

use super::machine::{self, Op, SLOTS, Schedule};
use crate::cuda::{PREAMBLE, SHARED_LIMIT, Source};
use crate::mlir::Mlir;
use inkwell::attributes::{Attribute, AttributeLoc};
use inkwell::builder::Builder;
use inkwell::context::Context;
use inkwell::execution_engine::ExecutionEngine;
use inkwell::module::{Linkage, Module};
use inkwell::passes::PassBuilderOptions;
use inkwell::targets::{CodeModel, InitializationConfig, RelocMode, Target, TargetMachine};
use inkwell::values::{BasicMetadataValueEnum, BasicValue, FunctionValue, InstructionOpcode, InstructionValue};
use inkwell::{AddressSpace, IntPredicate, OptimizationLevel};

/// Where the code of a kernel begins: its arguments, one a slot.
pub(super) type Entry = unsafe extern "C" fn(*const u64);

/// A kernel on the host.
pub struct Code {
    entry: Entry,
    ops: Vec<Op>,
    shared_bytes: usize,
    // Kept for the code that it owns.
    _engine: ExecutionEngine<'static>,
}

impl Code {
    /// The code of a kernel. It stays in memory for as long as the process.
    ///
    /// # Panics
    /// Where the kernel uses an intrinsic that is not emulated.
    pub fn new(source: &Source) -> Code {
        let context: &'static Context = Box::leak(Box::new(Context::create()));
        let shared = "llvm.mlir.addressof @shared : !llvm.ptr<3>";
        assert!(source.text.contains(shared), "no place of shared memory");
        let text = source.text.replace(shared, "llvm.call @emulator.shared() : () -> !llvm.ptr<3>");
        let (functions, text) = without_assembly(&text);
        let text = format!("{PREAMBLE}llvm.func @emulator.shared() -> !llvm.ptr<3>\n{functions}{text}");
        let mlir = Mlir::new().unwrap_or_else(|e| panic!("{e}"));
        let module = mlir.lower_text("emulated", &text, context).unwrap_or_else(|e| panic!("{e}"));
        let machine = host();
        module.set_triple(&machine.get_triple());
        module.set_data_layout(&machine.get_target_data().get_data_layout());
        let retarget =
            Retarget { context, module: &module, builder: context.create_builder(), ops: Default::default() };
        let (call, ops) = retarget.run(&machine);
        module.verify().unwrap_or_else(|e| panic!("{e}"));
        let passes = "always-inline,function(sroa,early-cse,instcombine<no-verify-fixpoint>,simplifycfg)";
        module.run_passes(passes, &machine, PassBuilderOptions::create()).unwrap_or_else(|e| panic!("{e}"));
        let engine = module.create_jit_execution_engine(OptimizationLevel::None).expect("an engine");
        engine.add_global_mapping(&call, machine::call as *const () as usize);
        let address = engine.get_function_address("emulator.entry").expect("the kernel's entry");
        // SAFETY: the address is that of a function made below, of this type.
        let entry = unsafe { std::mem::transmute::<usize, Entry>(address) };
        Code { entry, ops, shared_bytes: source.shared_bytes, _engine: engine }
    }

    pub(super) fn ops(&self) -> &[Op] {
        &self.ops
    }

    pub(super) fn entry(&self) -> Entry {
        self.entry
    }

    /// Runs the kernel with a grid of `blocks` blocks.
    ///
    /// # Errors
    /// What is wrong with how threads work together.
    ///
    /// # Safety
    /// The arguments must be those of the kernel.
    pub unsafe fn launch(&self, args: &[u64], blocks: u32, turns: Schedule) -> Result<(), String> {
        assert!(self.shared_bytes <= SHARED_LIMIT, "emit refuses more");
        // SAFETY: the caller's.
        unsafe { machine::launch(self, args, (blocks, self.shared_bytes), turns) }
    }
}

/// Slots of results: of a product of a warpgroup a thread has 128 sums at most, and a word beside them.
const RESULTS: usize = 65;

/// The text with calls of functions in place of inline assembly, and what declares these: they are named after the instruction
/// and what it waits for, and numbered.
fn without_assembly(text: &str) -> (String, String) {
    let (mut functions, mut out) = (String::new(), String::new());
    for (number, line) in text.lines().enumerate() {
        let Some((result, asm)) = line.split_once("llvm.inline_asm ") else {
            out += &format!("{line}\n");
            continue;
        };
        let parts: Vec<&str> = asm.split('"').collect();
        let [_, instruction, _, _, call] = parts.as_slice() else { panic!("odd inline assembly: {line}") };
        let is_name = |word: &&str| ["wgmma.", "tensormap."].iter().any(|name| word.starts_with(name));
        let word = instruction.split([' ', ';']).find(is_name).unwrap_or_else(|| panic!("not emulated: {line}"));
        let count = instruction.split([' ', ';']).nth(1).filter(|count| count.parse::<usize>().is_ok());
        let name = format!("emulator.{}.{}.{number}", word.replace("::", "."), count.unwrap_or("0"));
        let (values, types) = call.trim().split_once(" : ").unwrap_or_default();
        let (from, to) = types.split_once(" -> ").unwrap_or_default();
        let declared = if to == "()" { String::new() } else { format!(" -> {to}") };
        functions += &format!("llvm.func @{name}{from}{declared}\n");
        out += &format!("{result}llvm.call @{name}({values}) : {types}\n");
    }
    (functions, out)
}

fn host() -> TargetMachine {
    Target::initialize_native(&InitializationConfig::default()).expect("a native target");
    let triple = TargetMachine::get_default_triple();
    let target = Target::from_triple(&triple).expect("the host's target");
    let (cpu, features) = (TargetMachine::get_host_cpu_name(), TargetMachine::get_host_cpu_features());
    let (level, reloc, code) = (OptimizationLevel::Less, RelocMode::Default, CodeModel::JITDefault);
    let (cpu, features) = (cpu.to_string(), features.to_string());
    target.create_target_machine(&triple, &cpu, &features, level, reloc, code).expect("the host's machine")
}

struct Retarget<'a> {
    context: &'static Context,
    module: &'a Module<'static>,
    builder: Builder<'static>,
    ops: std::cell::RefCell<Vec<Op>>,
}

impl Retarget<'_> {
    /// Gives the declaration of what all ops call, and the ops by number.
    fn run(self, machine: &TargetMachine) -> (FunctionValue<'static>, Vec<Op>) {
        let (i32, pointer) = (self.context.i32_type(), self.context.ptr_type(AddressSpace::default()));
        let ty = self.context.void_type().fn_type(&[i32.into(), pointer.into(), pointer.into()], false);
        let call = self.module.add_function("emulator.call", ty, None);
        let functions: Vec<FunctionValue<'static>> = self.module.get_functions().collect();
        let mut kernels = vec![];
        for function in functions {
            let name = function.get_name().to_string_lossy().into_owned();
            if function.count_basic_blocks() > 0 {
                kernels.push(function);
            } else if function != call && (name.starts_with("llvm.nvvm.") || name.starts_with("emulator.")) {
                let arguments = function.count_params() as usize;
                let op = machine::op(&name, arguments).unwrap_or_else(|| panic!("`{name}` is not emulated"));
                let body = self.body(call, &function, op);
                function.replace_all_uses_with(body);
                // SAFETY: nothing uses the declaration any more.
                unsafe { function.delete() };
            }
        }
        let [kernel] = kernels.as_slice() else { panic!("expected one kernel, found {}", kernels.len()) };
        self.watch(call, *kernel, machine);
        self.enter(*kernel);
        (call, self.ops.take())
    }

    fn id(&self, op: Op) -> BasicMetadataValueEnum<'static> {
        let mut ops = self.ops.borrow_mut();
        ops.push(op);
        self.context.i32_type().const_int(ops.len() as u64 - 1, false).into()
    }

    /// A function in place of an intrinsic.
    fn body(&self, call: FunctionValue<'static>, of: &FunctionValue<'static>, op: Op) -> FunctionValue<'static> {
        let (b, i64) = (&self.builder, self.context.i64_type());
        let body = self.module.add_function(&format!("emulated.{op:?}"), of.get_type(), Some(Linkage::Internal));
        b.position_at_end(self.context.append_basic_block(body, ""));
        let [args, rets] = [SLOTS.max(of.count_params() as usize), RESULTS]
            .map(|slots| b.build_array_alloca(i64, i64.const_int(slots as u64, false), "").expect("slots"));
        for (i, parameter) in body.get_param_iter().enumerate() {
            // SAFETY: there are more slots than any intrinsic has arguments.
            let slot = unsafe { b.build_gep(i64, args, &[i64.const_int(i as u64, false)], "") }.expect("a slot");
            b.build_store(slot, parameter).expect("a store");
        }
        b.build_call(call, &[self.id(op), args.into(), rets.into()], "").expect("a call");
        match of.get_type().get_return_type() {
            Some(ty) => {
                let value = b.build_load(ty, rets, "").expect("a load");
                b.build_return(Some(&value as &dyn BasicValue<'_>)).expect("a return");
            }
            None => {
                b.build_return(None).expect("a return");
            }
        }
        body
    }

    /// Reports every load and store of the kernel that may be one of shared memory.
    fn watch(&self, call: FunctionValue<'static>, kernel: FunctionValue<'static>, machine: &TargetMachine) {
        let data = machine.get_target_data();
        let (b, i64, generic) = (&self.builder, self.context.i64_type(), AddressSpace::default());
        let pointer = self.context.ptr_type(generic);
        let watches = [Op::Load, Op::Store].map(|op| self.watcher(call, op));
        let blocks = kernel.get_basic_blocks();
        let all: Vec<InstructionValue<'static>> = blocks.iter().flat_map(|block| block.get_instructions()).collect();
        b.position_before(all.first().expect("a kernel"));
        let shared = self.module.get_function("emulated.Shared").expect("shared memory");
        let base = b.build_call(shared, &[], "").expect("a call").try_as_basic_value().unwrap_basic();
        let base = b.build_address_space_cast(base.into_pointer_value(), pointer, "").expect("a cast");
        for instruction in all {
            let operand = |i: u32| instruction.get_operand(i).and_then(|operand| operand.value());
            let (at, size, watch) = match instruction.get_opcode() {
                InstructionOpcode::Load => (operand(0), data.get_store_size(&instruction.get_type()), watches[0]),
                InstructionOpcode::Store => {
                    let value = operand(0).expect("a stored value");
                    (operand(1), data.get_store_size(&value.get_type()), watches[1])
                }
                _ => continue,
            };
            b.position_before(&instruction);
            let at = at.expect("an address").into_pointer_value();
            let at = b.build_address_space_cast(at, pointer, "").expect("a cast");
            let args = [at.into(), i64.const_int(size, false).into(), base.into()];
            b.build_call(watch, &args, "").expect("a call");
        }
    }

    /// A function of an address, a size and where shared memory begins, which calls the machine where both meet.
    fn watcher(&self, call: FunctionValue<'static>, op: Op) -> FunctionValue<'static> {
        let (b, i64) = (&self.builder, self.context.i64_type());
        let pointer = self.context.ptr_type(AddressSpace::default());
        let ty = self.context.void_type().fn_type(&[pointer.into(), i64.into(), pointer.into()], false);
        let body = self.module.add_function(&format!("watch.{op:?}"), ty, Some(Linkage::Internal));
        let inline = Attribute::get_named_enum_kind_id("alwaysinline");
        body.add_attribute(AttributeLoc::Function, self.context.create_enum_attribute(inline, 0));
        let [entry, report, end] = ["", "", ""].map(|name| self.context.append_basic_block(body, name));
        b.position_at_end(entry);
        let slots = b.build_array_alloca(i64, i64.const_int(2, false), "").expect("slots");
        // SAFETY: there are two slots.
        let second = unsafe { b.build_gep(i64, slots, &[i64.const_int(1, false)], "") }.expect("a slot");
        let parameter = |i: u32| body.get_nth_param(i).expect("a parameter");
        let [at, base] =
            [0, 2].map(|i| b.build_ptr_to_int(parameter(i).into_pointer_value(), i64, "").expect("a cast"));
        let offset = b.build_int_sub(at, base, "").expect("a difference");
        let limit = i64.const_int(SHARED_LIMIT as u64, false);
        let inside = b.build_int_compare(IntPredicate::ULT, offset, limit, "").expect("a comparison");
        b.build_conditional_branch(inside, report, end).expect("a branch");
        b.position_at_end(report);
        b.build_store(slots, at).expect("a store");
        b.build_store(second, parameter(1)).expect("a store");
        b.build_call(call, &[self.id(op), slots.into(), slots.into()], "").expect("a call");
        b.build_unconditional_branch(end).expect("a branch");
        b.position_at_end(end);
        b.build_return(None).expect("a return");
        body
    }

    /// A function that takes the kernel's arguments from slots.
    fn enter(&self, kernel: FunctionValue<'static>) {
        let (b, i64) = (&self.builder, self.context.i64_type());
        let pointer = self.context.ptr_type(AddressSpace::default());
        kernel.set_call_conventions(0);
        let ty = self.context.void_type().fn_type(&[pointer.into()], false);
        let entry = self.module.add_function("emulator.entry", ty, None);
        b.position_at_end(self.context.append_basic_block(entry, ""));
        let slots = entry.get_first_param().expect("a parameter").into_pointer_value();
        let mut args: Vec<BasicMetadataValueEnum<'static>> = vec![];
        for (i, parameter) in kernel.get_param_iter().enumerate() {
            // SAFETY: the caller gives a slot for every argument.
            let slot = unsafe { b.build_gep(i64, slots, &[i64.const_int(i as u64, false)], "") }.expect("a slot");
            args.push(b.build_load(parameter.get_type(), slot, "").expect("a load").into());
        }
        b.build_call(kernel, &args, "").expect("a call");
        b.build_return(None).expect("a return");
    }
}
