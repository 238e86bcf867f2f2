"""The one place for weight products: every kernel meets its input here. Models floor."""

import functools
import math
from collections.abc import Callable
from string import ascii_lowercase

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from llm.models.config import ADAPTED, AdapterConfig
from llm.models.grouped_dot import grouped_dot
from llm.models.quantization import dequantize_kernel, stored_shapes

Weights = dict[str, Array]  # a kernel, and lora_a and lora_b where it has an adapter


def fan_in(spec: str, shape: tuple[int, ...]) -> int:
    """Return how many inputs each output of an einsum like "BTD,DNH->BTNH" sums over."""
    _, inputs, _ = _sides(spec)
    kernel = "".join(_sides(spec))
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

    A letter that x, kernel and output share, as experts' "BECD,EDF->BECF", is one kernel each, with
    its own scales and factors. Rows that lie expert by expert are multiplied by `ragged_product`,
    which takes `weights`.
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

    def setup(self):
        experts, inputs, outputs = _sides(self.spec)
        self._kernel = self._stored_kernel()
        self._factors = {}
        if self.adapter.rank and self.name in self.adapter.targets:
            bound = fan_in(self.spec, self.shape) ** -0.5  # as PEFT begins
            uniform = lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)  # noqa: E731
            self._factors = {
                "lora_a": self._param("lora_a", uniform, experts + inputs + "R"),
                "lora_b": self._param(
                    "lora_b", nn.initializers.zeros_init(), experts + "R" + outputs
                ),
            }
        if self.use_bias:
            self._bias = self._param("bias", nn.initializers.zeros_init(), outputs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x, weights = x.astype(self.dtype), self.weights()
        product = float32_product if self.float32_output else jnp.einsum
        y = product(_in_kernel_order(self.spec), x, weights["kernel"])
        if self.multiplier != 1.0:
            y = y * jnp.asarray(self.multiplier, y.dtype)
        if "lora_a" in weights:
            y = y + self._low_rank(x, weights)
        return y + self._bias.astype(y.dtype) if self.use_bias else y

    def weights(self) -> Weights:
        """Return the kernel, restored from how it is stored, and the factors, in `dtype`."""
        weights = {"kernel": self._kernel, **self._factors}
        return {name: jnp.asarray(x, self.dtype) for name, x in weights.items()}

    def weight_axes(self) -> dict[str, tuple[str | None, ...]]:
        """Return the logical axes of each of `weights`."""
        experts, inputs, outputs = _sides(self.spec)
        letters = {
            "kernel": experts + inputs + outputs,
            "lora_a": experts + inputs + "R",
            "lora_b": experts + "R" + outputs,
        }
        return {name: self._axes(letters[name]) for name in ("kernel", *self._factors)}

    def _stored_kernel(self) -> ArrayLike:
        experts, inputs, outputs = _sides(self.spec)
        if self.adapter.quantize == "none" or self.name not in ADAPTED:
            return self._param("kernel", self.kernel_init, experts + inputs + outputs)
        stored = {}
        shapes = stored_shapes(self.adapter, self.shape, len(experts), len(inputs))
        for name, like in shapes.items():
            # Zero until `adapt_params` stores another model's kernel here.
            axes = tuple(a if n > 1 else None for a, n in zip(self.axes, like.shape, strict=True))
            init = nn.with_logical_partitioning(nn.initializers.zeros_init(), axes)
            stored[name] = self.param(name, init, like.shape, like.dtype)
        return dequantize_kernel(stored)

    def _low_rank(self, x: jax.Array, weights: Weights) -> jax.Array:
        """Return alpha / rank · (x · a) · b."""
        experts, inputs, outputs = _sides(self.spec)
        x_letters, y_letters = self.spec.split(",")[0], self.spec.split("->")[1]
        rows = "".join(letter for letter in x_letters if letter not in inputs)
        into = _in_kernel_order(f"{x_letters},{experts}{inputs}R->{rows}R")
        out_of = _in_kernel_order(f"{rows}R,{experts}R{outputs}->{y_letters}")
        low = jnp.einsum(into, x, weights["lora_a"])
        y = jnp.einsum(out_of, low, weights["lora_b"])
        return y * jnp.asarray(self.adapter.alpha / self.adapter.rank, y.dtype)

    def _param(self, name: str, init: Callable[..., jax.Array], letters: str) -> ArrayLike:
        """Return a parameter over letters of the kernel, and R for the rank."""
        kernel = "".join(_sides(self.spec))
        sizes = dict(zip(kernel, self.shape, strict=True)) | {"R": self.adapter.rank}
        boxed = nn.with_logical_partitioning(init, self._axes(letters))
        dtype = jnp.promote_types(jnp.float32, self.dtype)
        return self.param(name, boxed, tuple(sizes[n] for n in letters), dtype)

    def _axes(self, letters: str) -> tuple[str | None, ...]:
        axes = dict(zip("".join(_sides(self.spec)), self.axes, strict=True)) | {"R": None}
        return tuple(axes[letter] for letter in letters)


def ragged_product(
    weights: Weights,
    rows: Float[Array, "M D"],
    group_sizes: Int[Array, " E"],
    adapter: AdapterConfig,
) -> Float[Array, "M F"]:
    """Return each row times the kernel of its expert, factors of an adapter added.

    Rows lie expert by expert, `group_sizes` of them each; of those beyond the result is 0.
    """
    y = grouped_dot(rows, weights["kernel"], group_sizes)
    if "lora_a" not in weights:
        return y
    low = grouped_dot(rows, weights["lora_a"], group_sizes)
    low = grouped_dot(low, weights["lora_b"], group_sizes)
    return y + low * jnp.asarray(adapter.alpha / adapter.rank, y.dtype)


def _sides(spec: str) -> tuple[str, str, str]:
    """Return the kernel's letters, in its order: those of whole kernels side by side (experts'),
    those that are summed over, and those of the output alone."""
    x, kernel, y = spec.replace("->", ",").split(",")
    experts = "".join(letter for letter in kernel if letter in x and letter in y)
    inputs = "".join(letter for letter in kernel if letter in x and letter not in y)
    return experts, inputs, kernel.removeprefix(experts + inputs)


def _in_kernel_order(spec: str) -> str:
    """Rename an einsum's letters so that the kernel's run a, b, c, ….

    Einsum contracts in alphabetical order: "BTNH,NHD->BTD" would transpose both inputs to H, N.
    """
    kernel = spec.split("->")[0].split(",")[1]
    letters = filter(str.isalpha, dict.fromkeys(kernel + spec))
    renamed = dict(zip(letters, ascii_lowercase, strict=False))
    return "".join(renamed.get(symbol, symbol) for symbol in spec)
