"""DLPack producers built by hand, whose every word can be chosen; deletions are counted."""

from __future__ import annotations

import ctypes
import dataclasses
from typing import Any

import ml_dtypes
import numpy as np

__all__ = ["DTYPES", "Array", "address", "alive", "deleted"]


class Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
    )


class Managed(ctypes.Structure):
    _fields_ = (
        ("tensor", Tensor),
        ("manager", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    )


class Versioned(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", Tensor),
    )


DELETER = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
NEW = ctypes.pythonapi.PyCapsule_New
NEW.restype, NEW.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
POINTER = ctypes.pythonapi.PyCapsule_GetPointer
POINTER.restype, POINTER.argtypes = ctypes.c_void_p, (ctypes.c_void_p, ctypes.c_char_p)
NAME = ctypes.pythonapi.PyCapsule_GetName
NAME.restype, NAME.argtypes = ctypes.c_char_p, (ctypes.c_void_p,)

# Structures that capsules point to, until their deleter runs; how often it ran, by address.
alive: dict[int, Any] = {}
deleted: dict[int, int] = {}


@DELETER
def delete(address: int) -> None:
    deleted[address] = deleted.get(address, 0) + 1
    alive.pop(address, None)


@DELETER
def destruct(capsule: int) -> None:
    # As producers do it: a capsule that was consumed (renamed) is the consumer's to delete. Those
    # of another name from the start are nobody's.
    name = NAME(capsule)
    delete(POINTER(capsule, name))


def address(x: Any) -> int:
    return ctypes.cast(x, ctypes.c_void_p).value or 0


DTYPES: dict[str, tuple[int, int, Any]] = {
    "float64": (2, 64, np.float64),
    "float32": (2, 32, np.float32),
    "float16": (2, 16, np.float16),
    "bfloat16": (4, 16, ml_dtypes.bfloat16),
}


@dataclasses.dataclass
class Array:
    """An object with ``__dlpack__`` whose every word can be chosen."""

    memory: np.ndarray
    dtype_name: str = "float32"
    extents: tuple[int, ...] = ()
    steps: tuple[int, ...] | None = None
    offset: int = 0
    minor: int | None = 0
    flags: int = 0
    change: dict[str, Any] = dataclasses.field(default_factory=dict)
    made: list[int] = dataclasses.field(default_factory=list)

    def __dlpack_device__(self) -> Any:
        answer = self.change.get("says", (1, 0))
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def __dlpack__(self, **how: Any) -> Any:
        if "returns" in self.change:
            answer = self.change["returns"]
            if isinstance(answer, BaseException):
                raise answer
            return answer
        if self.minor is None and how:
            raise TypeError("__dlpack__() got an unexpected keyword argument")
        code, bits, _ = DTYPES[self.dtype_name]
        arrays = [(ctypes.c_int64 * max(len(x), 1))(*x) for x in (self.extents, self.steps or ())]
        words = {
            "data": self.memory.ctypes.data,
            "device_type": 1,
            "device_id": 0,
            "ndim": len(self.extents),
            "code": code,
            "bits": bits,
            "lanes": 1,
            "shape": address(arrays[0]),
            "strides": None if self.steps is None else address(arrays[1]),
            "byte_offset": self.offset,
        }
        words |= {k: v for k, v in self.change.items() if k in words}
        ends = {"manager": None, "deleter": address(delete)}
        whole: Any
        if self.minor is None:
            whole, name = Managed(tensor=Tensor(**words), **ends), b"dltensor"
        else:
            version = {"major": self.change.get("major", 1), "minor": self.minor}
            whole = Versioned(tensor=Tensor(**words), flags=self.flags, **version, **ends)
            name = b"dltensor_versioned"
        name = self.change.get("name", name)
        at = ctypes.addressof(whole)
        deleted.pop(at, None)
        alive[at] = (whole, arrays, self.memory, name)
        self.made.append(at)
        return NEW(at, name, address(destruct))

    def numpy(self) -> np.ndarray:
        """The same memory as NumPy sees it."""
        dtype = np.dtype(DTYPES[self.dtype_name][2])
        steps = None if self.steps is None else [s * dtype.itemsize for s in self.steps]
        return np.ndarray(self.extents, dtype, self.memory, self.offset, steps)
