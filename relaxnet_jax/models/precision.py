"""The precision of dense layers, and gradients of biases and norms that are fast on accelerators.

Dense layers multiply in bfloat16, accumulated in float32, or in float32. The gradients of the
biases and of the norms' parameters are sums over rows (`on_rows`).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, Literal, ParamSpec, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

_Given = ParamSpec("_Given")
_Result = TypeVar("_Result")


def in_float32(function: Callable[_Given, _Result]) -> Callable[_Given, _Result]:
    """Decorates a function so that its own matrix products, those of geometry, use full float32."""

    @functools.wraps(function)
    def precise(*args: _Given.args, **kwargs: _Given.kwargs) -> _Result:
        with jax.default_matmul_precision("float32"):
            return function(*args, **kwargs)

    return precise


@jax.custom_vjp
def bfloat16_product(x: Array, y: Array) -> Array:
    """x (M, K) @ y (K, N) with factors rounded to bfloat16 and products summed in float32.

    Its derivatives are products of the same kind, to any order in reverse mode. Those of a plain
    product of rounded factors would multiply float32 by bfloat16, at the speed of float32.
    """
    halves = x.astype(jnp.bfloat16), y.astype(jnp.bfloat16)
    exact = jax.lax.Precision.DEFAULT  # one pass multiplies bfloat16 factors exactly
    product = jnp.matmul(*halves, precision=exact, preferred_element_type=jnp.float32)
    return product.astype(x.dtype)


def _forward(x: Array, y: Array) -> tuple[Array, tuple[Array, Array]]:
    return bfloat16_product(x, y), (x, y)


def _backward(factors: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, y = factors
    return bfloat16_product(g, y.T), bfloat16_product(x.T, g)


bfloat16_product.defvjp(_forward, _backward)


def on_rows(values: Array, n_rows: int) -> Array:
    """Repeats the values (F,) on every row: (N, F), or on a CPU (1, F), which broadcasts alike.

    On accelerators it is a product with ones, so that its transpose, the sum of a gradient over all
    rows, is a matrix product too: XLA for GPUs fuses plain sums with other work and then runs them in
    a single block. On a CPU the sum is faster.
    """
    if _on_cpu():
        return values[None]
    # The barrier hides from XLA that these are ones, which would turn the product back into a sum.
    ones = jax.lax.optimization_barrier(jnp.ones((n_rows, 1), values.dtype))
    return jnp.matmul(ones, values[None], precision=jax.lax.Precision.HIGHEST)


def _on_cpu() -> bool:
    return jax.default_backend() == "cpu"


def matmul_precision(kind: Literal["float32", "bfloat16"]) -> contextlib.AbstractContextManager:
    """A context in which `flax.linen.Dense` layers multiply in this precision, and add biases by `on_rows`.

    Everything else (geometry, bases, sums over neighbours, norms and biases) stays in float32. That
    is full float32 on accelerators too, whose default is lower (TF32 on NVIDIA, bfloat16 on TPUs).
    """
    context = contextlib.ExitStack()
    context.enter_context(jax.default_matmul_precision("float32"))
    product = bfloat16_product if kind == "bfloat16" else jnp.matmul
    context.enter_context(nn.intercept_methods(functools.partial(_dense, product)))
    return context


def _dense(
    product: Callable[[Array, Array], Array],
    following: Any,
    args: Any,
    kwargs: Any,
    context: nn.module.InterceptorContext,
) -> Any:
    layer = context.module
    if not isinstance(layer, nn.Dense) or context.method_name != "__call__":
        return following(*args, **kwargs)
    (x,) = args
    kernel: Array = layer.get_variable("params", "kernel")
    flat = product(x.reshape(-1, x.shape[-1]), kernel)
    if layer.use_bias:
        flat = flat + on_rows(layer.get_variable("params", "bias"), flat.shape[0])
    return flat.reshape(*x.shape[:-1], kernel.shape[1])


class LayerNorm(nn.Module):
    """Layer normalisation with scale and bias, as `flax.linen.LayerNorm`: (N, F) -> (N, F)."""

    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        mean = jnp.mean(x, -1, keepdims=True)
        variance = jnp.maximum(jnp.mean(x * x, -1, keepdims=True) - mean * mean, 0.0)
        normed = (x - mean) * jax.lax.rsqrt(variance + self.epsilon)
        return normed * on_rows(scale, x.shape[0]) + on_rows(bias, x.shape[0])
