//! How each format's codes are put into its blocks; the inverse of [`crate::formats`]' splits. Figures are there already.

fn nibbles(codes: &[u8], out: &mut [u8]) {
    let (first, second) = codes.split_at(codes.len() / 2);
    for ((out, low), high) in out.iter_mut().zip(first).zip(second) {
        *out = low & 15 | high << 4;
    }
}

fn fifth_bits(codes: &[u8], out: &mut [u8]) {
    let word = codes.iter().enumerate().fold(0u32, |word, (i, code)| word | u32::from(code >> 4 & 1) << i);
    out[..4].copy_from_slice(&word.to_le_bytes());
}

pub fn q4_0(codes: &[u8], out: &mut [u8]) {
    nibbles(codes, &mut out[2..]);
}

pub fn q4_1(codes: &[u8], out: &mut [u8]) {
    nibbles(codes, &mut out[4..]);
}

pub fn q5_0(codes: &[u8], out: &mut [u8]) {
    fifth_bits(codes, &mut out[2..]);
    nibbles(codes, &mut out[6..]);
}

pub fn q5_1(codes: &[u8], out: &mut [u8]) {
    fifth_bits(codes, &mut out[4..]);
    nibbles(codes, &mut out[8..]);
}

pub fn q8_0(codes: &[u8], out: &mut [u8]) {
    for (out, code) in out[2..].iter_mut().zip(codes) {
        *out = code ^ 0x80; // code - 128 as a signed byte
    }
}

pub fn e4m3(codes: &[u8], out: &mut [u8]) {
    out[2..].copy_from_slice(codes);
}

pub fn q4_k(codes: &[u8], out: &mut [u8]) {
    for (codes, out) in codes.chunks_exact(64).zip(out[16..].chunks_exact_mut(32)) {
        nibbles(codes, out);
    }
}

pub fn q5_k(codes: &[u8], out: &mut [u8]) {
    q4_k(codes, &mut out[32..]);
    out[16..48].fill(0);
    for (i, code) in codes.iter().enumerate() {
        out[16 + i % 32] |= (code >> 4 & 1) << (i / 32);
    }
}

pub fn q6_k(codes: &[u8], out: &mut [u8]) {
    out[..192].fill(0);
    for (i, code) in codes.iter().enumerate() {
        let (half, within) = (i / 128, i % 128);
        out[half * 64 + within % 64] |= (code & 15) << (4 * (within / 64));
        out[128 + half * 32 + within % 32] |= (code >> 4 & 3) << (2 * (within / 32));
    }
}
