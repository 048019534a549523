"""Models run by hand on a sequence that other tokens were put into: plain torch and transformers' own modules.

A place of the longer sequence is an int, the old token that stands there, or a pair: the number of an inserted token,
and the old token beside it. Each row of a batch has its own list of places.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import naive
import torch
from torch import Tensor, nn

Places = list[list[Any]]
Middle = Callable[[int, Tensor, Tensor, tuple[Tensor, Tensor]], Tensor]
"""Of a block's number, the stream, which tokens are inserted ones, and cosines and sines, the stream behind it."""


def real(inputs: Mapping[str, Tensor]) -> list[list[bool]]:
    """Which tokens of each row are real ones."""
    return inputs["attention_mask"].bool().tolist()


def front(valid: list[list[bool]], count: int) -> Places:
    """Tokens in front of the first real one of each row."""
    out = []
    for row in valid:
        first = row.index(True)
        out.append([*range(first), *((i, first) for i in range(count)), *range(first, len(row))])
    return out


def end(valid: list[list[bool]], count: int) -> Places:
    """Tokens behind the last real one of each row."""
    out = []
    for row in valid:
        last = max(i for i, real in enumerate(row) if real) + 1
        out.append([*range(last), *((i, last - 1) for i in range(count)), *range(last, len(row))])
    return out


def every(valid: list[list[bool]], period: int, count: int = 1) -> Places:
    """Tokens behind each so many, padding counted too."""
    out = []
    for row in valid:
        places: list[Any] = []
        number = 0
        for token in range(len(row)):
            places.append(token)
            if token % period == period - 1:
                places += [(number + i, token) for i in range(count)]
                number += count
        out.append(places)
    return out


def at(valid: list[list[bool]], slots: list[int]) -> Places:
    """Tokens at given places of the longer sequence."""
    out = []
    for row in valid:
        places: list[Any] = []
        for place in range(len(row) + len(slots)):
            taken = sum(slot < place for slot in slots)
            places.append((taken, max(place - taken - 1, 0)) if place in slots else place - taken)
        out.append(places)
    return out


def beside(row: list[Any]) -> list[int]:
    """The old token at each place, or beside it."""
    return [place[1] if isinstance(place, tuple) else place for place in row]


def put(values: Tensor, places: Places, tokens: Tensor) -> Tensor:
    """Values [B, T, C] with rows of tokens [M, C] where the places say; one row of tokens stands everywhere."""
    rows = []
    for row, value in zip(places, values, strict=True):
        made = [
            tokens[min(place[0], len(tokens) - 1)].to(value.dtype) if isinstance(place, tuple) else value[place]
            for place in row
        ]
        rows.append(torch.stack(made))
    return torch.stack(rows)


def take_out(values: Tensor, places: Places) -> Tensor:
    """The old tokens of values [B, T', C]."""
    kept = [[i for i, place in enumerate(row) if not isinstance(place, tuple)] for row in places]
    return torch.stack([value[row] for value, row in zip(values, kept, strict=True)])


def seen(places: Places, valid: list[list[bool]], hidden: bool) -> Tensor:
    """bool [B, T']: which tokens others may see; inserted ones beside padding are hidden where `hidden` says."""
    out = []
    for row, real in zip(places, valid, strict=True):
        out.append([real[t] or (isinstance(p, tuple) and not hidden) for p, t in zip(row, beside(row), strict=True)])
    return torch.tensor(out)


def decoder(
    model: nn.Module,
    inputs: dict[str, Tensor],
    places: Places,
    tokens: Tensor,
    block: int = 0,
    *,
    counted: bool = True,
    silent: bool = False,
    hidden: bool = True,
    remove: bool = True,
    given: Tensor | None = None,
    middle: Middle | None = None,
    cuts: Mapping[int, naive.Cut] | None = None,
) -> tuple[Tensor, list[int]]:
    """A Llama-like decoder with tokens put in before a block: its logits, and the tokens that each block saw.

    Args:
        counted: old tokens have the positions of the longer sequence.
        silent: inserted tokens are at position 0, where a rotation turns nothing.
        hidden: inserted tokens beside padding are hidden.
        remove: the logits are those of the old tokens.
        given: the old positions, [B, T]; 0, 1, 2… by default.
        middle: what the stream goes through between attention and feed-forward, from the block of the insertion on.
        cuts: drops before later blocks; what they choose from are the tokens of the longer sequence.
    """
    text = getattr(model.model, "language_model", model.model)
    ids = inputs["input_ids"]
    valid = inputs.get("attention_mask", torch.ones_like(ids)).bool()
    rows = valid.tolist()
    x = embedded(model, inputs)
    batch, length, _ = x.shape
    positions = torch.arange(length).expand(batch, length) if given is None else given
    mask = torch.ones(length, length, dtype=torch.bool).tril() & valid[:, None, None, :]
    tables = text.rotary_emb(x, positions)
    lengths = []
    for number, layer in enumerate(text.layers):
        if number == block:
            x = put(x, places, tokens)
            more = x.shape[1]
            look = seen(places, rows, hidden)
            mask = torch.ones(more, more, dtype=torch.bool).tril() & look[:, None, None, :]
            positions = moved_positions(places, positions, counted, silent)
            tables = text.rotary_emb(x, positions)
            flags = inserted(places, rows)
        if cuts and number in cuts:
            kept = cuts[number].choose(naive.State(x, look, flags))
            x, look, flags, positions = _cut(x, look, flags, positions, kept, cuts[number].compact)
            mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril() & look[:, None, None, :]
            tables = text.rotary_emb(x, positions)
        lengths.append(x.shape[1])
        attended = naive._for(model, mask, x.dtype)
        how = {"attention_mask": attended, "position_ids": positions, "position_embeddings": tables}
        if middle is not None and number >= block:
            x = x + layer.self_attn(layer.input_layernorm(x), **how)[0]
            x = middle(number, x, flags, tables)
            x = x + layer.mlp(layer.post_attention_layernorm(x))
            continue
        out = layer(x, **how)
        x = out[0] if isinstance(out, tuple) else out
    x = text.norm(x)
    return model.lm_head(take_out(x, places) if remove else x), lengths


