//! Rounding to nearest, and quantizing by what a matrix is multiplied with.

use super::*;
use crate::formats::dequantize;
use crate::sample::Random;
use moments::Moments;

/// Root mean square of the error, as a share of that of the reals.
fn error(dtype: DType, reals: &[f32]) -> f64 {
    let mut bytes = vec![0; dtype.bytes(reals.len()).unwrap()];
    quantize(dtype, reals, &mut bytes).unwrap();
    let mut back = vec![0.0; reals.len()];
    dequantize(dtype, &bytes, &mut back);
    let off: f64 = reals.iter().zip(&back).map(|(x, y)| ((x - y) as f64).powi(2)).sum();
    (off / reals.iter().map(|x| (*x as f64).powi(2)).sum::<f64>()).sqrt()
}

/// About normal: a sum of uniform variables.
fn normal(count: usize) -> Vec<f32> {
    let mut random = Random::new(7);
    (0..count).map(|_| (0..12).map(|_| random.real()).sum::<f32>() / 2.0).collect()
}

#[test]
fn codes_come_back() {
    // Quantizing again what a format holds changes next to nothing.
    for dtype in WRITERS.iter().map(|w| w.dtype) {
        let reals = normal(16 * dtype.format().block);
        let (size, mut once) = (dtype.bytes(reals.len()).unwrap(), vec![0.0; reals.len()]);
        let (mut first, mut second) = (vec![0; size], vec![0; size]);
        quantize(dtype, &reals, &mut first).unwrap();
        dequantize(dtype, &first, &mut once);
        quantize(dtype, &once, &mut second).unwrap();
        let mut twice = vec![0.0; reals.len()];
        dequantize(dtype, &second, &mut twice);
        let most = once.iter().zip(&twice).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        // Scales of 8 bits, each for a few codes: some move by one.
        let step = if dtype == DType::Q6_K { 0.06 } else { 5e-3 };
        assert!(most < step, "{dtype}: {most}");
    }
}

#[test]
fn errors_are_near_the_least_possible() {
    // Measured on normal values; the plain scale (largest value met, no search) gives 0.0857 for q4_0.
    let reals = normal(64 * 128);
    let most = [
        (DType::Q4_0, 0.083),
        (DType::Q4_1, 0.076),
        (DType::Q5_0, 0.043),
        (DType::Q5_1, 0.038),
        (DType::Q8_0, 6e-3),
        (DType::INT4_G64, 0.095),
        (DType::INT4_G128, 0.105),
        (DType::UINT4_G32, 0.083),
        (DType::UINT4_G64, 0.092),
        (DType::UINT4_G128, 0.098),
        (DType::INT8_G64, 5.8e-3),
        (DType::INT8_G128, 6.3e-3),
        (DType::MXFP4, 0.115),
        (DType::NVFP4, 0.09),
        (DType::E4M3_G32, 0.026),
        (DType::E4M3_G128, 0.0265),
        (DType::Q4_K, 0.083),
        (DType::Q5_K, 0.043),
        (DType::Q6_K, 0.02),
    ];
    for (dtype, most) in most {
        let found = error(dtype, &reals);
        assert!(found < most, "{dtype}: {found}");
    }
}

#[test]
fn odd_groups() {
    for dtype in WRITERS.iter().map(|w| w.dtype) {
        let block = dtype.format().block;
        let mut spike = vec![0.0; block];
        spike[3] = -6.0; // a value that 4-bit floats have, under a power of two
        for reals in [vec![0.0; block], vec![0.25; block], spike] {
            let mut bytes = vec![0; dtype.bytes(block).unwrap()];
            quantize(dtype, &reals, &mut bytes).unwrap();
            let mut back = vec![1.0; block];
            dequantize(dtype, &bytes, &mut back);
            let off = reals.iter().zip(&back).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(off < 3e-3, "{dtype} {reals:?}: {back:?}");
        }
        let mut bytes = vec![0; dtype.bytes(block).unwrap()];
        assert!(quantize(dtype, &vec![f32::NAN; block], &mut bytes).is_err());
        assert!(quantize(dtype, &vec![1e30; block], &mut bytes).is_err());
    }
    assert!(quantize(DType::Q3_K, &[0.0; 256], &mut [0; 110]).is_err());
}

