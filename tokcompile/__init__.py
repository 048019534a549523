"""tokcompile: a compiler for token reduction in unmodified transformers."""

from tokcompile.api import compile, export, restore, rewrite
from tokcompile.calibration import calibrate
from tokcompile.capturing.imagesizes import precompute
from tokcompile.errors import AddressError, CaptureError, EditError, LowerError, RuleError, TokredError
from tokcompile.onnx_export.engine import export_tensorrt
from tokcompile.onnx_export.export import export_onnx
from tokcompile.recording import Recording
from tokcompile.weights import Weights

__version__ = "0.1.0"

__all__ = [
    "AddressError",
    "CaptureError",
    "EditError",
    "LowerError",
    "Recording",
    "RuleError",
    "TokredError",
    "Weights",
    "calibrate",
    "compile",
    "export",
    "export_onnx",
    "export_tensorrt",
    "precompute",
    "restore",
    "rewrite",
]
