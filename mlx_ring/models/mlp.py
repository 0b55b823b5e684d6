"""A multi-layer perceptron."""

import math
from itertools import pairwise

import mlx.core as mx
import mlx.nn as nn

from mlx_ring.config.choices import MLPModel
from mlx_ring.models.dropout import draw_key, dropout, split_key


class HiddenLayer(nn.Module):
    """A linear layer, ReLU and dropout. Flattens samples of any shape first."""

    def __init__(self, inputs: int, outputs: int, dropout: float) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)
        self.dropout = dropout

    def __call__(self, x: mx.array, key: mx.array | None) -> mx.array:
        """(B, …) → (B, outputs)"""
        return dropout(nn.relu(self.linear(x.flatten(1))), self.dropout, key)


class MLP(nn.Module):
    """Hidden layers and a linear head."""

    def __init__(self, config: MLPModel, input_shape: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        sizes = [math.prod(input_shape), *config.hidden_sizes]
        self.layers = [HiddenLayer(inputs, outputs, config.dropout) for inputs, outputs in pairwise(sizes)]
        self.head = nn.Linear(sizes[-1], num_classes)
        self.dropout = config.dropout

    def __call__(self, x: mx.array) -> mx.array:
        """Samples (B, *input_shape) → logits (B, num_classes)."""
        key = draw_key() if self.training and self.dropout > 0 else None
        for layer, layer_key in zip(self.layers, split_key(key, len(self.layers)), strict=True):
            x = layer(x, layer_key)
        return self.head(x.flatten(1))
