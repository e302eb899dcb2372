//! Quantized KV caches for transformer inference. The data flows through the modules in this order:
//!
//! `transform` (on the way in) -> `codebook`, `codec`, `pack` (numbers and codes) -> `flat` (whole tensors) -> `scheme` (the
//! recipe) -> `page` (the byte layout) -> `seal` (numbers into pages and back) -> `cache` (tables, tail, sinks) -> `attention`
//! (on codes).

pub mod attention;
pub mod cache;
pub mod codebook;
pub mod codec;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod dlpack;
pub mod error;
pub mod file;
pub mod flat;
pub mod pack;
pub mod page;
mod parallel;
pub mod scheme;
pub mod seal;
pub mod tensor;
pub mod transform;

#[cfg(feature = "python")]
mod python;

/// Compiles and runs the Rust of the quickstart.
#[cfg(doctest)]
#[doc = include_str!("../docs/quickstart.md")]
pub struct Quickstart;
