"""What a scheme costs in quality, measured on text that really went through its cache."""

from __future__ import annotations

from .._extras import require

# The modules below need both; say what to install before they fail on their own imports.
require("torch", "eval")
require("transformers", "eval")

from .divergence import (  # noqa: E402
    Fp8Cache,
    Result,
    divergence,
    divergences,
    long_text,
    text_sha256,
    windows,
)

__all__ = [
    "Fp8Cache",
    "Result",
    "divergence",
    "divergences",
    "long_text",
    "text_sha256",
    "windows",
]
