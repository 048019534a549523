"""A LLaVA of a few thousand weights: 3 vision blocks of 17 tokens, 3 decoder blocks, 16 image tokens."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from tokcompile.models import families

IMAGE = 4
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 7,
}
TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def llava() -> LlavaForConditionalGeneration:
    """The model, in eval mode; the last vision block feeds nothing, as in LLaVA-1.5."""
    return families.llava(VISION, TEXT, image_token_index=IMAGE).eval()


def inputs(rows: int = 1) -> dict[str, Tensor]:
    """Prompts of <bos>, 16 image tokens and 5 words: 22 tokens."""
    rng = torch.Generator().manual_seed(0)
    words = torch.randint(5, 64, (rows, 5), generator=rng)
    ids = torch.cat([torch.ones(rows, 1, dtype=torch.int64), torch.full((rows, 16), IMAGE), words], dim=1)
    return {"input_ids": ids, "pixel_values": torch.randn(rows, 3, 28, 28, generator=rng)}
