"""Between which sizes the open dimensions of an engine lie."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokcompile.errors import LowerError
from tokcompile.onnx_export.export import Exported, Shape


def profile(builder: Any, file: Exported, ranges: Mapping[str, tuple[int, int, int]]) -> Any:
    """TensorRT's profile of a file's inputs.

    Args:
        ranges: least, usual and greatest size of each open dimension, by its name.

    Raises:
        LowerError: an open dimension has no range, or a range is no range.
    """
    _check(file, ranges)
    made = builder.create_optimization_profile()
    for name, shape in file.inputs.items():
        made.set_shape(name, *(_at(shape, ranges, place) for place in range(3)))
    return made


def _check(file: Exported, ranges: Mapping[str, tuple[int, int, int]]) -> None:
    open_ = dict.fromkeys(size for shape in file.inputs.values() for size in shape if isinstance(size, str))
    missing = [name for name in open_ if name not in ranges]
    if missing:
        raise LowerError(
            "an engine needs to know between which sizes an open dimension lies",
            where=[str(file.path)],
            found=f"no range of {', '.join(missing)}",
            remedy="ranges={" + ", ".join(f"{name!r}: (LEAST, USUAL, GREATEST)" for name in missing) + "}",
        )
    for name, bounds in ranges.items():
        if len(bounds) != 3 or not 0 < bounds[0] <= bounds[1] <= bounds[2]:
            raise LowerError(
                f"the range of '{name}' is no least, usual and greatest size",
                found=str(tuple(bounds)),
                remedy="(1, 2, 8)",
            )


def _at(shape: Shape, ranges: Mapping[str, tuple[int, int, int]], place: int) -> tuple[int, ...]:
    return tuple(ranges[size][place] if isinstance(size, str) else size for size in shape)
