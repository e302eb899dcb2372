//! The kernels of `cuda/attend_*.cu`. A head size is compiled by the driver when it is first used: a process needs one or two.

use std::ffi::CString;
use std::sync::Mutex;

use cudarc::driver::{result, sys};

use super::widths::Widths;
use crate::cuda::driver::{Device, error};
use crate::error::Result;

/// What fields keys have, and which widths.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Keys {
    /// Scale and mean of each channel and page; values in blocks of 64 channels.
    Channel,
    /// One scale per token, values likewise.
    Token,
    /// Scale and zero point of each channel and 32 tokens, values of each token and 32 channels; codes of 4 or 2 bits.
    Grouped(u8),
    /// Two scales per token, values likewise: a block ends inside a head.
    Split,
    /// Other widths than 4 bits, with the fields of one of these.
    Wide(Widths, Fields),
}

/// What fields keys of other widths have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fields {
    /// As [`Keys::Channel`].
    Channel,
    /// As [`Keys::Token`].
    Token,
}

/// Which calls a kernel takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Calls {
    /// All.
    Any,
    /// One query of each sequence that attends everything, no cap, no log-sum-exp; queries, exact tokens and output in bfloat16.
    PlainBf16,
    /// The same in float16.
    PlainFp16,
}

/// Those that there are kernels for.
pub(super) fn calls_of(keys: Keys) -> &'static [Calls] {
    match keys {
        Keys::Wide(..) | Keys::Grouped(2) => &[Calls::Any],
        _ => &[Calls::Any, Calls::PlainBf16, Calls::PlainFp16],
    }
}

/// One PTX: a head size, for devices that copy pages in bulk (compute capability 9.0) or for all others.
struct Source {
    dim: usize,
    bulk: bool,
    ptx: &'static str,
    keys: &'static [Keys],
}

macro_rules! sources {
    ($($file:literal: $dim:literal $bulk:literal $keys:expr),+ $(,)?) => {
        const SOURCES: &[Source] = &[$(Source {
            dim: $dim,
            bulk: $bulk,
            ptx: include_str!(concat!("../../../cuda/ptx/", $file, ".ptx")),
            keys: $keys,
        }),+];
    };
}

const BOTH: &[Keys] = &[Keys::Channel, Keys::Token];
/// Keys and values of one width.
const fn even(bits: u8) -> [Keys; 2] {
    [Keys::Wide(Widths::Even(bits), Fields::Channel), Keys::Wide(Widths::Even(bits), Fields::Token)]
}
const W2: &[Keys] = &even(2);
const W3: &[Keys] = &even(3);
const W8: &[Keys] = &even(8);
const MIXED: &[Keys] = &[
    Keys::Wide(Widths::Mixed { value: 2 }, Fields::Channel),
    Keys::Wide(Widths::Mixed { value: 3 }, Fields::Channel),
    Keys::Wide(Widths::Mixed { value: 4 }, Fields::Channel),
];
const MIXED8: &[Keys] =
    &[Keys::Wide(Widths::Mixed8 { value: 4 }, Fields::Channel), Keys::Wide(Widths::Mixed8 { value: 8 }, Fields::Channel)];
const GROUPED: &[Keys] = &[Keys::Grouped(4), Keys::Grouped(2)];
const SPLIT: &[Keys] = &[Keys::Split];
sources! {
    "attend_64": 64 false BOTH,
    "attend_64_sm90": 64 true BOTH,
    "attend_80": 80 false &[Keys::Channel],
    "attend_80_sm90": 80 true &[Keys::Channel],
    "attend_96": 96 false &[Keys::Channel],
    "attend_96_sm90": 96 true &[Keys::Channel],
    "attend_128": 128 false BOTH,
    "attend_128_sm90": 128 true BOTH,
    "attend_256_sm90": 256 true BOTH,
    "attend_w2_64": 64 false W2,
    "attend_w2_64_sm90": 64 true W2,
    "attend_w3_64": 64 false W3,
    "attend_w3_64_sm90": 64 true W3,
    "attend_w8_64": 64 false W8,
    "attend_mixed_64_sm90": 64 true MIXED,
    "attend_mixed8_64_sm90": 64 true MIXED8,
    "attend_w2_128": 128 false W2,
    "attend_w2_128_sm90": 128 true W2,
    "attend_w3_128": 128 false W3,
    "attend_w3_128_sm90": 128 true W3,
    "attend_w8_128": 128 false W8,
    "attend_mixed_128_sm90": 128 true MIXED,
    "attend_mixed8_128_sm90": 128 true MIXED8,
    "attend_kivi_64": 64 false GROUPED,
    "attend_kivi_64_sm90": 64 true GROUPED,
    "attend_kivi_128": 128 false GROUPED,
    "attend_kivi_128_sm90": 128 true GROUPED,
    "attend_split_64": 64 false SPLIT,
    "attend_split_64_sm90": 64 true SPLIT,
    "attend_split_80": 80 false SPLIT,
    "attend_split_80_sm90": 80 true SPLIT,
    "attend_split_96": 96 false SPLIT,
    "attend_split_96_sm90": 96 true SPLIT,
    "attend_split_128": 128 false SPLIT,
    "attend_split_128_sm90": 128 true SPLIT,
}

