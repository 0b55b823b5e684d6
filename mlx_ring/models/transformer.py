"""A decoder-only transformer language model: pre-norm, rotary positions, grouped-query attention, SwiGLU.

Shapes: B sequences, T tokens, D = config.dimensions. The model computes in the dtype of the blocks' weights:
the trainer may cast everything but the embedding to bfloat16, and nothing here casts back to float32.
"""

import math

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path

from mlx_ring.config.choices import TransformerModel
from mlx_ring.models.dropout import draw_key, dropout, split_key


def fused_attention(query: mx.array, key: mx.array, value: mx.array, *, scale: float) -> mx.array:
    """Computes causal attention on (B, heads, T, width) each; `key` and `value` may have fewer heads."""
    return mx.fast.scaled_dot_product_attention(query, key, value, scale=scale, mask="causal")


class Attention(nn.Module):
    """Causal attention in which a group of query heads shares one key and value head."""

    def __init__(self, dimensions: int, heads: int, kv_heads: int, rope_base: float) -> None:
        super().__init__()
        self.head_dimensions = dimensions // heads
        self.query = nn.Linear(dimensions, dimensions, bias=False)
        self.key = nn.Linear(dimensions, kv_heads * self.head_dimensions, bias=False)
        self.value = nn.Linear(dimensions, kv_heads * self.head_dimensions, bias=False)
        self.output = nn.Linear(dimensions, dimensions, bias=False)
        self.rope = nn.RoPE(self.head_dimensions, base=rope_base)
        self.attend = fused_attention  # a caller may put another function of the same signature here

    def __call__(self, x: mx.array) -> mx.array:
        """(B, T, D) → (B, T, D)"""
        query = self.rope(self._heads(self.query(x)))
        key = self.rope(self._heads(self.key(x)))
        value = self._heads(self.value(x))
        mixed = self.attend(query, key, value, scale=self.head_dimensions**-0.5)
        return self.output(mixed.transpose(0, 2, 1, 3).flatten(2))

    def _heads(self, x: mx.array) -> mx.array:
        """(B, T, heads · width) → (B, heads, T, width), a view."""
        return mx.unflatten(x, -1, (-1, self.head_dimensions)).transpose(0, 2, 1, 3)


class SwiGLU(nn.Module):
    """The feed-forward layer of a block."""

    def __init__(self, dimensions: int, hidden_dimensions: int) -> None:
        super().__init__()
        self.gate = nn.Linear(dimensions, hidden_dimensions, bias=False)
        self.up = nn.Linear(dimensions, hidden_dimensions, bias=False)
        self.down = nn.Linear(hidden_dimensions, dimensions, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        """(B, T, D) → (B, T, D)"""
        return self.down(nn.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """Attention, then feed-forward; each normalises its input and adds its output to the residual stream."""

    def __init__(self, config: TransformerModel) -> None:
        super().__init__()
        assert config.dimensions and config.heads and config.kv_heads and config.hidden_dimensions
        self.attention_norm = nn.RMSNorm(config.dimensions)
        self.attention = Attention(config.dimensions, config.heads, config.kv_heads, config.rope_base)
        self.feed_forward_norm = nn.RMSNorm(config.dimensions)
        self.feed_forward = SwiGLU(config.dimensions, config.hidden_dimensions)
        self.dropout = config.dropout

    def __call__(self, x: mx.array, key: mx.array | None) -> mx.array:
        """(B, T, D) → (B, T, D)"""
        attention_key, feed_forward_key = split_key(key, 2)
        x = x + dropout(self.attention(self.attention_norm(x)), self.dropout, attention_key)
        return x + dropout(self.feed_forward(self.feed_forward_norm(x)), self.dropout, feed_forward_key)


class Transformer(nn.Module):
    """Token embedding, blocks, norm, head."""

    def __init__(self, config: TransformerModel, vocabulary_size: int) -> None:
        super().__init__()
        assert config.layers and config.dimensions and config.max_sequence_length
        self.max_sequence_length = config.max_sequence_length
        self.dropout = config.dropout
        self.embedding = nn.Embedding(vocabulary_size, config.dimensions)
        self.layers = [Block(config) for _ in range(config.layers)]
        self.norm = nn.RMSNorm(config.dimensions)
        if not config.tie_head:
            self.head = nn.Linear(config.dimensions, vocabulary_size, bias=False)
        self._draw_weights()

    def _draw_weights(self) -> None:
        """Draws the weights as in GPT-2.

        The deeper the model, the smaller are the weights of layers that add to the residual stream, so that
        the stream's variance does not grow with depth.
        """
        normal = nn.init.normal(std=0.02)
        residual = nn.init.normal(std=0.02 / math.sqrt(2 * len(self.layers)))

        def draw(path: str, weight: mx.array) -> mx.array:
            if weight.ndim < 2:
                return weight
            return (residual if path.endswith(("output.weight", "down.weight")) else normal)(weight)

        self.update(tree_map_with_path(draw, self.parameters()))

    def __call__(self, tokens: mx.array) -> mx.array:
        """Tokens (B, T), integers → logits (B, T, vocabulary_size)."""
        key = draw_key() if self.training and self.dropout > 0 else None
        embedding_key, *block_keys = split_key(key, 1 + len(self.layers))
        x = self.embedding(tokens).astype(self.layers[0].attention.query.weight.dtype)
        x = dropout(x, self.dropout, embedding_key)
        for block, block_key in zip(self.layers, block_keys, strict=True):
            x = block(x, block_key)
        x = self.norm(x)
        if "head" in self:
            return self.head(x)
        return x @ self.embedding.weight.astype(x.dtype).T
