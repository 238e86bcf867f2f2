"""Does a model fit a mesh? What the sizes of its parameters do not tell. Models floor."""

from jax.sharding import Mesh

from llm.models.config import ComputeConfig, TransformerConfig
from llm.parallel.rules import ways


def check_on_mesh(config: TransformerConfig, compute: ComputeConfig, mesh: Mesh) -> None:
    """Raise a ValueError, before anything is read or compiled, unless the model can run there."""
    check_heads(
        config.num_heads,
        ways(mesh, "activation_whole_row_heads"),
        ways(mesh, "activation_length"),
    )
    check_stages(config.num_cycles, ways(mesh, "layers"), compute)


def check_heads(num_heads: int, devices: int, stretches: int) -> None:
    """Raise a ValueError unless the devices of a row, cut into stretches, can share the heads."""
    if stretches > 1 and num_heads % devices:
        raise ValueError(
            f"mesh.tensor × mesh.context = {devices} devices cannot share the {num_heads} heads of "
            "a row; choose axes whose product divides them"
        )


def check_stages(num_cycles: int, stages: int, compute: ComputeConfig) -> None:
    """Raise a ValueError unless the cycles of layers, and the microbatches, are enough for them."""
    repeats, microbatches = compute.pipeline_repeats, compute.pipeline_microbatches
    if stages > 1 and num_cycles % (stages * repeats):
        raise ValueError(
            f"mesh.pipeline={stages} × compute.pipeline_repeats={repeats} do not divide the "
            f"model's {num_cycles} repetitions of model.cycle_layers"
        )
    if stages > 1 and microbatches is not None and microbatches % stages:
        raise ValueError(
            f"compute.pipeline_microbatches={microbatches} must be a multiple of mesh.pipeline="
            f"{stages}: fewer would leave stages waiting, and each stage keeps as many"
        )


def num_microbatches(batch: int, devices: int, stages: int, asked: int | None) -> int:
    """Return into how many microbatches a pipeline cuts a batch: as asked, or two a stage, or one.

    `devices` are those among which the rows of each are shared. Raises a ValueError where the batch
    does not divide.
    """
    for number in (2 * stages, stages) if asked is None else (asked,):
        if batch % (number * devices) == 0:
            return number
    raise ValueError(
        f"a batch of {batch} sequences does not divide into {number} microbatches "
        f"(compute.pipeline_microbatches={asked}) over {devices} devices each; choose another "
        "batch, number or mesh"
    )
