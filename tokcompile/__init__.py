"""tokcompile: a compiler for token reduction in unmodified transformers."""

from tokcompile.api import compile, restore, rewrite
from tokcompile.errors import AddressError, CaptureError, EditError, LowerError, RuleError, TokredError
from tokcompile.recording import Recording

__version__ = "0.1.0"

__all__ = [
    "AddressError",
    "CaptureError",
    "EditError",
    "LowerError",
    "Recording",
    "RuleError",
    "TokredError",
    "compile",
    "restore",
    "rewrite",
]
