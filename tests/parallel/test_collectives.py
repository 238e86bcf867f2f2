"""What a program moves and multiplies, read from what XLA compiled, is what arithmetic says."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llm.parallel.collectives import bytes_by_axes, read_collectives, replica_groups
from llm.parallel.products import count_product_flops, kernel_calls

ROWS, WIDTH, TURNS, INNER = 256, 512, 5, 3
SHARD = ROWS * WIDTH * 4  # bytes
ALL = PartitionSpec(("data", "fsdp"))


@pytest.fixture(scope="module", params=["cpu", "tpu"])
def mesh(request):
    """Eight devices, 2 × 4: fake ones of this machine, or of a TPU that is not here."""
    if request.param == "cpu":
        devices = jax.devices()[:8]
    else:
        if importlib.util.find_spec("libtpu") is None:
            pytest.skip("libtpu is not installed")
        from llm.training.ahead import topology_devices

        devices = topology_devices("v5e:2x4")
    return Mesh(np.asarray(devices).reshape(2, 4), ("data", "fsdp"))


def compile_for(mesh, fn, *shapes, out=ALL):
    """Compile a program of one device for all of them, its inputs split by rows."""
    mapped = jax.shard_map(fn, mesh=mesh, in_specs=ALL, out_specs=out, check_vma=False)
    rows = NamedSharding(mesh, ALL)
    given = [jax.ShapeDtypeStruct((8 * n, m), jnp.float32, sharding=rows) for n, m in shapes]
    with jax.set_mesh(mesh):
        return jax.jit(mapped).lower(*given).compile()


def test_every_kind_counts_its_bytes_and_turns(mesh):
    ring = [(i, (i + 1) % 4) for i in range(4)]

    def turn(_, x):
        x = lax.fori_loop(0, INNER, lambda _, x: jnp.sin(lax.ppermute(x, "fsdp", ring)), x)
        whole = jnp.sin(lax.all_gather(x, "fsdp", tiled=True))
        part = jnp.sin(lax.psum_scatter(whole, "fsdp", tiled=True))
        turned = jnp.sin(lax.all_to_all(part, "fsdp", 1, 0, tiled=True))
        return jnp.sin(lax.psum(turned.reshape(ROWS, WIDTH), "data"))

    compiled = compile_for(mesh, lambda x: lax.fori_loop(0, TURNS, turn, x), (ROWS, WIDTH))
    found = {c.kind: c for c in read_collectives(compiled, mesh)}
    assert {kind: (c.axes, c.count, c.bytes_a_device) for kind, c in found.items()} == {
        "collective-permute": (("fsdp",), TURNS * INNER, SHARD),
        "all-gather": (("fsdp",), TURNS, 3 * SHARD),
        "reduce-scatter": (("fsdp",), TURNS, 3 * SHARD),
        "all-to-all": (("fsdp",), TURNS, 3 * SHARD // 4),
        "all-reduce": (("data",), TURNS, SHARD),
    }
    assert bytes_by_axes(list(found.values())) == {
        ("fsdp",): TURNS * SHARD * (INNER + 3 + 3 + 0.75),
        ("data",): TURNS * SHARD,
    }


def test_a_counter_may_go_by_more_than_one(mesh):
    """From 1 below 10 by threes: three turns. So go products that a TPU runs in windows."""

    def turn(carry):
        count, x = carry
        return count + 3, jnp.sin(lax.psum(x, "data"))

    def fn(x):
        return lax.while_loop(lambda carry: carry[0] < 10, turn, (1, x))[1]

    (found,) = read_collectives(compile_for(mesh, fn, (ROWS, WIDTH)), mesh)
    assert (found.count, found.total_bytes) == (3, 3 * SHARD)


def test_collectives_over_several_axes_and_over_all(mesh):
    def fn(x):
        return lax.psum(x, ("data", "fsdp")), lax.all_gather(x, ("data", "fsdp"), tiled=True)

    found = read_collectives(
        compile_for(mesh, fn, (8, 128), out=(PartitionSpec(), PartitionSpec())), mesh
    )
    sent = {(c.kind, c.axes): c.total_bytes for c in found}
    assert sent == {
        ("all-reduce", ("data", "fsdp")): 2 * 7 * 8 * 128 * 4 // 8,
        ("all-gather", ("data", "fsdp")): 7 * 8 * 128 * 4,
    }


def test_collectives_that_the_compiler_adds(mesh):
    """A product with a kernel split over fsdp, in a scan over layers: gathered at each use."""
    layers, width = 3, 1024

    def forward(kernels, x):
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, kernels)[0]

    kernels = jax.ShapeDtypeStruct(
        (layers, width, width),
        jnp.bfloat16,
        sharding=NamedSharding(mesh, PartitionSpec(None, "fsdp")),
    )
    x = jax.ShapeDtypeStruct((1024, width), jnp.bfloat16, sharding=NamedSharding(mesh, ALL))
    out = NamedSharding(mesh, ALL)
    with jax.set_mesh(mesh):
        compiled = jax.jit(forward, out_shardings=out).lower(kernels, x).compile()
    if mesh.devices.flat[0].platform == "tpu":  # a CPU multiplies, and so gathers, in float32
        gathered = layers * 3 * (width // 4) * width * 2
        assert bytes_by_axes(read_collectives(compiled, mesh)) == {("fsdp",): gathered}
    assert count_product_flops(compiled) == 2 * layers * (1024 // 8) * width**2


def test_gradients_of_a_loop_count_as_their_products(mesh):
    layers, width = 4, 256

    def loss(kernels, x):
        def layer(x, w):
            return jnp.tanh(jnp.einsum("btd,df->btf", x, w)), None

        return jnp.sum(lax.scan(layer, x, kernels)[0])

    shapes = [jax.ShapeDtypeStruct((layers, width, width), jnp.float32)]
    shapes.append(jax.ShapeDtypeStruct((2, 64, width), jnp.float32))
    placed = [
        jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=NamedSharding(mesh, PartitionSpec()))
        for s in shapes
    ]
    compiled = jax.jit(jax.grad(loss)).lower(*placed).compile()
    # forward, and towards kernels and inputs; of the lowest layer's input there is no gradient,
    # but a loop computes it
    assert count_product_flops(compiled) == 3 * layers * 2 * 2 * 64 * width**2
    assert kernel_calls(compiled) == {}


def test_a_loop_without_a_fixed_number_of_turns_is_told(mesh):
    def fn(x):
        return lax.while_loop(lambda x: jnp.sum(x) < 10, lambda x: x + lax.pmean(x, "data"), x)

    compiled = compile_for(mesh, fn, (8, 128))
    with pytest.raises(ValueError, match="no number of turns"):
        read_collectives(compiled, mesh)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{{0,2},{1,3}}", [[0, 2], [1, 3]]),
        ("[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("[2,4]<=[4,2]T(1,0)", [[0, 2, 4, 6], [1, 3, 5, 7]]),
        ("mesh['a'=2,'b'=2] {'b'}", [[0, 1], [2, 3]]),
        ("mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
        ("mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ("mesh['a'=4,'b'=2] {'a':(1)2,'b'}", [[0, 1, 4, 5], [2, 3, 6, 7]]),
        ("{}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
    ],
)
def test_groups_are_read_in_every_notation(text, expected):
    """The notations' meanings are XLA's: iota then transpose, row-major; axes of a mesh."""
    assert (
        replica_groups(f"replica_groups={text}, use_global_device_ids=true", 8).tolist() == expected
    )
