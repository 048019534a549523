"""What all steps of a rule file share, and the checks that several of them make."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, PrivateAttr

from tokcompile import plugins
from tokcompile.address import Address, parse_address
from tokcompile.errors import known
from tokcompile.expr import has_expression
from tokcompile.fields import wrong


class Model(BaseModel):
    """Base of everything read from a rule file: unknown keys are errors, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Step(Model):
    """Base of the steps."""

    verb: ClassVar[str]
    refers: ClassVar[dict[str, str]] = {}
    """Field -> kind of step (`tap`, `score`, `select`) whose name it holds."""
    makes: ClassVar[bool] = True
    """Whether the step does nothing but make something that later steps use by name."""

    budgeted: ClassVar[str] = ""
    """The field that holds a budget, if the step has one."""

    _line: int = PrivateAttr(default=0)

    @property
    def line(self) -> int:
        """Line of the rule file where the step stands; 0 where it was not read from a file."""
        return self._line

    @property
    def address(self) -> Address | None:
        """The step's `at`, parsed; None where the step has none."""
        at = getattr(self, "at", None)
        return None if at is None else parse_address(at)

    def given(self) -> dict[str, Any]:
        """Return the fields that the rule file gave."""
        return {field: getattr(self, field) for field in type(self).model_fields if field in self.model_fields_set}


def needs(step: Step, fields: tuple[str, ...], by: str) -> None:
    """Refuse a step that lacks a field that its `by` needs."""
    for field in fields:
        if getattr(step, field) in (None, ()):
            described = type(step).model_fields[field].description
            raise wrong(f"'by: {by}' needs '{field}'", f"add {field}: {described}")


def refuses(step: Step, allowed: dict[str, tuple[str, ...]], by: str) -> None:
    """Refuse a field that belongs to another `by`: it would be ignored, and the user would not know."""
    if by not in plugins.BUILT_IN[step.verb]:
        return
    for field, users in allowed.items():
        if field in step.model_fields_set and by not in users:
            raise wrong(f"'by: {by}' does not use '{field}'", f"remove it; it belongs to by: {', '.join(users)}")


def known_by(step: Step, by: str) -> None:
    """Refuse a `by` that no pass and no plug-in has."""
    names = plugins.names(step.verb)
    if not has_expression(by) and by not in names:
        raise wrong(f"no way to {step.verb} is called '{by}'", known(by, names))


def single_part(step: Step, parts: tuple[str, ...], why: str) -> None:
    """Refuse an address of every block, or one that ends otherwise."""
    address = step.address
    if not address.is_single:
        raise wrong(f"'{address}' means every block, and '{step.verb}' needs one place", "give one block: decoder.2")
    if address.part not in parts:
        raise wrong(f"'{address}' is not a place for {why}", f"an address that ends in .{' or .'.join(parts)}")
