"""The models that tests compile: small, with random weights, and of sizes that coincide on purpose."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn
from transformers import LlavaConfig, LlavaForConditionalGeneration, Qwen2Config, SiglipVisionConfig

from tokcompile.models import families

# 16 patches, heads 16 wide; with 7 tokens of text 24 tokens in all, with 47 tokens 64, the width of the stream.
TEXT = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 7,
}
IMAGE = 63


def _llava(**options) -> nn.Module:
    return families.llava(VISION, TEXT, image_token_index=IMAGE, **options)


def _siglip() -> nn.Module:
    """No class token, biases on queries and keys, features of the last block."""
    vision = SiglipVisionConfig(**VISION, vision_use_head=False)
    config = LlavaConfig(
        vision_config=vision,
        text_config=Qwen2Config(**TEXT),
        image_token_index=IMAGE,
        image_seq_length=16,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    return families.scaled_init(LlavaForConditionalGeneration(config), 0)


BUILD: dict[str, Callable[[], nn.Module]] = {
    "llava": _llava,
    "llava-last": lambda: _llava(vision_feature_layer=-1, vision_feature_select_strategy="full", image_seq_length=17),
    "llava-siglip-qwen2": _siglip,
    "llama": lambda: families.decoder("llama", TEXT),
    "qwen2": lambda: families.decoder("qwen2", TEXT),
    # A window wider than any test's sequence, and as many key heads as query heads: keys go to attention uncopied.
    "mistral": lambda: families.decoder("mistral", TEXT | {"head_dim": 16, "num_key_value_heads": 4}),
    "gpt2": lambda: families.decoder("gpt2", TEXT | {"n_layer": 3, "n_head": 4, "n_embd": 64}),
    "opt": lambda: families.decoder("opt", TEXT | {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "gemma2": lambda: families.decoder(
        "gemma2", TEXT | {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 12}
    ),
    "clip": lambda: families.clip_vision(VISION),
    "vit": lambda: families.vit(VISION | {"num_labels": 10}),
}
VLMS = ("llava", "llava-last", "llava-siglip-qwen2")
DECODERS = ("llama", "qwen2", "mistral")
OTHERS = ("gpt2", "opt", "gemma2")  # no rotary tables, views on the stream, capped scores and a sliding window
TOWERS = ("clip", "vit")


def build(name: str, *, dtype: torch.dtype = torch.float32, attention: str = "sdpa") -> nn.Module:
    """A new model in eval mode."""
    model = BUILD[name]().eval().to(dtype)
    model.set_attn_implementation(attention)
    return model


@cache
def shared(name: str, dtype: torch.dtype = torch.float32, attention: str = "sdpa") -> nn.Module:
    """A model that tests share; none may change it."""
    return build(name, dtype=dtype, attention=attention)


def images(model: nn.Module) -> int:
    """Image tokens of each row; 0 in a model without images."""
    return getattr(model.config, "image_seq_length", 0)


def example(
    model: nn.Module,
    batch: int = 1,
    pads: tuple[int, ...] = (),
    text: int = 7,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Inputs of a model; `pads` says how far each row is padded on the left, within the same length."""
    rng = torch.Generator().manual_seed(seed)
    config = model.config
    out: dict[str, Tensor] = {}
    if hasattr(config, "image_size") or hasattr(config, "vision_config"):
        size = getattr(config, "vision_config", config).image_size
        out["pixel_values"] = torch.randn(batch, 3, size, size, generator=rng).to(model.dtype)
    if not hasattr(config, "vision_config") and "pixel_values" in out:
        return out
    words = torch.randint(5, 60, (batch, text), generator=rng)
    ids = torch.cat([torch.ones(batch, 1, dtype=torch.long), torch.full((batch, images(model)), IMAGE), words], 1)
    mask = torch.ones_like(ids)
    for row, pad in enumerate(pads):
        if pad:
            ids[row] = torch.cat([torch.zeros(pad, dtype=torch.long), ids[row, :-pad]])
            mask[row, :pad] = 0
    return out | {"input_ids": ids, "attention_mask": mask}


def row(inputs: dict[str, Tensor], number: int, pad: int = 0) -> dict[str, Tensor]:
    """One row of a batch alone, without its padding."""
    return {
        name: value[number : number + 1, pad:] if value.ndim == 2 else value[number : number + 1]
        for name, value in inputs.items()
    }
