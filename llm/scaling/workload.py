"""A training step as a plan counts it: what is trained, and how its arrays are cut. Third floor."""

import dataclasses
import functools
import math
from collections.abc import Mapping

import jax
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from llm.models.config import ComputeConfig, TransformerConfig
from llm.models.on_mesh import check_heads, check_stages, num_microbatches
from llm.models.transformer import Transformer, logical_axes
from llm.objectives.tiles import divide_tokens
from llm.parallel.config import MESH_AXES, MeshConfig
from llm.parallel.mesh import make_mesh
from llm.parallel.rules import RULES
from llm.scaling.accounting import count_flops, training_flops_per_token
from llm.scaling.memory import count_activation_bytes
from llm.training.ahead import abstract_state
from llm.training.config import OptimizerConfig
from llm.training.optimizers import make_optimizer

Sizes = Mapping[str, int]  # devices along each mesh axis


@dataclasses.dataclass(frozen=True)
class Workload:
    """One training step of a language model on packed rows."""

    model: TransformerConfig
    compute: ComputeConfig
    optimizer: OptimizerConfig
    batch_sequences: int
    length_tokens: int
    accumulate_steps: int = 1
    loss_tile_tokens: int = 4096

    @property
    def tokens(self) -> int:
        """Positions of a global batch."""
        return self.batch_sequences * self.length_tokens

    @property
    def itemsize(self) -> int:
        """Bytes of a number in the type that is computed in."""
        return {"bfloat16": 2, "float32": 4, "float64": 8}[self.compute.dtype]

    @property
    def active_mlp_width(self) -> int:
        """Features of the feed-forward block that a token goes through: of its experts, if any."""
        config = self.model
        if config.activation == "none":
            return 0
        if not config.moe_layers:
            return config.mlp_width
        return config.experts_per_token * config.expert_mlp_width + config.shared_expert_width

    def microbatch_tokens(self, sizes: Sizes) -> float:
        """Return the positions of a microbatch that a device has within the layers."""
        rows = self.batch_sequences / self.accumulate_steps / batch_parts(sizes)
        return rows * self.length_tokens / sizes["context"]

    def loss_tiles(self, sizes: Sizes) -> int:
        """Return in how many tiles the loss of a microbatch is taken."""
        tokens = self.microbatch_tokens(sizes) / sizes["pipeline"]
        return divide_tokens(tokens, self.length_tokens, self.loss_tile_tokens)

    def pipeline_microbatches(self, sizes: Sizes) -> int:
        """Return M, into how many parts the pipeline cuts a microbatch."""
        stages, asked = sizes["pipeline"], self.compute.pipeline_microbatches
        rows = self.batch_sequences // self.accumulate_steps
        return num_microbatches(rows, batch_parts(sizes), stages, asked) if stages > 1 else 1

    def turns(self, sizes: Sizes) -> float:
        """Return the turns of a stage for each in which it has work: (M·R + S − 1) / (M·R).

        Source: Narayanan et al. 2021, arXiv:2104.04473, section 2.2, for a circular schedule.
        """
        busy = self.pipeline_microbatches(sizes) * self.compute.pipeline_repeats
        return (busy + sizes["pipeline"] - 1) / busy

    def check(self, sizes: Sizes) -> None:
        """Check that a mesh divides the model and its batch.

        Raises:
          ValueError: names the dimension, and the sizes that would divide it.
        """
        check_stages(self.model.num_cycles, sizes["pipeline"], self.compute)
        for leaf in state_arrays(self):
            for size, axes in zip(leaf.shape, leaf.axes, strict=True):
                parts = math.prod(sizes[axis] for axis in axes)
                if size % parts:
                    cut = " × ".join(f"mesh.{axis}={sizes[axis]}" for axis in axes)
                    raise ValueError(
                        f"{leaf.name} has {size} along a dimension that {cut} cuts; choose a mesh "
                        f"whose axes divide {size}"
                    )
        rows, parts = self.batch_sequences // self.accumulate_steps, batch_parts(sizes)
        if rows % parts:
            raise ValueError(
                f"a microbatch of {rows} sequences (data.batch_sequences={self.batch_sequences} / "
                f"accumulate_steps={self.accumulate_steps}) does not divide over the {parts} "
                "devices of mesh.data × mesh.fsdp × mesh.expert"
            )
        if self.length_tokens % sizes["context"]:
            raise ValueError(
                f"data.length_tokens={self.length_tokens} does not divide over "
                f"mesh.context={sizes['context']} devices"
            )
        heads, stretches = self.model.num_heads, sizes["context"]
        check_heads(heads, sizes["tensor"] * stretches, stretches)
        self.pipeline_microbatches(sizes)


