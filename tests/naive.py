"""Rules run by hand, on the reduced sequence: plain torch and transformers' own modules, nothing of tokcompile.

`run` steps through a model layer by layer and calls a chooser at each place where a rule drops tokens. It is slow,
knows each row's kept tokens as a Python list, and is what a compiled rule is compared with.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

Kept = list[list[int]]
"""For each batch row the indices of the tokens that stay, ascending."""


@dataclass
class State:
    """What a chooser may look at when a drop is due.

    Attributes:
        hidden: [B, T, C], the input of the layer before which tokens go.
        valid, image: bool [B, T], real tokens and image tokens.
        scores: per decoder layer already run, its last real query's attention, float32 [B, T] on that layer's tokens.
    """

    hidden: Tensor
    valid: Tensor
    image: Tensor
    scores: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class Cut:
    """Tokens dropped before a decoder layer."""

    layer: int
    choose: Callable[[State], Kept]
    compact: bool = False


@dataclass
class Ran:
    """A hand-run: its logits, the tokens kept by each drop, and the tokens that each decoder layer saw.

    Where a compiled model leaves some places of the logits [B, T, V] empty, `filled`, bool [B, T], are the others.
    """

    logits: Tensor
    kept: list[Kept]
    lengths: list[int]
    filled: Tensor | None = None


@torch.no_grad()
def run(
    model: nn.Module,
    inputs: dict[str, Tensor],
    cuts: Sequence[Cut] = (),
    patches: Callable[[nn.Module, Tensor], Kept] | None = None,
    tower: Cut | None = None,
    generated: int = 0,
) -> Ran:
    """Run a language model or a LLaVA by hand.

    Args:
        model: of transformers, Llama-like, or LLaVA over one.
        inputs: input_ids, and attention_mask and pixel_values if there are any.
        cuts: drops in the decoder, in order; several before one layer are done one after the other.
        patches: chooses patches of each image before the projector; the text follows, numbered anew.
        tower: a drop before a block of the vision tower, which `patches` then choose from.
        generated: how many tokens at the end are the model's own: no image tokens, whatever their numbers.
    """
    ids = inputs["input_ids"]
    valid = inputs.get("attention_mask", torch.ones_like(ids)).bool()
    image = ids == getattr(model.config, "image_token_index", -1)
    image[:, ids.shape[1] - generated :] = False
    kept: list[Kept] = []
    features = None
    if "pixel_values" in inputs:
        with cut_in_tower(model, tower) as kept:
            features = vision_features(model, inputs["pixel_values"])
        others = class_tokens(model)
        choices = [[[i - others for i in row if i >= others] for row in one] for one in kept]
        if patches is not None:
            choices.append(patches(model, inputs["pixel_values"]))
            kept.append(choices[-1])
            features = _take(features, choices[-1])
        for number, chosen in enumerate(choices):
            text = [stay(row, chosen[b]) for b, row in enumerate(image.tolist())]
            kept.insert(2 * number + 1, text)
            ids, valid, image = (_take(t, text) for t in (ids, valid, image))
        features = model.model.multi_modal_projector(features)
    hidden = model.get_input_embeddings()(ids)
    if features is not None:
        hidden = hidden.masked_scatter(image[..., None], features.to(hidden.dtype))
    logits, more, lengths = _decoder(model, State(hidden, valid, image), cuts)
    return Ran(logits, kept + more, lengths)


@torch.no_grad()
def generate(
    model: nn.Module,
    inputs: dict[str, Tensor],
    steps: int,
    cuts: Sequence[Cut] = (),
    patches: Callable[[nn.Module, Tensor], Kept] | None = None,
) -> Tensor:
    """Greedy continuation without any cache: each step runs the prompt and all tokens so far from the beginning.

    What the first run chose stays chosen, and a new token is kept by every drop.

    Returns:
        The logits of each step, [B, steps, vocabulary].
    """
    first = run(model, inputs, cuts, patches)
    logits = [first.logits[:, -1]]
    skipped = 0 if patches is None else 2  # the patches, and the text's tokens that follow from them
    for done in range(1, steps):
        words = torch.stack([one.argmax(-1) for one in logits], 1)
        longer = inputs | {"input_ids": torch.cat([inputs["input_ids"], words], 1)}
        if "attention_mask" in inputs:
            longer["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(words)], 1)
        again = [
            Cut(cut.layer, _chosen_before(kept, done), cut.compact)
            for cut, kept in zip(cuts, first.kept[skipped:], strict=True)
        ]
        same = None if patches is None else lambda *_: first.kept[0]
        logits.append(run(model, longer, again, same, generated=done).logits[:, -1])
    return torch.stack(logits, 1)


def _chosen_before(kept: Kept, more: int) -> Callable[[State], Kept]:
    """A chooser that repeats a choice, and keeps the tokens that have come since."""

    def choose(state: State) -> Kept:
        tokens = state.hidden.shape[1]
        return [[*row, *range(tokens - more, tokens)] for row in kept]

    return choose


def class_tokens(model: nn.Module) -> int:
    """Tokens of a vision tower that are no patches."""
    config = getattr(model.config, "vision_config", model.config)
    return 0 if "siglip" in config.model_type else 1


@contextmanager
def cut_in_tower(model: nn.Module, cut: Cut | None) -> Iterator[list[Kept]]:
    """Let a block of the tower, and all after it, see the chosen tokens alone."""
    kept: list[Kept] = []

    def shorten(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = args[0]
        everything = torch.ones(hidden.shape[:2], dtype=torch.bool)
        image = everything.clone()
        image[:, : class_tokens(model)] = False
        kept.append(cut.choose(State(hidden, everything, image)))
        return (_take(hidden, kept[-1]), *args[1:])

    if cut is None:
        yield kept
        return
    hook = _layers(model)[cut.layer].register_forward_pre_hook(shorten)
    try:
        yield kept
    finally:
        hook.remove()


@torch.no_grad()
def encode(model: nn.Module, pixels: Tensor, cuts: Sequence[Cut]) -> tuple[Any, list[Kept]]:
    """Run a vision model alone by hand: what it returns, and the tokens kept by each drop."""
    with ExitStack() as stack:
        kept = [stack.enter_context(cut_in_tower(model, cut)) for cut in cuts]
        out = model(pixel_values=pixels)
    return out, [one for (one,) in kept]


def stay(image: list[bool], chosen: list[int]) -> list[int]:
    """Text tokens, and image tokens that are among the chosen."""
    ordinal, out = -1, []
    for token, is_image in enumerate(image):
        ordinal += is_image
        if not is_image or ordinal in chosen:
            out.append(token)
    return out


def _take(values: Tensor, kept: Kept) -> Tensor:
    return torch.stack([row[kept[b]] for b, row in enumerate(values)])


def _take_of_heads(table: Tensor, kept: Kept) -> Tensor:
    """Rows of a rotary table [B, T, D], or of one with heads of its own, [B or 1, H, T, D]."""
    if table.ndim == 3:
        return _take(table, kept)
    return torch.stack([row[:, kept[b]] for b, row in enumerate(table.expand(len(kept), -1, -1, -1))])


def _decoder(model: nn.Module, state: State, cuts: Sequence[Cut]) -> tuple[Tensor, list[Kept], list[int]]:
    text = getattr(model.model, "language_model", model.model)
    batch, tokens, _ = state.hidden.shape
    positions = torch.arange(tokens).expand(batch, tokens)
    causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    mask = causal & state.valid[:, None, None, :]
    tables = text.rotary_emb(state.hidden, positions)
    kept: list[Kept] = []
    lengths: list[int] = []
    for number, layer in enumerate(text.layers):
        for cut in (c for c in cuts if c.layer == number):
            chosen = cut.choose(state)
            kept.append(chosen)
            mask = torch.stack([mask[b][:, chosen[b]][:, :, chosen[b]] for b in range(batch)])
            positions = _take(positions, chosen)
            state.hidden, state.valid, state.image = (
                _take(t, chosen) for t in (state.hidden, state.valid, state.image)
            )
            if cut.compact:
                positions = positions - torch.tensor([[old - new for new, old in enumerate(row)] for row in chosen])
                tables = text.rotary_emb(state.hidden, positions)
            else:
                tables = tuple(_take_of_heads(t, chosen) for t in tables)
        lengths.append(state.hidden.shape[1])
        with _recorded(layer.self_attn) as seen:
            out = layer(
                state.hidden,
                attention_mask=_for(model, mask, state.hidden.dtype),
                position_ids=positions,
                position_embeddings=tables,
            )
        state.hidden = out[0] if isinstance(out, tuple) else out
        state.scores.append(_last_row(layer.self_attn, seen, tables, mask, state.valid))
    return model.lm_head(text.norm(state.hidden)), kept, lengths


def _for(model: nn.Module, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask as the model's attention takes it: bool for SDPA, additive for written-out attention."""
    if model.config.get_text_config()._attn_implementation != "eager":
        return mask
    return torch.where(mask, 0.0, torch.finfo(dtype).min).to(dtype)


