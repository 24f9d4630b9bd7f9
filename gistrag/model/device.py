"""Whether torch can compute on a GPU, found out without importing it."""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress
from importlib import metadata


def has_gpu() -> bool:
    """Return whether this machine has a GPU for CUDA, and torch was built for one."""
    with suppress(metadata.PackageNotFoundError):
        if metadata.version("torch").endswith("+cpu"):
            return False
    with suppress(OSError, AttributeError):
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        count = ctypes.c_int(0)
        return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0
    return False
