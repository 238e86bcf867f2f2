"""The transformer: embeddings, a scanned stack of layers, a head. Models floor.

Pure functions of (params, inputs): init_params, logical_axes, and Transformer.apply.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import no_type_check

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from llm.models.config import KEPT, AdapterConfig, ComputeConfig, TransformerConfig
from llm.models.feed_forward import readout_init
from llm.models.layers import Hidden, Layer, LayerCache, LayerInputs
from llm.models.masks import AttentionPattern
from llm.models.norms import Norm
from llm.models.pipeline import num_stages, run_pipeline
from llm.models.positions import rotary_angles, sinusoidal_embedding
from llm.models.projection import Projection, float32_product
from llm.models.router import COLLECTION
from llm.parallel.rules import constrain, gathered

Tokens = Int[Array, "B T"]
_TABLE = ("vocab", "embed")  # axes of the embedding, and in the other order of the head


@no_type_check  # a pytree holds shapes, shardings or NumPy arrays at times
@flax.struct.dataclass
class Cache:
    """Keys and values seen so far. All sequences share the index at which the next token goes."""

    layers: dict  # as the parameters: prefix_{i}, and cycle/layer_{j} stacked
    segments: Int[Array, "B S"]  # 0: nothing there, or padding
    length: Int[Array, ""] | int  # a plain 0 in a cache made within the same jit


class Cycle(nn.Module):
    """One repetition of the config's cycle of layers: the body of the scan."""

    config: TransformerConfig
    compute: ComputeConfig
    adapter: AdapterConfig

    @nn.compact
    def __call__(self, x: Hidden, caches: dict[str, LayerCache] | None, inputs: LayerInputs):
        updated = {}
        for j, kind in enumerate(self.config.cycle_layers):
            name = f"layer_{j}"
            cache = None if caches is None else caches[name]
            layer = Layer(self.config, self.compute, self.adapter, kind, name=name)
            x, updated[name] = layer(x, inputs, cache)
        return x, updated


