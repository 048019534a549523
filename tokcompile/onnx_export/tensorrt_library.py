"""The TensorRT that is installed, without anything that a user has to link or to set."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import re
from functools import cache
from pathlib import Path
from types import ModuleType

from tokcompile.errors import LowerError

LIBRARIES = "onnxruntime_ep_nv_tensorrt_rtx"
"""The package that carries the libraries of TensorRT for RTX."""
BINDINGS = "tensorrt_rtx_bindings"
"""The package of its Python interface, which expects these libraries to be loaded."""
ORDER = ("libcudart", "libtensorrt_rtx", "libtensorrt_onnxparser_rtx")
DATA_CENTRE = "tensorrt"
EXTRA = "pip install 'tokcompile[tensorrt]'"


def library(ahead: bool = True) -> ModuleType:
    """The Python interface of a TensorRT.

    Args:
        ahead: for engines of named architectures, which TensorRT for RTX builds on any machine; else the one for data
            centres is taken where it is installed, which builds for the GPU of this machine.

    Raises:
        LowerError: none can be loaded.
    """
    if not ahead and importlib.util.find_spec(DATA_CENTRE) is not None:
        return importlib.import_module(DATA_CENTRE)
    return _for_rtx()


@cache
def _for_rtx() -> ModuleType:
    missing = [name for name in (BINDINGS, LIBRARIES) if importlib.util.find_spec(name) is None]
    if missing:
        raise LowerError(
            f"a TensorRT engine needs {' and '.join(missing)}, which cannot be imported",
            found="no such package",
            remedy=EXTRA,
        )
    try:
        for path in _files():
            # Who needs a library that is loaded already finds it by its name, wherever its file lies.
            ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
        return importlib.import_module(BINDINGS)
    except (OSError, ImportError) as error:
        raise LowerError(
            "TensorRT for RTX cannot be loaded", found=str(error), remedy=f"{EXTRA}, on Linux x86-64"
        ) from error


def _files() -> list[Path]:
    """The libraries, each before those that need it; of several versions the latest."""
    spec = importlib.util.find_spec(LIBRARIES)
    folder = Path(next(iter(spec.submodule_search_locations or ()))) if spec else Path()
    found = []
    for stem in ORDER:
        files = sorted(folder.glob(f"{stem}.so.*"), key=_version)
        if not files:
            raise OSError(f"no {stem}.so.* in {folder}")
        found.append(files[-1])
    return found


def _version(path: Path) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", path.name.partition(".so")[2])]
