"""Addresses: what may be written, and what is said of what may not."""

from __future__ import annotations

import pytest

from tokcompile.address import Address, parse_address
from tokcompile.errors import RuleError


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("decoder.2.input", Address("decoder", 2, "input")),
        ("vision.-2.attention", Address("vision", -2, "attention")),
        ("vision.features.attention", Address("vision", "features", "attention")),
        ("decoder.*.cache", Address("decoder", "*", "cache")),
        ("decoder.${layer - 1}.attention", Address("decoder", "${layer - 1}", "attention")),
        ("vision.${vision.depth * 0.5}.rotary", Address("vision", "${vision.depth * 0.5}", "rotary")),
        ("projector.input", Address("projector", None, "input")),
        ("embedding.output", Address("embedding", None, "output")),
        ("vision.output", Address("vision", None, "output")),
        ("head.input", Address("head", None, "input")),
    ],
)
def test_parse(text: str, address: Address) -> None:
    assert parse_address(text) == address
    assert str(address) == text


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("decoder.2.inputs", "did you mean 'input'"),
        ("decodr.2.input", "did you mean 'decoder'"),
        ("decoder.last.input", "a whole number"),
        ("decoder.1.5.input", "write vision"),
        ("decoder", "write vision"),
        ("decoder.attention", "decoder.0.attention"),
        ("encoder.input", "encoder.0.input"),
        ("projecter.input", "did you mean 'projector'"),
        ("splice.attention", "known: input, output"),
        ("decoder..input", "a whole number"),
        ("${place}", "write vision"),
    ],
)
def test_refuses(text: str, remedy: str) -> None:
    with pytest.raises(RuleError) as caught:
        parse_address(text)
    assert text in caught.value.cause
    assert remedy in caught.value.remedy
