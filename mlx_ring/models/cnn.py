"""A convolutional network for small images."""

import mlx.core as mx
import mlx.nn as nn

from mlx_ring.config.choices import CNNModel
from mlx_ring.errors import ConfigError
from mlx_ring.models.dropout import draw_key
from mlx_ring.models.mlp import HiddenLayer


class Stage(nn.Module):
    """A 3 x 3 convolution, 2 x 2 max-pooling, ReLU, and a norm over the channels of each position."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(inputs, outputs, kernel_size=3, padding=1)
        self.pool = nn.MaxPool2d(kernel_size=2)
        # Fashion-MNIST, two stages, 2,000 steps of 128: 92.7 % with this norm, 90.1 % without.
        self.norm = nn.LayerNorm(outputs)

    def __call__(self, x: mx.array) -> mx.array:
        """(B, H, W, inputs) → (B, H // 2, W // 2, outputs)"""
        # ReLU and maximum commute; ReLU second handles a quarter of the elements.
        return self.norm(nn.relu(self.pool(self.convolution(x))))


class CNN(nn.Module):
    """Stages that each halve the image, a hidden layer with dropout, and a linear head.

    Raises: ConfigError if `input_shape` is not (height, width, channels), or is too small for the stages.
    """

    def __init__(self, config: CNNModel, input_shape: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        if len(input_shape) != 3:
            raise ConfigError(
                f"model=cnn needs images of shape (height, width, channels); the data gives {input_shape}: "
                "choose model=mlp"
            )
        height, width, channels = input_shape
        halvings = len(config.channels)
        if min(height, width) < 2**halvings:
            raise ConfigError(
                f"model.channels={config.channels} halves the image {halvings} times, and the data's "
                f"{input_shape} is too small for that: give fewer stages or choose model=mlp"
            )
        widths = [channels, *config.channels]
        stages = [Stage(widths[i], widths[i + 1]) for i in range(halvings)]
        flat = (height >> halvings) * (width >> halvings) * widths[-1]
        self.layers: list[nn.Module] = [*stages, HiddenLayer(flat, config.hidden_size, config.dropout)]
        self.head = nn.Linear(config.hidden_size, num_classes)
        self.dropout = config.dropout

    def __call__(self, x: mx.array) -> mx.array:
        """Images (B, height, width, channels) → logits (B, num_classes)."""
        *stages, hidden = self.layers
        for stage in stages:
            x = stage(x)
        key = draw_key() if self.training and self.dropout > 0 else None
        return self.head(hidden(x, key))
