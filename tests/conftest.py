"""Shared by all tests: the gpu marker skips itself."""

from __future__ import annotations

import pytest

import nqkv_rs

# Its assertions say what they compared, as those of test files do.
pytest.register_assert_rewrite("cuda_attend")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if nqkv_rs.cuda_is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device, or no CUDA kernels in this build")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
