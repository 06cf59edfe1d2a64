//! The instructions of a CPU that products are made of.

use std::arch::x86_64::*;

use super::activations::{PIECE, Piece};

/// Sums of several columns, computed side by side.
///
/// # Safety
/// Whoever makes a value of such a type knows that the CPU has its instructions.
pub(super) unsafe trait Lanes: Copy {
    /// How many columns.
    const COLUMNS: usize;
    /// Rows that the registers have room for.
    const ROWS: usize;
    /// Four weights of each column, 8 bits without a sign.
    type Weights: Copy;
    /// An integer of each column.
    type Sums: Copy;
    /// A number of each column.
    type Numbers: Copy;

    /// The bits of the largest of `numbers` without its sign, of which those of NaN are the largest.
    fn largest(self, numbers: &[f32; PIECE]) -> u32;
    /// Round `numbers`, times `factor`, to the nearest integers of 8 bits, or even ones, and give their sum.
    fn round(self, numbers: &[f32; PIECE], factor: f32, piece: &mut Piece) -> i32;
    /// Four weights of each column, a column after another.
    fn weights(self, bytes: &[u8]) -> Self::Weights;
    /// The lower and the upper halves of bytes, each with weights of 4 bits.
    fn halves(self, bytes: Self::Weights) -> [Self::Weights; 2];
    /// `sums` and, of each column, the dot product of four weights with the four bytes, with signs, of
    /// `activations`.
    fn add_products<const BITS: usize>(
        self,
        sums: Self::Sums,
        weights: Self::Weights,
        activations: i32,
    ) -> Self::Sums;
    /// `sum` for all columns.
    fn all(self, sum: i32) -> Self::Sums;
    /// Each column's of `zero_points`, times `factor`.
    fn times(self, zero_points: &[u8], factor: i32) -> Self::Sums;
    /// Zeros.
    fn zeros(self) -> Self::Numbers;
    /// The numbers of `columns`.
    fn load(self, columns: &[f32]) -> Self::Numbers;
    /// The numbers that the fp16 `columns` stand for.
    fn of_fp16(self, columns: &[u16]) -> Self::Numbers;
    /// `numbers` and `sums`, these times `scale` and each column's of `scales`.
    fn add_scaled(
        self,
        numbers: Self::Numbers,
        sums: Self::Sums,
        scales: Self::Numbers,
        scale: f32,
    ) -> Self::Numbers;
    /// Write `numbers` to `columns`.
    fn store(self, numbers: Self::Numbers, columns: &mut [f32]);
}

/// AVX-512 with VNNI.
#[derive(Debug, Clone, Copy)]
pub(super) struct Avx512(());

/// AVX2 with FMA and F16C, and VNNI or not.
#[derive(Debug, Clone, Copy)]
pub(super) struct Avx2<const VNNI: bool>(());

impl Avx512 {
    pub(super) fn of_cpu() -> Option<Self> {
        let is_there = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512vnni");
        is_there.then_some(Self(()))
    }
}

impl<const VNNI: bool> Avx2<VNNI> {
    pub(super) fn of_cpu() -> Option<Self> {
        let is_there = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c")
            && (!VNNI || is_x86_feature_detected!("avxvnni"));
        is_there.then_some(Self(()))
    }
}

// SAFETY: `of_cpu` alone makes values.
unsafe impl Lanes for Avx512 {
    const COLUMNS: usize = 16;
    const ROWS: usize = 8;
    type Weights = __m512i;
    type Sums = __m512i;
    type Numbers = __m512;

    #[inline(always)]
    fn largest(self, numbers: &[f32; PIECE]) -> u32 {
        // SAFETY: the CPU has AVX-512, and there are as many numbers.
        unsafe {
            let first = _mm512_abs_ps(_mm512_loadu_ps(numbers[..16].as_ptr()));
            let second = _mm512_abs_ps(_mm512_loadu_ps(numbers[16..].as_ptr()));
            let (first, second) = (_mm512_castps_si512(first), _mm512_castps_si512(second));
            _mm512_reduce_max_epu32(_mm512_max_epu32(first, second))
        }
    }

    #[inline(always)]
    fn round(self, numbers: &[f32; PIECE], factor: f32, piece: &mut Piece) -> i32 {
        // SAFETY: the CPU has AVX-512, and there is room for as many bytes as there are numbers.
        unsafe {
            let factor = _mm512_set1_ps(factor);
            let first = _mm512_mul_ps(_mm512_loadu_ps(numbers[..16].as_ptr()), factor);
            let second = _mm512_mul_ps(_mm512_loadu_ps(numbers[16..].as_ptr()), factor);
            let (first, second) = (_mm512_cvtps_epi32(first), _mm512_cvtps_epi32(second));
            let bytes = _mm256_set_m128i(_mm512_cvtepi32_epi8(second), _mm512_cvtepi32_epi8(first));
            _mm256_storeu_si256(piece.as_mut_ptr().cast(), bytes);
            _mm512_reduce_add_epi32(_mm512_add_epi32(first, second))
        }
    }

