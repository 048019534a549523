"""Addresses of sites, as rule files write them: `vision.-2.attention`, `decoder.2.input`, `projector.input`.

Only the syntax lives here. Which addresses a model has is known once its sites were found.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from tokcompile.errors import RuleError, known
from tokcompile.expr import has_expression

STACKS = ("vision", "decoder", "encoder")
BLOCK_PARTS = ("attention", "input", "middle", "output", "cache", "rotary")
WHOLE = {
    "projector": ("input", "patches", "output"),
    "splice": ("input", "output"),
    "embedding": ("output",),
    "head": ("input",),
    "decoder": ("input", "rotary"),
    "encoder": ("rotary",),
    "vision": ("input", "output", "rotary"),
}
FEATURES = "features"
EVERY = "*"

_WHOLE_TEXT = ", ".join(f"{stack}.{'|'.join(parts)}" for stack, parts in WHOLE.items())
GRAMMAR = (
    f"{'|'.join(STACKS)} . INDEX . {'|'.join(BLOCK_PARTS)} (INDEX: a number, negative from the end, "
    f"'{FEATURES}', '{EVERY}' or an expression), or one of {_WHOLE_TEXT}"
)


@dataclass(frozen=True)
class Address:
    """A place in a model.

    Attributes:
        stack: `vision`, `decoder`, `encoder`, or a site that exists once: `projector`, `splice`, `embedding`, `head`.
        index: block of the stack: a number (negative counts from the end), `features` (the last block whose output the
            model uses), `*`, or an unresolved expression; None for a place of the whole stack or of a single site.
        part: what of it: `attention`, `input`, `middle` (after the attention was added), `output`, `cache` or `rotary`.
    """

    stack: str
    index: int | str | None
    part: str

    def __str__(self) -> str:
        middle = [] if self.index is None else [str(self.index)]
        return ".".join([self.stack, *middle, self.part])

    @property
    def is_single(self) -> bool:
        """Whether the address means one place, and not one place of every block."""
        return self.index != EVERY


def parse_address(text: str) -> Address:
    """Read an address; the index may still hold a `${…}`.

    Raises:
        RuleError: the text is no address; names the piece that is wrong and what may stand there.
    """
    # An expression may hold dots of its own, so it is put aside while the text is split.
    holes = re.findall(r"\$\{[^{}]*\}", text)
    pieces = re.sub(r"\$\{[^{}]*\}", "\0", text).split(".")
    if len(pieces) == 2:
        return _whole(pieces[0], pieces[1], text)
    if len(pieces) != 3:
        raise RuleError(f"'{text}' is not an address", remedy=f"write {GRAMMAR}")
    stack, index, part = pieces
    if stack not in STACKS:
        raise RuleError(f"'{stack}' in address '{text}' is not a stack", remedy=known(stack, STACKS))
    if part not in BLOCK_PARTS:
        raise RuleError(f"'{part}' in address '{text}' is not a part of a block", remedy=known(part, BLOCK_PARTS))
    return Address(stack, _index(index.replace("\0", holes[0]) if holes else index, text), part)


def _whole(stack: str, part: str, text: str) -> Address:
    if stack not in WHOLE:
        remedy = f"give the block: {stack}.0.{part}" if stack in STACKS else known(stack, {*WHOLE, *STACKS})
        raise RuleError(f"'{stack}' in address '{text}' is not a place of a model", remedy=remedy)
    if part not in WHOLE[stack]:
        remedy = known(part, WHOLE[stack])
        if stack in STACKS and part in BLOCK_PARTS:
            remedy = f"give the block: {stack}.0.{part}; without one: {', '.join(WHOLE[stack])}"
        raise RuleError(f"'{part}' in address '{text}' is not a part of '{stack}'", remedy=remedy)
    return Address(stack, None, part)


def _index(index: str, text: str) -> int | str:
    if index in (FEATURES, EVERY) or has_expression(index):
        return index
    if re.fullmatch(r"-?[0-9]{1,6}", index):
        return int(index)
    raise RuleError(
        f"'{index}' in address '{text}' is not the index of a block",
        remedy=f"a whole number (-1 is the last block), '{FEATURES}', '{EVERY}' or an expression",
    )
