"""Caches of a fixed size (transformers' StaticCache): a prompt fills them with what a rule leaves of it.

A prompt runs with a cache that grows in its place, as it would without one: it attends to itself alone, and may be
longer than the buffers. What is left of its keys and values is then written into the buffers, and from there on every
step has the same shapes. How much of a buffer is filled is a number on the device; here the same is counted on the
host, so that no step waits for the device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokcompile.capturing.dynamo import optional
from tokcompile.decoding.carried import LEFT, SHORT, SPARE
from tokcompile.errors import TokredError

_FILLED = "_tokcompile_filled"
_WHOLE = "_tokcompile_whole"
DYNAMIC = "transformers' DynamicCache"


@dataclass
class Filled:
    """How much of a cache's conversation is known.

    Attributes:
        prompt: tokens of its prompt.
        seen: all tokens so far.
        room: how many tokens fit behind the prompt.
    """

    prompt: int
    seen: int
    room: int


def install(model: nn.Module) -> None:
    """Let `generate` leave masks of static caches to the model, and compile no model that is compiled already."""
    if hasattr(model, "generate"):
        for name, method in _METHODS.items():
            setattr(model, name, MethodType(method, model))


def restore(model: nn.Module) -> None:
    """Undo `install`."""
    for name, method in _METHODS.items():
        if getattr(model.__dict__.get(name), "__func__", None) is method:
            delattr(model, name)


def _get_compiled_call(model: nn.Module, compile_config: Any = None) -> Any:
    """What transformers would compile anew, beside or around the compiled call that the model has."""
    del compile_config
    return model.__call__


def _create_masks_for_generate(model: nn.Module, **given: Any) -> Any:
    """The caller's own mask: one for all layers, as transformers makes it outside of the model, fits no short cache."""
    cache = given.get("past_key_values")
    if not is_static(cache):
        masks: Any = optional("transformers.masking_utils")
        return getattr(type(model), "create_masks_for_generate", masks.create_masks_for_generate)(**given)
    if not getattr(cache, "_is_user_defined", False) and not hasattr(cache, _FILLED):
        setattr(cache, _WHOLE, True)  # which `generate` made, with room for the whole text
        vars(model).pop("_previous_max_cache_length", None)  # or of the longest so far; `fill` keeps count of the room
    return given["attention_mask"]


_METHODS = {
    "get_compiled_call": _get_compiled_call,
    "create_masks_for_generate": _create_masks_for_generate,
}


def is_static(cache: Any) -> bool:
    """Whether a cache, or the part of it for the decoder's own tokens, has buffers of a fixed size."""
    if cache is None:
        return False
    kind = getattr(optional("transformers.cache_utils"), "StaticLayer", ())
    own = getattr(cache, "self_attention_cache", cache)
    return any(isinstance(layer, kind) for layer in getattr(own, "layers", None) or ())


def begins(cache: Any) -> bool:
    """Whether a cache holds no token yet; asks the device only where it was not filled here.

    Raises:
        TokredError: something else has filled it.
    """
    if hasattr(cache, _FILLED):
        return False
    own = getattr(cache, "layers", ())  # a cache of two parts has none of its own, and is refused
    if any(layer.is_initialized and int(layer.get_seq_length()) for layer in own):
        raise TokredError(
            "this call goes on from a cache that no prompt of this compiled model has filled",
            found="a static cache with tokens in it",
            remedy="run the prompt through the compiled model with an empty cache: cache.reset()",
        )
    return True


