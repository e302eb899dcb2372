import os
from collections.abc import Sequence
from typing import Any, final

__all__ = [
    "FILE_FORMAT",
    "PAGE_TOKENS",
    "PAGE_VERSION",
    "LayerCache",
    "SavedCache",
    "__version__",
    "check_scheme",
    "codebook",
    "cpu_features",
    "cuda_dequantize",
    "cuda_device",
    "cuda_quantize",
    "cuda_status",
    "cuda_warm_up",
    "dequantize",
    "preset",
    "presets",
    "quantize",
    "quantized_sizes",
    "save",
]

__version__: str
FILE_FORMAT: int
PAGE_TOKENS: int
PAGE_VERSION: int

@final
class LayerCache:
    def __new__(
        cls,
        scheme: str,
        kv_heads: int,
        key_dim: int,
        value_dim: int,
        exact_dtype: str,
        batch: int,
    ) -> LayerCache: ...
    @property
    def page_bytes(self) -> int: ...
    @property
    def value_offset(self) -> int: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def exact_dtype(self) -> str: ...
    @property
    def batch(self) -> int: ...
    @property
    def rows(self) -> int: ...
    @property
    def free_rows(self) -> int: ...
    def tokens(self, sequence_index: int) -> int: ...
    def packed(self, sequence_index: int) -> int: ...
    def table(self, sequence_index: int) -> list[tuple[int, int]]: ...
    def rows_missing(self, tokens: int) -> int: ...
    def pool(self) -> list[Any]: ...
    def add_rows(self, pool: Any, at_least: int = 0) -> None: ...
    def check_append(self, k: Any, v: Any) -> None: ...
    def append(self, k: Any, v: Any) -> None: ...
    def try_append(self, k: Any, v: Any) -> int: ...
    def attend(
        self,
        q: Any,
        out: Any,
        scale: float,
        *,
        starts: Sequence[int] | None = None,
        fresh_k: Any | None = None,
        fresh_v: Any | None = None,
        window: int | None = None,
        soft_cap: float | None = None,
        lse: Any | None = None,
    ) -> tuple[int, int]: ...
    def read(self, sequence_index: int, start: int, k_out: Any, v_out: Any) -> None: ...
    def remove_newest(self, tokens: int) -> None: ...
    def select(self, indices: Sequence[int]) -> None: ...
    def crop(self, lengths: Sequence[int]) -> None: ...
    def fork(self) -> LayerCache: ...
    @staticmethod
    def join(parts: Sequence[LayerCache]) -> LayerCache: ...
    def reset(self) -> None: ...
    def memory(self) -> dict[str, int]: ...

@final
class SavedCache:
    def __new__(cls, bytes: Any) -> SavedCache: ...
    @property
    def header(self) -> str: ...
    def tensor(self, name: str) -> tuple[str, list[int], int, int]: ...
    def pages(self, layer: int) -> tuple[list[int], int, int]: ...
    def layer(self, layer: int, pool: Any) -> LayerCache: ...

def save(
    path: str | os.PathLike[str],
    model: str,
    layers: Sequence[LayerCache | tuple[str, Any, Any] | None],
) -> int: ...
def check_scheme(json: str) -> str: ...
def preset(name: str) -> str: ...
def presets() -> list[str]: ...
def codebook(name: str) -> list[float]: ...
def cpu_features() -> dict[str, Any]: ...
def quantized_sizes(
    shape: Sequence[int], codebook: str, block: int, scale: str, scale_dtype: str, flat: bool
) -> tuple[int, int]: ...
def quantize(
    x: Any,
    codes: Any,
    fields: Any,
    codebook: str,
    block: int,
    scale: str,
    scale_dtype: str,
    flat: bool,
    order: str,
) -> None: ...
def dequantize(
    codes: Any,
    fields: Any,
    out: Any,
    codebook: str,
    block: int,
    scale: str,
    scale_dtype: str,
    flat: bool,
    order: str,
) -> None: ...
def cuda_status() -> tuple[int, str | None]: ...
def cuda_device(ordinal: int) -> tuple[str, tuple[int, int], int]: ...
def cuda_warm_up(ordinal: int) -> None: ...
def cuda_quantize(
    x: Any,
    codes: Any,
    fields: Any,
    codebook: str,
    block: int,
    scale: str,
    scale_dtype: str,
    flat: bool,
    order: str,
    bad: Any | None = None,
) -> None: ...
def cuda_dequantize(
    codes: Any,
    fields: Any,
    out: Any,
    codebook: str,
    block: int,
    scale: str,
    scale_dtype: str,
    flat: bool,
    order: str,
) -> None: ...
