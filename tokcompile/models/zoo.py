"""A registry of models to compile: two trained, some small with random weights, some at the size of real ones.

loaded = load("llava-digits")
loaded.model(**loaded.example(batch=2))
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, LlavaForConditionalGeneration, PreTrainedModel

from tokcompile.errors import TokredError, known

from . import catalogue, digits, families, retrieval

Kind = Literal["vlm", "decoder", "vision"]
PAD, BOS = 0, 1
CHECKPOINT = Path(__file__).parent / "llava_digits"
RETRIEVAL = Path(__file__).parent / "llama_retrieval"

_SMALL_TEXT = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": 2,
}
_SMALL_VISION = {
    "hidden_size": 32,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 7,
}
_CLIP_L_336 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
_LLAMA_7B = {
    "vocab_size": 32064,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "pad_token_id": 32001,
}
_LLAMA_31_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
_QWEN_25_VL_7B = {
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "text_config": {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 128000,
        "rms_norm_eps": 1e-6,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "pad_token_id": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [16, 24, 24]},
    },
    "vision_config": {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 3584,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
    },
}
_MEDIUM_TEXT = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": 2,
}


@dataclass(frozen=True)
class Entry:
    """A model of the zoo: what it is, and how it is built.

    Attributes:
        text_length: tokens of text after <bos> and the image.
        on_meta: its weights are shapes alone.
        image: height and width in pixels of its example image, of a model that takes images of any size.
    """

    about: str
    kind: Kind
    build: Callable[[], PreTrainedModel] = field(repr=False)
    text_length: int = 8
    on_meta: bool = False
    image: tuple[int, int] | None = None


@dataclass(frozen=True)
class Loaded:
    """A model in eval mode and what is needed to call it."""

    name: str
    model: PreTrainedModel
    entry: Entry

    @property
    def kind(self) -> Kind:
        return self.entry.kind

    @property
    def about(self) -> str:
        return self.entry.about

    def example(
        self, batch: int = 1, padded: bool = False, text_length: int | None = None, seed: int = 0
    ) -> dict[str, Tensor]:
        """Arguments of `forward`, the same for the same seed.

        Args:
            batch: rows.
            padded: pad row i on the left by up to i tokens, so that rows have different real lengths; every row
                keeps its whole image and at least two tokens of text.
            text_length: tokens of text after <bos> and the image; each entry has its own default.
            seed: of the random tokens and pixels, or of what the trained models are asked.

        Returns:
            input_ids and attention_mask int64 [batch, sequence] and pixel_values [batch, 3, height, width], or
            those of them that the kind of model takes; of an entry with an `image`, what its family is given.
        """
        length = self.entry.text_length if text_length is None else text_length
        if self.entry.image is not None:
            family = catalogue.of_type(self.model.config.model_type)
            given = family.example(self.model, batch, padded, 1 + length, seed, image=self.entry.image)
            # Sizes of images are read as numbers, and a value on the meta device is none.
            return given if self.entry.on_meta else {name: self._place(value) for name, value in given.items()}
        if self.name == "llava-digits" and text_length in (None, self.entry.text_length):
            canvases = digits.canvases("test", batch, seed)
            inputs, ids = {"pixel_values": canvases.pixel_values}, canvases.input_ids
        elif self.name == "llama-retrieval" and length > retrieval.NEEDLE + 2:
            inputs, ids = {}, retrieval.prompts(batch, 1 + length, seed)
        else:
            rng = torch.Generator().manual_seed(seed)
            inputs = {} if self.kind == "decoder" else {"pixel_values": self._pixels(batch, rng)}
            ids = None if self.kind == "vision" else self._tokens(batch, length, rng)
        if ids is not None:
            inputs = self._pad(ids, length, padded) | inputs
        return {name: self._place(value) for name, value in inputs.items()}

    def _pixels(self, batch: int, rng: torch.Generator) -> Tensor:
        config = self.model.config
        size = getattr(config, "vision_config", config).image_size
        return torch.randn(batch, 3, size, size, generator=rng)

    def _tokens(self, batch: int, length: int, rng: torch.Generator) -> Tensor:
        """int64 [batch, 1 + image tokens + length]: <bos>, the image, then text that is not a special token."""
        config = self.model.config
        image = getattr(config, "image_token_index", None)
        words = getattr(config, "text_config", config).vocab_size
        text = torch.randint(5, words if image is None else min(words, 32000), (batch, length), generator=rng)
        parts = [torch.full((batch, 1), BOS)]
        if image is not None:
            parts.append(torch.full((batch, config.image_seq_length), image))
        return torch.cat([*parts, text], dim=1)

    def _pad(self, ids: Tensor, length: int, padded: bool) -> dict[str, Tensor]:
        """Pad row i by up to i places in front, for as many words dropped from the start of its text."""
        mask = torch.ones_like(ids)
        config = self.model.config
        pad = getattr(config, "text_config", config).pad_token_id
        for row in range(len(ids) if padded else 0):
            shift = row % max(1, length - 1)
            if shift:
                front = len(ids[row]) - length
                kept = torch.cat([ids[row, :front], ids[row, front + shift :]])
                ids[row] = torch.cat([torch.full((shift,), pad), kept])
                mask[row, :shift] = 0
        return {"input_ids": ids, "attention_mask": mask}

    def _place(self, value: Tensor) -> Tensor:
        dtype = self.model.dtype if value.is_floating_point() else value.dtype
        return value.to(device=self.model.device, dtype=dtype)


def _digits() -> PreTrainedModel:
    return LlavaForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=torch.float32)


def _retrieval() -> PreTrainedModel:
    return LlamaForCausalLM.from_pretrained(RETRIEVAL, dtype=torch.float32)


def _small_decoder(model_type: str) -> Callable[[], PreTrainedModel]:
    return lambda: families.decoder(model_type, _SMALL_TEXT)


_IMAGE = {"image_token_index": 4}
_LLAVA_15 = {"image_token_index": 32000, "vision_feature_layer": -2}

ZOO: dict[str, Entry] = {
    "llava-digits": Entry("trained on handwritten digits: 196 image tokens, 4 + 8 blocks", "vlm", _digits, 4),
    "llama-retrieval": Entry("trained to find needles in long texts: 3 blocks", "decoder", _retrieval, 127),
    "llava-tiny": Entry(
        "LLaVA, random weights: 16 image tokens, 3 + 4 blocks",
        "vlm",
        lambda: families.llava(_SMALL_VISION, _SMALL_TEXT, **_IMAGE),
    ),
    "llava-clip-l": Entry(
        "LLaVA with CLIP-L/14-336 (576 image tokens) and a small decoder, random weights",
        "vlm",
        lambda: families.llava(_CLIP_L_336, _MEDIUM_TEXT, **_IMAGE),
        16,
    ),
    "llava-1.5-7b": Entry(
        "LLaVA-1.5-7B's configuration on the meta device, no weights",
        "vlm",
        lambda: families.llava_meta(_CLIP_L_336, _LLAMA_7B, **_LLAVA_15),
        63,
        on_meta=True,
    ),
    "qwen2.5-vl-7b": Entry(
        "Qwen2.5-VL-7B's configuration on the meta device, no weights: an image of 4,692 tokens",
        "vlm",
        lambda: families.vlm_meta("qwen2_5_vl", _QWEN_25_VL_7B),
        63,
        on_meta=True,
        image=(136 * 14, 138 * 14),
    ),
    "llama-3.1-8b": Entry(
        "Llama-3.1-8B's configuration on the meta device, no weights",
        "decoder",
        lambda: families.decoder_meta("llama", _LLAMA_31_8B),
        63,
        on_meta=True,
    ),
    "llama-tiny": Entry("Llama, random weights: 4 blocks, grouped queries", "decoder", _small_decoder("llama"), 16),
    "qwen2-tiny": Entry("Qwen2, random weights: 4 blocks, biased queries", "decoder", _small_decoder("qwen2"), 16),
    "mistral-tiny": Entry("Mistral, random weights: 4 blocks", "decoder", _small_decoder("mistral"), 16),
    "clip-tiny": Entry(
        "CLIP vision tower, random weights: 3 blocks", "vision", lambda: families.clip_vision(_SMALL_VISION)
    ),
    "vit-tiny": Entry(
        "ViT classifier, random weights: 3 blocks", "vision", lambda: families.vit(_SMALL_VISION | {"num_labels": 10})
    ),
}


def names() -> list[str]:
    """The models of the zoo."""
    return list(ZOO)


def load(name: str, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Loaded:
    """Build a model of the zoo, in eval mode.

    Args:
        name: one of `names()`.
        dtype, device: where its weights go; a model on the meta device stays there.

    Raises:
        TokredError: there is no such model; the error lists those there are.
    """
    if name not in ZOO:
        raise TokredError(f"the zoo has no model '{name}'", remedy=known(name, ZOO))
    entry = ZOO[name]
    model = entry.build().eval().to(dtype)
    return Loaded(name, model if entry.on_meta else model.to(device), entry)