/// Rows of inputs that have much in common: a few directions, some columns larger than others.
fn inputs(seed: u64, columns: usize, rows: usize) -> Vec<f32> {
    let mut random = Random::new(seed);
    let directions: Vec<f32> = (0..4 * columns).map(|_| random.real()).collect();
    let size: Vec<f32> = (0..columns).map(|_| 0.2 + random.real().powi(4) * 4.0).collect();
    let mut out = vec![];
    for _ in 0..rows {
        let of: Vec<f32> = (0..4).map(|_| 2.0 * random.real()).collect();
        let common = |j: usize| of.iter().zip(directions[j..].iter().step_by(columns)).map(|(a, b)| a * b).sum::<f32>();
        out.extend((0..columns).map(|j| size[j] * (common(j) + 0.3 * random.real())).collect::<Vec<_>>());
    }
    out
}

/// Squared error of the results, and of the weights weighted with the mean square of their inputs.
fn felt(dtype: DType, weights: &[f32], bytes: &[u8], x: &[f32], columns: usize) -> (f64, f64) {
    let mut back = vec![0.0; weights.len()];
    dequantize(dtype, bytes, &mut back);
    let (mut results, mut weighted) = (0.0, 0.0);
    for (w, q) in weights.chunks_exact(columns).zip(back.chunks_exact(columns)) {
        for x in x.chunks_exact(columns) {
            let terms = || x.iter().zip(w.iter().zip(q)).map(|(x, (w, q))| f64::from(x * (w - q)));
            results += terms().sum::<f64>().powi(2);
            weighted += terms().map(|t| t * t).sum::<f64>();
        }
    }
    (results, weighted)
}

#[test]
fn errors_go_where_inputs_do_not_feel_them() {
    const COLUMNS: usize = 256;
    for dtype in WRITERS.iter().map(|w| w.dtype) {
        for seed in 0..3 {
            let x = inputs(seed, COLUMNS, 700);
            let weights = &normal(16 * COLUMNS + 100 * seed as usize)[100 * seed as usize..];
            let mut moments = Moments::new(COLUMNS);
            moments.add(&x, 2).unwrap();
            let run = |quantizer: Quantizer| {
                let mut out = vec![0; dtype.bytes(weights.len()).unwrap()];
                Prepared::new(quantizer, &moments, &[], 2)
                    .unwrap()
                    .quantize(dtype, COLUMNS, weights, &mut out)
                    .unwrap();
                out
            };
            let felt = |bytes: &[u8]| felt(dtype, weights, bytes, &x, COLUMNS);
            let (nearest, gptq) = (run(Quantizer::Nearest), run(Quantizer::Gptq));
            let mut plain = vec![0; nearest.len()];
            weights
                .chunks_exact(COLUMNS)
                .zip(plain.chunks_exact_mut(nearest.len() / 16))
                .for_each(|(row, out)| quantize(dtype, row, out).unwrap());
            assert_eq!(nearest, plain);
            assert_eq!(gptq, run(Quantizer::Gptq), "{dtype}: the same twice");
            assert!(felt(&gptq).0 < 0.5 * felt(&nearest).0, "{dtype} {seed}: {} {}", felt(&gptq).0, felt(&nearest).0);
            let weighted = felt(&run(Quantizer::Importance)).1;
            assert!(weighted < 1.05 * felt(&nearest).1, "{dtype} {seed}: {weighted} {}", felt(&nearest).1);
        }
    }
}

