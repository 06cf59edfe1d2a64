//! The host as a device, for rehearsals where there is no GPU.
//!
//! With an executor that computes at once, the whole backend runs as it does on a GPU, but for the
//! driver's calls: tests hold it to the tokens of ONNX Runtime's backend this way.

use std::cell::UnsafeCell;
use std::time::{Duration, Instant};

use super::device::{Buffer, Device, Work, check_inside};
use crate::error::{Error, Result};

/// Ordinary memory. Work is done when it is put on the stream, whose number is 0.
#[derive(Default)]
pub struct Host {
    /// In words, so that tensors of all element types are aligned, and the bytes asked for.
    memory: Vec<(Vec<UnsafeCell<u64>>, usize)>,
}

impl Host {
    /// Where the byte at `offset` of `buffer` lies, which has `bytes` more from there on.
    fn place(&self, buffer: Buffer, offset: usize, bytes: usize) -> *mut u8 {
        let (words, size) = &self.memory[buffer.index];
        check_inside(*size, offset, bytes);
        UnsafeCell::raw_get(words.as_ptr())
            .cast::<u8>()
            .wrapping_add(offset)
    }
}

impl Device for Host {
    type Captured = Work;
    type Mark = Instant;

    fn free_memory(&self) -> Result<Option<u64>> {
        Ok(None)
    }

    fn allocate(&mut self, bytes: usize) -> Result<Buffer> {
        let count = bytes.div_ceil(size_of::<u64>()).max(1);
        let mut words = Vec::new();
        words.try_reserve_exact(count).map_err(|_| Error::Device {
            what: format!("{bytes} bytes of memory"),
            reason: "this host has not enough".into(),
        })?;
        words.resize_with(count, || UnsafeCell::new(0));
        let address = words.as_ptr().expose_provenance() as u64;
        self.memory.push((words, bytes));
        Ok(Buffer {
            index: self.memory.len() - 1,
            address,
            bytes,
        })
    }

    fn write(&mut self, buffer: Buffer, offset: usize, bytes: &[u8]) -> Result<()> {
        let place = self.place(buffer, offset, bytes.len());
        // SAFETY: the range is inside the buffer, and nothing else runs while `self` is borrowed.
        unsafe { place.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
        Ok(())
    }

    fn read(&mut self, buffer: Buffer, offset: usize, bytes: &mut [u8]) -> Result<()> {
        let place = self.place(buffer, offset, bytes.len());
        // SAFETY: as in `write`.
        unsafe { place.copy_to_nonoverlapping(bytes.as_mut_ptr(), bytes.len()) };
        Ok(())
    }

    fn copy(&mut self, from: (Buffer, usize), to: (Buffer, usize), bytes: usize) -> Result<()> {
        let source = self.place(from.0, from.1, bytes);
        let target = self.place(to.0, to.1, bytes);
        // SAFETY: as in `write`; `copy_to` allows ranges that overlap.
        unsafe { source.copy_to(target, bytes) };
        Ok(())
    }

    fn run(&mut self, work: &Work) -> Result<()> {
        // SAFETY: the host's one stream is number 0. The tensors are in `self.memory`, and work is
        // done when the call returns, before anything else is asked of `self`.
        unsafe { work.enqueue(0) }
    }

    fn capture(&mut self, work: Work) -> Result<Work> {
        self.run(&work)?;
        Ok(work)
    }

    fn launch(&mut self, captured: &Work) -> Result<()> {
        self.run(captured)
    }

    fn mark(&mut self) -> Result<Instant> {
        Ok(Instant::now())
    }

    fn elapsed(&self, from: &Instant, to: &Instant) -> Result<Duration> {
        Ok(to.duration_since(*from))
    }
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};
    use std::sync::Arc;

    use super::super::buffers::bound;
    use super::super::device::{Bound, Executor};
    use super::*;

    /// Adds 1 to every byte of the one tensor.
    struct Increment;

    // SAFETY: it writes the tensor's `bytes` bytes.
    unsafe impl Executor for Increment {
        unsafe fn enqueue(&self, _: &Path, tensors: &[Bound], stream: u64, _: bool) -> Result<()> {
            assert_eq!(stream, 0);
            let place = std::ptr::with_exposed_provenance_mut::<u8>(tensors[0].address as usize);
            for index in 0..tensors[0].bytes {
                // SAFETY: the caller gives the tensor so many bytes, which nothing else uses now.
                unsafe { *place.add(index) += 1 };
            }
            Ok(())
        }
    }

    #[test]
    fn work_sees_what_was_written_and_leaves_what_is_read() {
        let mut host = Host::default();
        let (first, second) = (host.allocate(5).unwrap(), host.allocate(5).unwrap());
        let work = Work {
            executor: Arc::new(Increment),
            plan: PathBuf::new(),
            tensors: vec![bound("x", first, &[3], 1)],
            replayed: true,
        };
        host.write(first, 1, &[10, 20, 30, 40]).unwrap();
        let captured = host.capture(work).unwrap();
        host.launch(&captured).unwrap();
        host.copy((first, 0), (first, 1), 4).unwrap();
        host.copy((first, 0), (second, 0), 5).unwrap();
        let mut read = [0; 5];
        host.read(second, 0, &mut read).unwrap();
        assert_eq!(read, [2, 2, 12, 22, 30]);
    }
}
