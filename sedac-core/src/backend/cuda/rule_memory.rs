//! GPU memory of exit rules' tables.

use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream, DevicePtr, DeviceRepr, ValidAsZeroBits};

use super::chain_device::{MAX_CRITERIA, MAX_TABLES};
use crate::backend::gpu::failed;
use crate::error::Result;
use crate::policy::Condition;

// SAFETY: it is repr(C) of words, as the kernel reads it.
unsafe impl DeviceRepr for Condition {}
// SAFETY: it is of numbers, and of enums that have a value 0.
unsafe impl ValidAsZeroBits for Condition {}

/// Room for [`MAX_TABLES`] tables.
pub(super) struct RuleMemory {
    conditions: CudaSlice<Condition>,
    /// Of a table.
    most: usize,
}

impl RuleMemory {
    /// Bytes of the tables for `layers` layers.
    pub(super) fn bytes(layers: usize) -> u64 {
        (MAX_TABLES * MAX_CRITERIA * layers * size_of::<Condition>()) as u64
    }

    pub(super) fn allocate(stream: &Arc<CudaStream>, layers: usize) -> Result<Self> {
        let most = MAX_CRITERIA * layers;
        let conditions = stream.alloc_zeros(MAX_TABLES * most);
        Ok(Self {
            conditions: conditions.map_err(failed("memory for exit rules"))?,
            most,
        })
    }

    /// Write `conditions` to the table number `table`. Returns its address.
    pub(super) fn write(
        &mut self,
        stream: &Arc<CudaStream>,
        table: usize,
        conditions: &[Condition],
    ) -> Result<u64> {
        let first = table * self.most;
        let mut place = self.conditions.slice_mut(first..first + self.most);
        let copied = stream.memcpy_htod(conditions, &mut place);
        // `conditions` are read until then, also where the call failed
        let waited = stream.synchronize();
        copied.and(waited).map_err(failed("a copy to the GPU"))?;
        Ok(place.device_ptr(stream).0)
    }

    /// Whether a rule of `criteria` criteria may lie at `address`.
    pub(super) fn holds(&self, stream: &Arc<CudaStream>, address: u64, criteria: i32) -> bool {
        let bytes = (self.most * size_of::<Condition>()) as u64;
        let start = self.conditions.device_ptr(stream).0;
        let offset = address.checked_sub(start);
        offset.is_some_and(|at| at % bytes == 0 && at / bytes < MAX_TABLES as u64)
            && (0..=MAX_CRITERIA as i32).contains(&criteria)
    }
}
