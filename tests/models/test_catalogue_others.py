"""Vision models, encoders, encoder-decoder models and diffusion models of the catalogue build and run."""

from __future__ import annotations

import sys
from functools import cache
from types import SimpleNamespace

import pytest
import torch
import unloaded
from torch import Tensor, nn

from tokcompile.errors import TokredError
from tokcompile.models.catalogue import Family, families
from tokcompile.models.families import scaled_init

pytestmark = pytest.mark.usefixtures("one_thread")
KINDS = ("vision", "encoder", "encoder-decoder", "diffusion")
FAMILIES = {name: one for name, one in families().items() if one.kind in KINDS}
MASKS = {"input_ids": "attention_mask", "decoder_input_ids": "decoder_attention_mask"}


@cache
def built(name: str) -> nn.Module:
    if why := unloaded.missing(FAMILIES[name].needs):
        pytest.skip(why)
    return FAMILIES[name].build()


@torch.no_grad()
def answer(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    out = model(**inputs)
    if isinstance(out, Tensor):
        return out
    return out.logits if "logits" in out else out.pooler_output


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_runs_and_every_input_matters(name: str) -> None:
    model = built(name)
    assert not model.training
    assert all(p.any() for p in model.parameters() if p.ndim > 1)
    inputs, other = (FAMILIES[name].example(model, seed=seed) for seed in (0, 1))
    out = answer(model, inputs)
    assert len(out) == 1
    assert torch.isfinite(out).all()
    for key in inputs.keys() - set(MASKS.values()):
        changed = answer(model, {**inputs, key: other[key]})
        assert (changed - out).abs().max() > 0.02 * out.abs().max(), key


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_do_not_depend_on_each_other_or_on_padding(name: str) -> None:
    model = built(name)
    inputs = FAMILIES[name].example(model, batch=2, padded=True)
    out = answer(model, inputs)
    assert len(out) == 2
    assert torch.isfinite(out).all()
    row = {key: value[:1] for key, value in inputs.items()}
    for key, mask in MASKS.items():
        if key in row:
            kept = int(row[mask].sum())
            assert kept < row[key].shape[1]
            assert row[mask][0, :kept].all(), "padding on the right"
            row |= {key: row[key][:, :kept], mask: row[mask][:, :kept]}
    alone = answer(model, row)
    torch.testing.assert_close(out[:1, : alone.shape[1]], alone, rtol=1e-4, atol=1e-4)


def test_the_same_seed_gives_the_same_model() -> None:
    one = FAMILIES["whisper"]
    torch.manual_seed(5)
    first, second, third = one.build(), one.build(), one.build(seed=1)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), third.parameters(), strict=True))


def test_a_diffusion_transformer_begins_as_published_and_its_blocks_matter_once_drawn() -> None:
    model = FAMILIES["dit"]._model().eval()
    inputs = FAMILIES["dit"].example(model, batch=2)
    tokens, condition = torch.randn(2, 16, 64), torch.randn(2, 64)
    assert not answer(model, inputs).any()
    assert all(torch.equal(block(tokens, condition), tokens) for block in model.blocks)
    scaled_init(model, 0)
    assert all((block(tokens, condition) - tokens).norm() > 0.1 * tokens.norm() for block in model.blocks)


def test_patches_of_a_diffusion_transformer_go_back_where_they_came_from() -> None:
    model = FAMILIES["dit"]._model()
    image = torch.arange(model.out_channels * 64.0).reshape(1, model.out_channels, 8, 8)
    patches = image.reshape(1, -1, 4, 2, 4, 2).permute(0, 2, 4, 3, 5, 1).reshape(1, 16, -1)
    torch.testing.assert_close(model.unpatchify(patches), image)


def test_a_module_that_is_missing_is_an_error_with_a_remedy() -> None:
    one = Family(name="one", kind="vision", source="timm", inputs="pixels", type="one", needs="no_such_module")
    with pytest.raises(TokredError, match="needs no_such_module") as error:
        one.build()
    assert "pip install no_such_module" in error.value.remedy


def test_a_family_that_this_transformers_lacks_is_an_error_that_asks_for_a_newer_one() -> None:
    needs = "transformers.models.no_such_model"
    one = Family(name="one", kind="vlm", auto="AutoModelForImageTextToText", inputs="image_tokens", needs=needs)
    with pytest.raises(TokredError, match=f"'one' needs {needs}") as error:
        one.build()
    assert error.value.remedy.startswith("pip install --upgrade transformers; ")
    assert error.value.remedy.endswith(" has no models.no_such_model")


def test_a_model_of_timm_is_made_by_its_type_and_its_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, dict[str, object]]] = []

    def create_model(kind: str, **options: object) -> nn.Module:
        asked.append((kind, options))
        return nn.Linear(2, 2)

    monkeypatch.setitem(sys.modules, "timm", SimpleNamespace(create_model=create_model))
    one = Family(name="one", kind="vision", source="timm", inputs="pixels", type="a_vit", config={"depth": 3})
    assert not one.build().training
    assert asked == [("a_vit", {"pretrained": False, "depth": 3})]
