"""The retrieval task: a long text of a made-up language, needles hidden in it, and questions about the needles.

The language has 32 words. What follows a word is, half of the time, one of eight words that are the same in every text,
and otherwise the one word that follows it in this text: so a text must be remembered to go on well in it. A needle is
`<key> K V V`, with words of the same language; `<ask> K` asks for its two words V.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Split = Literal["train", "test"]

WORDS = tuple(consonant + vowel for consonant in "bdfgklmn" for vowel in "aeio")
VOCABULARY = ("<pad>", "<bos>", "<eos>", "<unk>", "<key>", "<ask>", *WORDS)
TOKEN = {word: index for index, word in enumerate(VOCABULARY)}
PAD, BOS, EOS, UNK, KEY, ASK = range(6)
FIRST_WORD = TOKEN[WORDS[0]]

VALUES = 2
"""Words of an answer."""
NEEDLE = 2 + VALUES
"""Tokens of a needle, `<key> K V V`, and of a question with its answer, `<ask> K V V`."""

LANGUAGE_SEED = 32
SUCCESSORS = 8
"""Words that may follow a word in every text; the next of them is always 0.7 times as likely."""
FALL = 0.7
OWN = 0.5
"""How often the word that follows is the text's own."""
_SPLIT_NUMBER = {"train": 0, "test": 1}


@dataclass(frozen=True)
class Texts:
    """A batch of n texts of T tokens with k needles each.

    input_ids: int64 [n, T], `<bos>` first.
    keys: int64 [n, k], the word that each needle is known by; a text's keys differ.
    values: int64 [n, k, 2], what a needle holds.
    places: int64 [n, k], ascending: where each needle's `<key>` stands.
    more: int64 [n, M], how the text goes on.
    """

    input_ids: Tensor
    keys: Tensor
    values: Tensor
    places: Tensor
    more: Tensor

    def __len__(self) -> int:
        return len(self.input_ids)

    def rows(self, which: Tensor) -> Texts:
        """Some of the texts, by their numbers, int64 [m]."""
        return Texts(**{name: value[which] for name, value in vars(self).items()})

    @property
    def in_needle(self) -> Tensor:
        """bool [n, T]: the tokens of needles."""
        mask = torch.zeros_like(self.input_ids, dtype=torch.bool)
        spots = self.places[..., None] + torch.arange(NEEDLE)
        return mask.scatter_(1, spots.flatten(1), True)

    def questions(self, which: Tensor) -> Tensor:
        """int64 [n, m, 2]: `<ask> K` about the needles `which`, int64 [n, m]."""
        keys = self.keys.gather(1, which)
        return torch.stack([torch.full_like(keys, ASK), keys], dim=-1)

    def answers(self, which: Tensor) -> Tensor:
        """int64 [n, m, 2]: the values of the needles `which`, int64 [n, m]."""
        return self.values.gather(1, which[..., None].expand(-1, -1, VALUES))


@functools.cache
def successors() -> Tensor:
    """int64 [32, 8]: words that may follow each word in every text, the likeliest first; as numbers of words."""
    rng = torch.Generator().manual_seed(LANGUAGE_SEED)
    return torch.rand(len(WORDS), len(WORDS), generator=rng).argsort(1)[:, :SUCCESSORS].contiguous()


def chances() -> Tensor:
    """float32 [8]: how likely each of a word's successors is among them."""
    weights = FALL ** torch.arange(SUCCESSORS)
    return weights / weights.sum()


def texts(split: Split, n: int, length: int, needles: int, seed: int, more: int = 0) -> Texts:
    """n texts of `length` tokens with `needles` needles anywhere, the same for the same arguments.

    Args:
        more: words with which each text goes on.

    Raises:
        ValueError: there is no room for the needles, or there are not as many keys.
    """
    slack = length - 1 - NEEDLE * needles
    if slack < 0 or needles > len(WORDS):
        raise ValueError(f"{needles} needles of {NEEDLE} tokens, known by different words, in {length} tokens")
    rng = torch.Generator().manual_seed(2 * seed + _SPLIT_NUMBER[split])
    words = len(WORDS)
    gaps = torch.randint(slack + 1, (n, needles), generator=rng).sort(1).values
    places = 1 + gaps + NEEDLE * torch.arange(needles)
    keys = torch.rand(n, words, generator=rng).argsort(1)[:, :needles] + FIRST_WORD
    values = torch.randint(words, (n, needles, VALUES), generator=rng) + FIRST_WORD
    whole = torch.cat([torch.full((n, needles, 1), KEY), keys[..., None], values], dim=-1)
    fixed = torch.full((n, length + more), -1)
    fixed[:, 0] = BOS
    fixed.scatter_(1, (places[..., None] + torch.arange(NEEDLE)).flatten(1), whole.flatten(1))
    ids = _speak(fixed, rng)
    return Texts(ids[:, :length], keys, values, places, ids[:, length:])


def prompts(n: int, length: int, seed: int) -> Tensor:
    """int64 [n, length]: test texts, each with a question about its first needle at the end."""
    room = length - 2
    found = texts("test", n, room, min(8, (room - 1) // NEEDLE), seed)
    return torch.cat([found.input_ids, found.questions(torch.zeros(n, 1, dtype=torch.long))[:, 0]], dim=1)


def _speak(fixed: Tensor, rng: torch.Generator) -> Tensor:
    """Fill in the language where `fixed` [n, T] is -1: each word follows the word before it, a needle's too."""
    n, length = fixed.shape
    words = len(WORDS)
    own = torch.rand(n, words, generator=rng).argsort(1)
    rank = torch.multinomial(chances(), n * length, replacement=True, generator=rng).view(n, length)
    of_text = torch.rand(n, length, generator=rng) < OWN
    word = torch.randint(words, (n,), generator=rng)
    row, common, said = torch.arange(n), successors(), []
    for place in range(length):
        spoken = torch.where(of_text[:, place], own[row, word], common[word, rank[:, place]])
        token = torch.where(fixed[:, place] >= 0, fixed[:, place], spoken + FIRST_WORD)
        word = torch.where(token >= FIRST_WORD, token - FIRST_WORD, word)
        said.append(token)
    return torch.stack(said, dim=1)