class Transformer(nn.Module):
    """A functional transformer described by one config: see TransformerConfig for its kinds."""

    config: TransformerConfig
    compute: ComputeConfig = ComputeConfig()
    adapter: AdapterConfig = AdapterConfig()

    def setup(self):
        c, dtype = self.config, jnp.dtype(self.compute.dtype)
        if dtype.itemsize > 4 and not jax.config.jax_enable_x64:
            raise ValueError(
                f"compute.dtype={self.compute.dtype!r}: JAX computes so with JAX_ENABLE_X64=1 alone"
            )
        std = 0.02 if c.initializer == "gpt2" else 1.0
        self.embedder = Embedder(c.padded_vocab_size, c.width, _TABLE, std)
        if c.positions == "learned":
            axes = ("positions", "embed")
            self.position_embedder = Embedder(c.max_length_tokens, c.width, axes, std)
        for i, kind in enumerate(c.prefix_layers):
            layer = _rematerialise(Layer, self.compute, scanned=False)
            setattr(self, f"prefix_{i}", layer(c, self.compute, self.adapter, kind))
        unrolled = self.compute.unroll_layers
        if c.num_cycles:  # none once `unstack` has made every layer a prefix layer
            self.cycle = nn.scan(
                _rematerialise(Cycle, self.compute, scanned=not unrolled),
                variable_axes={"params": 0, COLLECTION: 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=(0, nn.broadcast),
                length=c.num_cycles,
                unroll=c.num_cycles if unrolled else 1,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )(c, self.compute, self.adapter)
        if c.norm_placement == "pre":
            self.final_norm = Norm(c.norm, c.norm_epsilon, dtype)
        self.embedding_dropout = nn.Dropout(c.dropout_rate)
        if not c.tied_head:
            self.head = Projection(
                "BTD,DV->BTV",
                (c.width, c.padded_vocab_size),
                _TABLE[::-1],
                readout_init(c),
                dtype=dtype,
                float32_output=True,
                multiplier=1 / (c.width_ratio or 1.0),
            )

    def __call__(self, tokens: Tokens, **kwargs):
        """Return float32 logits [B T V], or (logits, cache) if a cache is given; see `hidden`."""
        hidden, cache = self.hidden(tokens, **kwargs)
        logits = self.unembed(hidden)
        return logits if cache is None else (logits, cache)

    def hidden(
        self,
        tokens: Tokens,
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        prefix: Bool[Array, "B T"] | None = None,
        cache: Cache | None = None,
        deterministic: bool = True,
    ) -> tuple[Hidden, Cache | None]:
        """Return the last hidden states and the cache with these tokens written to it.

        Segment 0 is padding; tokens attend within their segment only. `positions` default to the
        index in the row. `prefix` marks keys that prefix attention shows to every query.
        """
        c = self.config
        start = 0 if cache is None else cache.length
        if positions is None:
            positions = jnp.broadcast_to(start + jnp.arange(tokens.shape[1]), tokens.shape)
        if cache is not None:
            segment_ids = jnp.ones_like(tokens) if segment_ids is None else segment_ids
            segments = jax.lax.dynamic_update_slice_in_dim(
                cache.segments, segment_ids, start, axis=1
            )
        inputs = LayerInputs(
            patterns={
                kind: AttentionPattern(
                    kind=c.attention,
                    window=c.sliding_window_tokens if kind == "local" else None,
                    # a cache whose length is a plain 0 is known to be empty: look at nothing else
                    query_start=None if isinstance(start, int) else start,
                    query_segments=segment_ids,
                    key_segments=segment_ids if isinstance(start, int) else segments,
                    prefix=prefix,
                    alibi_heads=c.num_heads if c.positions == "alibi" else None,
                )
                for kind in sorted({kind.removesuffix("_moe") for kind in c.layer_kinds})
            },
            real=None if segment_ids is None else segment_ids > 0,
            rotary=rotary_angles(positions, c) if c.positions == "rotary" else None,
            deterministic=deterministic,
        )
        x = self._embed(tokens, positions, deterministic)
        caches = {} if cache is None else cache.layers
        layers = {}
        for i in range(len(c.prefix_layers)):
            name = f"prefix_{i}"
            x, layers[name] = getattr(self, name)(x, inputs, caches.get(name))
        if c.num_cycles and cache is None and num_stages() > 1 and not self.is_initializing():
            x = self._pipelined(x, inputs)
        elif c.num_cycles:
            x, layers["cycle"] = self.cycle(x, caches.get("cycle"), inputs)
        if c.norm_placement == "pre":
            x = self.final_norm(x)
        if cache is not None:
            cache = Cache(layers, segments, jnp.int32(start + tokens.shape[1]))
        return x, cache

    def unembed(self, hidden: Hidden) -> Float[Array, "B T V"]:
        """Return float32 logits over the padded vocabulary; the padding's are −inf."""
        c = self.config
        if c.tied_head:
            logits = self.embedder.attend(hidden, 1 / (c.width_ratio or 1.0))
        else:
            logits = self.head(hidden)
        if c.head_softcap is not None:
            logits = jnp.tanh(logits / c.head_softcap) * c.head_softcap
        if c.padded_vocab_size != c.vocab_size:
            logits = jnp.where(jnp.arange(c.padded_vocab_size) < c.vocab_size, logits, -jnp.inf)
        return constrain(logits, "activation_batch", "activation_length", "activation_vocab")

    def _pipelined(self, x: Hidden, inputs: LayerInputs) -> Hidden:
        """Return x after all cycles, each stage of the mesh's pipeline doing some of them."""
        module = _rematerialise(Cycle, self.compute, scanned=True)
        cycle = module(self.config, self.compute, self.adapter, parent=None)
        key = None if inputs.deterministic else self.make_rng("dropout")
        reported = [COLLECTION] if self.is_mutable_collection(COLLECTION) else []

        def stage(params, x, inputs, turn):
            def one(x, of_cycle):
                params, i = of_cycle
                rngs = {} if key is None else {"dropout": jax.random.fold_in(key, i)}
                (x, _), report = cycle.apply(
                    {"params": params}, x, None, inputs, rngs=rngs, mutable=reported
                )
                return x, report

            number = jax.tree.leaves(params)[0].shape[0]
            unroll = number if self.compute.unroll_layers else 1
            return jax.lax.scan(one, x, (params, turn * number + jnp.arange(number)), unroll=unroll)

        axes = logical_axes(self.clone(parent=None))["cycle"]
        params = self.variables["params"]["cycle"]
        x, reports = run_pipeline(stage, params, axes, x, inputs, self.compute)
        for name, report in reports.items():
            self.put_variable(name, "cycle", report)
        return x

    def _embed(self, tokens, positions, deterministic):
        c, dtype = self.config, jnp.dtype(self.compute.dtype)
        x = self.embedder(tokens).astype(dtype)
        if c.positions == "learned":
            x = x + self.position_embedder(positions).astype(dtype)
        elif c.positions == "sinusoidal":
            x = x + sinusoidal_embedding(positions, c.width).astype(dtype)
        x = self.embedding_dropout(x, deterministic=deterministic)
        return constrain(x, "activation_batch", "activation_length", "activation_embed")


class Embedder(nn.Module):
    """A lookup table, and the tied head that is its transpose."""

    rows: int
    width: int
    axes: tuple[str, str]
    std: float

    def setup(self):
        init = nn.with_logical_partitioning(nn.initializers.normal(self.std), self.axes)
        self.embedding = self.param("embedding", init, (self.rows, self.width), jnp.float32)

    def __call__(self, index: Int[Array, "B T"]) -> Hidden:
        # gathered over fsdp like any parameter at its use; a lookup in rows split by width is slow
        table = constrain(self.embedding, self.axes[0], "activation_embed")
        return jnp.take(table, index, axis=0)

    def attend(self, hidden: Hidden, multiplier: float = 1.0) -> Float[Array, "B T V"]:
        logits = float32_product("BTD,VD->BTV", hidden, self.embedding.astype(hidden.dtype))
        return logits if multiplier == 1.0 else logits * jnp.asarray(multiplier, logits.dtype)


# A Transformer, a ScalarModel, or several of them by name, whose parameters are trees by name.
Model = nn.Module | Mapping[str, nn.Module]


def init_params(model: Model, key: jax.Array) -> dict:
    """Return freshly initialised parameters as a plain nested dict of float32 arrays."""
    # unboxed: boxed axis names would be shifted silently by a vmap over seeds
    return nn.unbox(_init(model, key))


def scale_params(params: dict, factor: ArrayLike) -> dict:
    """Return parameters with kernels and tables multiplied: another scale of initialisation."""

    def one(path, leaf):
        return leaf * factor if path[-1].key in ("kernel", "embedding") else leaf

    return jax.tree_util.tree_map_with_path(one, params)


def head_params(config: TransformerConfig, params: dict) -> dict:
    """Return the part of the parameters that `Transformer.unembed` reads, for a loop over tiles."""
    if config.tied_head:
        return {"embedder": {"embedding": gathered(params["embedder"]["embedding"], _TABLE)}}
    return {"head": {"kernel": gathered(params["head"]["kernel"], _TABLE[::-1])}}


def unembed(model: Transformer, head: dict, hidden: Hidden) -> Float[Array, "B T V"]:
    """Return float32 logits by `head_params`, of one tile of a loop.

    The head is said again to be gathered, which it is, for its gradient's sake: each tile's is then
    cut over fsdp as it is summed, and not at the end of the loop.
    """
    params = head_params(model.config, head)
    return model.apply({"params": params}, hidden, method="unembed")


def logical_axes(model: Model) -> dict:
    """Return, for each parameter, the tuple of its dimensions' logical names."""
    boxed = jax.eval_shape(functools.partial(_init, model), jax.random.key(0))
    is_box = lambda x: isinstance(x, nn.LogicallyPartitioned)  # noqa: E731
    return jax.tree.map(lambda box: box.names, boxed, is_leaf=is_box)


def param_shapes(model: Model) -> dict:
    """Return the tree of jax.ShapeDtypeStructs of the model's parameters; allocates nothing."""
    return jax.eval_shape(functools.partial(init_params, model), jax.random.key(0))


def init_cache(
    config: TransformerConfig, batch: int, length_tokens: int, dtype=jnp.float32
) -> Cache:
    """Return an empty cache for that many sequences of at most that many tokens."""

    axes = ("activation_batch", "activation_kv_heads", "activation_cache_length", None)

    def layer(*stack):
        shape = (*stack, batch, config.num_kv_heads, length_tokens, config.head_dim)
        empty = constrain(jnp.zeros(shape, dtype), *(None for _ in stack), *axes)
        return LayerCache(empty, empty)

    layers = {f"prefix_{i}": layer() for i in range(len(config.prefix_layers))}
    if config.num_cycles:
        cycle = range(len(config.cycle_layers))
        layers["cycle"] = {f"layer_{j}": layer(config.num_cycles) for j in cycle}
    return Cache(layers, jnp.zeros((batch, length_tokens), jnp.int32), 0)


def _init(model: Model, key: jax.Array) -> dict:
    if isinstance(model, Mapping):
        keys = jax.random.split(key, len(model))
        return {name: _init(model[name], k) for name, k in zip(sorted(model), keys, strict=True)}
    # on one token, for which the fused kernels are not made
    plain = dataclasses.replace(model.compute, attention_kernel="xla", remat="none")
    return model.clone(compute=plain).init(key, jnp.zeros((1, 1), jnp.int32))["params"]


def _rematerialise(module, compute: ComputeConfig, *, scanned: bool):
    """Wrap a module so that its activations are recomputed in the backward pass, by policy name."""
    policies = jax.checkpoint_policies
    attention, either = policies.save_only_these_names(KEPT), policies.save_from_both_policies
    named = {
        "full": policies.nothing_saveable,
        "dots": either(policies.dots_saveable, attention),
        "dots_with_no_batch": either(policies.dots_with_no_batch_dims_saveable, attention),
        "attention": attention,
    }
    if compute.remat == "none":
        return module
    # inside a rolled loop XLA cannot merge the two computations; elsewhere it must be told not to
    return nn.remat(module, policy=named[compute.remat], prevent_cse=not scanned)
