//! Packed bytes against the format table's own dequantization.

use super::*;
use crate::harness::{float_weight, quantized_weight};
use mansard_ir::decode;
use mansard_ir::eval::Value;
use mansard_ir::formats::FORMATS;
use mansard_ir::layout::packed_bytes;

fn packed(weight: &Weight, threads: usize) -> Vec<u8> {
    let mut bytes = vec![];
    pack(weight, threads, &mut |b| {
        bytes.extend_from_slice(b);
        Ok(())
    })
    .unwrap();
    let (dtype, shape) = weight.dtype_shape();
    assert_eq!(bytes.len(), packed_bytes(dtype, &shape));
    bytes
}

/// Packed `[n, k]` -> f32 rows, with those of the padding.
fn unpack(dtype: DType, k: usize, bytes: &[u8]) -> Vec<f32> {
    let rows = bytes.len() / StripLayout::new(dtype, k).bytes * STRIP;
    decode::weight(dtype, &[rows, k], bytes).unwrap().data.to_vec()
}

#[test]
fn every_quantized_format_survives() {
    for format in FORMATS.iter().filter(|f| f.int.is_some()) {
        let (n, k) = (37, 3 * format.block);
        let weight = quantized_weight(format.dtype, &[n, k], 7);
        let bytes = packed(&weight, 1);
        assert_eq!(bytes, packed(&weight, 3), "{}: threads change bytes", format.name);
        let (found, expected) = (unpack(format.dtype, k, &bytes), weight.read_all().unwrap());
        let most = expected.iter().fold(0f32, |m, x| m.max(x.abs()));
        for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
            // Scales and minima that the file keeps in several parts are rounded once, to f16.
            assert!((found - expected).abs() <= most * 2e-3, "{}[{i}]: {found}, not {expected}", format.name);
        }
        assert!(found[n * k..].iter().all(|x| *x == 0.0), "{}: padding", format.name);
        let exact = !format.name.ends_with("_k");
        assert!(!exact || found[..n * k] == expected, "{} is exact", format.name);
    }
}

#[test]
fn planes_survive() {
    let ty = mansard_ir::Type::tensor(DType::Q8_PLANES, [mansard_ir::Dim::N(21), mansard_ir::Dim::N(96)]);
    let weight = mansard_ir::sample::weight(&ty, &mut mansard_ir::sample::Random::new(7)).unwrap();
    let bytes = packed(&weight, 2);
    let Value::Planes(expected) = Value::of_weight(&weight).unwrap() else { panic!("no planes") };
    let Value::Planes(found) = decode::operand(DType::Q8_PLANES, &[21, 96], &bytes).unwrap() else {
        panic!("no planes")
    };
    assert!(found.lower == expected.lower && found.deviations == expected.deviations && found.shape == [21, 96]);
    let whole = decode::weight(DType::Q8_PLANES, &[21, 96], &bytes).unwrap();
    for (row, whole) in whole.rows().enumerate() {
        let near = |(x, y): (&f32, f32)| (x - y).abs() <= 1e-5 * y.abs().max(1.0);
        assert!(whole.iter().zip(expected.row(row)).all(near), "row {row}");
    }
    assert!(found.upper.iter().zip(expected.upper.iter()).all(|(x, y)| (x - y).abs() <= 1e-5 * y.abs().max(1.0)));
    assert!(decode::operand(DType::Q8_PLANES, &[21, 96], &bytes[64..]).is_err());
}

#[test]
fn floats_survive() {
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        let (n, k) = (21, 19);
        let weight = float_weight(dtype, &[n, k], 5);
        assert_eq!(unpack(dtype, k, &packed(&weight, 2))[..n * k], weight.read_all().unwrap());
    }
}

#[test]
fn experts_follow_one_another() {
    let (n, k) = (20, 64);
    let weight = quantized_weight(DType::Q4_1, &[3, n, k], 11);
    let (found, expected) = (unpack(DType::Q4_1, k, &packed(&weight, 2)), weight.read_all().unwrap());
    for expert in 0..3 {
        assert_eq!(found[expert * 32 * k..][..n * k], expected[expert * n * k..][..n * k]);
    }
}

#[test]
fn vectors_are_f32() {
    let weight = float_weight(DType::F16, &[5], 1);
    let bytes = packed(&weight, 2);
    let expected: Vec<u8> = weight.read_all().unwrap().iter().flat_map(|x| x.to_le_bytes()).collect();
    assert_eq!((&bytes[..20], &bytes[20..]), (&expected[..], &[0; 44][..]));
}

#[test]
fn what_cannot_be_packed_is_said() {
    let weight = float_weight(DType::F32, &[4, 256], 1);
    let as_k_quant = Weight {
        ty: mansard_ir::Type::tensor(DType::Q3_K, [mansard_ir::Dim::N(4), mansard_ir::Dim::N(256)]),
        ..weight
    };
    let error = pack(&as_k_quant, 1, &mut |_| Ok(())).unwrap_err();
    assert!(error.to_string().contains("is not stored as q3_k"), "{error}");
}
