//! NVIDIA's driver, opened at run time: nothing of CUDA is needed to build, or to run on a CPU.
//!
//! Thin by intent: every method of [`Driver`] is a call or two of the CUDA Driver API, which its reference describes. Calls
//! that an old driver might not have come after [`super::choose`] has seen its version.
#![allow(unsafe_code)]

use super::select::pick;
use super::{Address, Driver, Entry, Facts, Function, Recorded, Shape};
use cudarc::driver::sys::{self, CUdevice_attribute as Attribute, CUresult};
use mansard_ir::{Error, Kind, Place, Result, bail};
use std::ffi::{CStr, CString, c_int, c_void};
use std::ptr::null_mut;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Shared memory that a block has without asking.
const SHARED_UNASKED: usize = 48 << 10;

/// Bytes of what an assembler may say.
const LOG: usize = 16 << 10;

/// One GPU's context, with one queue.
#[derive(Debug)]
struct Cuda {
    facts: Facts,
    device: sys::CUdevice,
    context: sys::CUcontext,
    stream: sys::CUstream,
    made: Mutex<Made>,
}

/// What has been made in the context.
#[derive(Debug, Default)]
struct Made {
    modules: Vec<sys::CUmodule>,
    functions: Vec<sys::CUfunction>,
    graphs: Vec<sys::CUgraphExec>,
    marks: Vec<sys::CUevent>,
}

// SAFETY: the driver's handles belong to the context, which any thread may make its current one, as every method does.
unsafe impl Send for Cuda {}
// SAFETY: the driver's calls are safe to make from several threads; lists of handles are behind a lock.
unsafe impl Sync for Cuda {}

/// The GPUs of this machine.
///
/// # Errors
/// Where there is no driver, or it refuses.
pub fn devices() -> Result<Vec<Facts>> {
    let driver = driver()?;
    (0..count()?).map(|index| facts(index, driver).map(|(facts, _)| facts)).collect()
}

/// The GPU of that number.
///
/// # Errors
/// Where there is no driver or no such GPU, or the driver refuses.
pub fn open(index: usize) -> Result<Arc<dyn Driver>> {
    let driver = driver()?;
    pick(index, count()?)?;
    let (facts, device) = facts(index, driver)?;
    let place = || format!("cuda:{index}");
    let mut context = null_mut();
    // SAFETY: the device is one of the driver's; the context is written.
    let retained = unsafe { sys::cuDevicePrimaryCtxRetain(&mut context, device) };
    if retained == CUresult::CUDA_ERROR_DEVICE_UNAVAILABLE {
        let error = Error::new(Kind::Io, "another process has the GPU for itself (its compute mode is exclusive)");
        return Err(error.at(place()));
    }
    check("cuDevicePrimaryCtxRetain", retained).at(place)?;
    // From here on dropped as a whole.
    let mut cuda = Cuda { facts, device, context, stream: null_mut(), made: Mutex::default() };
    cuda.enter()?;
    let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
    // SAFETY: the context is current; the stream is written.
    check("cuStreamCreate", unsafe { sys::cuStreamCreate(&mut cuda.stream, flags) }).at(place)?;
    Ok(Arc::new(cuda))
}

/// Opens the driver's library; gives the CUDA version it knows.
fn driver() -> Result<(u32, u32)> {
    // SAFETY: loads the driver's library, whose initializers are trusted as it is.
    if !unsafe { sys::is_culib_present() } {
        let error = Error::new(Kind::Unsupported, "no GPU: there is no NVIDIA driver (libcuda.so) on this machine");
        return Err(error.help("use --device cpu, or install the driver"));
    }
    // SAFETY: takes no pointer.
    let started = unsafe { sys::cuInit(0) };
    if started == CUresult::CUDA_ERROR_NO_DEVICE {
        bail!(Unsupported, "no GPU: the NVIDIA driver finds none");
    }
    check("cuInit", started)?;
    let mut version = 0;
    // SAFETY: writes the version.
    check("cuDriverGetVersion", unsafe { sys::cuDriverGetVersion(&mut version) })?;
    Ok((version as u32 / 1000, version as u32 % 1000 / 10))
}

fn count() -> Result<usize> {
    let mut count = 0;
    // SAFETY: writes the count.
    check("cuDeviceGetCount", unsafe { sys::cuDeviceGetCount(&mut count) })?;
    Ok(count.max(0) as usize)
}

