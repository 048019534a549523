"""Reads a YAML file as plain data, with the line of every key, and refuses what data does not need.

No tags, no anchors or aliases (they can grow without bound), no duplicate keys, bounded size and depth. Scalars follow
YAML 1.2: `on` and `yes` are words, `012` is twelve, `1:30` is a text.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import yaml

from tokcompile.errors import RuleError

MAX_BYTES = 64 * 1024
MAX_DEPTH = 16
_INT = re.compile(r"[-+]?[0-9]{1,18}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]{1,3})?")

Path_ = tuple[str | int, ...]
"""Where a value stands in a file: keys and list positions from the top."""


class Lines(dict[Path_, int]):
    """Line number of each place of a file."""

    def nearest(self, path: Path_) -> int:
        """Return the line of a place, or of the closest place around it that the file has."""
        while path and path not in self:
            path = path[:-1]
        return self.get(path, 1)


class _Loader(yaml.SafeLoader):
    """Composes nodes, and refuses tags, anchors, aliases and deep nesting as soon as they are read."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> yaml.Node:
        event = self.peek_event()
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent) or event.anchor:
            raise _Refused("anchors and aliases (& and *) are not allowed", line, "write the value out, or quote it")
        if getattr(event, "tag", None):
            raise _Refused(f"the tag '{event.tag}' is not allowed", line, "a rule file holds plain values only")
        if self.depth >= MAX_DEPTH:
            raise _Refused(f"nested deeper than {MAX_DEPTH}", line, "a rule file needs no such depth")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Refused(Exception):
    def __init__(self, cause: str, line: int, remedy: str) -> None:
        super().__init__(cause)
        self.cause, self.line, self.remedy = cause, line, remedy


def read_text(path: Path) -> str:
    """Read a file of bounded size as UTF-8."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise RuleError(f"cannot read the file: {error.strerror}", where=str(path), remedy="check the path") from None
    if len(raw) > MAX_BYTES:
        raise RuleError(f"the file is over {MAX_BYTES // 1024} KiB", where=str(path), remedy="split it, or shorten it")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise RuleError("the file is not UTF-8 text", where=f"{path}:{line}", remedy="save it as UTF-8") from None


def parse(text: str, name: str) -> tuple[Any, Lines]:
    """Read YAML text as data and the line of every key and list item.

    Args:
        name: file name for error messages.
    """
    lines = Lines()
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return (None if node is None else _plain(node, (), lines)), lines
    except _Refused as error:
        raise RuleError(error.cause, where=f"{name}:{error.line}", remedy=error.remedy) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise RuleError(f"not YAML: {error.problem}", where=f"{name}:{line}", remedy="check colons, quotes") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise RuleError(f"not YAML: {error.reason}", where=f"{name}:{line}", remedy="remove the character") from None


def scalar(text: str) -> int | float | bool | str | None:
    """Give a word the type that a plain YAML scalar would have: what an option on a command line means."""
    if text in ("", "~", "null", "Null", "NULL"):
        return None
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if _INT.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text) and math.isfinite(float(text)):
        return float(text)
    return text


def _plain(node: yaml.Node, path: Path_, lines: Lines) -> Any:
    lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.ScalarNode):
        return scalar(node.value) if node.style in (None, "") else node.value
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, (*path, position), lines) for position, item in enumerate(node.value)]
    return _mapping(node, path, lines)


def _mapping(node: yaml.MappingNode, path: Path_, lines: Lines) -> dict[str, Any]:
    data: dict[str, Any] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode) or key_node.value == "<<":
            raise _Refused("a key must be a plain word", line, "rename the key")
        key = key_node.value
        if key in data:
            before = lines[(*path, key)]
            raise _Refused(f"the key '{key}' stands twice (first in line {before})", line, "remove one of them")
        lines[(*path, key)] = line
        data[key] = _plain(value_node, (*path, key), lines)
    return data


class _Dumper(yaml.SafeDumper):
    """Quotes every text that this module would read back as something else."""


def _represent_text(dumper: _Dumper, value: str) -> yaml.Node:
    style = None if scalar(value) == value else "'"
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _represent_text)


def dump(data: Any) -> str:
    """Write plain data as YAML that `parse` reads back as the same data."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
