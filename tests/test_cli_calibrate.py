"""`tokred calibrate`: the table of a model, from random tokens or from a text."""

from __future__ import annotations

import json
from pathlib import Path

import fleet
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

import tokcompile
from tokcompile.cli import app

RUN = CliRunner()
WORDS = ["a", "few", "words", "of", "no", "meaning"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model with its weights and a tokenizer of six words."""
    words = Tokenizer(models.WordLevel({word: number + 5 for number, word in enumerate(WORDS)}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path)
    fleet.build("llama").save_pretrained(tmp_path)
    (tmp_path / "text").write_text(" ".join(WORDS[i * i % 6] for i in range(50)))
    return tmp_path


def test_a_model_of_the_zoo_reads_random_tokens(tmp_path: Path) -> None:
    out = tmp_path / "tables" / "llama.safetensors"
    words = ["zoo:llama-tiny", "pairs=4", "--rule", "fasa", "--samples", "2", "--length", "24", "--keys", "6"]
    result = RUN.invoke(app, ["calibrate", *words, "--out", str(out), "--json"])
    data = json.loads(result.stdout)
    assert data["path"] == str(out)
    table = tokcompile.Weights.load(out).state_dict()["fasa.pairs"]
    assert data["tables"] == {"fasa.pairs": list(table.shape)}
    assert table.dtype == torch.int16 and table.shape[2] == 4
    assert (table.diff(dim=2) > 0).all()


def test_a_folder_reads_a_text(folder: Path, tmp_path: Path) -> None:
    """The table is that of the same pieces, given by hand."""
    out = tmp_path / "table.safetensors"
    options = ["--rule", "fasa", "--samples", "2", "--length", "20", "--keys", "6", "--text", str(folder / "text")]
    result = RUN.invoke(app, ["calibrate", str(folder), "pairs=3", *options, "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert f"wrote {out}: fasa.pairs [3, 2, 3]" in result.stdout
    ids = torch.tensor([i * i % 6 + 5 for i in range(50)])
    pieces = [{"input_ids": ids[None, start : start + 20]} for start in (0, 30)]
    expected = tokcompile.calibrate(fleet.build("llama"), pieces, "fasa", keys=6, pairs=3)
    assert torch.equal(tokcompile.Weights.load(out).state_dict()["fasa.pairs"], expected.state_dict()["fasa.pairs"])


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["zoo:llama-tiny", "--text", "FOLDER/text"], "no tokenizer"),
        (["FOLDER"], "needs a text to read"),
        (["FOLDER", "--text", "FOLDER/nothing"], "cannot be loaded"),
        (["FOLDER", "--text", "FOLDER/text", "--length", "51"], "is too short"),
    ],
)
def test_what_cannot_be_read(folder: Path, words: list[str], why: str) -> None:
    words = [word.replace("FOLDER", str(folder)) for word in words]
    result = RUN.invoke(app, ["calibrate", *words, "--rule", "fasa", "--out", str(folder / "table"), "--json"])
    error = json.loads(result.stdout)["error"]
    assert result.exit_code == 1
    assert why in error["cause"]
    assert error["remedy"]
