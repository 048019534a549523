"""One builder per model family: a transformers configuration given as data in, a model with random weights out."""

from __future__ import annotations

from copy import deepcopy
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)

Data = dict[str, Any]
M = TypeVar("M", bound=nn.Module)


def llava_config(vision: Data, text: Data, **options: Any) -> LlavaConfig:
    """A LLaVA configuration with a CLIP tower and a Llama decoder; the number of image tokens follows."""
    tower = CLIPVisionConfig(**vision)
    options.setdefault("image_seq_length", (tower.image_size // tower.patch_size) ** 2)
    return LlavaConfig(vision_config=tower, text_config=LlamaConfig(**text), **options)


def llava(vision: Data, text: Data, *, seed: int = 0, **options: Any) -> LlavaForConditionalGeneration:
    """LLaVA with a CLIP vision tower, an MLP projector and a Llama decoder."""
    return scaled_init(LlavaForConditionalGeneration(llava_config(vision, text, **options)), seed)


def llava_meta(vision: Data, text: Data, **options: Any) -> LlavaForConditionalGeneration:
    """LLaVA on the meta device: shapes only, no memory."""
    with torch.device("meta"):
        return LlavaForConditionalGeneration(llava_config(vision, text, **options))


def decoder(model_type: str, config: Data, *, seed: int = 0) -> PreTrainedModel:
    """A decoder-only language model of one of transformers' types ("llama", "qwen2", "mistral")."""
    return scaled_init(AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **config)), seed)


def decoder_meta(model_type: str, config: Data) -> PreTrainedModel:
    """Such a model on the meta device: shapes only, no memory."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **config))


def vlm_meta(model_type: str, config: Data) -> PreTrainedModel:
    """A vision-language model of one of transformers' types on the meta device: shapes only, no memory."""
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(AutoConfig.for_model(model_type, **deepcopy(config)))


def clip_vision(config: Data, *, seed: int = 0) -> CLIPVisionModel:
    """CLIP's vision tower."""
    return scaled_init(CLIPVisionModel(CLIPVisionConfig(**config)), seed)


def vit(config: Data, *, seed: int = 0) -> ViTForImageClassification:
    """ViT with a classification head."""
    return scaled_init(ViTForImageClassification(ViTConfig(**config)), seed)


@torch.no_grad()
def scaled_init(model: M, seed: int) -> M:
    """Draw the weights anew with std = 1 / sqrt(fan in), so that narrow models depend on all of their inputs.

    transformers' own std of 0.02 suits widths of thousands; at a width of 128 it all but closes the layers.
    Biases and norms keep what they have; embeddings, class tokens and position tables get a std of 0.5. A matrix that
    begins at zero, such as what makes the gates of adaLN-Zero, is drawn as any other.
    """
    rng = torch.Generator().manual_seed(seed)
    convolutions = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Conv1d)}
    for name, parameter in sorted(model.named_parameters()):
        if parameter.ndim < 2 and "class_embedding" not in name:
            continue
        # Of the module itself: an MLP inside of an embedder is no table.
        table = parameter.ndim != 2 or "embed" in ".".join(name.split(".")[-2:])
        table = table and parameter.ndim != 4 and name not in convolutions
        std = 0.5 if table else parameter[0].numel() ** -0.5
        parameter.normal_(0, std, generator=rng)
    return model
