//! Transforms of keys and values on their way in: the launch of `cuda/transform.cu`. Same bits as [`crate::transform`].

use std::ffi::c_void;

use super::codec::dtype_number;
use super::room::DeviceView;
use super::{Device, Kernel, Stream};
use crate::error::{Error, Result};
use crate::transform::{block_of, unit};

/// The parts of a transform on a device, as [`crate::transform::Transform`] has them; an address of 0 is none.
#[derive(Debug, Clone, Copy, Default)]
pub struct DeviceTransform {
    /// Cosines, float32 `[rope_batch][tokens][pairs]`.
    pub cos: u64,
    /// Sines.
    pub sin: u64,
    /// 1 if all sequences have the same positions.
    pub rope_batch: usize,
    /// Channels that turn, halved.
    pub pairs: usize,
    /// Pair `i` is channels `2 i` and `2 i + 1`; otherwise `i` and `pairs + i`.
    pub interleaved: bool,
    /// Subtracted, float32 `[heads][dim]`.
    pub centre: u64,
    /// Rotate.
    pub hadamard: bool,
}

/// `Transform` of `cuda/transform.cuh`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct TransformArgument {
    cos: u64,
    sin: u64,
    centre: u64,
    rope_batch: i32,
    tokens: i32,
    pairs: i32,
    interleaved: i32,
    block: i32,
    unit: f32,
}

/// `TransformArguments` of `cuda/transform.cu`.
#[repr(C)]
struct TransformArguments {
    x: u64,
    stride: [i64; 4],
    out: u64,
    transform: TransformArgument,
    batch: i32,
    heads: i32,
    tokens: i32,
    dim: i32,
    dtype: i32,
    out_dtype: i32,
}
const _: () = assert!(size_of::<TransformArgument>() == 48 && size_of::<TransformArguments>() == 48 + 48 + 24);

impl TransformArgument {
    /// Whether 8 numbers of a head that lie side by side turn or do not, and angles and centres can be read 16 bytes at a time.
    pub(super) fn by_eights(&self) -> bool {
        let aligned = [self.cos, self.sin, self.centre].iter().all(|address| address.is_multiple_of(16));
        aligned && self.pairs % 8 == 0
    }

    /// Channels that are rotated together; 0: none.
    pub(super) fn block(&self) -> usize {
        self.block as usize
    }
}

impl DeviceTransform {
    /// As kernels take it, for a `[batch, heads, tokens, dim]` tensor.
    pub(super) fn argument(&self, shape: [usize; 4]) -> Result<TransformArgument> {
        let [batch, _, tokens, dim] = shape;
        let fits = self.cos == 0 || ((self.rope_batch == 1 || self.rope_batch == batch) && 2 * self.pairs <= dim);
        if !fits || (self.cos == 0) != (self.sin == 0) {
            let expected = format!("cos and sin of [1 or {batch}, {tokens}, up to {}]", dim / 2);
            return Err(Error::shape("rope", expected, format!("[{}, {tokens}, {}]", self.rope_batch, self.pairs)));
        }
        if dim > 256 || (self.hadamard && block_of(dim) < 2) {
            return Err(Error::value("head size for a transform", "1 to 256, even for a Hadamard rotation", dim));
        }
        let block = if self.hadamard { block_of(dim) } else { 0 };
        Ok(TransformArgument {
            cos: self.cos,
            sin: self.sin,
            centre: self.centre,
            rope_batch: self.rope_batch as i32,
            tokens: tokens as i32,
            pairs: if self.cos == 0 { 0 } else { self.pairs as i32 },
            interleaved: i32::from(self.interleaved),
            block: block as i32,
            unit: unit(block.max(1)),
        })
    }

    /// Writes `x`, changed, to `out`, which is contiguous and of the same shape.
    ///
    /// # Safety
    /// Both are of memory of `device`, alive and unused by others until `stream` is past this; so are this transform's parts.
    pub unsafe fn apply(&self, device: &Device, stream: Stream, x: &DeviceView, out: &DeviceView) -> Result<()> {
        let [batch, heads, tokens, dim] = x.shape;
        if out.shape != x.shape {
            return Err(Error::shape("out", format!("{:?}", x.shape), format!("{:?}", out.shape)));
        }
        let mut a = TransformArguments {
            x: x.address,
            stride: x.strides.map(|s| s as i64),
            out: out.address,
            transform: self.argument(x.shape)?,
            batch: batch as i32,
            heads: heads as i32,
            tokens: tokens as i32,
            dim: dim as i32,
            dtype: dtype_number(x.dtype) as i32,
            out_dtype: dtype_number(out.dtype) as i32,
        };
        const WARPS: usize = 8;
        let blocks = (batch * heads * tokens).div_ceil(WARPS).min(8 * device.processors());
        let argument: *mut c_void = (&raw mut a).cast();
        // SAFETY: the caller's promise; the one parameter is this struct.
        unsafe { device.launch(Kernel::TransformRows, (blocks, 1, 1), 32 * WARPS, 0, stream, &mut [argument]) }
    }
}
