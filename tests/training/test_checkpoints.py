"""Checkpoints: what is restored is what was saved, and every damage is found and named."""

import json
import shutil
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from etils.epath import backend
from jax.sharding import NamedSharding, PartitionSpec
from toy_loop import toy_state, toy_step

from llm.training import checkpoints, manifests
from llm.training.checkpoints import Checkpointer, CheckpointError
from llm.training.digests import array_digests, tree_digest
from llm.training.loading import load_params, verify
from llm.training.manifests import CorruptStepError, list_steps, read_ledger


def state_at(step: int):
    """A state of which every array depends on the step."""
    return jax.tree.map(lambda x: (x + step).astype(x.dtype), toy_state())


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A workdir with good steps 1 and 2; tests that damage it take a copy."""
    workdir = tmp_path_factory.mktemp("saved")
    checkpointer = Checkpointer(workdir)
    for step in (1, 2):
        checkpointer.save(step, state_at(step), {"tokens": 10 * step, "cursor": step})
    checkpointer.close()
    return workdir


@pytest.fixture
def workdir(saved, tmp_path):
    return epath.Path(shutil.copytree(saved, tmp_path / "workdir"))


def restore(workdir, target=None):
    checkpointer = Checkpointer(workdir)
    try:
        return checkpointer.restore(toy_state() if target is None else target)
    finally:
        checkpointer.close()


def test_restores_the_newest_step_bitwise(workdir):
    state, manifest = restore(workdir)
    assert_same_bits(state, state_at(2))
    assert (manifest["step"], manifest["tokens"], manifest["cursor"]) == (2, 20, 2)
    assert restore(workdir / "fresh") is None


def test_abstract_numpy_and_uncommitted_targets(workdir):
    target = toy_state()
    assert not target.params["kernel"].committed
    assert not restore(workdir).state.params["kernel"].committed
    abstract = jax.eval_shape(toy_state).replace(cursor=np.zeros((), np.uint32))
    state = restore(workdir, abstract).state
    assert_same_bits(state, state_at(2))
    assert isinstance(state.cursor, np.ndarray) and isinstance(state.step, jax.Array)


def test_ledger(workdir):
    first, second = read_ledger(workdir)
    assert (first["step"], first["tokens"], first["cursor"]) == (1, 10, 1)
    assert second["params_digest"] == tree_digest(state_at(2).params)
    assert first["params_digest"] != second["params_digest"]


MESHES = {
    "1 device": ((1,), ("fsdp",), PartitionSpec()),
    "8 by rows": ((8,), ("fsdp",), PartitionSpec("fsdp")),
    "2 × 4 by both": ((2, 4), ("fsdp", "tensor"), PartitionSpec("fsdp", "tensor")),
    "8 replicated": ((8,), ("data",), PartitionSpec()),
}


def test_restores_on_every_mesh_from_every_mesh(tmp_path):
    def on(name):
        shape, axes, spec = MESHES[name]
        mesh = jax.make_mesh(shape, axes, devices=jax.devices()[: np.prod(shape)])

        def place(x):
            divisible = x.shape == (16, 24)
            return jax.device_put(x, NamedSharding(mesh, spec if divisible else PartitionSpec()))

        return jax.tree.map(place, state_at(5))

    digests = set()
    for saved_on in MESHES:
        workdir = tmp_path / saved_on
        checkpointer = Checkpointer(workdir)
        checkpointer.save(5, on(saved_on))
        checkpointer.close()
        digests.add(read_ledger(workdir)[0]["state_digest"])
        for restored_on in MESHES:
            target = on(restored_on)
            state = restore(workdir, target).state
            assert_same_bits(state, state_at(5))
            assert state.params["kernel"].sharding == target.params["kernel"].sharding
    assert len(digests) == 1


def test_a_donated_state_is_saved_as_it_was(tmp_path):
    state = toy_state(width=4096)
    expected = array_digests(state)
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(1, state)
    for i in range(5):  # overwrites the buffers while the save goes on
        state, _ = toy_step(state, {"x": jnp.ones(4), "cursor": np.uint32(i)})
    checkpointer.close()
    assert array_digests(restore(tmp_path, toy_state(width=4096)).state) == expected


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def zero(path):
    path.write_bytes(bytes(path.stat().st_size))


def empty(path):
    path.write_bytes(b"")


def remove(path):
    path.unlink()


@pytest.mark.parametrize("damage", [flip, truncate, zero, empty, remove])
def test_damage_to_each_file_in_turn_is_found(saved, tmp_path, damage, caplog):
    step_dir = saved / "checkpoints" / "2"
    names = sorted(str(p.relative_to(step_dir)) for p in step_dir.rglob("*") if p.is_file())
    assert "MANIFEST.json" in names and len(names) > 8
    for number, name in enumerate(names):
        workdir = shutil.copytree(saved, tmp_path / str(number))
        damage(workdir / "checkpoints" / "2" / name)
        caplog.clear()
        state, manifest = restore(workdir)
        assert manifest["step"] == 1, name
        assert_same_bits(state, state_at(1))
        assert "checkpoints/2 is corrupt" in caplog.text and name in caplog.text
        assert (workdir / "checkpoints" / "corrupt-2").exists()
        assert list_steps(workdir) == [1]


def test_every_byte_of_a_manifest_counts(workdir):
    path = workdir / "checkpoints" / "2" / "MANIFEST.json"
    good = path.read_bytes()
    for position in range(0, len(good), 7):
        for bit in (0, 5):
            content = bytearray(good)
            content[position] ^= 1 << bit
            path.write_bytes(content)
            with pytest.raises(CorruptStepError):
                manifests.read_manifest(path.parent)


def test_arrays_are_checked_apart_from_files(workdir, caplog):
    """Files as they were hashed, yet not the arrays that were given to the save."""
    step_dir = workdir / "checkpoints" / "2"
    manifest = manifests.read_manifest(step_dir)
    manifest["arrays"]["params/kernel"]["digest"] = "0" * 16
    manifests.write_manifest(step_dir, manifest)
    assert restore(workdir).manifest["step"] == 1
    assert "array params/kernel has checksum" in caplog.text


def test_no_good_step_is_an_error_each_time(workdir):
    for step in (1, 2):
        flip(workdir / "checkpoints" / str(step) / "_METADATA")
    for _ in range(2):  # never a silent start from step 0
        with pytest.raises(CheckpointError, match=r"names steps \[1, 2\] but none"):
            restore(workdir)
    assert (workdir / "checkpoints" / "corrupt-1").exists()


def test_set_aside_twice(workdir):
    flip(workdir / "checkpoints" / "2" / "_METADATA")
    restore(workdir)
    checkpointer = Checkpointer(workdir)
    checkpointer.save(2, state_at(2))
    checkpointer.close()
    flip(workdir / "checkpoints" / "2" / "_METADATA")
    restore(workdir)
    assert (workdir / "checkpoints" / "corrupt-2").exists()
    assert (workdir / "checkpoints" / "corrupt-2-2").exists()


def test_what_a_killed_save_leaves_is_removed(workdir, caplog):
    directory = workdir / "checkpoints"
    shutil.copytree(directory / "2", directory / "3")
    (directory / "3" / "MANIFEST.json").unlink()  # killed before the manifest
    shutil.copytree(directory / "2", directory / "4.orbax-checkpoint-tmp-123")
    shutil.copytree(directory / "2", directory / "deleted-0")
    assert restore(workdir).manifest["step"] == 2
    assert sorted(path.name for path in directory.iterdir()) == ["1", "2"]
    assert "3: the run ended while saving it" in caplog.text


def test_a_ledger_line_lost_or_torn_in_a_crash_is_added(workdir):
    ledger = workdir / "checkpoints.jsonl"
    whole = ledger.read_text()
    ledger.write_text(whole[:-20])
    restore(workdir)
    assert [row["step"] for row in read_ledger(workdir)] == [1, 2]
    assert json.loads(ledger.read_text().splitlines()[-1]) == json.loads(whole.splitlines()[-1])


def test_another_state_is_refused_and_not_called_corrupt(workdir):
    target = toy_state(width=8)
    target = target.replace(ema_params=None, params=target.params | {"bias": jnp.ones(2)})
    with pytest.raises(ValueError) as error:
        restore(workdir, target)
    assert "params/bias is missing from the checkpoint" in str(error.value)
    assert "ema_params/kernel is only in the checkpoint" in str(error.value)
    with pytest.raises(ValueError, match=r"float32\(16, 24\) there but float32\(8, 24\) here"):
        restore(workdir, toy_state(width=8))
    assert list_steps(workdir) == [1, 2]


def test_retention(tmp_path):
    checkpointer = Checkpointer(tmp_path, keep_newest=2, keep_every_steps=3)
    for step in range(1, 8):
        checkpointer.save(step, {"params": {"x": jnp.full(3, step)}})
        checkpointer.wait()
        assert step in list_steps(tmp_path)
    checkpointer.close()
    assert list_steps(tmp_path) == [3, 6, 7]
    assert [row["step"] for row in read_ledger(tmp_path)] == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize(
    ("owner", "name", "goes_on_from"),
    [(manifests, "hash_files", 1), (manifests, "write_manifest", 1),
     (checkpoints, "append_json_line", 2), (backend._OsPathBackend, "rename", 2),
     (backend._OsPathBackend, "rmtree", 2)],
)  # fmt: skip
def test_retention_that_breaks_off_leaves_a_good_step(
    tmp_path, monkeypatch, owner, name, goes_on_from
):
    """With one step kept, whichever operation between two saves is the last, one is whole."""
    checkpointer = Checkpointer(tmp_path, keep_newest=1)
    checkpointer.save(1, state_at(1))
    checkpointer.wait()
    broken = threading.Event()

    def stop(*args, **kwargs):
        broken.set()
        raise KeyboardInterrupt("the machine goes off here")

    with monkeypatch.context() as patch:
        real = getattr(owner, name)
        # Orbax renames and removes too, before: only what concerns the older step breaks off.
        patch.setattr(
            owner, name, lambda *a, **k: stop() if broken_here(name, a) else real(*a, **k)
        )
        checkpointer.save(2, state_at(2))
        assert broken.wait(30)
        checkpointer._saving.exception()
    assert restore(tmp_path).manifest["step"] == goes_on_from
    assert all(not report.problems for report in verify(tmp_path))
    checkpointer._saving = None
    checkpointer.close()


def broken_here(name, arguments):
    if name in ("rename", "rmtree"):
        return any(str(a).endswith(("checkpoints/1", "deleted-1")) for a in arguments)
    return True


def test_the_last_good_step_outlives_a_failing_save(tmp_path, monkeypatch):
    checkpointer = Checkpointer(tmp_path, keep_newest=1)
    checkpointer.save(1, state_at(1))
    checkpointer.wait()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(manifests, "hash_files", full)
        checkpointer.save(2, state_at(2))
        with pytest.raises(CheckpointError, match="step 2 .*No space left.*good step is 1"):
            checkpointer.wait()
    checkpointer.close()
    assert restore(tmp_path).manifest["step"] == 1


def test_check_raises_a_background_failure_without_waiting(tmp_path, monkeypatch):
    going, failed = threading.Event(), threading.Event()

    def slow(*args, **kwargs):
        going.wait()
        failed.set()
        raise OSError("the disk is gone")

    monkeypatch.setattr(checkpoints.manifests, "hash_files", slow)
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(1, state_at(1))
    checkpointer.check()  # still writing: returns at once
    going.set()
    failed.wait()
    with pytest.raises(CheckpointError, match="the disk is gone"):
        for _ in range(1000):
            checkpointer.check()
            threading.Event().wait(0.01)
    checkpointer.close()


def test_a_held_step_is_not_valid_before_its_commit(tmp_path):
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(1, state_at(1), {"a": 1}, hold=True)
    threading.Event().wait(0.3)
    assert list_steps(tmp_path) == []
    checkpointer.commit({"b": 2})
    checkpointer.close()
    manifest = restore(tmp_path).manifest
    assert (manifest["a"], manifest["b"]) == (1, 2)


def test_load_params(workdir):
    loaded = load_params(workdir)
    assert loaded.step == 2 and loaded.digest == tree_digest(state_at(2).params)
    assert_same_bits(loaded.params, jax.tree.map(np.asarray, state_at(2).params))
    assert isinstance(loaded.params["kernel"], np.ndarray)
    older = load_params(workdir, step=1, ema=True)
    assert_same_bits(older.params, jax.tree.map(np.asarray, state_at(1).ema_params))
    with pytest.raises(FileNotFoundError, match=r"step 7; its steps are \[1, 2\]"):
        load_params(workdir, step=7)


def test_load_a_part_of_the_parameters(workdir):
    layers = load_params(workdir, part="layers")
    assert_same_bits(layers.params, jax.tree.map(np.asarray, state_at(2).params["layers"]))
    assert layers.digest == tree_digest(state_at(2).params["layers"])
    with pytest.raises(ValueError, match="holds no params/policy"):
        load_params(workdir, part="policy")


def test_load_params_on_devices(workdir):
    mesh = jax.make_mesh((8,), ("fsdp",))
    everywhere = NamedSharding(mesh, PartitionSpec())
    by_rows = NamedSharding(mesh, PartitionSpec("fsdp"))
    params = load_params(workdir, shardings=everywhere).params
    assert_same_bits(params, state_at(2).params)
    tree = {"kernel": by_rows, "layers": {"scale": everywhere}}
    params = load_params(workdir, shardings=tree).params
    assert_same_bits(params, state_at(2).params)
    assert params["kernel"].sharding == by_rows
    with pytest.raises(ValueError, match="none for layers/scale"):
        load_params(workdir, shardings={"kernel": by_rows})


def test_load_params_passes_over_a_bad_step_and_touches_nothing(workdir):
    flip(workdir / "checkpoints" / "2" / "_sharding")
    assert load_params(workdir).step == 1
    with pytest.raises(CorruptStepError, match="step 2: "):
        load_params(workdir, step=2)
    assert list_steps(workdir) == [1, 2]


def test_load_params_without_an_average(tmp_path):
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(1, {"params": {"x": jnp.ones(3)}, "step": jnp.int32(1)})
    checkpointer.close()
    with pytest.raises(ValueError, match=r"no ema_params; it holds \['params', 'step'\]"):
        load_params(tmp_path, ema=True)


def test_verify_reports_each_step(workdir):
    good = verify(workdir)
    assert [(r.step, r.problems) for r in good] == [(1, ()), (2, ())]
    assert good[0].num_arrays == len(jax.tree.leaves(toy_state())) and good[0].num_files > 8
    flip(workdir / "checkpoints" / "1" / "_METADATA")
    ledger = workdir / "checkpoints.jsonl"
    ledger.write_text(ledger.read_text().replace('"cursor":2', '"cursor":9'))
    first, second = verify(workdir)
    assert "_METADATA has other bytes" in first.problems[0]
    assert second.problems == ("the ledger says cursor 9, the manifest 2",)