    #[inline(always)]
    fn weights(self, bytes: &[u8]) -> __m512i {
        let bytes: &[u8; 64] = bytes.try_into().expect("four of each column");
        // SAFETY: the CPU has AVX-512, and there are as many bytes.
        unsafe { _mm512_loadu_si512(bytes.as_ptr().cast()) }
    }

    #[inline(always)]
    fn halves(self, bytes: __m512i) -> [__m512i; 2] {
        // SAFETY: the CPU has AVX-512.
        unsafe {
            let mask = _mm512_set1_epi8(15);
            let upper = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), mask);
            [_mm512_and_si512(bytes, mask), upper]
        }
    }

    #[inline(always)]
    fn add_products<const BITS: usize>(
        self,
        sums: __m512i,
        weights: __m512i,
        activations: i32,
    ) -> __m512i {
        // SAFETY: the CPU has AVX-512 with VNNI.
        unsafe { _mm512_dpbusd_epi32(sums, weights, _mm512_set1_epi32(activations)) }
    }

    #[inline(always)]
    fn all(self, sum: i32) -> __m512i {
        // SAFETY: the CPU has AVX-512.
        unsafe { _mm512_set1_epi32(sum) }
    }

    #[inline(always)]
    fn times(self, zero_points: &[u8], factor: i32) -> __m512i {
        let zero_points: &[u8; 16] = zero_points.try_into().expect("one of each column");
        // SAFETY: the CPU has AVX-512, and there are as many zero points.
        unsafe {
            let zero_points = _mm_loadu_si128(zero_points.as_ptr().cast());
            let zero_points = _mm512_cvtepu8_epi32(zero_points);
            _mm512_mullo_epi32(zero_points, _mm512_set1_epi32(factor))
        }
    }

    #[inline(always)]
    fn zeros(self) -> __m512 {
        // SAFETY: the CPU has AVX-512.
        unsafe { _mm512_setzero_ps() }
    }

    #[inline(always)]
    fn load(self, columns: &[f32]) -> __m512 {
        let columns: &[f32; 16] = columns.try_into().expect("as many columns");
        // SAFETY: the CPU has AVX-512, and there are as many columns.
        unsafe { _mm512_loadu_ps(columns.as_ptr()) }
    }

    #[inline(always)]
    fn of_fp16(self, columns: &[u16]) -> __m512 {
        let columns: &[u16; 16] = columns.try_into().expect("as many columns");
        // SAFETY: the CPU has AVX-512, and there are as many columns.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(columns.as_ptr().cast())) }
    }

    #[inline(always)]
    fn add_scaled(self, numbers: __m512, sums: __m512i, scales: __m512, scale: f32) -> __m512 {
        // SAFETY: the CPU has AVX-512.
        unsafe {
            let scales = _mm512_mul_ps(scales, _mm512_set1_ps(scale));
            _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums), scales, numbers)
        }
    }

    #[inline(always)]
    fn store(self, numbers: __m512, columns: &mut [f32]) {
        let columns: &mut [f32; 16] = columns.try_into().expect("as many columns");
        // SAFETY: the CPU has AVX-512, and there are as many columns.
        unsafe { _mm512_storeu_ps(columns.as_mut_ptr(), numbers) }
    }
}

// SAFETY: `of_cpu` alone makes values.
unsafe impl<const VNNI: bool> Lanes for Avx2<VNNI> {
    const COLUMNS: usize = 8;
    const ROWS: usize = 4;
    type Weights = __m256i;
    type Sums = __m256i;
    type Numbers = __m256;

    #[inline(always)]
    fn largest(self, numbers: &[f32; PIECE]) -> u32 {
        // SAFETY: the CPU has AVX2, and there are as many numbers.
        unsafe {
            let mut largest = _mm256_setzero_si256();
            for numbers in numbers.as_chunks::<8>().0 {
                let bits = _mm256_castps_si256(_mm256_loadu_ps(numbers.as_ptr()));
                let bits = _mm256_and_si256(bits, _mm256_set1_epi32(i32::MAX));
                largest = _mm256_max_epu32(largest, bits);
            }
            let half = _mm256_extracti128_si256(largest, 1);
            let largest = _mm_max_epu32(_mm256_castsi256_si128(largest), half);
            let largest = _mm_max_epu32(largest, _mm_shuffle_epi32(largest, 0b01_00_11_10));
            let largest = _mm_max_epu32(largest, _mm_shuffle_epi32(largest, 0b10_11_00_01));
            _mm_cvtsi128_si32(largest) as u32
        }
    }

