"""Text of encoders, which is padded on the right, and what encoder-decoder models take."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tokcompile.models.inputs.text import BOS, PAD

EOS = 2
PLACES = (3, 0, 1)
"""Places of padding in the rows of a batch, over and over."""


def encoder_text(model: nn.Module, batch: int, padded: bool, length: int, seed: int) -> dict[str, Tensor]:
    """input_ids and attention_mask, int64 [batch, length]; padded rows end with 3, 0, 1, 3... places of padding."""
    rng = torch.Generator().manual_seed(seed)
    ids, mask = _rows(model, batch, padded, length, rng)
    return {"input_ids": ids, "attention_mask": mask}


def text_to_text(
    model: nn.Module, batch: int, padded: bool, length: int, seed: int, decoder_length: int = 9
) -> dict[str, Tensor]:
    """What `encoder_text` gives, and decoder_input_ids and decoder_attention_mask, int64 [batch, decoder_length]."""
    rng = torch.Generator().manual_seed(seed)
    ids, mask = _rows(model, batch, padded, length, rng)
    return {"input_ids": ids, "attention_mask": mask, **_decoder(model, batch, padded, decoder_length, rng)}


def speech_to_text(
    model: nn.Module, batch: int, padded: bool, length: int, seed: int, decoder_length: int = 9
) -> dict[str, Tensor]:
    """input_features and the decoder's text; the features have no mask, since they are padded with silence instead.

    Args:
        model: its configuration says the mel bins and the positions; two frames make a position.
        batch: rows.
        padded: rows of the decoder's text have different lengths, padded on the right.
        length: has no effect: the encoder takes one length of features alone.
        seed: of the features and tokens.
        decoder_length: tokens of text.

    Returns:
        input_features, float32 [batch, mel bins, 2 * positions]; decoder_input_ids and decoder_attention_mask, int64
        [batch, decoder_length].
    """
    rng = torch.Generator().manual_seed(seed)
    shape = (batch, model.config.num_mel_bins, 2 * model.config.max_source_positions)
    features = torch.randn(shape, generator=rng)
    return {"input_features": features, **_decoder(model, batch, padded, decoder_length, rng)}


def _decoder(model: nn.Module, batch: int, padded: bool, length: int, rng: torch.Generator) -> dict[str, Tensor]:
    ids, mask = _rows(model, batch, padded, length, rng, ends=False)
    ids[:, 0] = model.config.decoder_start_token_id
    return {"decoder_input_ids": ids, "decoder_attention_mask": mask}


def _rows(
    model: nn.Module, batch: int, padded: bool, length: int, rng: torch.Generator, ends: bool = True
) -> tuple[Tensor, Tensor]:
    ids = torch.randint(5, model.config.vocab_size, (batch, length), generator=rng)
    ids[:, 0] = BOS
    mask = torch.ones_like(ids)
    for row in range(batch):
        places = PLACES[row % len(PLACES)] if padded else 0
        if ends:
            ids[row, length - places - 1] = EOS
        ids[row, length - places :] = PAD
        mask[row, length - places :] = 0
    return ids, mask
