//! How each format's block comes apart: its bytes become codes, scales and minima (or zero points).
//!
//! ```text
//! q4_1   d m | 16 bytes of two codes   -->   codes[0..32], scales = [d], mins = [m]
//! ```

use super::Split;

fn f16(b: &[u8]) -> f32 {
    half::f16::from_le_bytes([b[0], b[1]]).to_f32()
}

/// Low nibbles are the first half of the elements, high nibbles the second.
fn nibbles(bytes: &[u8], codes: &mut [u8]) {
    let (first, second) = codes.split_at_mut(codes.len() / 2);
    for ((b, low), high) in bytes.iter().zip(first).zip(second) {
        *low = b & 15;
        *high = b >> 4;
    }
}

/// Bit `i` of the 32-bit word is the fifth bit of element `i`.
fn fifth_bits(bytes: &[u8], codes: &mut [u8]) {
    let word = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    for (i, code) in codes.iter_mut().enumerate() {
        *code |= ((word >> i & 1) as u8) << 4;
    }
}

pub fn q4_0(b: &[u8], s: Split<'_>) {
    s.scales[0] = f16(b);
    nibbles(&b[2..], s.codes);
}

/// Halves of the block have a scale each.
pub fn two_scales(b: &[u8], s: Split<'_>) {
    s.scales[0] = f16(b);
    s.scales[1] = f16(&b[2..]);
    nibbles(&b[4..], s.codes);
}

pub fn q4_1(b: &[u8], s: Split<'_>) {
    s.scales[0] = f16(b);
    s.mins[0] = f16(&b[2..]);
    nibbles(&b[4..], s.codes);
}

pub fn q5_0(b: &[u8], s: Split<'_>) {
    s.scales[0] = f16(b);
    nibbles(&b[6..], s.codes);
    fifth_bits(&b[2..], s.codes);
}

pub fn q5_1(b: &[u8], s: Split<'_>) {
    s.scales[0] = f16(b);
    s.mins[0] = f16(&b[2..]);
    nibbles(&b[8..], s.codes);
    fifth_bits(&b[4..], s.codes);
}

pub fn q8_0(b: &[u8], s: Split<'_>) {
    s.scales[0] = f16(b);
    for (code, b) in s.codes.iter_mut().zip(&b[2..]) {
        *code = b ^ 0x80; // signed byte + 128
    }
}

pub fn e4m3(b: &[u8], s: Split<'_>) {
    s.scales[0] = f16(b);
    s.codes.copy_from_slice(&b[2..]);
}

pub fn q2_k(b: &[u8], s: Split<'_>) {
    let (d, dmin) = (f16(&b[80..]), f16(&b[82..]));
    for (g, packed) in b[..16].iter().enumerate() {
        s.scales[g] = d * (packed & 15) as f32;
        s.mins[g] = -dmin * (packed >> 4) as f32;
    }
    for (i, code) in s.codes.iter_mut().enumerate() {
        let (half, within) = (i / 128, i % 128);
        *code = b[16 + half * 32 + within % 32] >> (2 * (within / 32)) & 3;
    }
}

pub fn q3_k(b: &[u8], s: Split<'_>) {
    let d = f16(&b[108..]);
    for g in 0..16 {
        // Twelve bytes hold sixteen 6-bit scales: low nibbles in the first eight, high pairs in the last four.
        let low = if g < 8 { b[96 + g] & 15 } else { b[96 + g - 8] >> 4 };
        let high = b[104 + g % 4] >> (2 * (g / 4)) & 3;
        s.scales[g] = d * ((low | high << 4) as f32 - 32.0);
    }
    for (i, code) in s.codes.iter_mut().enumerate() {
        let (half, within) = (i / 128, i % 128);
        let low = b[32 + half * 32 + within % 32] >> (2 * (within / 32)) & 3;
        let high = b[within % 32] >> (half * 4 + within / 32) & 1;
        *code = low | high << 2;
    }
}

/// Eight 6-bit scales and eight 6-bit minima in twelve bytes, shared by Q4_K and Q5_K.
fn scales_and_mins(b: &[u8], s: &mut Split<'_>) {
    let (d, dmin, q) = (f16(b), f16(&b[2..]), &b[4..16]);
    for g in 0..8 {
        let (scale, min) = if g < 4 {
            (q[g] & 63, q[g + 4] & 63)
        } else {
            (q[g + 4] & 15 | q[g - 4] >> 6 << 4, q[g + 4] >> 4 | q[g] >> 6 << 4)
        };
        s.scales[g] = d * scale as f32;
        s.mins[g] = -dmin * min as f32;
    }
}

pub fn q4_k(b: &[u8], mut s: Split<'_>) {
    scales_and_mins(b, &mut s);
    for (i, code) in s.codes.iter_mut().enumerate() {
        *code = b[16 + i / 64 * 32 + i % 32] >> (4 * (i / 32 % 2)) & 15;
    }
}

pub fn q5_k(b: &[u8], mut s: Split<'_>) {
    scales_and_mins(b, &mut s);
    for (i, code) in s.codes.iter_mut().enumerate() {
        let low = b[48 + i / 64 * 32 + i % 32] >> (4 * (i / 32 % 2)) & 15;
        *code = low | (b[16 + i % 32] >> (i / 32) & 1) << 4;
    }
}

pub fn q6_k(b: &[u8], s: Split<'_>) {
    let d = f16(&b[208..]);
    for g in 0..16 {
        s.scales[g] = d * b[192 + g] as i8 as f32;
    }
    for (i, code) in s.codes.iter_mut().enumerate() {
        let (half, within) = (i / 128, i % 128);
        let low = b[half * 64 + within % 64] >> (4 * (within / 64)) & 15;
        let high = b[128 + half * 32 + within % 32] >> (2 * (within / 32)) & 3;
        *code = low | high << 4;
    }
}
