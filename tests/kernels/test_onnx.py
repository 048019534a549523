"""Every op as ONNX: standard operators that ONNX Runtime computes the same with, for any batch."""

from __future__ import annotations

from pathlib import Path

import onnxed
import pytest
import torch
from test_ops import CASES, Call

from tokcompile.onnx_export.export import write

USUAL = {"close_gaps", "cluster_labels", "gather_tokens", "match_pairs", "topk_mask"}
"""Those with operators that the exporter alone has no ONNX form of, and the one that every edit inserts."""


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in USUAL else pytest.mark.slow) for n in sorted(CASES)])
def test_onnx_runtime_gives_the_same_result_for_any_batch(name: str, tmp_path: Path) -> None:
    """`write` refuses a file that the ONNX checker does not take, or with operators of other domains."""
    make, call = CASES[name]
    tensors = make(3)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(Call(name), tensors, dynamic_shapes={"tensors": tuple({0: batch} for _ in tensors)})
    file = write(program, tmp_path / "op.onnx")
    session = onnxed.session(file.path)
    for rows in (3, 5):
        given = make(rows)
        feed = {name: value.numpy() for name, value in zip(file.inputs, given, strict=True)}
        (found,) = session.run(None, feed)
        torch.testing.assert_close(torch.from_numpy(found), call(*given), rtol=1e-4, atol=1e-5)
