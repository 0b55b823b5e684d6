"""Arrays by name: what travels, what is saved, what is compared."""

import mlx.core as mx

Arrays = dict[str, mx.array]  # by the dotted path of a parameter, or by another name
