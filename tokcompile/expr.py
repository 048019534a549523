"""The arithmetic that a rule file may put between `${` and `}`: exact, tiny, and unable to run code.

Names, dotted names, whole and decimal numbers, `+ - * / //`, unary minus, `min`, `max` and `isqrt`, the whole part of a
square root: nothing else. Numbers are `int` or `Fraction`, never floats, because a budget that is a hair off keeps
another number of tokens.
"""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction

from tokcompile.errors import RuleError, known

Number = int | Fraction
Value = int | Fraction | str | bool

MAX_LENGTH = 200
MAX_DEPTH = 24

_HOLE = re.compile(r"\$\{([^{}]*)\}")
_ALLOWED = re.compile(r"[A-Za-z0-9_.+\-*/(), ]")
_NUMBER = re.compile(r"[0-9]+(\.[0-9]+)?")
_GRAMMAR = "names, numbers, + - * / //, unary minus, parentheses, min(...), max(...) and isqrt(...)"
_BINARY: dict[type[ast.operator], Callable[[Number, Number], Number]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    # Fraction, so that 3 / 2 stays exact where Python's own division would give a float.
    ast.Div: lambda left, right: Fraction(left) / Fraction(right),
    ast.FloorDiv: operator.floordiv,
}


def _isqrt(values: list[Number]) -> int:
    (value,) = values
    return math.isqrt(math.floor(value))


_CALLS: dict[str, Callable[[list[Number]], Number]] = {"min": min, "max": max, "isqrt": _isqrt}
RESERVED_NAMES = frozenset(_CALLS)


def evaluate(source: str, names: Mapping[str, Value]) -> Number:
    """Evaluate one expression (the text between the braces) exactly.

    Args:
        source: the expression.
        names: value of each plain or dotted name.
    """
    return _eval(_parse(source), source, names)


def substitute(text: str, names: Mapping[str, Value]) -> Value:
    """Replace every `${…}` of a text.

    A text that is one `${…}` gives the value itself, with its type (a lone name may also stand for a word or a truth
    value); any other text gives a string, with whole numbers written as integers.
    """
    _refuse_open(text)
    whole = _HOLE.fullmatch(text)
    if whole:
        return _value(whole[1], names)
    return _HOLE.sub(lambda hole: str(_value(hole[1], names)), text)


def names_in(text: str) -> set[str]:
    """Return the names that the `${…}` of a text use; raise where one is not a legal expression."""
    _refuse_open(text)
    found: set[str] = set()
    for hole in _HOLE.finditer(text):
        found |= set(_names(_parse(hole[1])))
    return found


def has_expression(text: object) -> bool:
    """Say whether a value is a text with a `${` in it."""
    return isinstance(text, str) and "${" in text


def _value(source: str, names: Mapping[str, Value]) -> Value:
    name = source.strip()
    if isinstance(names.get(name), str | bool):
        return names[name]
    return evaluate(source, names)


def _refuse_open(text: str) -> None:
    # Blanks in place of closed expressions keep the columns.
    column = _HOLE.sub(lambda hole: " " * len(hole[0]), text).find("${")
    if column >= 0:
        cause = f"'${{' is never closed in '{text[:MAX_LENGTH]}', column {column + 1}"
        raise RuleError(cause, remedy="close it with '}'; braces do not nest")


def _fail(source: str, column: int, cause: str, remedy: str = "") -> RuleError:
    shown = source if len(source) <= MAX_LENGTH else source[:40] + "…"
    return RuleError(f"{cause} in '${{{shown}}}', column {column + 1}", remedy=remedy or f"allowed are {_GRAMMAR}")


