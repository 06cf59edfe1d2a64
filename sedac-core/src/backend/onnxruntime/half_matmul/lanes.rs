//! The instructions of a CPU that products are made of.

use std::arch::x86_64::*;

/// Columns computed side by side, in two registers.
///
/// # Safety
/// Whoever makes a value of such a type knows that the CPU has its instructions.
pub(super) unsafe trait Lanes: Copy {
    /// How many columns.
    const COLUMNS: usize;
    /// Rows that the registers have room for.
    const ROWS: usize;
    /// A number of each column.
    type Numbers: Copy;

    /// Zeros.
    fn zeros(self) -> Self::Numbers;
    /// The numbers that the fp16 `weights` stand for.
    fn of_fp16(self, weights: &[u16]) -> Self::Numbers;
    /// The numbers that the bf16 `weights` stand for.
    fn of_bf16(self, weights: &[u16]) -> Self::Numbers;
    /// The numbers of `columns`.
    fn load(self, columns: &[f32]) -> Self::Numbers;
    /// `sums` and `weights`, these times `factor`.
    fn add_product(self, sums: Self::Numbers, weights: Self::Numbers, factor: f32)
    -> Self::Numbers;
    /// Write `numbers` to `columns`.
    fn store(self, numbers: Self::Numbers, columns: &mut [f32]);
}

/// AVX-512.
#[derive(Debug, Clone, Copy)]
pub(super) struct Avx512(());

/// AVX2 with FMA and F16C.
#[derive(Debug, Clone, Copy)]
pub(super) struct Avx2(());

impl Avx512 {
    pub(super) fn of_cpu() -> Option<Self> {
        is_x86_feature_detected!("avx512f").then_some(Self(()))
    }
}

impl Avx2 {
    pub(super) fn of_cpu() -> Option<Self> {
        let is_there = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c");
        is_there.then_some(Self(()))
    }
}

// SAFETY: `of_cpu` alone makes values.
unsafe impl Lanes for Avx512 {
    const COLUMNS: usize = 32;
    const ROWS: usize = 8;
    type Numbers = [__m512; 2];

    #[inline(always)]
    fn zeros(self) -> [__m512; 2] {
        // SAFETY: the CPU has AVX-512.
        unsafe { [_mm512_setzero_ps(); 2] }
    }

    #[inline(always)]
    fn of_fp16(self, weights: &[u16]) -> [__m512; 2] {
        let weights: &[u16; 32] = weights.try_into().expect("one of each column");
        let mut numbers = self.zeros();
        for (numbers, weights) in numbers.iter_mut().zip(weights.as_chunks::<16>().0) {
            // SAFETY: the CPU has AVX-512, and there are as many weights.
            unsafe { *numbers = _mm512_cvtph_ps(_mm256_loadu_si256(weights.as_ptr().cast())) };
        }
        numbers
    }

    #[inline(always)]
    fn of_bf16(self, weights: &[u16]) -> [__m512; 2] {
        let weights: &[u16; 32] = weights.try_into().expect("one of each column");
        let mut numbers = self.zeros();
        for (numbers, weights) in numbers.iter_mut().zip(weights.as_chunks::<16>().0) {
            // SAFETY: the CPU has AVX-512, and there are as many weights.
            unsafe {
                let weights = _mm512_cvtepu16_epi32(_mm256_loadu_si256(weights.as_ptr().cast()));
                *numbers = _mm512_castsi512_ps(_mm512_slli_epi32(weights, 16));
            }
        }
        numbers
    }

    #[inline(always)]
    fn load(self, columns: &[f32]) -> [__m512; 2] {
        let columns: &[f32; 32] = columns.try_into().expect("as many columns");
        let mut numbers = self.zeros();
        for (numbers, columns) in numbers.iter_mut().zip(columns.as_chunks::<16>().0) {
            // SAFETY: the CPU has AVX-512, and there are as many columns.
            unsafe { *numbers = _mm512_loadu_ps(columns.as_ptr()) };
        }
        numbers
    }

