"""How many tokens a conversation has seen, where a cache holds fewer or more: whoever calls must count the first.

Callers count by the cache: `generate` cuts the tokens that it holds off a text that it is given whole. After an edit
these are not the text's first ones, and the call would say some tokens twice. Such a call is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MethodType
from typing import Any

from torch import Tensor

from tokcompile.errors import TokredError

_BESIDE = "_tokcompile_beside"
_PROMPT = "_tokcompile_prompt"


def check(cache: Any, given: Mapping[str, Any]) -> None:
    """Refuse a call whose tokens and mask do not fit what its cache has seen.

    Args:
        cache: what an earlier call returned; None at the start of a conversation.
        given: arguments of the call; `attention_mask` [B, all tokens so far] says how many there are.

    Raises:
        TokredError: the mask is for more or fewer tokens than were seen and are given.
    """
    seen, tokens, mask = _seen(cache), tokens_of(given), given.get("attention_mask")
    if seen is None or tokens is None or not isinstance(mask, Tensor) or mask.ndim != 2:
        return
    if mask.shape[1] != seen + tokens:
        raise TokredError(
            "a call that goes on from a cache has other tokens than its mask says",
            found=f"{tokens} tokens after {seen}, and a mask of {mask.shape[1]}",
            remedy="give the new tokens alone, and a mask of all: generate(input_ids=new, attention_mask=mask_of_all, "
            "past_key_values=cache)",
        )


def note(cache: Any, given: Mapping[str, Any], before: int, evicts: bool, later: bool = False) -> None:
    """Note on a cache what it lacks of the tokens that its conversation has seen.

    Args:
        cache: what the call returned; None is allowed.
        given: arguments of the call.
        before: tokens that were seen before it.
        evicts: whether a prompt's keys are evicted; such a cache is cropped down to its prompt, and no further.
        later: whether later steps evict, too; such a cache cannot be cropped at all.
    """
    tokens, held = tokens_of(given), _held(cache)
    if tokens is None or not held:
        return
    setattr(cache, _BESIDE, [before + tokens - count for count in held])
    if evicts and not before:
        setattr(cache, _PROMPT, tokens)
        if "crop" not in vars(cache):  # what is carried beside a cache may refuse all crops
            cache.crop = MethodType(_no_crop if later else _crop, cache)


def _crop(cache: Any, tokens_to_remove: int) -> Any:
    """Take the last tokens back, less than all after the prompt; a draft in a prompt had a say in what was evicted."""
    seen, prompt = _seen(cache), getattr(cache, _PROMPT)
    if seen is not None and (seen == prompt or seen + min(tokens_to_remove, 0) < prompt):
        raise TokredError(
            "a prompt whose keys were evicted cannot be cropped: tokens that are taken back had a say in what stays",
            found=f"crop({tokens_to_remove}) after {seen} tokens, of which {prompt} are the prompt's",
            remedy="generate without an assistant, or start from a copy of the cache as it was",
        )
    return type(cache).crop(cache, tokens_to_remove)


def _no_crop(cache: Any, tokens_to_remove: int) -> Any:
    del cache
    raise TokredError(
        "a cache whose keys are evicted at every step cannot be cropped: what is taken back had a say in what stays",
        found=f"crop({tokens_to_remove})",
        remedy="generate without an assistant, or start from a copy of the cache as it was",
    )


def seen_before(cache: Any) -> int:
    """How many tokens a cache has seen; of one that was not noted, how many it holds."""
    known = _seen(cache)
    return known if known is not None else max(_held(cache), default=0)


def is_changed(cache: Any) -> bool:
    """Whether a cache holds fewer or more tokens in some layer than its conversation has seen."""
    return any(getattr(cache, _BESIDE, None) or ())


def _seen(cache: Any) -> int | None:
    """Steps, and `crop`, change what a cache holds and what it has seen alike: their difference stays."""
    beside, held = getattr(cache, _BESIDE, None), _held(cache)
    return None if beside is None or len(beside) != len(held) else max(map(sum, zip(beside, held, strict=True)))


def _held(cache: Any) -> list[int]:
    layers = getattr(cache, "layers", ())
    if any(not isinstance(getattr(layer, "keys", None), Tensor) for layer in layers):
        return []
    lengths = [layer.get_seq_length() for layer in layers]
    return lengths if all(isinstance(length, int) for length in lengths) else []


def tokens_of(given: Mapping[str, Any]) -> int | None:
    """How many tokens a call of a decoder gives; None where it gives another model's."""
    if given.get("decoder_input_ids") is not None or given.get("decoder_inputs_embeds") is not None:
        return None
    value = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
    return value.shape[1] if isinstance(value, Tensor) else None
