"""A diffusion transformer, DiT with adaLN-Zero, after Peebles and Xie, "Scalable Diffusion Models with Transformers".

Modules and parameters are named as in the authors' code, so that their checkpoints' names fit.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FREQUENCIES = 256
"""Width of the sinusoidal features of a timestep."""


class TimestepEmbedder(nn.Module):
    """Sinusoidal features of a timestep, then an MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, timestep: Tensor) -> Tensor:
        """int64 or float [batch] to float [batch, width]."""
        half = FREQUENCIES // 2
        steps = torch.arange(half, dtype=torch.float32, device=timestep.device)
        angles = timestep[:, None].float() * torch.exp(-math.log(10000) * steps / half)
        features = torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)
        return self.mlp(features.to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """A table of class labels; where labels are dropped in training, its last row stands for no label."""

    def __init__(self, classes: int, width: int, dropout: float) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(classes + (dropout > 0), width)
        self.classes, self.dropout = classes, dropout

    def forward(self, label: Tensor) -> Tensor:
        """int64 [batch] to float [batch, width]."""
        if self.training and self.dropout > 0:
            dropped = torch.rand(label.shape, device=label.device) < self.dropout
            label = torch.where(dropped, self.classes, label)
        return self.embedding_table(label)


class PatchEmbed(nn.Module):
    """Patches of an image as tokens, row by row."""

    def __init__(self, patch: int, channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, stride=patch)

    def forward(self, image: Tensor) -> Tensor:
        """float [batch, channels, size, size] to float [batch, tokens, width]."""
        return self.proj(image).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Self-attention with one projection for queries, keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """float [batch, tokens, width] to the same."""
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        out = F.scaled_dot_product_attention(query, key, value)
        return self.proj(out.transpose(1, 2).reshape(batch, tokens, width))


class Mlp(nn.Module):
    """Two linear layers with an approximate GELU between them."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(width, inner), nn.GELU(approximate="tanh"), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        """float [..., width] to the same."""
        return self.fc2(self.act(self.fc1(x)))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Tokens [batch, tokens, width] shifted and scaled by what each image's condition gives, [batch, width]."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class DiTBlock(nn.Module):
    """Attention and an MLP; the condition shifts and scales what goes into each and gates what comes out."""

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(width, int(width * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Tokens [batch, tokens, width] and a condition [batch, width] to tokens."""
        parts = self.adaLN_modulation(condition).chunk(6, dim=1)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = parts
        x = x + gate_msa.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_msa, scale_msa))
        return x + gate_mlp.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class FinalLayer(nn.Module):
    """Tokens to the pixels of their patches."""

    def __init__(self, width: int, patch: int, channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, patch * patch * channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Tokens [batch, tokens, width] and a condition [batch, width] to [batch, tokens, patch * patch * channels]."""
        shift, scale = self.adaLN_modulation(condition).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class DiT(nn.Module):
    """Noise, and a variance where `learn_sigma`, predicted for noisy latents at a timestep and of a class.

    Args:
        input_size: height and width of the latents.
        patch_size: height and width of a patch.
        in_channels: channels of the latents.
        hidden_size: width.
        depth: blocks.
        num_heads: attention heads of a block.
        mlp_ratio: inner width of the MLPs, in widths.
        class_dropout_prob: how often a label is dropped in training.
        num_classes: labels.
        learn_sigma: twice as many channels come out as go in.
    """

    def __init__(
        self,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        learn_sigma: bool = True,
    ) -> None:
        super().__init__()
        self.input_size, self.patch_size, self.in_channels = input_size, patch_size, in_channels
        self.num_classes = num_classes
        self.out_channels = 2 * in_channels if learn_sigma else in_channels
        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        # Fixed, so a buffer: the authors' parameter without a gradient would be drawn anew with the weights.
        self.register_buffer("pos_embed", sincos(input_size // patch_size, hidden_size)[None])
        self.blocks = nn.ModuleList(DiTBlock(hidden_size, num_heads, mlp_ratio) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels)
        self._initialize()

    def forward(self, latents: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
        """Noise for noisy latents.

        Args:
            latents: float [batch, in_channels, input_size, input_size].
            timestep: int64 or float [batch].
            label: int64 [batch].

        Returns:
            float [batch, out_channels, input_size, input_size].
        """
        x = self.x_embedder(latents) + self.pos_embed
        condition = self.t_embedder(timestep) + self.y_embedder(label)
        for block in self.blocks:
            x = block(x, condition)
        return self.unpatchify(self.final_layer(x, condition))

    def unpatchify(self, x: Tensor) -> Tensor:
        """[batch, tokens, patch * patch * channels] to [batch, channels, size, size]."""
        side, patch, channels = self.input_size // self.patch_size, self.patch_size, self.out_channels
        x = x.reshape(x.shape[0], side, side, patch, patch, channels)
        return torch.einsum("nhwpqc->nchpwq", x).reshape(x.shape[0], channels, side * patch, side * patch)

    @torch.no_grad()
    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                nn.init.zeros_(module.bias)
        for weight in (self.y_embedder.embedding_table.weight, *(self.t_embedder.mlp[at].weight for at in (0, 2))):
            nn.init.normal_(weight, std=0.02)
        # The Zero of adaLN-Zero: every block begins as the identity, and nothing comes out.
        for module in (*self.blocks, self.final_layer):
            nn.init.zeros_(module.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)


def sincos(side: int, width: int) -> Tensor:
    """Positions of a square grid, float32 [side * side, width]: half of the width tells the column, half the row."""
    frequencies = 10000 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)
    return torch.cat([waves.repeat(side, 1), waves.repeat_interleave(side, 0)], dim=1).float()
