//! The table of entry points: which PTX holds a kernel, under which name.

/// PTX of one source in `cuda/`.
pub(super) struct Source {
    pub(super) name: &'static str,
    pub(super) ptx: &'static str,
}

macro_rules! kernels {
    ($($source:literal: [$($kernel:ident = $name:literal),+ $(,)?]),+ $(,)?) => {
        /// Every kernel.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        #[allow(missing_docs, reason = "the names say it")]
        pub enum Kernel {
            $($($kernel,)+)+
        }

        pub(super) static SOURCES: [Source; [$($source),+].len()] =
            [$(Source { name: $source, ptx: include_str!(concat!("../../cuda/ptx/", $source, ".ptx")) }),+];

        /// All of them, in the order of the enum.
        pub(super) const KERNELS: &[Kernel] = &[$($(Kernel::$kernel,)+)+];

        impl Kernel {
            /// The entry point.
            pub(super) fn name(self) -> &'static str {
                match self {
                    $($(Self::$kernel => $name,)+)+
                }
            }

            /// Index of its source.
            pub(super) fn source(self) -> usize {
                let file = match self {
                    $($(Self::$kernel)|+ => $source,)+
                };
                SOURCES.iter().position(|s| s.name == file).expect("a source of the table")
            }
        }
    };
}

kernels! {
    "flat": [
        FlatQuantizeF32 = "flat_quantize_f32",
        FlatQuantizeF16 = "flat_quantize_f16",
        FlatQuantizeBf16 = "flat_quantize_bf16",
        FlatQuantizeFieldsF32 = "flat_quantize_fields_f32",
        FlatQuantizeFieldsF16 = "flat_quantize_fields_f16",
        FlatQuantizeFieldsBf16 = "flat_quantize_fields_bf16",
        FlatDequantizeF32 = "flat_dequantize_f32",
        FlatDequantizeF16 = "flat_dequantize_f16",
        FlatDequantizeBf16 = "flat_dequantize_bf16",
        FlatFieldsAnyF32 = "flat_fields_any_f32",
        FlatFieldsAnyF16 = "flat_fields_any_f16",
        FlatFieldsAnyBf16 = "flat_fields_any_bf16",
        FlatCodesAnyF32 = "flat_codes_any_f32",
        FlatCodesAnyF16 = "flat_codes_any_f16",
        FlatCodesAnyBf16 = "flat_codes_any_bf16",
        FlatValuesAnyF32 = "flat_values_any_f32",
        FlatValuesAnyF16 = "flat_values_any_f16",
        FlatValuesAnyBf16 = "flat_values_any_bf16",
    ],
    "append": [
        AppendF16 = "append_f16",
        AppendBf16 = "append_bf16",
        AppendTransformedF16 = "append_transformed_f16",
        AppendTransformedBf16 = "append_transformed_bf16",
    ],
    "append_any": [
        AppendAnyF16 = "append_any_f16",
        AppendAnyBf16 = "append_any_bf16",
        AppendAnyTransformedF16 = "append_any_transformed_f16",
        AppendAnyTransformedBf16 = "append_any_transformed_bf16",
    ],
    "append_slots": [
        AppendSlotsF16 = "append_slots_f16",
        AppendSlotsBf16 = "append_slots_bf16",
        AppendSlotsTransformedF16 = "append_slots_transformed_f16",
        AppendSlotsTransformedBf16 = "append_slots_transformed_bf16",
    ],
    "pages": [
        PagesSeal = "pages_seal",
        PagesAppend = "pages_append",
        PagesAppendTransformed = "pages_append_transformed",
        PagesRead = "pages_read",
        PagesSet = "pages_set",
    ],
    "prompt": [
        PromptChannelsF16 = "prompt_channels_f16",
        PromptChannelsBf16 = "prompt_channels_bf16",
        PromptKeysF16 = "prompt_keys_f16",
        PromptKeysBf16 = "prompt_keys_bf16",
        PromptValuesF16 = "prompt_values_f16",
        PromptValuesBf16 = "prompt_values_bf16",
    ],
    "seal": [
        SealChannelsF16 = "seal_channels_f16",
        SealChannelsBf16 = "seal_channels_bf16",
        SealKeysF16 = "seal_keys_f16",
        SealKeysBf16 = "seal_keys_bf16",
        SealValuesF16 = "seal_values_f16",
        SealValuesBf16 = "seal_values_bf16",
    ],
    "transform": [TransformRows = "transform_rows"],
    "read": [
        ReadF32 = "read_f32",
        ReadF16 = "read_f16",
        ReadBf16 = "read_bf16",
    ],
}

/// Transformed tokens of an append that goes the general way.
pub(super) const TRANSFORMED_BYTES: usize = 60 << 10;

impl Kernel {
    /// Dynamic shared memory that a launch may ask for.
    pub(super) fn shared_bytes(self) -> usize {
        match self {
            // The table of cells, then eight warps' stages.
            Self::PromptChannelsF16
            | Self::PromptChannelsBf16
            | Self::PromptKeysF16
            | Self::PromptKeysBf16
            | Self::PromptValuesF16
            | Self::PromptValuesBf16 => 16384 + 8 * 8192,
            // The table of cells, then eight warps' three strips of 2048 bytes.
            Self::SealChannelsF16
            | Self::SealChannelsBf16
            | Self::SealKeysF16
            | Self::SealKeysBf16
            | Self::SealValuesF16
            | Self::SealValuesBf16 => 16384 + 8 * 3 * 2048,
            // Two tables of codes, then two halves of a page and its codes for each group.
            Self::AppendF16
            | Self::AppendBf16
            | Self::AppendTransformedF16
            | Self::AppendTransformedBf16
            | Self::AppendAnyF16
            | Self::AppendAnyBf16
            | Self::AppendAnyTransformedF16
            | Self::AppendAnyTransformedBf16 => usize::MAX,
            // Beside its 33 KB of other shared memory, where a block may have 99.
            Self::PagesAppendTransformed => TRANSFORMED_BYTES,
            _ => 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kernel_is_in_its_ptx() {
        for (i, kernel) in KERNELS.iter().enumerate() {
            assert_eq!(*kernel as usize, i);
            let entry = format!(".entry {}(", kernel.name());
            assert!(SOURCES[kernel.source()].ptx.contains(&entry), "{}", kernel.name());
        }
        for source in &SOURCES {
            assert!(source.ptx.contains(".version 8.0") && source.ptx.contains(".target sm_80"), "{}", source.name);
            let known = KERNELS.iter().filter(|k| SOURCES[k.source()].name == source.name).count();
            assert_eq!(source.ptx.matches(".entry ").count(), known, "{}: a kernel that nobody calls", source.name);
        }
    }
}
