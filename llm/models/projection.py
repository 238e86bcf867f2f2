"""The one place for weight products: every kernel meets its input here. Models floor."""

import functools
import math
from collections.abc import Callable
from string import ascii_lowercase

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


def fan_in(spec: str, shape: tuple[int, ...]) -> int:
    """Return how many inputs each output of an einsum like "BTD,DNH->BTNH" sums over."""
    inputs, kernel = spec.split("->")[0].split(",")
    return math.prod(n for letter, n in zip(kernel, shape, strict=True) if letter in inputs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def float32_product(spec: str, x: ArrayLike, kernel: ArrayLike) -> jax.Array:
    """Return an einsum of equal-typed inputs with its output left in float32 (float64 stays).

    For logits: rounded to bf16 they lose what distinguishes likely tokens. The cotangent is rounded
    to the inputs' type first, since a product of float32 with bf16 would run at float32's speed.
    """
    out = jnp.promote_types(jnp.float32, x.dtype)
    return jnp.einsum(spec, x, kernel, preferred_element_type=out)


def _float32_product_forward(spec, x, kernel):
    return float32_product(spec, x, kernel), (x, kernel)


def _float32_product_backward(spec, inputs, cotangent):
    _, pullback = jax.vjp(functools.partial(jnp.einsum, spec), *inputs)
    return pullback(cotangent.astype(inputs[0].dtype))


float32_product.defvjp(_float32_product_forward, _float32_product_backward)


class Projection(nn.Module):
    """x times a kernel, as an einsum string that shows both shapes; a bias on the output's letters.

    Master weights are float32 (float64 when computing in it); the product is taken in `dtype`, and
    left in float32 where `float32_output` asks for it.
    """

    spec: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    kernel_init: Callable[..., jax.Array]
    use_bias: bool = False
    dtype: jnp.dtype = jnp.float32
    float32_output: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        param_dtype = jnp.promote_types(jnp.float32, self.dtype)
        init = nn.with_logical_partitioning(self.kernel_init, self.axes)
        kernel = self.param("kernel", init, self.shape, param_dtype)
        product = float32_product if self.float32_output else jnp.einsum
        y = product(_in_kernel_order(self.spec), x.astype(self.dtype), kernel.astype(self.dtype))
        if not self.use_bias:
            return y
        letters, output = self.spec.split("->")[0].split(",")[1], self.spec.split("->")[1]
        kept = [i for i, letter in enumerate(letters) if letter in output]
        init = nn.with_logical_partitioning(
            nn.initializers.zeros_init(), tuple(self.axes[i] for i in kept)
        )
        bias = self.param("bias", init, tuple(self.shape[i] for i in kept), param_dtype)
        return y + bias.astype(y.dtype)


def _in_kernel_order(spec: str) -> str:
    """Rename an einsum's letters so that the kernel's run a, b, c, ….

    Einsum contracts in alphabetical order: "BTNH,NHD->BTD" would transpose both inputs to H, N.
    """
    kernel = spec.split("->")[0].split(",")[1]
    letters = filter(str.isalpha, dict.fromkeys(kernel + spec))
    renamed = dict(zip(letters, ascii_lowercase, strict=False))
    return "".join(renamed.get(symbol, symbol) for symbol in spec)