def inserted(places: Places, valid: list[list[bool]]) -> Tensor:
    """bool [B, T']: inserted tokens, but for those beside padding."""
    pairs = zip(places, valid, strict=True)
    return torch.tensor([[isinstance(p, tuple) and real[p[1]] for p in row] for row, real in pairs])


def _cut(x: Tensor, look: Tensor, flags: Tensor, positions: Tensor, kept: naive.Kept, compact: bool) -> list[Tensor]:
    """What a drop leaves of values by token; `compact` moves positions down by the tokens dropped before each."""
    out = [naive._take(value, kept) for value in (x, look, flags, positions)]
    if compact:
        out[3] = out[3] - torch.tensor([[old - new for new, old in enumerate(row)] for row in kept])
    return out


def embedded(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Embeddings with image features among them."""
    ids = inputs["input_ids"]
    x = model.get_input_embeddings()(ids)
    if "pixel_values" not in inputs:
        return x
    features = model.model.multi_modal_projector(naive.vision_features(model, inputs["pixel_values"]))
    return x.masked_scatter((ids == model.config.image_token_index)[..., None], features.to(x.dtype))


def moved_positions(places: Places, positions: Tensor, counted: bool, silent: bool) -> Tensor:
    """Positions [B, T'] of the longer sequence."""
    out = []
    for number, row in enumerate(places):
        made = []
        for index, (place, old) in enumerate(zip(row, beside(row), strict=True)):
            position = int(positions[number, old]) + (index - old if counted else 0)
            made.append(0 if silent and isinstance(place, tuple) else position)
        out.append(made)
    return torch.tensor(out)


@contextmanager
def put_before(block: nn.Module, tokens: Tensor, slot: int) -> Iterator[None]:
    """Let a block and all after it see tokens [M, C], the first at a place of each row."""

    def longer(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = args[0] if args else kwargs.pop("hidden_states")
        rows = tokens.expand(len(hidden), *tokens.shape[-2:]).to(hidden.dtype)
        return (torch.cat([hidden[:, :slot], rows, hidden[:, slot:]], 1), *args[1:]), kwargs

    hook = block.register_forward_pre_hook(longer, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def features_without_the_first(model: nn.Module, count: int) -> Iterator[None]:
    """Let the projector of a LLaVA read features [B, N, C] without the first of each image."""
    hook = model.model.multi_modal_projector.register_forward_pre_hook(lambda module, args: (args[0][:, count:],))
    try:
        yield
    finally:
        hook.remove()


@torch.no_grad()
def steps(
    model: nn.Module, inputs: dict[str, Tensor], places: Callable[[list[list[bool]]], Places], count: int, **how: Any
) -> Tensor:
    """Logits of a prompt and steps after it, [B, count, V], of runs over all tokens so far: none has a cache.

    Args:
        places: where inserted tokens stand in a prompt, given its real tokens; they stay there.
        how: further arguments of `decoder`.
    """
    logits, start = [], inputs["input_ids"].shape[1]
    for step in range(count):
        mask = inputs["attention_mask"]
        given = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)
        rows = [[*row, *range(start, start + step)] for row in places([valid[:start] for valid in real(inputs)])]
        out, _ = decoder(model, inputs, rows, given=given, **how)
        logits.append(out[:, -1])
        word = logits[-1].argmax(-1, keepdim=True)
        more = {"input_ids": word, "attention_mask": torch.ones_like(word)}
        inputs = {name: torch.cat([value, more[name]], 1) if name in more else value for name, value in inputs.items()}
    return torch.stack(logits, 1)