#[test]
fn odd_inputs_of_a_matrix() {
    let weights = normal(256);
    let mut out = vec![0; DType::Q4_0.bytes(256).unwrap()];
    // Inputs that are all nothing, or all alike, or fewer than columns.
    for x in [vec![0.0; 256], vec![1.0; 512], inputs(1, 256, 3)] {
        let mut moments = Moments::new(256);
        moments.add(&x, 3).unwrap();
        let prepared = Prepared::new(Quantizer::Gptq, &moments, &[], 1).unwrap();
        prepared.quantize(DType::Q4_0, 256, &weights, &mut out).unwrap();
        assert!(felt(DType::Q4_0, &weights, &out, &inputs(2, 256, 9), 256).0.is_finite());
        let error = prepared.quantize(DType::Q4_0, 256, &[f32::NAN; 256], &mut out).unwrap_err();
        assert!(error.to_string().contains("cannot be quantized"), "{error}");
        assert!(prepared.quantize(DType::INT4_G128, 192, &weights[..192], &mut [0; 99]).is_err());
    }
    let mut moments = Moments::new(256);
    moments.add(&[f32::INFINITY; 256], 1).unwrap();
    for quantizer in [Quantizer::Importance, Quantizer::Gptq] {
        assert!(Prepared::new(quantizer, &moments, &[], 2).is_err());
    }
    let mut moments = Moments::new(100);
    moments.add(&[1.0; 100], 1).unwrap();
    let prepared = Prepared::new(Quantizer::Importance, &moments, &[], 1).unwrap();
    let error = prepared.quantize(DType::Q4_0, 100, &[1.0; 100], &mut out).unwrap_err();
    assert!(error.to_string().contains("whole groups"), "{error}");
}

#[test]
fn moments_are_sums_of_products() {
    let x = inputs(3, 96, 21);
    let (mut one, mut three) = (Moments::new(96), Moments::new(96));
    one.add(&x, 1).unwrap();
    three.add(&x, 3).unwrap();
    assert_eq!(one, three);
    let block = one.blocks().next().unwrap();
    for (i, j) in [(0, 0), (3, 95), (50, 50), (17, 40)] {
        let sum: f64 = x.chunks_exact(96).map(|x| f64::from(x[i]) * f64::from(x[j])).sum();
        assert!((f64::from(block.sums[i * 96 + j]) - sum).abs() < 1e-4 * (1.0 + sum.abs()), "{i} {j}");
    }
    assert!(block.shift.is_none() && one.add(&x[1..], 1).is_err());
    assert_eq!(Moments::new(0).blocks().count(), 0);
    let wide: Vec<_> = Moments::new(14336).blocks().map(|b| (b.range, b.sums.len())).collect();
    assert_eq!(wide, [(0..7168, 7168 * 7168), (7168..14336, 7168 * 7168)]);
}

#[test]
fn shifts_are_sums_of_products() {
    let (x, z) = (inputs(3, 200, 21), inputs(4, 200, 21));
    let (mut one, mut three) = (Moments::new(200), Moments::new(200));
    one.add_shifted(&x, &z, 1).unwrap();
    three.add_shifted(&x, &z, 3).unwrap();
    assert_eq!(one, three);
    let block = one.blocks().next().unwrap();
    for (i, j) in [(0, 0), (3, 195), (195, 3), (50, 50)] {
        let rows = x.chunks_exact(200).zip(z.chunks_exact(200));
        let sum: f64 = rows.map(|(x, z)| f64::from(z[i] - x[i]) * f64::from(x[j])).sum();
        assert!((f64::from(block.shift.unwrap()[i * 200 + j]) - sum).abs() < 1e-4 * (1.0 + sum.abs()), "{i} {j}");
    }
    assert!(one.add_shifted(&x, &z[200..], 1).is_err());
}

