"""experiments.plan as a user runs it: by formulas in a second, searched, compiled for a TPU."""

import importlib.util
import json
import shlex
import subprocess
import sys

import pytest

from experiments.plan_stages import model_shape
from llm.scaling.accounting import count_flops

SMALL = (
    "--config=configs/pretrain_tiny.py",
    "--config.compute.dtype=bfloat16",
    "--config.compute.unroll_layers=false",
    "--config.optimizer.name=adamw",
    "--config.optimizer.learning_rate=1e-3",
)


def run(*arguments, expect=0):
    command = [sys.executable, "-m", "experiments.plan", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == expect, done.stderr
    return done


def plan(*arguments):
    return json.loads(run(*arguments, "--json").stdout)


def test_a_large_run_is_planned_without_a_tpu():
    price = "--config.run.chip_hour_dollars={'v5p': 4.2}"
    report = plan("--config=configs/gpt3_175b.py", price, "--slice=v5p:8x8x8", "--nocompile")
    params = 174_604_259_328  # Brown et al. 2020, table 2.1, as tests/models/test_presets.py counts
    memory, flops = report["memory_gb"], report["flops_a_step"]
    # float32, and AdamW's two moments; biases and norms are not split over all 512
    assert memory["params"] == pytest.approx(4 * params / 512 / 1e9, rel=0.02)
    assert memory["optimizer"] == pytest.approx(2 * memory["params"], rel=1e-3)
    assert report["fits"] and memory["total"] < memory["limit"]
    # 6·N a token, and the attention of 2,048 positions, seen to half, in 96 layers 12,288 wide
    tokens = 1536 * 2048
    attention = 12 * 96 * 12288 * 1024
    assert flops["model"] == pytest.approx((6 * params + attention) * tokens, rel=0.005)
    # recomputed is all but the last product of a layer, a third of it
    assert 0 < report["mfu_predicted"] <= report["mfu_bound"] < 3 / (3 + 2 / 3)
    days = 300e9 / report["tokens_a_day"]
    assert report["days"] == pytest.approx(days, rel=1e-3)
    assert report["dollars"] == pytest.approx(days * 24 * 512 * 4.2, rel=1e-3)


def test_the_best_of_a_search_can_be_pasted():
    searched = plan(*SMALL, "--slice=v5e:2x2", "--search", "--nocompile")
    pasted = plan(*SMALL, "--slice=v5e:2x2", "--nocompile", *shlex.split(searched["best"]))
    best = searched["candidates"][0]
    assert pasted["seconds"]["predicted"] == best["seconds"]["predicted"]
    assert pasted["mesh"] == best["mesh"] and pasted["memory_gb"] == best["memory_gb"]
    assert searched["tried"] > 20
    assert all(
        c["seconds"]["predicted"] >= best["seconds"]["predicted"] for c in searched["candidates"]
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--slice=v5f:4x4",), "slice 'v5f:4x4': no chip 'v5f'; did you mean v5"),
        (("--slice=v5e:4x4", "--config.mesh.fsdp=3"), "16 devices are not divisible by 3"),
        (("--slice=v5e:16x16",), "microbatch of 16 sequences"),
        ((), "--slice is required"),
    ],
)
def test_a_mistake_is_one_line(arguments, message):
    failed = run(*SMALL, "--nocompile", *arguments, expect=2)
    (line,) = failed.stderr.strip().splitlines()
    assert line.startswith("error: ") and message in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--slice=v5e:2x2",), "config.source: not/here does not exist"),
        (("--slice=v5e:2x2",), "--model=configs/….py names the recipe with its shape"),
        (("--slice=h100:8",), "only recipes of pretraining are planned by formulas"),
        (("--slice=v5e:2x2", "--search"), "without --nocompile and --search"),
        (("--slice=v5e:2x2", "--model=configs/llama3_9b.py"), "did you mean configs/llama3_8b.py"),
    ],
)
def test_a_mistake_of_a_later_stage_is_one_line(arguments, message):
    source = "--config=configs/finetune_tiny.py", "--config.source=not/here"
    failed = run(*source, *arguments, expect=2)
    (line,) = failed.stderr.strip().splitlines()
    assert line.startswith("error: ") and message in line


HAS_LIBTPU = importlib.util.find_spec("libtpu") is not None
needs_libtpu = pytest.mark.skipif(not HAS_LIBTPU, reason="libtpu is not installed")


@pytest.mark.skipif(HAS_LIBTPU, reason="libtpu is installed")
def test_a_missing_libtpu_is_one_line():
    failed = run(*SMALL, "--slice=v5e:2x2", expect=2)
    assert "libtpu must be installed (extra [tpu])" in failed.stderr.strip().splitlines()[-1]


