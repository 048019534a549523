"""The retrieval task and its model: texts, the circuit that training begins with, what the checkpoint recalls."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, LlamaForCausalLM

from tokcompile.models import recipe_retrieval, retrieval, zoo
from tokcompile.models.recipe_retrieval import ANSWER, IGNORED, LANGUAGE, Stage

SIZES = st.tuples(st.integers(1, 4), st.integers(34, 90), st.integers(1, 8), st.integers(0, 9), st.integers(0, 99))


@given(SIZES)
def test_needles_stand_where_they_are_said_to(sizes: tuple[int, int, int, int, int]) -> None:
    n, length, needles, more, seed = sizes
    texts = retrieval.texts("test", n, length, needles, seed, more)
    assert texts.input_ids.shape == (n, length) and texts.more.shape == (n, more)
    whole = torch.cat([texts.input_ids, texts.more], dim=1).tolist()
    for row in range(n):
        said = whole[row]
        places, keys = texts.places[row].tolist(), texts.keys[row].tolist()
        assert [i for i, token in enumerate(said) if token == retrieval.KEY] == places
        assert all(
            later - place >= retrieval.NEEDLE for place, later in zip(places, [*places[1:], length], strict=True)
        )
        assert len(set(keys)) == needles
        for place, key, value in zip(places, keys, texts.values[row].tolist(), strict=True):
            assert said[place + 1 : place + retrieval.NEEDLE] == [key, *value]
        assert said[0] == retrieval.BOS
        assert all(token >= retrieval.FIRST_WORD for i, token in enumerate(said) if i and i not in places)
        inside = {place + i for place in places for i in range(retrieval.NEEDLE)}
        assert texts.in_needle[row].nonzero()[:, 0].tolist() == sorted(inside)


@given(st.integers(0, 99))
def test_a_word_has_eight_successors_and_one_of_its_text(seed: int) -> None:
    texts = retrieval.texts("train", 2, 300, 5, seed)
    common = [set(row) for row in retrieval.successors().tolist()]
    assert all(len(each) == retrieval.SUCCESSORS for each in common)
    for row in range(2):
        ids, inside = texts.input_ids[row].tolist(), texts.in_needle[row].tolist()
        own: dict[int, set[int]] = {}
        for place in range(2, len(ids)):
            if inside[place] or ids[place - 1] < retrieval.FIRST_WORD:
                continue
            word, after = ids[place - 1] - retrieval.FIRST_WORD, ids[place] - retrieval.FIRST_WORD
            if after not in common[word]:
                own.setdefault(word, set()).add(after)
        assert own and all(len(each) == 1 for each in own.values())


def test_how_often_a_text_speaks_for_itself() -> None:
    """Half of the time, and then a common successor in 8 of 32 cases."""
    texts = retrieval.texts("train", 64, 300, 1, 0)
    word, after = texts.input_ids[:, 1:-1], texts.input_ids[:, 2:]
    plain = ~texts.in_needle[:, 2:] & (word >= retrieval.FIRST_WORD)
    common = (
        retrieval.successors()[word[plain] - retrieval.FIRST_WORD] == after[plain][:, None] - retrieval.FIRST_WORD
    ).any(1)
    expected = 1 - retrieval.OWN + retrieval.OWN * retrieval.SUCCESSORS / len(retrieval.WORDS)
    assert common.float().mean().item() == pytest.approx(expected, abs=0.03)


def test_a_seed_and_a_split_decide_a_text() -> None:
    one, again, other = (retrieval.texts("test", 2, 80, 3, seed).input_ids for seed in (4, 4, 5))
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert not torch.equal(one, retrieval.texts("train", 2, 80, 3, 4).input_ids)


def test_questions_and_answers_belong_together() -> None:
    texts = retrieval.texts("test", 3, 80, 4, 0)
    which = torch.tensor([[2, 0], [1, 1], [3, 2]])
    for row in range(3):
        for turn, number in enumerate(which[row].tolist()):
            assert texts.questions(which)[row, turn].tolist() == [retrieval.ASK, texts.keys[row, number]]
            assert torch.equal(texts.answers(which)[row, turn], texts.values[row, number])
    some = texts.rows(torch.tensor([2, 0]))
    assert torch.equal(some.input_ids, texts.input_ids[[2, 0]]) and torch.equal(some.keys, texts.keys[[2, 0]])
    ids = retrieval.prompts(3, 60, 1)
    assert ids.shape == (3, 60) and (ids[:, -2] == retrieval.ASK).all()


@pytest.mark.parametrize(("length", "needles"), [(20, 5), (400, 33)])
def test_no_room_for_the_needles(length: int, needles: int) -> None:
    with pytest.raises(ValueError, match=f"{needles} needles"):
        retrieval.texts("test", 1, length, needles, 0)


def test_lessons_teach_the_language_and_the_answers_alone() -> None:
    stage = Stage(60, 3, 1, 1e-3, 4, 4, asked=3)
    ids, kinds = recipe_retrieval.lessons(stage, 7)
    texts = retrieval.texts("train", 3, 60, 4, 7)
    assert torch.equal(ids[:, :60], texts.input_ids) and ids.shape == kinds.shape == (3, 60 + 3 * retrieval.NEEDLE)
    assert torch.equal(kinds[:, :60] == LANGUAGE, ~texts.in_needle)
    turns, roles = ids[:, 60:].unflatten(1, (3, -1)), kinds[:, 60:].unflatten(1, (3, -1))
    assert (turns[..., 0] == retrieval.ASK).all() and (roles == torch.tensor([IGNORED, IGNORED, ANSWER, ANSWER])).all()
    for row in range(3):
        known = dict(zip(texts.keys[row].tolist(), texts.values[row].tolist(), strict=True))
        assert [known[key] for key in turns[row, :, 1].tolist()] == turns[row, :, 2:].tolist()
    certain = torch.nn.functional.one_hot(ids.roll(-1, 1), len(retrieval.VOCABULARY)).float() * 50
    language, answer, right = recipe_retrieval.losses(certain, ids, kinds)
    assert language < 1e-3 and answer < 1e-3 and right == 1


def test_the_untrained_model_looks_back_and_for_earlier_words() -> None:
    model = recipe_retrieval.build_model(3).eval()
    model.set_attn_implementation("eager")
    ids = retrieval.texts("train", 4, 96, 4, 0).input_ids
    with torch.no_grad():
        first, second, _ = model(input_ids=ids, output_attentions=True).attentions
    for head, far in enumerate(recipe_retrieval.BACK):
        assert first[:, head].diagonal(-far, 1, 2)[:, 8:].mean() > 0.9
    follows = torch.zeros(4, 96, 96, dtype=torch.bool)
    follows[:, :, 1:] = ids[:, :, None] == ids[:, None, :-1]
    follows &= torch.ones(96, 96, dtype=torch.bool).tril()
    share = follows[:, 48:].float().sum(-1) / torch.arange(49, 97)
    assert (second[:, 0] * follows)[:, 48:].sum(-1).mean() > 3 * share.mean()


def test_the_checkpoint_is_small_and_recalls() -> None:
    assert (zoo.RETRIEVAL / "model.safetensors").stat().st_size < 3 * 2**20
    model = LlamaForCausalLM.from_pretrained(zoo.RETRIEVAL, dtype=torch.float32)
    assert recipe_retrieval.accuracy(model, 48, 512, seed=77, batch=16) >= 0.95


def test_the_tokenizer_knows_the_words() -> None:
    tokenizer = AutoTokenizer.from_pretrained(zoo.RETRIEVAL)
    assert tokenizer("<ask> ba")["input_ids"] == [retrieval.BOS, retrieval.ASK, retrieval.TOKEN["ba"]]
    assert tokenizer.convert_tokens_to_ids(list(retrieval.VOCABULARY)) == list(range(len(retrieval.VOCABULARY)))


def test_the_recipe_runs_and_an_interrupted_one_goes_on_to_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def arguments(name: str) -> list[str]:
        return ["--smoke", "--out", str(tmp_path / name / "out"), "--work", str(tmp_path / name / "work")]

    assert recipe_retrieval.main(arguments("whole")).keys() == {40}
    step = recipe_retrieval.Recipe._step
    monkeypatch.setattr(recipe_retrieval, "SAVE_EVERY_S", -1.0)

    def stops(self: recipe_retrieval.Recipe, number: int, at: int) -> tuple[float, float, float]:
        if (number, at) == (2, 1):
            raise KeyboardInterrupt
        return step(self, number, at)

    monkeypatch.setattr(recipe_retrieval.Recipe, "_step", stops)
    with pytest.raises(KeyboardInterrupt):
        recipe_retrieval.main(arguments("resumed"))
    monkeypatch.setattr(recipe_retrieval.Recipe, "_step", step)
    recipe_retrieval.main([*arguments("resumed"), "--resume"])
    one, other = (
        LlamaForCausalLM.from_pretrained(tmp_path / name / "out").state_dict() for name in ("whole", "resumed")
    )
    assert all(torch.equal(one[name], other[name]) for name in one)