@contextmanager
def _recorded(attention: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Queries and keys before rotary, [B, T, heads * width], as the model's own projections make them."""
    seen: dict[str, Tensor] = {}
    hooks = [
        getattr(attention, name).register_forward_hook(lambda module, args, out, name=name: seen.__setitem__(name, out))
        for name in ("q_proj", "k_proj")
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _heads(value: Tensor, width: int) -> Tensor:
    return value.unflatten(-1, (-1, width)).transpose(1, 2)


def _last_row(
    attention: nn.Module, seen: dict[str, Tensor], tables: tuple[Tensor, Tensor], mask: Tensor, valid: Tensor
) -> Tensor:
    """Attention of each row's last real token, mean over heads, float32 [B, T]."""
    query, key = (_heads(seen[name], attention.head_dim) for name in ("q_proj", "k_proj"))
    module = importlib.import_module(type(attention).__module__)
    query, key = module.apply_rotary_pos_emb(query, key, *tables)
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = query.float() @ key.float().transpose(2, 3) * attention.scaling
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1).mean(1)
    last = [max(i for i, real in enumerate(row) if real) for row in valid.tolist()]
    return torch.stack([weights[b, t] for b, t in enumerate(last)])


def vision_features(model: nn.Module, pixels: Tensor) -> Tensor:
    """What the projector reads: [images, patches, C]."""
    states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    chosen = states[model.config.vision_feature_layer]
    return chosen[:, 1:] if model.config.vision_feature_select_strategy == "default" else chosen


def vision_attention(model: nn.Module, pixels: Tensor, block: int) -> Tensor:
    """Attention that each patch receives in one block of the tower, mean over rows and heads: float32 [B, patches]."""
    tower = model.model.vision_tower
    attention = _layers(model)[block].self_attn
    with _recorded(attention) as seen:
        tower(pixels)
    query, key = (_heads(seen[name], attention.head_dim).float() for name in ("q_proj", "k_proj"))
    received = (query @ key.transpose(2, 3) * attention.head_dim**-0.5).softmax(-1).mean((1, 2))
    return received[:, 1:] if model.config.vision_feature_select_strategy == "default" else received


def _layers(model: nn.Module) -> nn.ModuleList:
    tower = getattr(model.model, "vision_tower", model) if hasattr(model, "model") else model
    return next(m for m in tower.modules() if isinstance(m, nn.ModuleList))


def best(scores: Tensor, among: Sequence[int], count: int) -> list[int]:
    """The tokens with the largest scores among some, ties to the lower index; ascending."""
    values = scores.tolist()
    return sorted(sorted(among, key=lambda i: (-values[i], i))[:count])


def count(keep: int | float | str, n: int, nearest: bool = False) -> int:
    """A budget of n tokens, in exact fractions: a count, or a share rounded down, or as Python's `round` does."""
    if isinstance(keep, int):
        return min(keep, n)
    share = Fraction(str(keep)) * n
    return max(1, round(share) if nearest else share.numerator // share.denominator)


# The rules of the library.


def fastv(layer: int = 2, keep: int | float | str = 0.5) -> Cut:
    """FastV: the image tokens that the last text token looks at most in the layer before."""

    return Cut(layer, lambda state: looked_at(state.scores[layer - 1], state.image, keep))


def looked_at(scores: Tensor, image: Tensor, keep: int | float | str) -> Kept:
    """The image tokens with the largest scores, and all others. Scores are [B, T], `image` is bool [B, T]."""
    out = []
    for row, is_image in zip(scores, image.tolist(), strict=True):
        among = [i for i, yes in enumerate(is_image) if yes]
        chosen = best(row, among, count(keep, len(among), nearest=True))
        out.append(sorted([*chosen, *(i for i in range(len(is_image)) if i not in among)]))
    return out


def hiprune(
    keep: int | float | str = "1/3",
    alpha: float = 0.1,
    object_layer: int | None = None,
) -> Callable[[nn.Module, Tensor], Kept]:
    """HiPrune: anchors of a middle layer, their neighbours on the raster, and the best of the last layer used."""

    def choose(model: nn.Module, pixels: Tensor) -> Kept:
        config = model.config.vision_config
        depth, feature = config.num_hidden_layers, model.config.vision_feature_layer
        middle = vision_attention(model, pixels, (object_layer or depth * 3 // 8) - 1)
        deep = vision_attention(model, pixels, depth + feature if feature < 0 else feature - 1)
        return anchored(middle, deep, config.image_size // config.patch_size, keep, alpha)

    return choose


def anchored(middle: Tensor, deep: Tensor, width: int, keep: int | float | str, alpha: float) -> Kept:
    """Anchors by `middle`, their neighbours on a raster of a width, and the best by `deep`; both [images, patches]."""
    patches = middle.shape[1]
    budget = count(keep, patches, nearest=True)
    anchors = round(budget * Fraction(str(alpha)) / 5)
    out = []
    for row in range(len(middle)):
        first = best(middle[row], range(patches), anchors)
        around = {min(max(i + d, 0), patches - 1) for i in first for d in (0, -1, 1, -width, width)} - set(first)
        ranked = sorted(
            range(patches),
            key=lambda i, row=row, first=first, around=around: (
                i not in first,
                i not in around,
                -deep[row, i].item(),
                i,
            ),
        )
        out.append(sorted(ranked[:budget]))
    return out


def random(keep: int | float | str = "1/3", seed: int = 0, among: str = "image", ends: bool = False) -> Cut:
    """Random tokens, the same in each row; padding goes first, and the first and last real token never if asked."""

    def choose(state: State) -> Kept:
        out = []
        tokens = state.hidden.shape[1]
        luck = torch.tensor(lucky(tokens, seed))
        for valid, image in zip(state.valid.tolist(), state.image.tolist(), strict=True):
            group = [i for i in range(tokens) if among == "all" or image[i] == (among == "image")]
            scores = torch.tensor([luck[i] if valid[i] else -torch.inf for i in range(tokens)])
            if ends:
                scores[[valid.index(True), tokens - 1 - valid[::-1].index(True)]] = torch.inf
            chosen = best(scores, group, count(keep, len(group)))
            out.append(sorted({*chosen, *(i for i in range(tokens) if i not in group)}))
        return out

    return Cut(0, choose, compact=True)


def divprune(keep: int | float | str = 0.098) -> Cut:
    """DivPrune: image tokens far from each other, in float64; no token twice. Positions count anew."""

    def choose(state: State) -> Kept:
        out = []
        for hidden, image in zip(state.hidden.double(), state.image.tolist(), strict=True):
            among = [i for i, is_image in enumerate(image) if is_image]
            chosen = spread_out(hidden[among], count(keep, len(among), nearest=True))
            out.append(sorted({*(among[i] for i in chosen), *(i for i in range(len(image)) if not image[i])}))
        return out

    return Cut(0, choose, compact=True)


def spread_out(tokens: Tensor, budget: int) -> list[int]:
    """Places of tokens [T, C] in the order of a walk from the loneliest to the farthest from all before, and so on."""
    units = tokens / tokens.norm(dim=1, keepdim=True)
    apart = (1 - units @ units.T).tolist()
    walk: list[int] = []
    for _ in range(budget):
        nearest = {}
        for i in range(len(apart)):
            others = walk or [j for j in range(len(apart)) if j != i]
            nearest[i] = min((apart[i][j] for j in others), default=0.0)
        walk.append(min((i for i in nearest if i not in walk), key=lambda i: (-nearest[i], i)))
    return walk


def longest(layer: int, keep: int) -> Cut:
    """Patches whose vectors are longest, and every class token; for a tower."""

    def choose(state: State) -> Kept:
        out = []
        for norms, image in zip(state.hidden.float().norm(dim=-1), state.image.tolist(), strict=True):
            patches = [i for i, is_patch in enumerate(image) if is_patch]
            chosen = best(norms, patches, count(keep, len(patches)))
            out.append(sorted({*chosen, *(i for i in range(len(image)) if not image[i])}))
        return out

    return Cut(layer, choose)


def lucky(tokens: int, seed: int) -> list[float]:
    """The hash of (seed, index) that the random rule scores by, in Python integers."""

    def mix(word: int) -> int:
        word = (word ^ word >> 16) * 0x21F0AAAD & 0xFFFFFFFF
        word = (word ^ word >> 15) * 0x735A2D97 & 0xFFFFFFFF
        return word ^ word >> 15

    salt = mix(mix(seed & 0xFFFFFFFF) + (seed >> 32 & 0xFFFFFFFF) & 0xFFFFFFFF)
    return [(mix(mix(i + 1) ^ salt) >> 8) * 2.0**-24 for i in range(tokens)]
