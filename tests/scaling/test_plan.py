"""Plans held against what compilers said, what others published, and closed forms."""

import dataclasses
import functools
import pathlib
import sys

import pytest
import scipy.stats

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import maxtext

from benchmarks.plans import (
    ROWS,
    compiled_table,
    make_row,
    plans_table,
    read_compiled,
    recipe_config,
    weak_scaling_table,
)
from llm.models.config import ComputeConfig, TransformerConfig
from llm.parallel.config import MESH_AXES, MeshConfig
from llm.scaling.hardware import parse_slice
from llm.scaling.plan import make_plan
from llm.scaling.traffic import count_traffic
from llm.scaling.work import count_work
from llm.scaling.workload import Workload, mesh_sizes
from llm.training.config import OptimizerConfig

HOUSE = pathlib.Path(__file__).resolve().parents[2]
COMPILED = read_compiled(HOUSE / "benchmarks" / "plans.jsonl")
B, T = 16, 512
SMALL = Workload(
    TransformerConfig(
        vocab_size=1024,
        width=256,
        num_layers=6,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        mlp_width=1024,
        max_length_tokens=T,
    ),
    ComputeConfig(dtype="bfloat16", unroll_layers=False),
    OptimizerConfig(),
    batch_sequences=B,
    length_tokens=T,
    loss_tile_tokens=B * T,
)


def sizes(**given):
    return {axis: given.get(axis, 1) for axis in MESH_AXES}


def changed(**fields):
    compute = dataclasses.replace(SMALL.compute, remat=fields.pop("remat", "none"))
    return dataclasses.replace(SMALL, compute=compute, **fields)


# ----------------------------------------------------------------------------- compilers


def row_id(key):
    return f"{key[0][8:]} {key[1]} {key[2][:24]}"


QUICK = ("depth.py:16", "mesh.pipeline", "gpt3", "mixtral", "moe_1t")  # the others: -m long
ROWS_COMPILED = [
    pytest.param(
        key,
        marks=() if any(q in " ".join(key) for q in QUICK) else pytest.mark.long,
        id=row_id(key),
    )
    for key in COMPILED
]


@functools.cache
def row_of(*key):
    return make_row(*key, COMPILED.get(key), compile_it=False)


