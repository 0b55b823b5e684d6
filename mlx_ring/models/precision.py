"""Mixed precision: forward and backward in the compute dtype, master weights in float32."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path

Forward = Callable[[Any, mx.array], mx.array]


def build_forward(model: nn.Module, dtype: mx.Dtype) -> Forward:
    """Returns a function of (parameters, inputs) that runs the model in `dtype` and returns its outputs.

    `parameters` are the trainable ones. The frozen ones are taken from the model and cast to `dtype` too. The
    function leaves the cast parameters in the model: the caller puts all master weights back with
    `model.update`. Embedding tables are not cast: their gradient is a sum over many rows, and bfloat16 would
    round small terms away.
    """
    embeddings = {path for path, module in model.named_modules() if isinstance(module, nn.Embedding)}

    def cast(path: str, parameter: mx.array) -> mx.array:
        keep = path.rpartition(".")[0] in embeddings or not mx.issubdtype(parameter.dtype, mx.floating)
        return parameter if keep else parameter.astype(dtype)

    def forward(parameters: Any, inputs: mx.array) -> mx.array:
        model.update(parameters)
        if dtype != mx.float32:
            model.update(tree_map_with_path(cast, model.parameters()))
        return model(inputs.astype(dtype) if mx.issubdtype(inputs.dtype, mx.floating) else inputs)

    return forward