def stand_in(model: nn.Module, cache: Any, given: Mapping[str, Any]) -> Any:
    """A cache that grows, for a prompt to run with in place of a static one.

    Raises:
        TokredError: the cache has layers that are neither for all keys nor for those in a window, or padding is not
            told by a mask of two dimensions.
    """
    utils: Any = optional("transformers.cache_utils")
    config: Any = model.config
    text, layers = config.get_text_config(decoder=True), getattr(cache, "layers", None) or ()
    kinds = set(getattr(text, "layer_types", None) or ())
    held = utils.DynamicCache(config=text)
    known = kinds <= {"full_attention", "sliding_attention"} and not getattr(config, "is_encoder_decoder", False)
    known &= {type(layer) for layer in layers} <= {utils.StaticLayer, utils.StaticSlidingWindowLayer}
    if not known or getattr(cache, "offloading", False) or len(layers) != len(held.layers):
        raise TokredError(
            "a rule that shortens caches cannot fill this static cache",
            found=type(cache).__name__ + (f" for layers of {', '.join(sorted(kinds))}" if kinds else ""),
            remedy=f"a StaticCache of a decoder whose layers attend to all keys or in a window, or {DYNAMIC}",
        )
    if all(layer.is_sliding for layer in layers):
        raise TokredError(
            "a rule that shortens caches has none to fill here",
            found="a static cache of windows alone",
            remedy=f"use {DYNAMIC}",
        )
    mask = given.get("attention_mask")
    if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
        raise TokredError(
            "the mask of a prompt that fills a static cache does not say what is padding",
            found=f"{mask.ndim} dimensions" if isinstance(mask, Tensor) else type(mask).__name__,
            remedy="pass an attention_mask [batch, tokens]",
        )
    return held


def fill(cache: Any, held: Any, given: Mapping[str, Any], prompt: int, spare: int) -> tuple[dict[str, Tensor], int]:
    """Write what a prompt left into the buffers.

    Args:
        cache: a static cache without tokens.
        held: the cache that the prompt ran with.
        given: arguments of the prompt's call.
        prompt: its tokens.
        spare: tokens that there is room for behind the prompt at least, where buffers are made here.

    Returns:
        What later steps are told, rows first: int64 [B, layers], padding that each layer holds where rules evicted
        padding before tokens, int64 [B], padding on the left where they left it, and int64 [B, layers], by how much
        each holds less than the prompt; and how much room there is behind prompts of this model.

    Raises:
        TokredError: a buffer is too small, or of another shape.
    """
    layers = list(zip(cache.layers, held.layers, strict=True))
    full = [(static, made) for static, made in layers if not static.is_sliding]
    whole = vars(cache).pop(_WHOLE, False)
    spares = [static.max_cache_len - (prompt if whole else made.keys.shape[2]) for static, made in full]
    room = max(min(spares), spare) if whole else min(spares)
    if room < 0:
        raise TokredError(
            "a static cache is too small for what a prompt leaves",
            found=f"{min(s.max_cache_len for s, _ in full)} slots, and {max(m.keys.shape[2] for _, m in full)} tokens",
            remedy="StaticCache(config, max_cache_len=N) with N the budget and the tokens that follow",
        )
    for static, made in layers:
        size = made.keys.shape[2] + room if whole else static.max_cache_len
        if static.is_sliding:
            size = min(made.sliding_window, prompt + room)
        _make(static, made, size, anew=whole or (static.is_sliding and not static.is_initialized))
    for static, made in layers:
        (_fill_window if static.is_sliding else _fill_one)(static, made.keys.detach(), made.values.detach(), made)
    setattr(cache, _FILLED, Filled(prompt, prompt, room))
    cache.reset = MethodType(_reset, cache)
    return _told(given, held, prompt), room if whole else spare


def _make(static: Any, made: Any, size: int, anew: bool) -> None:
    """Make the buffers of a layer where it has none, or others than it needs and may change."""
    if anew and size != static.max_cache_len:
        static.max_cache_len, static.is_initialized = size, False
    if not static.is_initialized:
        static.lazy_initialization(made.keys, made.values)
    like, buffer = made.keys, static.keys
    fits = like.shape[:2] == buffer.shape[:2] and like.dtype == buffer.dtype and like.device == buffer.device
    if not fits or buffer.shape[2] < size:
        raise TokredError(
            "the buffers of a static cache do not fit what a prompt leaves",
            found=f"{tuple(buffer.shape)} of {buffer.dtype} for {tuple(like.shape)} of {like.dtype}, {size} slots",
            remedy="a new StaticCache for another batch, or a larger one",
        )


def _fill_one(static: Any, keys: Tensor, values: Tensor, made: Any) -> None:
    del made
    count = keys.shape[2]
    static.keys[:, :, :count].copy_(keys)
    static.values[:, :, :count].copy_(values)
    static.cumulative_length.fill_(count)


