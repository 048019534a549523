"""What TensorRT says while it builds: its errors, and the layers that an engine runs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_LAYER = re.compile(r"Name: (?P<name>\S+), LayerType: (?P<kind>\w+), .*?(?:Metadata: (?P<sources>.*))?$")
_SOURCE = re.compile(r"\[ONNX Layer: ([^\]]+)\]")


@dataclass(frozen=True)
class Layer:
    """One step of an engine.

    Attributes:
        kind: TensorRT's word for how it was made, such as `gemm`, or `kgen` for a generated kernel.
        sources: operators of the ONNX file that it computes, or parts of which.
        steps: steps of rules that brought some of these.
    """

    name: str
    kind: str
    sources: list[str]
    steps: list[str]


class Log:
    """Keeps what TensorRT says; in the report are the layers, in an error the last complaint."""

    def __init__(self, trt: Any) -> None:
        self.lines: list[str] = []
        self._errors: list[str] = []
        outer = self

        class Logger(trt.ILogger):  # type: ignore[misc]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, text: str) -> None:
                outer.lines.append(text)
                if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                    outer._errors.append(text)

        self.logger = Logger()

    def last_error(self) -> str:
        """The last complaint."""
        return self._errors[-1].strip() if self._errors else "TensorRT gave no reason"

    def speaks_of_attention(self) -> bool:
        """Whether the last complaint is that attention has no fused kernel."""
        return "is_decomposable" in self.last_error()


def layers_in(lines: Sequence[str], steps: Mapping[str, str]) -> list[Layer]:
    """The layers of an engine, from what was said when it was built.

    An engine itself tells them on a machine with its GPU only.

    Args:
        lines: messages of the builder at detailed verbosity.
        steps: the rule's step of each ONNX operator that one brought.
    """
    found = []
    for match in (match for text in lines for line in text.splitlines() if (match := _LAYER.match(line.strip()))):
        sources = _SOURCE.findall(match["sources"] or "")
        found.append(
            Layer(match["name"], match["kind"], sources, list(dict.fromkeys(steps[s] for s in sources if s in steps)))
        )
    return found