fn facts(index: usize, driver: (u32, u32)) -> Result<(Facts, sys::CUdevice)> {
    let mut device = 0;
    // SAFETY: writes the device.
    check("cuDeviceGet", unsafe { sys::cuDeviceGet(&mut device, index as c_int) })?;
    let mut name = [0u8; 256];
    // SAFETY: writes a text of at most so many bytes, its zero included.
    let named = unsafe { sys::cuDeviceGetName(name.as_mut_ptr().cast(), name.len() as c_int - 1, device) };
    check("cuDeviceGetName", named)?;
    let name = CStr::from_bytes_until_nul(&name).map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let mut memory = 0;
    // SAFETY: writes the number of bytes.
    check("cuDeviceTotalMem", unsafe { sys::cuDeviceTotalMem_v2(&mut memory, device) })?;
    let attribute = |attribute: Attribute| {
        let mut value = 0;
        // SAFETY: writes the value.
        check("cuDeviceGetAttribute", unsafe { sys::cuDeviceGetAttribute(&mut value, attribute, device) })?;
        Ok(value.max(0) as usize)
    };
    let major = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)? as u32;
    let minor = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)? as u32;
    let processors = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
    let shared_bytes = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;
    Ok((Facts { index, name, capability: (major, minor), driver, processors, shared_bytes, memory }, device))
}

/// What a call came to.
fn check(call: &str, result: CUresult) -> Result<()> {
    let kind = match result {
        CUresult::CUDA_SUCCESS => return Ok(()),
        // What only wrong launches or kernels bring about.
        CUresult::CUDA_ERROR_INVALID_VALUE
        | CUresult::CUDA_ERROR_INVALID_HANDLE
        | CUresult::CUDA_ERROR_NOT_FOUND
        | CUresult::CUDA_ERROR_ILLEGAL_ADDRESS
        | CUresult::CUDA_ERROR_ILLEGAL_INSTRUCTION
        | CUresult::CUDA_ERROR_MISALIGNED_ADDRESS
        | CUresult::CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES
        | CUresult::CUDA_ERROR_LAUNCH_FAILED => Kind::Internal,
        _ => Kind::Io,
    };
    let mut text = std::ptr::null();
    // SAFETY: writes the address of a constant text, or null for a number the driver does not know.
    let known = unsafe { sys::cuGetErrorString(result, &mut text) } == CUresult::CUDA_SUCCESS && !text.is_null();
    // SAFETY: a constant of the driver, ended by a zero.
    let said = if known { unsafe { CStr::from_ptr(text) }.to_string_lossy() } else { "an unknown error".into() };
    Err(Error::new(kind, format!("{call}: {said} ({result:?})")))
}

impl Cuda {
    /// Makes the context this thread's.
    fn enter(&self) -> Result<()> {
        // SAFETY: the context is retained for as long as this lives.
        check("cuCtxSetCurrent", unsafe { sys::cuCtxSetCurrent(self.context) })
    }

    fn made(&self) -> MutexGuard<'_, Made> {
        self.made.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn synchronize(&self) -> Result<()> {
        // SAFETY: the stream is this context's.
        check("cuStreamSynchronize", unsafe { sys::cuStreamSynchronize(self.stream) })
    }

    /// A module of PTX or machine code; the error holds what the assembler said.
    fn module(&self, code: &[u8]) -> Result<sys::CUmodule> {
        // Text is ended by a zero.
        let code = [code, &[0]].concat();
        let mut log = vec![0u8; LOG];
        let mut options =
            [sys::CUjit_option::CU_JIT_ERROR_LOG_BUFFER, sys::CUjit_option::CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES];
        // The second value is a number in a pointer's place.
        let mut values: [*mut c_void; 2] = [log.as_mut_ptr().cast(), std::ptr::without_provenance_mut(LOG - 1)];
        let mut module = null_mut();
        // SAFETY: the code outlives the call; there are two options and two values, the log of the size given.
        let loaded = unsafe {
            let (options, values) = (options.as_mut_ptr(), values.as_mut_ptr());
            sys::cuModuleLoadDataEx(&mut module, code.as_ptr().cast(), 2, options, values)
        };
        let log = CStr::from_bytes_until_nul(&log).map(CStr::to_string_lossy).unwrap_or_default();
        match check("cuModuleLoadDataEx", loaded) {
            Err(error) if !log.trim().is_empty() => {
                Err(Error::new(Kind::Internal, format!("{}: {}", error.message(), log.trim())))
            }
            other => other.map(|()| module),
        }
    }