@pytest.mark.parametrize("key", ROWS_COMPILED)
def test_predictions_agree_with_the_compiler(key):
    """The rows of benchmarks/plans.py, as libtpu 0.0.42 compiled them."""
    row, said = row_of(*key), COMPILED[key]
    assert row["memory_gb"]["total"] == pytest.approx(said["memory_gb"]["total"], rel=0.1)
    expected = row["flops_a_step"]["outside_of_kernels"]
    assert said["product_flops"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("key", ROWS_COMPILED)
def test_traffic_is_what_the_compiled_step_sends(key):
    """Within 0.1% along tensor, which has nothing else. Of all axes together, since sums over
    several at once are of none alone, at least 95% of what the forms say; at most that and once
    more what goes along fsdp, where the compiler may sum whole what it could gather or scatter.

    The exchange of experts without a capacity is left out: compiled it counts as if its buffers,
    with room for all, were full."""
    predicted = row_of(*key)["network_gb"]
    sent = dict(COMPILED[key]["network_gb"])
    if "tensor" in predicted:
        assert sent["tensor"] == pytest.approx(predicted["tensor"], rel=1e-3)
    model = recipe_config(key[0], key[2]).model
    if model.moe_layers and model.expert_capacity_factor is None:
        sent["expert"] = predicted["expert"]
    least, most = sum(predicted.values()), sum(predicted.values()) + predicted.get("fsdp", 0.0)
    assert 0.95 * least <= sum(sent.values()) <= max(most, 1.05 * least)


def test_the_table_has_enough_compiled_rows():
    assert len(COMPILED) >= 12
    assert set(COMPILED) <= set(ROWS)


def test_the_tables_are_written():
    rows = [row_of(*key) for key in list(COMPILED)[:2]]
    assert len(plans_table(rows).splitlines()) == len(compiled_table(rows).splitlines()) == 4
    assert len(weak_scaling_table().splitlines()) == 8


# ----------------------------------------------------------------------------- published


@pytest.fixture(scope="module")
def published():
    """(run, bound, prediction) in TFLOP/s a chip, for each of MaxText's forty."""
    found = []
    for run in maxtext.RUNS:
        time = maxtext.plan(run).time
        found.append((run, maxtext.tflops(run, time.bound), maxtext.tflops(run, time.predicted)))
    return found


def test_bounds_lie_above_what_maxtext_reached(published):
    assert len(published) == 40
    for run, bound, predicted in published:
        assert bound > run.tflops and predicted > run.tflops, run


def test_predictions_rank_maxtexts_runs(published):
    """Spearman's rank correlation of predicted with published TFLOP/s a chip."""

    def rank(chips, slices=(1, 2, 4, 8, 16, 32)):
        rows = [row for row in published if row[0].chip in chips and row[0].slices in slices]
        return scipy.stats.spearmanr([r[2] for r in rows], [r[0].tflops for r in rows])[0]

    assert rank(("v5e", "v5p")) > 0.9
    assert rank(("v5e",)) > 0.7
    assert rank(("v5p",)) > 0.8
    assert rank(("v5p",), slices=(1,)) > 0.9


def test_more_slices_are_never_faster(published):
    """As published: a chip gives less, the more slices the network joins."""
    for run, _, predicted in published:
        alone = next(p for r, _, p in published if r[:3] == run[:3] and r.slices == 1)
        assert predicted <= alone


# -------------------------------------------------------------------------- closed forms


def test_sums_of_tensor_parallelism_by_hand():
    """Megatron's four sums of the stream a layer (Shoeybi et al. 2019, arXiv:1909.08053, figure 4),
    the embedding's, twice as wide, and the head's."""
    stream = B * T // 4 * 256 * 2
    sums = 6 * 4 + 2 + 1
    assert count_traffic(SMALL, sizes(fsdp=4, tensor=2))["tensor"] == sums * stream * 2 / 2
    again = count_traffic(changed(remat="full"), sizes(fsdp=4, tensor=2))["tensor"]
    assert again == (sums + 6) * stream  # recomputed up to the layer's last product


def test_gathers_and_scatters_by_hand():
    """Twice gathered, once scattered, bfloat16 (Rajbhandari et al. 2020, arXiv:1910.02054,
    section 7); the head gathered once, its gradient scattered; the table's summed in float32."""
    matrices = 6 * (2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 1024)
    table, norms = 256 * 1024, (6 * 2 + 1) * 256
    expected = ((3 * matrices + 2 * table) * 2 + (2 + 2 * 4) * table + 2 * 2 * norms) * 3 / 4
    assert count_traffic(SMALL, sizes(fsdp=4))["fsdp"] == expected
    twice = changed(accumulate_steps=2)
    assert count_traffic(twice, sizes(fsdp=4))["fsdp"] == 2 * expected - 2 * table * 3 / 4
    tiles = changed(loss_tile_tokens=B * T // 4 // 2)  # a device's: two tiles, each scatters
    assert count_traffic(tiles, sizes(fsdp=4))["fsdp"] == expected + 2 * table * 3 / 4


def test_gradients_of_replicas_are_summed():
    """A ring's all-reduce sends 2·(n − 1)/n of what it sums: tables in float32, and the head where
    it is taken in several tiles."""
    layers = 6 * (2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 1024 + 2 * 256) + 256
    sent = count_traffic(SMALL, sizes(data=4))
    assert sent == {"data": (2 * layers + (4 + 2) * 256 * 1024) * 2 * 3 / 4}
    tiles = count_traffic(changed(loss_tile_tokens=B * T // 8), sizes(data=4))
    assert tiles == {"data": (2 * layers + (4 + 4) * 256 * 1024) * 2 * 3 / 4}


def test_exchanges_of_context_parallelism_by_hand():
    """Queries, keys and values there, outputs back, and so their gradients (Jacobs et al. 2023,
    arXiv:2309.14509, section 3.2): (c − 1)/c of them leave the device each time."""
    tokens, heads = B * T // 2, (2 * 4 + 2 * 2) * 64
    sent = count_traffic(SMALL, sizes(context=2))["context"]
    grads = count_traffic(SMALL, sizes(data=2))["data"]  # as replicas': all hold all parameters
    assert sent - grads == 6 * 2 * tokens * heads * 2 / 2


def test_bubble_of_a_circular_pipeline():
    """Narayanan et al. 2021, arXiv:2104.04473, section 2.2: (p − 1)/m of the work, and by v
    stretches a stage v times less; 2·p microbatches, or p, where nothing says how many."""
    few = dataclasses.replace(SMALL, batch_sequences=6)  # which do not divide by twelve
    assert few.turns(sizes(pipeline=6)) == pytest.approx(1 + 5 / 6)
    assert SMALL.turns(sizes(pipeline=2)) == 1 + 1 / 4
    assert SMALL.turns(sizes()) == 1
    circular = dataclasses.replace(SMALL.compute, pipeline_repeats=3)
    assert dataclasses.replace(SMALL, compute=circular).turns(sizes(pipeline=2)) == 1 + 1 / 12
    times = [make_plan(SMALL, mesh, parse_slice("v5e:2x1")).time for mesh in (
        MeshConfig(data=2), MeshConfig(data=1, pipeline=2))]  # fmt: skip
    layers = times[1].compute - times[0].compute
    assert layers == pytest.approx(times[1].idle, rel=0.1)  # all but the head's


def test_hidden_states_of_a_pipeline_by_hand():
    """Four microbatches of two stages take five turns, each with a shift there and back; all go in
    and out, and their gradients; cos and sin of 32 pairs go in."""
    stream = B * T * 256 * 2
    sent = count_traffic(SMALL, sizes(pipeline=2))["pipeline"]
    outside = (4 * 1024 + 2 * 1024 + 2) * 256 * 2 / 2  # gradients of table, head and last norm
    assert sent - outside == 2 * 5 / 4 * stream + (4 * stream + B * T * 64 * 4) / 2


def test_rematerialisation_repeats_all_but_the_last_product():
    matrices = 2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 1024
    none, full = (count_work(w, sizes()) for w in (SMALL, changed(remat="full")))
    assert full.products - none.products == 2 * 6 * (matrices - 1024 * 256) * B * T
    # one block of 512 is the whole square; forward 1, backward 3.5, forward again
    square = 4 * 6 * 4 * 64 * T * B * T
    assert none.attention == 4.5 * square and full.attention == 5.5 * square
    assert none.model == full.model


def test_kernels_leave_out_what_the_mask_hides():
    """Of 16 × 16 blocks of 128 a causal one visits 136, with a window of 256 three a row."""
    long = dataclasses.replace(SMALL, length_tokens=2048, batch_sequences=4)
    square = 4 * 6 * 4 * 64 * 2048 * 4 * 2048
    assert count_work(long, sizes(), "gpu").attention == 3.5 * square * 136 / 256
    assert count_work(long, sizes(), "tpu").attention == 4.5 * square * 10 / 16  # blocks of 512
    local = dataclasses.replace(SMALL.model, cycle_layers=("local",), sliding_window_tokens=256)
    windowed = dataclasses.replace(long, model=local)
    assert count_work(windowed, sizes(), "gpu").attention == 3.5 * square * (1 + 2 + 3 * 14) / 256


def test_a_larger_microbatch_or_less_remat_takes_more_memory():
    where = parse_slice("v5e:2x2")
    total = lambda w: make_plan(w, MeshConfig(data=1, fsdp=4), where).memory.total  # noqa: E731
    assert total(changed(accumulate_steps=4)) < total(SMALL)
    order = [total(changed(remat=r)) for r in ("full", "attention", "dots_with_no_batch", "none")]
    assert order == sorted(order)


# -------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ({"fsdp": 12}, "mesh.fsdp=12 cuts"),
        ({"data": 32}, r"microbatch of 16 sequences .* does not divide over the 32 devices"),
        ({"tensor": 4}, r"num_kv_heads|kernel.* has 2"),
        ({"context": 3}, "data.length_tokens=512"),
        ({"context": 8}, "mesh.tensor × mesh.context = 8 devices cannot share the 4 heads"),
        ({"pipeline": 4}, "mesh.pipeline=4 .* do not divide the model's 6"),
        ({"data": 16, "pipeline": 2}, "16 sequences does not divide into 2 microbatches"),
    ],
)
def test_a_mesh_that_divides_nothing_is_told(mesh, message):
    with pytest.raises(ValueError, match=message):
        SMALL.check(sizes(**mesh))


def test_recipes_of_the_table_load():
    for recipe, slice_name, overrides in ROWS:
        config = recipe_config(recipe, overrides)
        assert mesh_sizes(config.mesh, parse_slice(slice_name).num_chips)
