"""explain: figures against counts made by hand, for a drop before, in, and not in the decoder."""

from __future__ import annotations

import json
from html.parser import HTMLParser

import pytest
import tiny
import torch
from rich.console import Console
from torch import Tensor, nn

from tokcompile.capturing.capture import capture
from tokcompile.errors import AddressError
from tokcompile.program import Program
from tokcompile.report import Explanation, Part, explain, explain_captured
from tokcompile.rulefile import load_rule

WIDTH, INNER, KV_WIDTH = 32, 64, 16


@pytest.fixture(scope="module")
def program() -> Program:
    (captured,) = capture(tiny.llava(), tiny.inputs(2))
    return captured


def applied(program: Program, rule: str, **options: object) -> Part:
    (part,) = explain_captured([program.copy()], [load_rule(rule).bind(**options)])
    return part


def decoder_block(tokens: int, rows: int = 2) -> int:
    """Multiplications and additions of one Llama block: q, k, v, o, three of the MLP, and attention."""
    weights = 2 * WIDTH * WIDTH + 2 * WIDTH * KV_WIDTH + 3 * WIDTH * INNER
    return rows * (2 * tokens * weights + 2 * 2 * tokens * tokens * WIDTH)


def rows(part: Part, stack: str) -> list[tuple]:
    return [row for row in part.after.rows if row.stack == stack]


def test_before(program: Program) -> None:
    measured = applied(program, "random", keep=4).before
    decoder = [row for row in measured.rows if row.stack == "decoder"]
    vision = [row for row in measured.rows if row.stack == "vision"]
    assert [row.tokens for row in decoder] == [22, 22, 22]
    assert [row.flops for row in decoder] == [decoder_block(22)] * 3
    assert [row.kv_bytes for row in decoder] == [2 * 2 * 22 * KV_WIDTH * 4] * 3
    assert [row.tokens for row in vision] == [17, 17, 17]
    assert [row.live for row in vision] == [True, True, False]
    assert vision[2].flops == vision[0].kv_bytes == 0
    assert measured.totals["projector"] == 2 * 2 * 16 * (32 * 32 + 32 * 32)
    assert all(row.fused for row in measured.rows)
    assert not measured.unknown


def test_a_drop_before_the_decoder(program: Program) -> None:
    part = applied(program, "hiprune", keep=4)
    assert [row.tokens for row in rows(part, "decoder")] == [10, 10, 10]
    assert [row.flops for row in rows(part, "decoder")] == [decoder_block(10)] * 3
    assert part.after.totals["projector"] == part.before.totals["projector"] // 4
    assert part.after.kv_bytes == part.before.kv_bytes * 10 // 22
    assert part.after.totals["rule"] > 0
    assert part.after.flops < part.before.flops
    assert all(row.fused for row in part.after.rows)


def test_a_drop_in_the_middle_shows_block_by_block(program: Program) -> None:
    part = applied(program, "fastv", keep=4, layer=2)
    assert [row.tokens for row in rows(part, "decoder")] == [22, 22, 10]
    assert [row.flops for row in rows(part, "decoder")] == [decoder_block(22), decoder_block(22), decoder_block(10)]
    each = 2 * 2 * KV_WIDTH * 4
    assert [row.kv_bytes for row in rows(part, "decoder")] == [22 * each, 22 * each, 10 * each]


def test_keeping_everything_changes_nothing(program: Program) -> None:
    part = applied(program, "fastv", keep=16, layer=2)
    assert part.after.totals == part.before.totals
    assert part.after.rows == part.before.rows


def test_the_copy_leaves_the_program_alone(program: Program) -> None:
    before = str(program.graph)
    applied(program, "hiprune", keep=4)
    assert str(program.graph) == before


@pytest.fixture(scope="module")
def explanation() -> Explanation:
    return explain(tiny.llava(), tiny.inputs(), [load_rule("hiprune").bind(keep=4)], name="tiny")


def test_as_data(explanation: Explanation) -> None:
    data = json.loads(json.dumps(explanation.to_dict()))
    assert data["graphs"] == 1 and data["note"] == "" and data["model"] == "tiny"
    assert data["rules"][0]["rule"] == "hiprune"
    assert data["inputs"] == {"input_ids": [1, 22], "pixel_values": [1, 3, 28, 28]}
    part = data["parts"][0]
    assert part["after"]["flops"] == sum(part["after"]["totals"].values())
    assert [step["verb"] for step in part["applied"][0]["steps"]][-1] == "drop"
    assert {each["op"] for each in part["kernels"]} >= {"attention_received", "kept_indices", "gather_tokens"}
    assert {(each["kernel"], each["reason"]) for each in part["kernels"]} == {
        (False, "its tensors are on cpu; kernels run on cuda"),
        (False, "the operator has no kernel"),
    }
    assert part["milliseconds"] > 0 and data["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize("plain", [True, False])
def test_as_table(explanation: Explanation, plain: bool) -> None:
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(explanation.to_table(plain))
    text = console.export_text()
    assert "decoder.2" in text and "no output reads it" in text
    assert "5 of 5 fused calls stay fused" in text
    assert "no attention matrix [B, H, N, N] with N > 256" in text
    assert "references (its tensors are on cpu; kernels run on cuda): " in text


class _Page(HTMLParser):
    """Collects what a page would fetch, and checks that its tags close."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.fetched += [v for k in ("src", "href") if (v := found.get(k)) and not v.startswith("data:")]
        if tag in ("script", "link", "iframe"):
            self.fetched.append(tag)
        if tag not in ("meta", "br", "img", "rect"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def assert_self_contained(html: str) -> None:
    page = _Page()
    page.feed(html)
    assert page.fetched == [] and page.open == []
    assert "url(" not in html and "@import" not in html


def test_as_page(explanation: Explanation) -> None:
    html = explanation.to_html()
    assert_self_contained(html)
    assert "22 → 10" in html and "decoder.2" in html and "hiprune" in html


def test_a_rule_that_finds_nothing_is_an_error() -> None:
    with pytest.raises(AddressError, match="decoder"):
        explain(tiny.llava(), tiny.inputs(), [load_rule("fastv").bind(layer=9)])


class _Written(nn.Module):
    """One block whose attention is written out: it makes the matrix that a fused call avoids."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, 16)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        weights = torch.softmax(q @ k.transpose(-2, -1) * 0.25, dim=-1)
        return x + self.out((weights @ v).transpose(1, 2).flatten(2))


def test_attention_matrices_are_seen() -> None:
    (part,) = explain_captured(capture(_Written(), {"x": torch.randn(1, 300, 32)}), [])
    assert [300, 300] == part.before.matrices[0]["shape"][-2:]
    assert not part.before.rows[0].fused


class _Pieces(nn.Module):
    """A model that comes in two graphs."""

    def __init__(self) -> None:
        super().__init__()
        self.block = _Written()

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(x)
        torch._dynamo.graph_break()
        return self.block(x)


def test_a_model_in_pieces_says_so() -> None:
    explanation = explain(_Pieces(), {"x": torch.randn(1, 20, 32)}, [load_rule("fastv").bind()])
    assert not explanation.whole and "came in 2 graphs" in explanation.note
    assert all(part.after is None and "matches nothing" in part.refused for part in explanation.parts)
    assert_self_contained(explanation.to_html())
    assert "came in 2 graphs" in json.dumps(explanation.to_dict())