    fn function(&self, module: sys::CUmodule, entry: &Entry) -> Result<(sys::CUfunction, usize)> {
        let name = CString::new(entry.name.as_str());
        let name = name.map_err(|_| Error::new(Kind::Input, "expected a name without zeros"))?;
        let mut function = null_mut();
        // SAFETY: the module is loaded, the name ended by a zero.
        check("cuModuleGetFunction", unsafe { sys::cuModuleGetFunction(&mut function, module, name.as_ptr()) })?;
        if entry.shared_bytes > SHARED_UNASKED {
            let most = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the function is the module's.
            let asked = unsafe { sys::cuFuncSetAttribute(function, most, entry.shared_bytes as c_int) };
            check("cuFuncSetAttribute", asked)?;
        }
        let (mut resident, threads) = (0, entry.threads as c_int);
        // SAFETY: the function is the module's; writes the number of blocks.
        let counted = unsafe {
            sys::cuOccupancyMaxActiveBlocksPerMultiprocessor(&mut resident, function, threads, entry.shared_bytes)
        };
        check("cuOccupancyMaxActiveBlocksPerMultiprocessor", counted)?;
        Ok((function, resident.max(1) as usize))
    }
}

impl Driver for Cuda {
    fn facts(&self) -> &Facts {
        &self.facts
    }

    fn free_memory(&self) -> Result<usize> {
        self.enter()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: writes both numbers.
        check("cuMemGetInfo", unsafe { sys::cuMemGetInfo_v2(&mut free, &mut total) })?;
        Ok(free)
    }

    fn allocate(&self, bytes: usize) -> Result<Address> {
        self.enter()?;
        let mut at = 0;
        // SAFETY: writes the address.
        check("cuMemAlloc", unsafe { sys::cuMemAlloc_v2(&mut at, bytes) })?;
        Ok(at)
    }

    fn free(&self, at: Address) {
        // A context that has failed keeps its memory until it goes.
        if self.enter().and_then(|()| self.synchronize()).is_ok() {
            // SAFETY: the address is of an allocation, and all work on it is done.
            unsafe { sys::cuMemFree_v2(at) };
        }
    }

    fn clear(&self, at: Address, bytes: usize) -> Result<()> {
        self.enter()?;
        // SAFETY: the GPU checks addresses; no memory of this process is touched.
        check("cuMemsetD8Async", unsafe { sys::cuMemsetD8Async(at, 0, bytes, self.stream) })
    }

    fn copy_in(&self, to: Address, from: &[u8]) -> Result<()> {
        self.enter()?;
        // SAFETY: so many bytes are read; what is not pinned - and only outputs are - is staged before the call returns.
        let copied = unsafe { sys::cuMemcpyHtoDAsync_v2(to, from.as_ptr().cast(), from.len(), self.stream) };
        check("cuMemcpyHtoDAsync", copied)
    }

    fn copy(&self, from: Address, to: Address, bytes: usize) -> Result<()> {
        self.enter()?;
        // SAFETY: the GPU checks addresses; no memory of this process is touched.
        check("cuMemcpyDtoDAsync", unsafe { sys::cuMemcpyDtoDAsync_v2(to, from, bytes, self.stream) })
    }

    fn finish(&self, copies: &mut [(Address, &mut [u8])]) -> Result<()> {
        self.enter()?;
        let mut copied = Ok(());
        for (from, to) in copies {
            // SAFETY: so many bytes are written, before the call below returns.
            let result = unsafe { sys::cuMemcpyDtoHAsync_v2(to.as_mut_ptr().cast(), *from, to.len(), self.stream) };
            copied = copied.and(check("cuMemcpyDtoHAsync", result));
        }
        // Whatever was refused, what was not must have ended.
        copied.and(self.synchronize())
    }

    fn pin(&self, memory: &mut [u8]) -> Result<()> {
        if memory.is_empty() {
            return Ok(());
        }
        self.enter()?;
        // SAFETY: the memory is the caller's, who unpins it before it goes.
        let pinned = unsafe { sys::cuMemHostRegister_v2(memory.as_mut_ptr().cast(), memory.len(), 0) };
        check("cuMemHostRegister", pinned)
    }

    fn unpin(&self, memory: &mut [u8]) {
        if !memory.is_empty() && self.enter().is_ok() {
            // SAFETY: the memory is what was pinned; a refusal means that it is not any more.
            unsafe { sys::cuMemHostUnregister(memory.as_mut_ptr().cast()) };
        }
    }

    fn load(&self, code: &[u8], entries: &[Entry]) -> Result<Vec<Function>> {
        self.enter()?;
        let module = self.module(code)?;
        let mut made = self.made();
        made.modules.push(module);
        let function = |entry: &Entry| {
            let (function, resident) = self.function(module, entry).at(|| format!("kernel `{}`", entry.name))?;
            made.functions.push(function);
            Ok(Function { id: made.functions.len() - 1, resident })
        };
        entries.iter().map(function).collect()
    }