@dataclasses.dataclass(frozen=True)
class StateArray:
    """An array of the training state, and which mesh axes cut which of its dimensions."""

    name: str
    shape: tuple[int, ...]
    itemsize: int
    axes: tuple[tuple[str, ...], ...]  # mesh axes of each dimension
    names: tuple[str | None, ...] = ()  # logical names; of parameters only

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def is_table(self) -> bool:
        """Whether rows of it are looked up: the embedding, learned positions."""
        return self.name.endswith("embedding")

    def is_cut_by(self, axis: str) -> bool:
        """Whether a mesh axis cuts one of its dimensions."""
        return any(axis in axes for axes in self.axes)

    def parts(self, sizes: Sizes, *, without: tuple[str, ...] = ()) -> int:
        """Return into how many parts a mesh cuts it, some of its axes left out."""
        return math.prod(sizes[axis] for axes in self.axes for axis in axes if axis not in without)


@functools.lru_cache(maxsize=64)
def state_arrays(workload: Workload) -> tuple[StateArray, ...]:
    """Return the arrays that live through a step: parameters first, then the optimizer's."""
    plain = dataclasses.replace(workload.compute, attention_kernel="xla", remat="none")
    return _state_arrays(workload.model, plain, workload.optimizer)


@functools.lru_cache(maxsize=64)
def _state_arrays(
    config: TransformerConfig, compute: ComputeConfig, optimizer: OptimizerConfig
) -> tuple[StateArray, ...]:
    model = Transformer(config, compute)
    axes = logical_axes(model)
    made = make_optimizer(optimizer, axes, width_ratio=config.width_ratio)
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])  # what cuts what is the same on all
    state = abstract_state(model, made, mesh, ema=optimizer.ema_decay is not None)
    names = dict(jax.tree_util.tree_leaves_with_path(axes, is_leaf=lambda x: isinstance(x, tuple)))
    found = []
    for part in (state.params, (state.opt_state, state.ema_params)):
        for path, x in jax.tree_util.tree_leaves_with_path(part):
            spec = (*x.sharding.spec, *(None,) * (x.ndim - len(x.sharding.spec)))
            cuts = tuple(() if a is None else a if isinstance(a, tuple) else (a,) for a in spec)
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            logical = names[path] if part is state.params else ()
            found.append(StateArray(name, x.shape, x.dtype.itemsize, cuts, logical))
    return tuple(found)


def param_arrays(workload: Workload) -> tuple[StateArray, ...]:
    """Return the parameters alone."""
    return tuple(array for array in state_arrays(workload) if array.names)


def batch_parts(sizes: Sizes) -> int:
    """Return over how many devices the sequences of a batch are split."""
    return math.prod(sizes[axis] for axis in RULES["activation_batch"] if axis != "pipeline")


def mesh_sizes(mesh: MeshConfig, num_devices: int) -> dict[str, int]:
    """Return the sizes of a mesh of so many devices by the axes' names."""
    return dict(zip(MESH_AXES, mesh.sizes(num_devices), strict=True))


# Both trace the model, and a search asks for thousands of plans of one.
cached_flops = functools.lru_cache(maxsize=64)(count_flops)
cached_training_flops = functools.lru_cache(maxsize=64)(training_flops_per_token)


@functools.lru_cache(maxsize=256)
def kept_bytes_a_sequence(
    config: TransformerConfig, compute: ComputeConfig, length_tokens: int
) -> int:
    """Return the activations that differentiation keeps of one sequence, traced as for a TPU.

    A GPU's fused attention, which cannot be traced without cuDNN, keeps the same: queries, keys,
    values, outputs, and a number a row.
    """
    device = AbstractDevice(device_kind="TPU v5", num_cores=1, platform="tpu")
    mesh = AbstractMesh(
        (1,) * len(MESH_AXES),
        MESH_AXES,
        axis_types=(AxisType.Auto,) * len(MESH_AXES),
        abstract_device=device,
    )
    if compute.attention_kernel == "cudnn":
        compute = dataclasses.replace(compute, attention_kernel="auto")
    with jax.sharding.use_abstract_mesh(mesh):
        return count_activation_bytes(
            config, compute, batch_sequences=1, length_tokens=length_tokens
        )
