"""What newer PyTorch does and the older that is supported does not, put into older PyTorch where models need it.

Most is of sizes that are known only when a model runs, as the number of features of an image, or of images that are
not empty: older PyTorch asks what they are, which splits the graph, where newer PyTorch can do without.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import sympy
import torch
from torch._C import DispatchKey
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, ShapeEnv
from torch.utils._sympy.functions import Min

NEW_ENOUGH = "2.13"
"""The first version that needs none of it; torch.__version__ compares as a version."""
_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default


def mend() -> None:
    """Put all of it in, once; nothing happens where PyTorch has them."""
    if torch.__version__ >= NEW_ENOUGH:
        return
    _put_off_texts_of_sizes()
    _attend_under_masks_of_any_batch()
    _compare_multiples()


def _put_off_texts_of_sizes() -> None:
    """Let a text with such a size wait until the graph has run.

    Dynamo reads the size for the text, as where a model says how many features an image has if there are too few.
    """
    text = torch._dynamo.variables.lazy.LazySymNodeFormatString
    handlers: dict[type, Any] = torch._dynamo.variables.builder.SourcelessBuilder._type_handlers
    handlers.setdefault(text, _text_of_size)


def _text_of_size(tx: Any, value: Any) -> Any:
    """Dynamo's variable of one number in a text: the text, or what makes it later."""
    del tx
    variables: Any = torch._dynamo.variables
    try:
        return variables.ConstantVariable.create(str(value))
    except (torch._dynamo.exc.UserError, GuardOnDataDependentSymNode):
        return variables.StringFormatVariable.create(value.fmt_var.as_python_constant(), [value.sym_node_var], {})


def _attend_under_masks_of_any_batch() -> None:
    """Let attention take a mask of such a batch.

    To choose a kernel, it asks whether the mask has a batch of one, before whether it has that of the queries.
    """
    if DispatchKey.CompositeImplicitAutograd not in _ATTENTION.py_kernels:
        _ATTENTION.py_impl(DispatchKey.CompositeImplicitAutograd)(_attend)


def _attend(*args: Any, **kwargs: Any) -> Any:
    """The operator's own parts, with the answer that newer PyTorch takes: a size that may be any is not one."""
    run = functools.partial(_ATTENTION._op_dk, DispatchKey.CompositeImplicitAutograd, *args, **kwargs)
    try:
        return run()
    except GuardOnDataDependentSymNode:
        with _unknown_sizes_are_not_one():
            return run()


@contextmanager
def _unknown_sizes_are_not_one() -> Iterator[None]:
    ask = ShapeEnv.evaluate_expr

    def evaluate(self: ShapeEnv, expression: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("fallback_value") is None and isinstance(expression, sympy.Eq) and expression.rhs == 1:
            kwargs["fallback_value"] = False
        return ask(self, expression, *args, **kwargs)

    with patch.object(ShapeEnv, "evaluate_expr", evaluate):
        yield


def _compare_multiples() -> None:
    """Let "one multiple of a size is the least of some" be known, as each multiple is known to be at most another.

    Attention's layout depends on it, and an exported length would have to be of those that were seen.
    """
    ask = ShapeEnv.evaluate_expr
    if getattr(ask, "_tokcompile", False):
        return

    @functools.wraps(ask)
    def evaluate(self: ShapeEnv, expression: Any, *args: Any, **kwargs: Any) -> Any:
        return ask(self, _as_order(expression) if _of_least(expression) else expression, *args, **kwargs)

    evaluate._tokcompile = True  # type: ignore[attr-defined]
    ShapeEnv.evaluate_expr = evaluate


def _of_least(asked: Any) -> bool:
    """Whether an expression asks if a size is the least of some that it is among."""
    return isinstance(asked, (sympy.Eq, sympy.Ne)) and isinstance(asked.lhs, Min) and asked.rhs in asked.lhs.args


def _as_order(asked: sympy.Eq | sympy.Ne) -> sympy.Basic:
    """`Min(a, b) == a` as `a <= b`, and `Min(a, b) != a` as `b < a`."""
    least = sympy.And(*(sympy.Le(asked.rhs, other) for other in asked.lhs.args if other != asked.rhs))
    return least if isinstance(asked, sympy.Eq) else sympy.Not(least)