def _parse(source: str) -> ast.expr:
    if len(source) > MAX_LENGTH:
        raise _fail(source, MAX_LENGTH, f"expression longer than {MAX_LENGTH} characters")
    for column, character in enumerate(source):
        if not _ALLOWED.match(character):
            raise _fail(source, column, f"'{character}' is not allowed")
    # Leading blanks would read as indentation; replacing them keeps the columns right.
    blanks = len(source) - len(source.lstrip())
    try:
        tree = ast.parse(source.lstrip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        column = blanks + max(getattr(error, "offset", None) or 1, 1) - 1
        raise _fail(source, column, "cannot read the expression") from None
    for node in ast.walk(tree):
        if hasattr(node, "col_offset"):
            node.col_offset += blanks
            node.end_col_offset += blanks
    _check(tree, source, 0)
    return tree


def _piece(node: ast.AST, source: str) -> str:
    return source[node.col_offset : node.end_col_offset]


def _dotted(node: ast.expr) -> str | None:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        return f"{node.value.id}.{node.attr}"
    return None


def _check(node: ast.expr, source: str, depth: int) -> None:
    """Refuse every node that the grammar does not have, before anything is computed."""
    if depth > MAX_DEPTH:
        raise _fail(source, node.col_offset, f"nested deeper than {MAX_DEPTH}")
    if _dotted(node) is not None:
        return
    if isinstance(node, ast.Constant):
        if not _NUMBER.fullmatch(_piece(node, source)):
            raise _fail(source, node.col_offset, f"'{_piece(node, source)}' is not a plain number")
        return
    for child in _operands(node, source):
        _check(child, source, depth + 1)


def _operands(node: ast.expr, source: str) -> list[ast.expr]:
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return [node.operand]
    if isinstance(node, ast.BinOp):
        if type(node.op) in _BINARY:
            return [node.left, node.right]
        raise _fail(source, node.left.end_col_offset, f"'{_piece(node, source)}' uses an operator that is not allowed")
    if isinstance(node, ast.Call):
        legal = isinstance(node.func, ast.Name) and node.func.id in _CALLS and not node.keywords and node.args
        if legal and not any(isinstance(argument, ast.Starred) for argument in node.args):
            return list(node.args)
        raise _fail(source, node.col_offset, f"'{_piece(node, source)}' is a call that is not allowed")
    raise _fail(source, node.col_offset, f"'{_piece(node, source)}' is not allowed")


def _names(node: ast.expr) -> Iterator[str]:
    name = _dotted(node)
    if name is not None:
        yield name
    elif not isinstance(node, ast.Constant):
        for child in _operands(node, ""):
            yield from _names(child)


def _eval(node: ast.expr, source: str, names: Mapping[str, Value]) -> Number:
    name = _dotted(node)
    if name is not None:
        return _look_up(name, node, source, names)
    if isinstance(node, ast.Constant):
        text = _piece(node, source)
        return Fraction(text) if "." in text else int(text)
    values = [_eval(child, source, names) for child in _operands(node, source)]
    if isinstance(node, ast.UnaryOp):
        return -values[0]
    if isinstance(node, ast.Call):
        return _call(node, source, values)
    try:
        return _BINARY[type(node.op)](*values)
    except ZeroDivisionError:
        raise _fail(
            source, node.col_offset, f"'{_piece(node, source)}' divides by zero", "change the divisor"
        ) from None


def _call(node: ast.Call, source: str, values: list[Number]) -> Number:
    if node.func.id == "isqrt" and (len(values) != 1 or values[0] < 0):
        cause = f"'{_piece(node, source)}' is a square root of {', '.join(map(str, values))}"
        raise _fail(source, node.col_offset, cause, "isqrt takes one number that is not negative")
    return _CALLS[node.func.id](values)


def _look_up(name: str, node: ast.expr, source: str, names: Mapping[str, Value]) -> Number:
    if name not in names:
        raise _fail(source, node.col_offset, f"unknown name '{name}'", known(name, names))
    value = names[name]
    if isinstance(value, str | bool):
        raise _fail(source, node.col_offset, f"'{name}' is {value!r}, not a number", "use it alone, as ${" + name + "}")
    return value
