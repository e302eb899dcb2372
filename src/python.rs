//! `nqkv_rs._core`: argument checks, GIL, error mapping. Nothing else.

#[cfg(feature = "cuda")]
mod attend;
mod borrow;
mod cache;
#[cfg(feature = "cuda")]
mod cuda;
#[cfg(feature = "cuda")]
mod cuda_cache;
#[cfg(feature = "cuda")]
mod device;
mod file;
mod flat;
mod transform;

use pyo3::exceptions::{PyNotImplementedError, PyRuntimeError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::error::Error;
use crate::scheme::Scheme;

impl From<Error> for PyErr {
    fn from(e: Error) -> Self {
        let text = e.to_string();
        match e {
            Error::Shape { .. } | Error::Value { .. } | Error::NonFinite { .. } | Error::File { .. } => {
                PyValueError::new_err(text)
            }
            Error::Dtype { .. } | Error::Memory { .. } => PyTypeError::new_err(text),
            Error::Exhausted { .. } | Error::Cuda { .. } => PyRuntimeError::new_err(text),
            Error::Unsupported { .. } => PyNotImplementedError::new_err(text),
        }
    }
}

/// Checks a scheme's JSON form and returns it in canonical form.
#[pyfunction]
fn check_scheme(json: &str) -> PyResult<String> {
    Ok(Scheme::from_json(json)?.to_json())
}

/// The JSON form of a preset.
#[pyfunction]
fn preset(name: &str) -> PyResult<String> {
    Ok(Scheme::preset(name)?.to_json())
}

/// Names of the presets.
#[pyfunction]
fn presets() -> Vec<&'static str> {
    Scheme::presets().to_vec()
}

/// Levels of a codebook by name.
#[pyfunction]
fn codebook(name: &str) -> PyResult<Vec<f32>> {
    Ok(crate::codebook::Codebook::parse(name)?.levels().to_vec())
}

/// What the CPU offers and which code path runs on it.
#[pyfunction]
fn cpu_features(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    let d = PyDict::new(py);
    #[cfg(target_arch = "x86_64")]
    {
        d.set_item("avx2", is_x86_feature_detected!("avx2"))?;
        d.set_item("fma", is_x86_feature_detected!("fma"))?;
        d.set_item("f16c", is_x86_feature_detected!("f16c"))?;
        d.set_item("avx512f", is_x86_feature_detected!("avx512f"))?;
        d.set_item("avx512bw", is_x86_feature_detected!("avx512bw"))?;
        d.set_item("avx512vnni", is_x86_feature_detected!("avx512vnni"))?;
    }
    d.set_item("threads", rayon::current_num_threads())?;
    d.set_item("path", crate::attention::cpu_path())?;
    Ok(d)
}

/// The extension module.
#[pymodule]
mod _core {
    #[cfg(feature = "cuda")]
    #[pymodule_export]
    use super::attend::{cuda_attend, cuda_attend_workspace, cuda_newest_are_exact, cuda_stream};
    #[pymodule_export]
    use super::cache::LayerCache;
    #[cfg(feature = "cuda")]
    #[pymodule_export]
    use super::cuda::{cuda_dequantize, cuda_device, cuda_driver_version, cuda_quantize, cuda_status, cuda_warm_up};
    #[cfg(feature = "cuda")]
    #[pymodule_export]
    use super::cuda_cache::CudaLayerCache;
    #[pymodule_export]
    use super::file::{SavedCache, save};
    #[pymodule_export]
    use super::flat::{dequantize, quantize, quantized_sizes};
    #[cfg(feature = "cuda")]
    #[pymodule_export]
    use super::transform::on_device::cuda_transform;
    #[pymodule_export]
    use super::transform::transform;
    #[pymodule_export]
    use super::{check_scheme, codebook, cpu_features, preset, presets};

    use pyo3::prelude::*;

    #[pymodule_init]
    fn init(m: &Bound<'_, PyModule>) -> PyResult<()> {
        m.add("__version__", env!("CARGO_PKG_VERSION"))?;
        m.add("FILE_FORMAT", crate::file::FORMAT)?;
        m.add("PAGE_TOKENS", crate::page::PAGE_TOKENS)?;
        m.add("PAGE_VERSION", crate::page::PAGE_VERSION)
    }
}
