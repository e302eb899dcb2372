//! DLPack tensors that a hostile producer describes; where the description stays inside real memory, every element is read.

use nqkv_rs::dlpack::{DlDataType, DlDevice, DlTensor, Element, TensorRef};
use nqkv_rs::tensor::Dtype;

use crate::common::Random;

fn odd_extent(random: &mut Random) -> i64 {
    match random.below(12) {
        0 => -1,
        1 => i64::MAX,
        2 => i64::MIN,
        3 => 1 << 31,
        4 => 1 << 62,
        5 => 0,
        _ => random.below(6) as i64,
    }
}

/// One input; true if it was accepted.
pub fn input(random: &mut Random) -> bool {
    let memory = vec![0u8; 4096];
    let hostile = random.one_in(2);
    let ndim = if hostile { *random.pick(&[-1, 0, 1, 2, 3, 4, 5, 8, 64, 65, i32::MAX, i32::MIN]) } else { 4 };
    let slots = usize::try_from(ndim).unwrap_or(0).min(64);
    let extent = |wild: bool, random: &mut Random| if wild { odd_extent(random) } else { random.below(5) as i64 };
    let shape: Vec<i64> = (0..slots).map(|_| extent(hostile && random.one_in(3), random)).collect();
    let strides: Vec<i64> = (0..slots).map(|_| extent(hostile && random.one_in(3), random)).collect();
    let dtypes = [(2, 64), (2, 32), (2, 16), (4, 16), (1, 8), (0, 8), (5, 64), (6, 8), (2, 0), (255, 255)];
    let (code, bits) = if hostile { *random.pick(&dtypes) } else { *random.pick(&dtypes[..5]) };
    let byte_offset = if hostile { *random.pick(&[0, 2, 3, u64::MAX, 1 << 63, 1 << 40]) } else { random.below(3) as u64 };
    let tensor = DlTensor {
        data: if hostile && random.one_in(5) { std::ptr::null_mut() } else { memory.as_ptr().cast_mut().cast() },
        device: DlDevice {
            kind: if hostile && random.one_in(5) { random.below(20) as i32 } else { 1 },
            id: random.below(2) as i32,
        },
        ndim,
        dtype: DlDataType { code, bits, lanes: if hostile && random.one_in(6) { random.below(4) as u16 } else { 1 } },
        shape: if hostile && random.one_in(8) { std::ptr::null() } else { shape.as_ptr() },
        strides: if random.one_in(3) { std::ptr::null() } else { strides.as_ptr() },
        byte_offset,
    };
    // SAFETY: `ndim` entries wherever it is not refused.
    let Ok(t) = (unsafe { TensorRef::new("x", &tensor, random.one_in(2)) }) else { return false };
    let _ = (t.check_contiguous("x"), t.check_output("x", &[1, 2]), t.is_empty());
    let size = match t.element {
        Element::Float(d) => d.bytes(),
        Element::U8 => 1,
    };
    let reach = |sign: i128| -> i128 {
        if t.is_empty() {
            return 0;
        }
        let steps = t.shape.iter().zip(&t.strides).map(|(&n, &s)| (n as i128 - 1) * s as i128 * sign);
        steps.filter(|r| *r > 0).sum::<i128>() * size as i128
    };
    let start = t.data as i128 - memory.as_ptr() as i128;
    let inside = start - reach(-1) >= 0 && start + reach(1) + size as i128 <= memory.len() as i128;
    // SAFETY: read only where every element lies inside `memory`.
    let Ok(view) = (unsafe { t.view("x") }) else { return true };
    if inside && !t.is_empty() && t.len() < 4096 {
        let mut row = vec![0; t.shape[3] * 4];
        for b in 0..t.shape[0] {
            for h in 0..t.shape[1] {
                for n in 0..t.shape[2] {
                    view.copy_row(b, h, n, Dtype::F32, &mut row);
                }
            }
        }
        view.check_finite("x", Dtype::F16).unwrap();
    }
    true
}