@needs_libtpu
def test_a_step_is_compiled_with_splash_attention():
    """On a slice of four chips that are not here, packed segments and all, backward too."""
    report = plan(*SMALL, "--slice=v5e:2x2", "--config.mesh.fsdp=4", "--config.mesh.data=1")
    said = report["compiled"]
    kernels = {name: count for name, count in said["kernels"].items() if "splash" in name}
    assert sum("fwd" in name for name in kernels) >= 1
    assert {"dq", "dkv"} == {part for part in ("dq", "dkv") for n in kernels if part in n}
    assert all("segmented" in name and count == 2 for name, count in kernels.items())  # two layers
    assert said["product_flops"] == pytest.approx(report["flops_a_step"]["products"], rel=1e-3)
    assert set(said["network_gb"]) == {"fsdp"}
    assert said["memory_gb"]["total"] < report["memory_gb"]["limit"]


@needs_libtpu
@pytest.mark.long
def test_fine_tuning_is_compiled_as_pretraining_of_the_same_is():
    """The same step by another entry point: its FLOPs are those of the pretraining plan's forms."""
    same = SMALL[1:], "--slice=v5e:2x2"
    rows = "--config.data.length_tokens=128", "--config.data.batch_sequences=16"
    pretraining = plan(SMALL[0], *same[0], *rows, same[1], "--nocompile")
    report = plan(
        "--config=configs/finetune_tiny.py", "--model=configs/pretrain_tiny.py", *same[0], *rows,
        same[1],
    )  # fmt: skip
    (update,) = report["programs"]
    assert {"fwd", "dq", "dkv"} <= {
        p for p in ("fwd", "dq", "dkv") for n in update["kernels"] if p in n
    }
    assert update["flops"] == pytest.approx(pretraining["flops_a_step"]["executed"], rel=1e-3)
    assert report["memory_gb"]["parameters"] == pytest.approx(pretraining["memory_gb"]["params"])
    assert report["seconds"] <= pretraining["seconds"]["predicted"]


@needs_libtpu
@pytest.mark.long
def test_a_step_of_policy_gradients_is_sampled_scored_and_learnt():
    report = plan(
        "--config=configs/rlhf_tiny.py", "--model=configs/pretrain_tiny.py", *SMALL[1:],
        "--config.rewards.rule={'kind': 'model', 'path': 'runs/reward'}", "--slice=v5e:2x2",
    )  # fmt: skip
    assert [row["program"] for row in report["programs"]] == ["rollout", "reward rule", "learn"]
    assert report["fits"] and report["days"] == pytest.approx(60 * report["seconds"] / 86400)
    assert report["seconds"] == pytest.approx(
        sum(row["seconds"]["bound"] for row in report["programs"])
    )


DROPLESS = """
from configs import moe_tiny


def get_config(arg=None):
    config = moe_tiny.get_config()
    config.model.expert_capacity_factor = None
    return config
"""


@needs_libtpu
@pytest.mark.long
def test_what_kernels_compute_is_counted_too(tmp_path):
    """Splash and grouped products of a look at 128 positions: all scores, which are one block."""
    (tmp_path / "dropless.py").write_text(DROPLESS)
    model = f"{tmp_path / 'dropless.py'}"
    report = plan(
        "--config=configs/preference_tiny.py", f"--model={model}", "--slice=v5e:1x1",
        "--config.compute.dtype=bfloat16", "--config.compute.unroll_layers=false",
    )  # fmt: skip
    reference, _ = report["programs"]
    assert any("ragged" in name for name in reference["kernels"])
    assert any("mha_fwd" in name for name in reference["kernels"])
    forward = count_flops(model_shape(model), 128, causal_half=False).forward()
    assert reference["flops"] == pytest.approx(16 * 4 * 128 * forward, rel=2e-3)


LADDER = """
from configs.dataclass_config import to_config_dict
from configs.schema import ScalingConfig
from llm.data.config import SourceConfig
from llm.models.config import ComputeConfig
from llm.scaling.config import LadderConfig


def get_config(arg=None):
    ladder = LadderConfig(depths=(1,), tokens=(8192, 16384), learning_rates=(1e-2,))
    config = to_config_dict(ScalingConfig(ladders={"sizes": ladder}))
    config.compute = to_config_dict(ComputeConfig(dtype="bfloat16", unroll_layers=False))
    config.data.sources = {"text": to_config_dict(SourceConfig(paths=("README.md",)))}
    config.data.tokenizer.kind = "bytes"
    config.data.length_tokens, config.data.batch_sequences = 128, 8
    return config
"""


@needs_libtpu
@pytest.mark.long
def test_a_ladder_is_compiled_group_by_group(tmp_path):
    (tmp_path / "ladder.py").write_text(LADDER)
    report = plan(f"--config={tmp_path / 'ladder.py'}", "--slice=v5e:2x2")
    short, long = report["groups"]
    assert (short["runs"], short["fits"]) == (1, True)
    # two lengths of one shape are one program, and twice the time
    assert long["height_gb"] == short["height_gb"] > 0
    assert long["days"] == pytest.approx(2 * short["days"])