def _fill_window(static: Any, keys: Tensor, values: Tensor, made: Any) -> None:
    """As transformers fills it; the one slot that a full window keeps more leaves it before anything reads it."""
    seen, size, count = made.cumulative_length, static.max_cache_len, keys.shape[2]
    start = size - count if seen >= size else 0
    static.keys[:, :, start : start + count].copy_(keys)
    static.values[:, :, start : start + count].copy_(values)
    static.cumulative_length.fill_(min(seen, size))
    static.cumulative_length_int = seen


def _reset(cache: Any) -> None:
    vars(cache).pop(_FILLED, None)
    type(cache).reset(cache)


def _told(given: Mapping[str, Any], held: Any, prompt: int) -> dict[str, Tensor]:
    mask, keys = given.get("attention_mask"), held.layers[0].keys
    counts = torch.tensor([layer.keys.shape[2] for layer in held.layers], device=keys.device)
    if not isinstance(mask, Tensor):
        mask = keys.new_ones(keys.shape[0], prompt)
    real = mask.to(device=keys.device).ne(0)
    left = real.long().cumsum(1).eq(0).sum(1)
    spare, short = (counts[None] - real.sum(1, keepdim=True)).clamp_min(0), prompt - counts
    return {SPARE: spare, LEFT: left, SHORT: short.expand(keys.shape[0], -1)}


def continued(cache: Any, given: Mapping[str, Any], tokens: int | None) -> dict[str, Any]:
    """Arguments of a step, whose mask has one size in all steps.

    Raises:
        TokredError: the buffers are full, or the arguments do not say which tokens these are.
    """
    filled: Filled = getattr(cache, _FILLED)
    mask = given.get("attention_mask")
    wrong = None
    if tokens is None or given.get("position_ids") is None:
        wrong = "no position_ids, which a static cache cannot tell"
    elif mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
        wrong = "a mask that is not of two dimensions"
    elif mask is not None and mask.shape[1] != filled.seen + tokens:
        wrong = f"{tokens} tokens after {filled.seen}, and a mask of {mask.shape[1]}"
    if wrong or tokens is None:
        raise TokredError(
            "a call that goes on from a static cache does not say which tokens these are",
            found=str(wrong),
            remedy="give the new tokens alone, position_ids, and a mask of all: generate(input_ids=new, "
            "attention_mask=mask_of_all, past_key_values=cache)",
        )
    if filled.seen + tokens > filled.prompt + filled.room:
        raise TokredError(
            "a static cache is full",
            found=f"{tokens} tokens after {filled.seen}, of which {filled.prompt} are the prompt's; "
            f"{filled.room} fit behind it",
            remedy="StaticCache(config, max_cache_len=N) with N the budget and all tokens that follow",
        )
    given = {name: _laid_out(value) for name, value in given.items()}
    if mask is None:
        return given
    torch._assert_async(mask[:, -tokens:].ne(0).all(), "padding among the new tokens behind a static cache")
    if any(layer.is_sliding for layer in cache.layers):  # what is right of a query is hidden from it anyway
        columns = filled.prompt + filled.room
    else:  # nothing but the width of the mask is read, which is thus one for prompts of all lengths
        columns = max(layer.max_cache_len for layer in cache.layers)
    return {**given, "attention_mask": F.pad(mask, (0, columns - mask.shape[1]), value=1)}


def _laid_out(value: Any) -> Any:
    """A part of a longer tensor by itself: the length of the whole, in its strides, would be another in each step."""
    if not isinstance(value, Tensor) or value.stride() == torch.empty(value.shape, device="meta").stride():
        return value
    return value.clone(memory_format=torch.contiguous_format)


def count(cache: Any, tokens: int) -> None:
    """Count the tokens of a step that has run."""
    getattr(cache, _FILLED).seen += tokens


def hand_back(out: Any, held: Any, cache: Any) -> Any:
    """What a prompt's call returned, with the static cache in place of the one that it ran with."""
    if isinstance(out, tuple):
        return tuple(cache if part is held else part for part in out)
    if getattr(out, "past_key_values", None) is held:
        out.past_key_values = cache
    return out