    fn launch(&self, function: usize, shape: Shape, args: &[Address]) -> Result<()> {
        self.enter()?;
        let Some(function) = self.made().functions.get(function).copied() else {
            bail!(Internal, "there is no function {function}");
        };
        let mut args = args.to_vec();
        let mut params: Vec<*mut c_void> = args.iter_mut().map(|arg| std::ptr::from_mut(arg).cast()).collect();
        let mut dependent = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        };
        let config = sys::CUlaunchConfig {
            gridDimX: shape.blocks,
            gridDimY: 1,
            gridDimZ: 1,
            blockDimX: shape.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: shape.shared_bytes,
            hStream: self.stream,
            attrs: &mut dependent,
            numAttrs: u32::from(shape.dependent),
        };
        // SAFETY: the configuration and as many arguments as the entry was looked up with, of 8 bytes each, are read before
        // the call returns. The kernel touches the GPU's memory alone.
        check("cuLaunchKernelEx", unsafe { sys::cuLaunchKernelEx(&config, function, params.as_mut_ptr(), null_mut()) })
    }

    fn record(&self, launches: &mut dyn FnMut() -> Result<()>) -> Result<Recorded> {
        self.enter()?;
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream is this context's.
        check("cuStreamBeginCapture", unsafe { sys::cuStreamBeginCapture_v2(self.stream, mode) })?;
        let launched = launches();
        let (mut graph, mut executable) = (null_mut(), null_mut());
        // SAFETY: ends what began above; writes the graph.
        let ended = check("cuStreamEndCapture", unsafe { sys::cuStreamEndCapture(self.stream, &mut graph) });
        let made = launched.and(ended).and_then(|()| {
            // SAFETY: the graph is whole; writes what can be launched of it.
            check("cuGraphInstantiate", unsafe { sys::cuGraphInstantiateWithFlags(&mut executable, graph, 0) })
        });
        if !graph.is_null() {
            // SAFETY: what was made of the graph does not need it.
            unsafe { sys::cuGraphDestroy(graph) };
        }
        made?;
        let mut made = self.made();
        made.graphs.push(executable);
        Ok(Recorded(made.graphs.len() - 1))
    }

    fn replay(&self, recorded: Recorded) -> Result<()> {
        self.enter()?;
        let Some(graph) = self.made().graphs.get(recorded.0).copied() else {
            bail!(Internal, "nothing is recorded as {}", recorded.0);
        };
        // SAFETY: the graph lives as long as this.
        check("cuGraphLaunch", unsafe { sys::cuGraphLaunch(graph, self.stream) })
    }

    fn mark(&self, mark: usize) -> Result<()> {
        self.enter()?;
        let mut made = self.made();
        while made.marks.len() <= mark {
            let mut event = null_mut();
            // SAFETY: writes the event.
            check("cuEventCreate", unsafe { sys::cuEventCreate(&mut event, 0) })?;
            made.marks.push(event);
        }
        // SAFETY: both are this context's.
        check("cuEventRecord", unsafe { sys::cuEventRecord(made.marks[mark], self.stream) })
    }

    fn seconds(&self, from: usize, to: usize) -> Result<f64> {
        self.enter()?;
        let made = self.made();
        let (Some(from), Some(to)) = (made.marks.get(from), made.marks.get(to)) else {
            bail!(Internal, "there are no marks {from} and {to}");
        };
        let mut milliseconds = 0.0;
        // SAFETY: both are this context's; writes the time between them.
        check("cuEventElapsedTime", unsafe { sys::cuEventElapsedTime_v2(&mut milliseconds, *from, *to) })?;
        Ok(f64::from(milliseconds) / 1e3)
    }
}

impl Drop for Cuda {
    fn drop(&mut self) {
        let made = std::mem::take(&mut *self.made());
        // SAFETY: every handle is of this context, none is used again, and all work has ended. Refusals mean that the context
        // has failed, with which everything of it goes.
        unsafe {
            sys::cuCtxSetCurrent(self.context);
            if !self.stream.is_null() {
                sys::cuStreamSynchronize(self.stream);
            }
            made.graphs.iter().for_each(|graph| _ = sys::cuGraphExecDestroy(*graph));
            made.marks.iter().for_each(|event| _ = sys::cuEventDestroy_v2(*event));
            made.modules.iter().for_each(|module| _ = sys::cuModuleUnload(*module));
            if !self.stream.is_null() {
                sys::cuStreamDestroy_v2(self.stream);
            }
            sys::cuDevicePrimaryCtxRelease_v2(self.device);
        }
    }
}
