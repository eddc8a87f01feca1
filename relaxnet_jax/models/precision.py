"""Matrix products of the dense layers in bfloat16, accumulated in float32."""

from __future__ import annotations

import contextlib
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array


@jax.custom_vjp
def bfloat16_product(x: Array, y: Array) -> Array:
    """x (M, K) @ y (K, N): factors rounded to bfloat16, products summed in float32.

    Its derivatives are products of the same kind, to any order in reverse mode: those of a plain
    product of rounded factors would multiply float32 by bfloat16, at the speed of float32.
    """
    halves = x.astype(jnp.bfloat16), y.astype(jnp.bfloat16)
    return jnp.matmul(*halves, preferred_element_type=jnp.float32).astype(x.dtype)


def _forward(x: Array, y: Array) -> tuple[Array, tuple[Array, Array]]:
    return bfloat16_product(x, y), (x, y)


def _backward(factors: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, y = factors
    return bfloat16_product(g, y.T), bfloat16_product(x.T, g)


bfloat16_product.defvjp(_forward, _backward)


def matmul_precision(kind: Literal["float32", "bfloat16"]) -> contextlib.AbstractContextManager:
    """Within this context `flax.linen.Dense` layers multiply in that precision.

    All else, geometry, bases, sums over neighbours, norms and biases, stays as it is. "float32" is
    what it says on accelerators too, whose default is less (TF32 on NVIDIA's, bfloat16 on TPUs).
    """
    if kind == "float32":
        return jax.default_matmul_precision("float32")
    return nn.intercept_methods(_dense)


def _dense(following: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
    layer = context.module
    if not isinstance(layer, nn.Dense) or context.method_name != "__call__":
        return following(*args, **kwargs)
    (x,) = args
    kernel: Array = layer.get_variable("params", "kernel")
    flat = bfloat16_product(x.reshape(-1, x.shape[-1]), kernel)
    result = flat.reshape(*x.shape[:-1], kernel.shape[1])
    return result + layer.get_variable("params", "bias") if layer.use_bias else result
