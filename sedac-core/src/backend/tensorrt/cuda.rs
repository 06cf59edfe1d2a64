//! The first NVIDIA GPU, through its driver.

use std::sync::Arc;
use std::time::Duration;

use cudarc::driver::sys::{CUevent_flags, CUgraphInstantiate_flags, CUstreamCaptureMode};
use cudarc::driver::{CudaEvent, CudaGraph, CudaSlice, CudaStream, DevicePtr, result};

use super::super::gpu::{failed, new_stream};
use super::device::{Buffer, Device, Work, check_inside};
use crate::error::{Error, Result};

/// Engines set themselves up in their first runs, which must not be captured.
const WARM_UPS: usize = 2;

/// A CUDA device and a stream of its own.
#[derive(Debug)]
pub struct Cuda {
    stream: Arc<CudaStream>,
    memory: Vec<CudaSlice<u8>>,
}

/// A captured graph.
pub struct Captured(CudaGraph);

// SAFETY: CUDA's graph objects may be used from any thread, by one at a time. A `Captured` owns the
// only handles of its graph, has no `Sync` and is no `Clone`, so that launching and destroying it
// never happen at once.
unsafe impl Send for Captured {}

impl Cuda {
    /// The first GPU, in the driver's primary context, which other libraries use too.
    ///
    /// # Errors
    /// [`Error::Device`] without a driver or a GPU.
    pub fn new() -> Result<Self> {
        Ok(Self {
            stream: new_stream()?,
            memory: Vec::new(),
        })
    }

    /// The stream on which everything happens.
    pub fn stream(&self) -> Arc<CudaStream> {
        self.stream.clone()
    }

    fn bind(&self) -> Result<()> {
        let context = self.stream.context();
        context.bind_to_thread().map_err(failed("the GPU"))
    }

    /// Where the byte at `offset` of `buffer` lies, which has `bytes` more from there on.
    fn place(&self, buffer: Buffer, offset: usize, bytes: usize) -> u64 {
        let slice = &self.memory[buffer.index];
        check_inside(slice.len(), offset, bytes);
        slice.device_ptr(&self.stream).0 + offset as u64
    }

    /// Wait for the stream, also where `put` failed half-way: the host's memory that it was given
    /// goes back to its owner afterwards. The first error counts.
    fn wait_after(&self, put: Result<()>) -> Result<()> {
        let waited = self.stream.synchronize().map_err(failed("engines"));
        put.and(waited)
    }
}

impl Device for Cuda {
    type Captured = Captured;
    type Mark = CudaEvent;

    fn free_memory(&self) -> Result<Option<u64>> {
        let (free, _) = self
            .stream
            .context()
            .mem_get_info()
            .map_err(failed("the GPU"))?;
        Ok(Some(free as u64))
    }

    fn allocate(&mut self, bytes: usize) -> Result<Buffer> {
        let slice = self
            .stream
            .alloc_zeros::<u8>(bytes.max(1))
            .map_err(failed(format!("{bytes} bytes of GPU memory")))?;
        let address = slice.device_ptr(&self.stream).0;
        self.memory.push(slice);
        Ok(Buffer {
            index: self.memory.len() - 1,
            address,
            bytes,
        })
    }

    fn write(&mut self, buffer: Buffer, offset: usize, bytes: &[u8]) -> Result<()> {
        let place = self.place(buffer, offset, bytes.len());
        self.bind()?;
        // SAFETY: the range is inside a live allocation, and `bytes` outlives the copy, which the
        // next line waits for whatever the driver says here.
        let copied = unsafe { result::memcpy_htod_async(place, bytes, self.stream.cu_stream()) };
        self.wait_after(copied.map_err(failed("a copy to the GPU")))
    }

    fn read(&mut self, buffer: Buffer, offset: usize, bytes: &mut [u8]) -> Result<()> {
        let place = self.place(buffer, offset, bytes.len());
        self.bind()?;
        // SAFETY: the range is inside a live allocation, and `bytes` is borrowed until the copy has
        // ended, which the next line waits for whatever the driver says here.
        let copied = unsafe { result::memcpy_dtoh_async(bytes, place, self.stream.cu_stream()) };
        self.wait_after(copied.map_err(failed("a copy from the GPU")))
    }

    fn copy(&mut self, from: (Buffer, usize), to: (Buffer, usize), bytes: usize) -> Result<()> {
        let from = self.place(from.0, from.1, bytes);
        let to = self.place(to.0, to.1, bytes);
        self.bind()?;
        // SAFETY: both ranges are inside allocations that live until `drop` has waited for the
        // stream.
        unsafe { result::memcpy_dtod_async(to, from, bytes, self.stream.cu_stream()) }
            .map_err(failed("a copy on the GPU"))
    }

    fn run(&mut self, work: &Work) -> Result<()> {
        self.bind()?;
        // SAFETY: the stream is the device's own and lives as long as it. So do the tensors, which
        // are in `self.memory`: `drop` waits for the stream before it goes, and a captured graph is
        // launched by `self` alone.
        unsafe { work.enqueue(self.stream.cu_stream() as u64) }
    }

    fn capture(&mut self, work: Work) -> Result<Captured> {
        let warm = (0..WARM_UPS).try_for_each(|_| self.run(&work));
        self.wait_after(warm)?;
        self.stream
            .begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED)
            .map_err(failed("a capture"))?;
        let done = self.run(&work);
        // a capture is ended whatever became of the work
        let graph = self.stream.end_capture(CUgraphInstantiate_flags(0));
        done?;
        graph
            .map_err(failed("a captured engine"))?
            .map(Captured)
            .ok_or_else(|| Error::Device {
                what: "a captured engine".into(),
                reason: "it put nothing on the stream".into(),
            })
    }

    fn launch(&mut self, captured: &Captured) -> Result<()> {
        captured.0.launch().map_err(failed("a captured engine"))
    }

    fn mark(&mut self) -> Result<CudaEvent> {
        let timed = CUevent_flags::CU_EVENT_DEFAULT;
        let event = self.stream.record_event(Some(timed));
        event.map_err(failed("an event"))
    }

    fn elapsed(&self, from: &CudaEvent, to: &CudaEvent) -> Result<Duration> {
        let ms = from.elapsed_ms(to).map_err(failed("an event"))?;
        Ok(Duration::from_secs_f64(f64::from(ms.max(0.0)) / 1e3))
    }
}

impl Drop for Cuda {
    fn drop(&mut self) {
        // memory goes back when nothing uses it any more; a driver that fails now has no one to tell
        let _ = self.stream.synchronize();
    }
}
