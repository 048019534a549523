"""The zoo: every entry builds and runs, and the trained one answers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from tokcompile.models import digits, recipe_llava_digits, zoo

RUNNABLE = [name for name, entry in zoo.ZOO.items() if not entry.on_meta and name != "llava-clip-l"]


@pytest.mark.parametrize("name", RUNNABLE)
def test_an_entry_runs(name: str) -> None:
    loaded = zoo.load(name)
    inputs = loaded.example(batch=2, padded=loaded.kind != "vision")
    with torch.no_grad():
        out = loaded.model(**inputs)
    assert torch.isfinite(out[0]).all()
    assert not loaded.model.training


@pytest.mark.parametrize("name", [n for n in RUNNABLE if zoo.ZOO[n].kind != "vision"])
def test_padding_stands_on_the_left_and_images_stay_whole(name: str) -> None:
    loaded = zoo.load(name)
    plain, padded = loaded.example(batch=3), loaded.example(batch=3, padded=True)
    mask = padded["attention_mask"]
    assert len({int(n) for n in mask.sum(1)}) == 3
    assert (mask.diff(dim=1) >= 0).all()
    image = getattr(loaded.model.config, "image_token_index", None)
    if image is not None:
        assert torch.equal((plain["input_ids"] == image).sum(1), (padded["input_ids"] == image).sum(1))


@pytest.mark.parametrize(
    ("name", "billions"), [("llava-1.5-7b", 7.06), ("llama-3.1-8b", 8.03), ("qwen2.5-vl-7b", 8.29)]
)
def test_real_proportions_are_built_without_memory(name: str, billions: float) -> None:
    model = zoo.load(name).model
    assert all(p.is_meta for p in model.parameters())
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(billions * 1e9, rel=2e-3)


def test_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(Exception, match="llava-digits"):
        zoo.load("llava-digit")


def test_the_checkpoint_is_small_and_right() -> None:
    assert (zoo.CHECKPOINT / "model.safetensors").stat().st_size < 10 * 2**20
    model = zoo.load("llava-digits").model
    assert recipe_llava_digits.accuracy(model, 400, seed=1) >= 0.95


def test_the_tokenizer_makes_the_prompts() -> None:
    tokenizer = AutoTokenizer.from_pretrained(zoo.CHECKPOINT)
    text = " ".join(["<image>"] * digits.IMAGE_TOKENS + ["which", "digit", "is", "blue"])
    assert tokenizer(text)["input_ids"] == digits.prompts(torch.tensor([2]))[0].tolist()


def test_the_recipe_runs_and_goes_on(tmp_path: Path) -> None:
    arguments = ["--smoke", "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    recipe_llava_digits.main(arguments)
    state = torch.load(tmp_path / "work" / "state.pt", weights_only=False)
    assert (state["stage"], state["step"]) == ("refined", 2)
    recipe_llava_digits.main([*arguments, "--resume"])
    assert (tmp_path / "out" / "model.safetensors").exists()
