"""The one place for weight products: every kernel meets its input here. Models floor."""

import functools
import math
from collections.abc import Callable
from string import ascii_lowercase

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from llm.models.config import ADAPTED, AdapterConfig
from llm.models.quantization import dequantize_kernel, stored_shapes


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

    With an adapter the kernel may be stored quantised, and low-rank factors `lora_a` (inputs by
    rank) and `lora_b` (rank by outputs) add alpha / rank · (x · a) · b; b begins at zero.
    """

    spec: str
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    kernel_init: Callable[..., jax.Array]
    use_bias: bool = False
    dtype: jnp.dtype = jnp.float32
    float32_output: bool = False
    adapter: AdapterConfig = AdapterConfig()
    multiplier: float = 1.0  # of the product, for muP

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.astype(self.dtype)
        product = float32_product if self.float32_output else jnp.einsum
        y = product(_in_kernel_order(self.spec), x, self._kernel().astype(self.dtype))
        if self.multiplier != 1.0:
            y = y * jnp.asarray(self.multiplier, y.dtype)
        if self.adapter.rank and self.name in self.adapter.targets:
            y = y + self._low_rank(x)
        if not self.use_bias:
            return y
        _, outputs = _sides(self.spec)
        bias = self._param("bias", nn.initializers.zeros_init(), outputs)
        return y + bias.astype(y.dtype)

    def _kernel(self) -> ArrayLike:
        """Return the kernel, restored from how it is stored."""
        inputs, outputs = _sides(self.spec)
        if self.adapter.quantize == "none" or self.name not in ADAPTED:
            return self._param("kernel", self.kernel_init, inputs + outputs)
        stored = {}
        for name, like in stored_shapes(self.adapter, self.shape, len(inputs)).items():
            # Zero until `adapt_params` stores another model's kernel here.
            axes = tuple(a if n > 1 else None for a, n in zip(self.axes, like.shape, strict=True))
            init = nn.with_logical_partitioning(nn.initializers.zeros_init(), axes)
            stored[name] = self.param(name, init, like.shape, like.dtype)
        return dequantize_kernel(stored)

    def _low_rank(self, x: jax.Array) -> jax.Array:
        """Return alpha / rank · (x · a) · b."""
        inputs, outputs = _sides(self.spec)
        bound = fan_in(self.spec, self.shape) ** -0.5  # as PEFT begins
        uniform = lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)  # noqa: E731
        a = self._param("lora_a", uniform, inputs + "R")
        b = self._param("lora_b", nn.initializers.zeros_init(), "R" + outputs)
        x_letters, y_letters = self.spec.split(",")[0], self.spec.split("->")[1]
        rows = "".join(letter for letter in x_letters if letter not in inputs)
        into = _in_kernel_order(f"{x_letters},{inputs}R->{rows}R")
        out_of = _in_kernel_order(f"{rows}R,R{outputs}->{y_letters}")
        low = jnp.einsum(into, x, a.astype(self.dtype))
        y = jnp.einsum(out_of, low, b.astype(self.dtype))
        return y * jnp.asarray(self.adapter.alpha / self.adapter.rank, y.dtype)

    def _param(self, name: str, init: Callable[..., jax.Array], letters: str) -> ArrayLike:
        """Return a parameter over letters of the kernel, and R for the rank."""
        kernel = "".join(_sides(self.spec))
        sizes = dict(zip(kernel, self.shape, strict=True)) | {"R": self.adapter.rank}
        axes = dict(zip(kernel, self.axes, strict=True)) | {"R": None}
        boxed = nn.with_logical_partitioning(init, tuple(axes[n] for n in letters))
        dtype = jnp.promote_types(jnp.float32, self.dtype)
        return self.param(name, boxed, tuple(sizes[n] for n in letters), dtype)


def _sides(spec: str) -> tuple[str, str]:
    """Return the kernel's letters that are summed over, and those of the output, in its order."""
    x, kernel = spec.split("->")[0].split(",")
    inputs = "".join(letter for letter in kernel if letter in x)
    return inputs, kernel.removeprefix(inputs)


def _in_kernel_order(spec: str) -> str:
    """Rename an einsum's letters so that the kernel's run a, b, c, ….

    Einsum contracts in alphabetical order: "BTNH,NHD->BTD" would transpose both inputs to H, N.
    """
    kernel = spec.split("->")[0].split(",")[1]
    letters = filter(str.isalpha, dict.fromkeys(kernel + spec))
    renamed = dict(zip(letters, ascii_lowercase, strict=False))
    return "".join(renamed.get(symbol, symbol) for symbol in spec)