    #[inline(always)]
    fn add_product(self, sums: [__m512; 2], weights: [__m512; 2], factor: f32) -> [__m512; 2] {
        // SAFETY: the CPU has AVX-512.
        unsafe {
            let factor = _mm512_set1_ps(factor);
            [
                _mm512_fmadd_ps(weights[0], factor, sums[0]),
                _mm512_fmadd_ps(weights[1], factor, sums[1]),
            ]
        }
    }

    #[inline(always)]
    fn store(self, numbers: [__m512; 2], columns: &mut [f32]) {
        let columns: &mut [f32; 32] = columns.try_into().expect("as many columns");
        for (numbers, columns) in numbers.iter().zip(columns.as_chunks_mut::<16>().0) {
            // SAFETY: the CPU has AVX-512, and there are as many columns.
            unsafe { _mm512_storeu_ps(columns.as_mut_ptr(), *numbers) };
        }
    }
}

// SAFETY: `of_cpu` alone makes values.
unsafe impl Lanes for Avx2 {
    const COLUMNS: usize = 16;
    const ROWS: usize = 4;
    type Numbers = [__m256; 2];

    #[inline(always)]
    fn zeros(self) -> [__m256; 2] {
        // SAFETY: the CPU has AVX2.
        unsafe { [_mm256_setzero_ps(); 2] }
    }

    #[inline(always)]
    fn of_fp16(self, weights: &[u16]) -> [__m256; 2] {
        let weights: &[u16; 16] = weights.try_into().expect("one of each column");
        let mut numbers = self.zeros();
        for (numbers, weights) in numbers.iter_mut().zip(weights.as_chunks::<8>().0) {
            // SAFETY: the CPU has AVX2 with F16C, and there are as many weights.
            unsafe { *numbers = _mm256_cvtph_ps(_mm_loadu_si128(weights.as_ptr().cast())) };
        }
        numbers
    }

    #[inline(always)]
    fn of_bf16(self, weights: &[u16]) -> [__m256; 2] {
        let weights: &[u16; 16] = weights.try_into().expect("one of each column");
        let mut numbers = self.zeros();
        for (numbers, weights) in numbers.iter_mut().zip(weights.as_chunks::<8>().0) {
            // SAFETY: the CPU has AVX2, and there are as many weights.
            unsafe {
                let weights = _mm256_cvtepu16_epi32(_mm_loadu_si128(weights.as_ptr().cast()));
                *numbers = _mm256_castsi256_ps(_mm256_slli_epi32(weights, 16));
            }
        }
        numbers
    }

    #[inline(always)]
    fn load(self, columns: &[f32]) -> [__m256; 2] {
        let columns: &[f32; 16] = columns.try_into().expect("as many columns");
        let mut numbers = self.zeros();
        for (numbers, columns) in numbers.iter_mut().zip(columns.as_chunks::<8>().0) {
            // SAFETY: the CPU has AVX2, and there are as many columns.
            unsafe { *numbers = _mm256_loadu_ps(columns.as_ptr()) };
        }
        numbers
    }

    #[inline(always)]
    fn add_product(self, sums: [__m256; 2], weights: [__m256; 2], factor: f32) -> [__m256; 2] {
        // SAFETY: the CPU has AVX2 with FMA.
        unsafe {
            let factor = _mm256_set1_ps(factor);
            [
                _mm256_fmadd_ps(weights[0], factor, sums[0]),
                _mm256_fmadd_ps(weights[1], factor, sums[1]),
            ]
        }
    }

    #[inline(always)]
    fn store(self, numbers: [__m256; 2], columns: &mut [f32]) {
        let columns: &mut [f32; 16] = columns.try_into().expect("as many columns");
        for (numbers, columns) in numbers.iter().zip(columns.as_chunks_mut::<8>().0) {
            // SAFETY: the CPU has AVX2, and there are as many columns.
            unsafe { _mm256_storeu_ps(columns.as_mut_ptr(), *numbers) };
        }
    }
}