/// Head sizes that there are kernels for.
pub(super) fn dims(keys: Keys, bulk: bool) -> Vec<usize> {
    SOURCES.iter().filter(|s| s.bulk == bulk && s.keys.contains(&keys)).map(|s| s.dim).collect()
}

/// A kernel as the driver knows it.
#[derive(Clone, Copy)]
pub(super) struct Function(pub(super) sys::CUfunction);
// SAFETY: a handle that the driver lets any thread use; its module is never unloaded.
unsafe impl Send for Function {}

/// Loaded ones, by device and kernel.
type Loaded = Vec<((usize, usize, Keys, bool, Calls), Function)>;
static LOADED: Mutex<Loaded> = Mutex::new(Vec::new());

fn name(keys: Keys, dim: usize, calls: Calls) -> String {
    let calls = match calls {
        Calls::Any => "",
        Calls::PlainBf16 => "_bf16",
        Calls::PlainFp16 => "_fp16",
    };
    match keys {
        Keys::Channel => format!("attend_channel_{dim}{calls}"),
        Keys::Token => format!("attend_token_{dim}{calls}"),
        Keys::Grouped(4) => format!("attend_kivi_{dim}{calls}"),
        Keys::Grouped(bits) => format!("attend_kivi_k{bits}v{bits}_{dim}"),
        Keys::Split => format!("attend_split_{dim}{calls}"),
        Keys::Wide(Widths::Even(bits), Fields::Channel) => format!("attend_channel_k{bits}v{bits}_{dim}"),
        Keys::Wide(Widths::Even(bits), Fields::Token) => format!("attend_token_k{bits}v{bits}_{dim}"),
        Keys::Wide(Widths::Mixed { value }, _) => format!("attend_mixed_v{value}_{dim}"),
        Keys::Wide(Widths::Mixed8 { value }, _) => format!("attend_mixed8_v{value}_{dim}"),
    }
}

/// The kernel, loaded if it was not; `shared` is the most dynamic shared memory that a launch asks for.
pub(super) fn function(device: &Device, (keys, calls): (Keys, Calls), dim: usize, bulk: bool, shared: usize) -> Result<Function> {
    let key = (device.ordinal(), dim, keys, bulk, calls);
    let mut loaded = LOADED.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    if let Some((_, found)) = loaded.iter().find(|(k, _)| *k == key) {
        return Ok(*found);
    }
    device.bind()?;
    let found = |s: &&Source| s.dim == dim && s.bulk == bulk && s.keys.contains(&keys);
    let source = SOURCES.iter().find(found).expect("a head size of the table");
    let image = CString::new(source.ptx).expect("PTX has no NUL");
    // SAFETY: NUL-terminated PTX.
    let module = unsafe { result::module::load_data(image.as_ptr().cast()) }.map_err(error("loading attention"))?;
    for (&keys, &calls) in source.keys.iter().flat_map(|keys| calls_of(*keys).iter().map(move |calls| (keys, calls))) {
        let entry = CString::new(name(keys, dim, calls)).expect("names have no NUL");
        // SAFETY: a module that was just loaded in the current context, and is never unloaded.
        let function = unsafe { result::module::get_function(module, entry) }.map_err(error("attention kernel"))?;
        let limit = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: a loaded function.
        unsafe { result::function::set_function_attribute(function, limit, shared as i32) }
            .map_err(error("shared memory of attention"))?;
        loaded.push(((device.ordinal(), dim, keys, bulk, calls), Function(function)));
    }
    let found = loaded.iter().find(|(k, _)| *k == key).expect("a kernel of the table");
    Ok(found.1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kernel_is_in_its_ptx() {
        for source in SOURCES {
            let target = if source.bulk { ".target sm_90\n" } else { ".target sm_80\n" };
            assert!(source.ptx.contains(".version 8.0") && source.ptx.contains(target), "{}", source.dim);
            for (&keys, &calls) in source.keys.iter().flat_map(|keys| calls_of(*keys).iter().map(move |calls| (keys, calls))) {
                assert!(source.ptx.contains(&format!(".entry {}(", name(keys, source.dim, calls))), "{}", source.dim);
            }
            assert_eq!(
                source.ptx.matches(".entry ").count(),
                source.keys.iter().map(|&keys| calls_of(keys).len()).sum::<usize>()
            );
        }
    }
}
