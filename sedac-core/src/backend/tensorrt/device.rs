//! What the backend needs of a device: memory, and work that is done in order on one stream.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use crate::error::Result;

/// A tensor of an engine in one pass: its memory and its shape there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bound {
    /// Its name in the engine.
    pub name: String,
    /// Where its first element lies.
    pub address: u64,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Bytes of all its elements.
    pub bytes: usize,
}

/// Puts the work of plans on a stream. What it puts there is mostly captured once and replayed, so
/// it is no part of the decode loop.
///
/// # Safety
/// What is put on the stream reads and writes no memory of the core's but the tensors', each from
/// its address on and no further than its `bytes`: a plan whose own tensors take more, or have other
/// shapes, is an error.
pub unsafe trait Executor: Send + Sync {
    /// Put `plan` on `stream` over `tensors`, of which it takes those it knows. Where it is
    /// `replayed`, what the stream was given is done again later, so that whatever it uses must be
    /// kept for the same plan and tensors.
    ///
    /// # Errors
    /// What TensorRT reports.
    ///
    /// # Safety
    /// `stream` is a live stream, and each tensor has its `bytes` of memory there which live, and
    /// which nothing else uses, until the stream has done the work, the last replay included.
    unsafe fn enqueue(
        &self,
        plan: &Path,
        tensors: &[Bound],
        stream: u64,
        replayed: bool,
    ) -> Result<()>;
}

/// A plan over tensors in buffers of one device, which alone is given it.
pub struct Work {
    pub(super) executor: Arc<dyn Executor>,
    pub(super) plan: PathBuf,
    pub(super) tensors: Vec<Bound>,
    pub(super) replayed: bool,
}

impl Work {
    /// Put it on `stream`.
    ///
    /// # Errors
    /// What the executor reports.
    ///
    /// # Safety
    /// `stream` is a live stream of the device whose buffers the tensors are in. These live until
    /// the stream has done the work, the last replay included, and are used in its order only.
    pub unsafe fn enqueue(&self, stream: u64) -> Result<()> {
        // SAFETY: what the executor asks for is what the caller promises; `bound` has made sure
        // that each tensor ends inside of its buffer.
        unsafe {
            self.executor
                .enqueue(&self.plan, &self.tensors, stream, self.replayed)
        }
    }
}

/// Memory of a device, which keeps it until its own end.
#[derive(Debug, Clone, Copy)]
pub struct Buffer {
    pub(super) index: usize,
    pub(super) address: u64,
    pub(super) bytes: usize,
}

/// Check that `bytes` bytes from `offset` on are inside a buffer of `size`.
///
/// # Panics
/// When they are not: copying them would destroy what lies beyond.
pub(super) fn check_inside(size: usize, offset: usize, bytes: usize) {
    let end = offset.checked_add(bytes);
    assert!(
        end.is_some_and(|end| end <= size),
        "bytes {offset} to {end:?} of a buffer of {size}"
    );
}

/// A device with one stream, on which everything below happens in the order of the calls.
///
/// Buffers must be the device's own, and ranges inside them; the devices panic rather than touch
/// what lies outside. Every method reports an [`Error::Device`](crate::Error::Device) when the
/// driver fails, and `work` its own errors.
pub trait Device: Send {
    /// Work that can be launched again.
    type Captured: Send;
    /// A point between two pieces of work.
    type Mark: Send;

    /// Bytes that are free; None where its memory is the host's.
    fn free_memory(&self) -> Result<Option<u64>>;

    /// `bytes` bytes of zeros.
    ///
    /// # Errors
    /// When there is not so much memory.
    fn allocate(&mut self, bytes: usize) -> Result<Buffer>;

    /// Write `bytes` into `buffer` from `offset` on.
    fn write(&mut self, buffer: Buffer, offset: usize, bytes: &[u8]) -> Result<()>;

    /// Read from `buffer` from `offset` on, once all work before is done.
    fn read(&mut self, buffer: Buffer, offset: usize, bytes: &mut [u8]) -> Result<()>;

    /// Copy `bytes` bytes between places in two buffers.
    fn copy(&mut self, from: (Buffer, usize), to: (Buffer, usize), bytes: usize) -> Result<()>;

    /// Do `work` once.
    fn run(&mut self, work: &Work) -> Result<()>;

    /// Do `work`, which may be done several times over, and keep it to be launched again.
    fn capture(&mut self, work: Work) -> Result<Self::Captured>;

    /// Do captured work again.
    fn launch(&mut self, captured: &Self::Captured) -> Result<()>;

    /// Mark the point after all work so far.
    fn mark(&mut self) -> Result<Self::Mark>;

    /// The time from one mark to a later one. Waits until the work before them is done.
    fn elapsed(&self, from: &Self::Mark, to: &Self::Mark) -> Result<Duration>;
}