/// Inputs that have shifted: codes are chosen for the results that the others would have had.
#[test]
fn results_are_kept_where_inputs_have_shifted() {
    const COLUMNS: usize = 128;
    let z = inputs(5, COLUMNS, 600);
    // What a quantized matrix before might give: smaller, and each column with a little of its neighbour.
    let shifted = |row: &[f32]| (0..COLUMNS).map(|j| 0.8 * row[j] + 0.1 * row[(j + 1) % COLUMNS]).collect::<Vec<_>>();
    let x: Vec<f32> = z.chunks_exact(COLUMNS).flat_map(shifted).collect();
    let weights = normal(16 * COLUMNS);
    let (mut plain, mut aware) = (Moments::new(COLUMNS), Moments::new(COLUMNS));
    plain.add(&x, 1).unwrap();
    aware.add_shifted(&x, &z, 2).unwrap();
    let off = |moments: &Moments| {
        let mut out = vec![0; DType::Q4_0.bytes(weights.len()).unwrap()];
        let prepared = Prepared::new(Quantizer::Gptq, moments, &[], 2).unwrap();
        prepared.quantize(DType::Q4_0, COLUMNS, &weights, &mut out).unwrap();
        let mut back = vec![0.0; weights.len()];
        dequantize(DType::Q4_0, &out, &mut back);
        let product = |x: &[f32], w: &[f32]| x.iter().zip(w).map(|(x, w)| f64::from(x * w)).sum::<f64>();
        let mut sum = 0.0;
        for (w, q) in weights.chunks_exact(COLUMNS).zip(back.chunks_exact(COLUMNS)) {
            let pairs = z.chunks_exact(COLUMNS).zip(x.chunks_exact(COLUMNS));
            sum += pairs.map(|(z, x)| (product(z, w) - product(x, q)).powi(2)).sum::<f64>();
        }
        sum
    };
    assert!(off(&aware) < 0.2 * off(&plain), "{} {}", off(&aware), off(&plain));
}

/// Scaled columns: the error of results falls on inputs whose columns differ much, and is as `Moments::square` says.
#[test]
fn scaled_columns_disturb_results_less() {
    const COLUMNS: usize = 256;
    for dtype in [DType::INT4_G128, DType::UINT4_G64, DType::Q4_K] {
        let x = inputs(11, COLUMNS, 500);
        let mut moments = Moments::new(COLUMNS);
        moments.add(&x, 2).unwrap();
        let rows = normal(16 * COLUMNS);
        let row: Vec<f32> = rows[..COLUMNS].to_vec();
        let by_hand: f64 = x
            .chunks_exact(COLUMNS)
            .map(|x| x.iter().zip(&row).map(|(x, w)| f64::from(x * w)).sum::<f64>().powi(2))
            .sum();
        assert!((moments.square(&row) / by_hand - 1.0).abs() < 1e-3);
        let samples = [awq::Sample { dtype, rows: rows.clone() }];
        let Prepared::Awq(scales) = Prepared::new(Quantizer::Awq, &moments, &samples, 1).unwrap() else { panic!() };
        let felt_with = |scales: &[f32]| {
            let mut out = vec![0; dtype.bytes(rows.len()).unwrap()];
            Prepared::Awq(scales.to_vec()).quantize(dtype, COLUMNS, &rows, &mut out).unwrap();
            let mut back = vec![0.0; rows.len()];
            dequantize(dtype, &out, &mut back);
            back.iter_mut().zip(scales.iter().cycle()).for_each(|(q, s)| *q /= s);
            let off: Vec<f32> = back.iter().zip(&rows).map(|(q, w)| q - w).collect();
            off.chunks_exact(COLUMNS).map(|off| moments.square(off)).sum::<f64>()
        };
        let (plain, scaled) = (felt_with(&[1.0; COLUMNS]), felt_with(&scales));
        assert!(scaled < 0.95 * plain, "{dtype}: {scaled} {plain}");
    }
    let silent = Moments::new(64);
    let samples = [awq::Sample { dtype: DType::Q4_0, rows: normal(64) }];
    assert_eq!(awq::search(&silent, &samples).unwrap(), [1.0; 64]);
    assert!(awq::search(&silent, &[awq::Sample { dtype: DType::Q4_0, rows: vec![0.0; 63] }]).is_err());
}