    #[inline(always)]
    fn round(self, numbers: &[f32; PIECE], factor: f32, piece: &mut Piece) -> i32 {
        // SAFETY: the CPU has AVX2, and there is room for as many bytes as there are numbers.
        unsafe {
            let mut integers = [_mm256_setzero_si256(); 4];
            for (integers, numbers) in integers.iter_mut().zip(numbers.as_chunks::<8>().0) {
                let numbers = _mm256_loadu_ps(numbers.as_ptr());
                *integers = _mm256_cvtps_epi32(_mm256_mul_ps(numbers, _mm256_set1_ps(factor)));
            }
            let [a, b, c, d] = integers;
            // halves of registers are packed for themselves
            let pairs = [_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d)];
            let bytes = _mm256_packs_epi16(pairs[0], pairs[1]);
            let order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
            let bytes = _mm256_permutevar8x32_epi32(bytes, order);
            _mm256_storeu_si256(piece.as_mut_ptr().cast(), bytes);
            let sums = _mm256_add_epi32(_mm256_add_epi32(a, b), _mm256_add_epi32(c, d));
            let half = _mm256_extracti128_si256(sums, 1);
            let sums = _mm_add_epi32(_mm256_castsi256_si128(sums), half);
            let sums = _mm_add_epi32(sums, _mm_shuffle_epi32(sums, 0b01_00_11_10));
            let sums = _mm_add_epi32(sums, _mm_shuffle_epi32(sums, 0b10_11_00_01));
            _mm_cvtsi128_si32(sums)
        }
    }

    #[inline(always)]
    fn weights(self, bytes: &[u8]) -> __m256i {
        let bytes: &[u8; 32] = bytes.try_into().expect("four of each column");
        // SAFETY: the CPU has AVX2, and there are as many bytes.
        unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) }
    }

    #[inline(always)]
    fn halves(self, bytes: __m256i) -> [__m256i; 2] {
        // SAFETY: the CPU has AVX2.
        unsafe {
            let mask = _mm256_set1_epi8(15);
            let upper = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), mask);
            [_mm256_and_si256(bytes, mask), upper]
        }
    }

    #[inline(always)]
    fn add_products<const BITS: usize>(
        self,
        sums: __m256i,
        weights: __m256i,
        activations: i32,
    ) -> __m256i {
        // SAFETY: the CPU has AVX2, and VNNI where it is asked.
        unsafe {
            let activations = _mm256_set1_epi32(activations);
            if VNNI {
                return _mm256_dpbusd_avx_epi32(sums, weights, activations);
            }
            // two products of 4 and 8 bits have room in 16, two of 8 and 8 may not
            if BITS == 4 {
                let products = _mm256_maddubs_epi16(weights, activations);
                let products = _mm256_madd_epi16(products, _mm256_set1_epi16(1));
                return _mm256_add_epi32(sums, products);
            }
            let [lower, upper] = self.halves(weights);
            let lower = _mm256_maddubs_epi16(lower, activations);
            let upper = _mm256_maddubs_epi16(upper, activations);
            let lower = _mm256_madd_epi16(lower, _mm256_set1_epi16(1));
            let upper = _mm256_madd_epi16(upper, _mm256_set1_epi16(16));
            _mm256_add_epi32(sums, _mm256_add_epi32(lower, upper))
        }
    }

    #[inline(always)]
    fn all(self, sum: i32) -> __m256i {
        // SAFETY: the CPU has AVX2.
        unsafe { _mm256_set1_epi32(sum) }
    }

    #[inline(always)]
    fn times(self, zero_points: &[u8], factor: i32) -> __m256i {
        let zero_points: &[u8; 8] = zero_points.try_into().expect("one of each column");
        // SAFETY: the CPU has AVX2, and there are as many zero points.
        unsafe {
            let zero_points = _mm_loadl_epi64(zero_points.as_ptr().cast());
            let zero_points = _mm256_cvtepu8_epi32(zero_points);
            _mm256_mullo_epi32(zero_points, _mm256_set1_epi32(factor))
        }
    }

    #[inline(always)]
    fn zeros(self) -> __m256 {
        // SAFETY: the CPU has AVX2.
        unsafe { _mm256_setzero_ps() }
    }

    #[inline(always)]
    fn load(self, columns: &[f32]) -> __m256 {
        let columns: &[f32; 8] = columns.try_into().expect("as many columns");
        // SAFETY: the CPU has AVX2, and there are as many columns.
        unsafe { _mm256_loadu_ps(columns.as_ptr()) }
    }

    #[inline(always)]
    fn of_fp16(self, columns: &[u16]) -> __m256 {
        let columns: &[u16; 8] = columns.try_into().expect("as many columns");
        // SAFETY: the CPU has AVX2 with F16C, and there are as many columns.
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(columns.as_ptr().cast())) }
    }

    #[inline(always)]
    fn add_scaled(self, numbers: __m256, sums: __m256i, scales: __m256, scale: f32) -> __m256 {
        // SAFETY: the CPU has AVX2 with FMA.
        unsafe {
            let scales = _mm256_mul_ps(scales, _mm256_set1_ps(scale));
            _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums), scales, numbers)
        }
    }

    #[inline(always)]
    fn store(self, numbers: __m256, columns: &mut [f32]) {
        let columns: &mut [f32; 8] = columns.try_into().expect("as many columns");
        // SAFETY: the CPU has AVX2, and there are as many columns.
        unsafe { _mm256_storeu_ps(columns.as_mut_ptr(), numbers) }
    }
}
