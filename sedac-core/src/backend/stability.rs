//! Stability of a layer from the residual stream before and after it.

/// Sums of as many products are kept apart, so that they are added at once.
const LANES: usize = 16;

/// (cos + 1) / 2 of the residual stream `before` a layer and `after` it, fp32 of equal length. As an
/// engine's graph has it, the square of half the sum of two unit vectors: that of zeros is zeros, too.
pub(crate) fn stability(before: &[f32], after: &[f32]) -> f32 {
    let (of_before, of_after) = (dot(before, before), dot(after, after));
    if of_before == 0.0 || of_after == 0.0 {
        let units = [of_before, of_after].map(|squares| if squares == 0.0 { 0.0 } else { 0.25 });
        return units[0] + units[1];
    }
    dot(before, after) / (of_before.sqrt() * of_after.sqrt()) * 0.5 + 0.5
}

fn dot(left: &[f32], right: &[f32]) -> f32 {
    let (left, right) = (left.chunks_exact(LANES), right.chunks_exact(LANES));
    let rest = left.remainder().iter().zip(right.remainder());
    let rest: f32 = rest.map(|(left, right)| left * right).sum();
    let mut sums = [0.0; LANES];
    for (left, right) in left.zip(right) {
        for (sum, (left, right)) in sums.iter_mut().zip(left.iter().zip(right)) {
            *sum += left * right;
        }
    }
    sums.iter().sum::<f32>() + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_directions_are_stable_and_opposite_ones_are_not() {
        // not a multiple of the lanes
        let before: Vec<f32> = (0..37).map(|place| (place as f32).sin()).collect();
        let scaled = |factor: f32| before.iter().map(|x| x * factor).collect::<Vec<_>>();
        assert!((stability(&before, &scaled(3.0)) - 1.0).abs() < 1e-6);
        assert!(stability(&before, &scaled(-0.5)).abs() < 1e-6);
        let mut right = vec![0.0; 37];
        let mut up = right.clone();
        (right[3], up[36]) = (2.0, 5.0);
        assert_eq!(stability(&right, &up), 0.5);
    }

    #[test]
    fn a_vector_of_zeros_has_no_direction() {
        let (zeros, ones) = ([0.0; 20], [1.0; 20]);
        assert_eq!(stability(&zeros, &ones), 0.25);
        assert_eq!(stability(&ones, &zeros), 0.25);
        assert_eq!(stability(&zeros, &zeros), 0.0);
        assert!(stability(&ones, &[f32::NAN; 20]).is_nan());
        // squares of squares are beyond fp32
        assert!((stability(&[1e12; 20], &[1e12; 20]) - 1.0).abs() < 1e-6);
    }
}
