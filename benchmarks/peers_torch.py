"""The transformer of `mlx_ring/models/transformer.py` in PyTorch, for `peers.py`, with the same weights."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as functional
from torch import nn


def rotation(length: int, width: int, base: float) -> torch.Tensor:
    """Returns the cosines and sines of the rotary angles, (2, T, width / 2)."""
    frequencies = base ** (-torch.arange(0, width, 2, dtype=torch.float32) / width)
    angles = torch.arange(length, dtype=torch.float32)[:, None] * frequencies
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Applies rotary positions to (B, heads, T, width). Pairs the two halves, as `mlx.nn.RoPE` does."""
    cosine, sine = rotation.to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cosine - second * sine, first * sine + second * cosine], dim=-1)


class Attention(nn.Module):
    def __init__(self, dimensions: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.kv_heads = kv_heads
        self.width = dimensions // heads
        self.query = nn.Linear(dimensions, dimensions, bias=False)
        self.key = nn.Linear(dimensions, kv_heads * self.width, bias=False)
        self.value = nn.Linear(dimensions, kv_heads * self.width, bias=False)
        self.output = nn.Linear(dimensions, dimensions, bias=False)

    def forward(self, x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape

        def split(projected: torch.Tensor, heads: int) -> torch.Tensor:
            return projected.view(batch, length, heads, self.width).transpose(1, 2)

        query = rotate(split(self.query(x), self.heads), rotation)
        key = rotate(split(self.key(x), self.kv_heads), rotation)
        value = split(self.value(x), self.kv_heads)
        mixed = functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=self.heads != self.kv_heads
        )
        return self.output(mixed.transpose(1, 2).reshape(batch, length, -1))


class SwiGLU(nn.Module):
    def __init__(self, dimensions: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(dimensions, hidden, bias=False)
        self.up = nn.Linear(dimensions, hidden, bias=False)
        self.down = nn.Linear(hidden, dimensions, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(functional.silu(self.gate(x)) * self.up(x))


class RMSNorm(nn.RMSNorm):
    """Casts its weight to the input's dtype, as mlx_ring does: PyTorch fuses no mixed dtypes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class Block(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dimensions, eps=1e-5)
        self.attention = Attention(config.dimensions, config.heads, config.kv_heads)
        self.feed_forward_norm = RMSNorm(config.dimensions, eps=1e-5)
        self.feed_forward = SwiGLU(config.dimensions, config.hidden_dimensions)

    def forward(self, x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x), rotation)
        return x + self.feed_forward(self.feed_forward_norm(x))


class Transformer(nn.Module):
    """The model. `config` is a TransformerModel whose sizes are filled in."""

    rotation: torch.Tensor

    def __init__(self, config: Any, vocabulary_size: int, length: int) -> None:
        super().__init__()
        width = config.dimensions // config.heads
        self.register_buffer("rotation", rotation(length, width, config.rope_base), persistent=False)
        self.embedding = nn.Embedding(vocabulary_size, config.dimensions)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.dimensions, eps=1e-5)
        self.head = nn.Linear(config.dimensions, vocabulary_size, bias=False)
        if config.tie_head:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        if torch.is_autocast_enabled(x.device.type):  # as in mlx_ring, all between the layers is bfloat16
            x = x.to(torch.get_autocast_dtype(x.device.type))
        for layer in self.layers:
            x = layer(x, self.rotation)
        return self.head(self.norm(x))

    def take(self, weights: dict[str, np.ndarray]) -> None:
        """Takes the weights of mlx_ring's model, which have the same names."""
        missing, unexpected = self.load_state_dict(
            {name: torch.from_numpy(array) for name, array in weights.items()}, strict=False
        )
        assert not unexpected and set(missing) <= {"head.weight"}, (missing, unexpected)
