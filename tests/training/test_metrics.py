"""Logs of numbers: strict JSON, nothing lost, nothing doubled; and the line that a person reads."""

import io
import json
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest

from llm.training.metrics import MetricsWriter, read_metrics, to_float
from llm.training.progress import Progress, Throughput, describe


def strict(text):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def write(workdir, step, sizes, steps):
    writer = MetricsWriter(workdir)
    writer.open(step, sizes)
    for s in steps:
        writer.write(s, {"train/loss": jnp.float32(s + 0.1)})
    sizes = writer.sync()
    writer.close()
    return sizes


def test_one_object_a_line(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.open(0, None)
    writer.write(1, {"train/loss": jnp.float32(2.345), "tokens": np.int64(2**40), "on": True})
    writer.write_texts(1, {"sample": "two\nlines é"})
    writer.close()
    assert (tmp_path / "metrics.jsonl").read_text() == (
        '{"step": 1, "train/loss": 2.345, "tokens": 1099511627776, "on": 1}\n'
    )
    assert strict((tmp_path / "texts.jsonl").read_text()) == [{"step": 1, "sample": "two\nlines é"}]


def test_not_finite_values_are_strings_and_come_back(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.open(0, None)
    writer.write(1, {"a": jnp.nan, "b": jnp.float32(jnp.inf), "c": -np.inf})
    writer.close()
    (row,) = strict((tmp_path / "metrics.jsonl").read_text())
    assert row == {"step": 1, "a": "NaN", "b": "Infinity", "c": "-Infinity"}
    (back,) = read_metrics(tmp_path)
    assert np.isnan(back["a"]) and back["b"] == np.inf and back["c"] == -np.inf


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e-30, 3e38, 16777217.0, -0.0])
def test_float32_digits_give_the_same_bits_back(value):
    written = to_float("x", jnp.float32(value))
    assert np.float32(written).tobytes() == np.float32(value).tobytes()
    assert to_float("x", np.float64(value)) == value
    assert to_float("x", jnp.bfloat16(0.5)) == 0.5


def test_a_metric_is_one_number():
    with pytest.raises(ValueError, match=r"train/loss has shape \(2,\)"):
        to_float("train/loss", jnp.ones(2))


def test_cut_at_the_restored_step(tmp_path):
    write(tmp_path, 0, None, [1, 2, 3, 4])
    write(tmp_path, 2, {}, [3])
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]


def test_cut_at_the_size_at_the_save(tmp_path):
    """Lines of the saved step that came after the save will come again."""
    sizes = write(tmp_path, 0, None, [1, 2])
    write(tmp_path, 2, sizes, [2, 3])
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 2, 3]
    write(tmp_path, 2, sizes, [3])
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]


def test_without_a_checkpoint_logs_begin_anew(tmp_path):
    write(tmp_path, 0, None, [0, 1])
    write(tmp_path, 0, None, [0])
    assert [row["step"] for row in read_metrics(tmp_path)] == [0]


def test_a_torn_last_line_is_cut(tmp_path):
    write(tmp_path, 0, None, [1, 2])
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + b'{"step": 3, "train/lo\xff')
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]
    write(tmp_path, 3, {}, [3])
    assert [row["step"] for row in strict(path.read_text())] == [1, 2, 3]


def test_tensorboard_purges_what_is_written_again(tmp_path):
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    write(tmp_path, 0, None, [1, 2, 3])
    write(tmp_path, 2, {}, [3])
    events = []
    for path in sorted((tmp_path / "tensorboard").iterdir()):
        content, position = path.read_bytes(), 0
        while position < len(content):  # a TFRecord: length, its CRC, data, its CRC
            length = int.from_bytes(content[position : position + 8], "little")
            events.append(Event.FromString(content[position + 12 : position + 12 + length]))
            position += length + 16
    scalars = [
        (e.step, round(e.summary.value[0].simple_value, 3)) for e in events if e.summary.value
    ]
    assert scalars == [(1, 1.1), (2, 2.1), (3, 3.1), (3, 3.1)]
    starts = [e.step for e in events if e.session_log.status == SessionLog.START]
    assert starts == [3]  # TensorBoard hides steps from here on that came before


def test_wandb_is_asked_only_when_wanted(tmp_path, monkeypatch):
    calls = []
    fake = types.ModuleType("wandb")
    fake.init = lambda **options: (
        calls.append(options)
        or types.SimpleNamespace(
            log=lambda values, step: calls.append((step, values)),
            finish=lambda: calls.append("end"),
        )
    )
    for _ in range(2):
        monkeypatch.setitem(sys.modules, "wandb", fake)
        writer = MetricsWriter(tmp_path, wandb_project="lm")
        writer.open(0, None, {"seed": 1})
        writer.write(1, {"a": 2.0})
        writer.close()
    first, logged, end, second, *_ = calls
    assert first == second and first["project"] == "lm" and first["config"] == {"seed": 1}
    assert logged == (1, {"a": 2.0}) and end == "end"
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match="needs the package wandb"):
        MetricsWriter(tmp_path, wandb_project="lm").open(0, None)


def test_describe():
    assert describe(3.2144, 725, 1.0, 18300, 0.412) == (
        "loss 3.214  18.3k tokens/s  MFU 41.2%  0:12:05 left"
    )
    assert describe(None, 7200, 1.5, 2_000_000 / 1.5, None) == "1.33M tokens/s  3:00:00 left"
    assert describe(0.5, 1, None, 1, None) == "loss 0.5"


def test_plain_lines_at_intervals_and_at_the_end():
    stream = io.StringIO()
    progress = Progress(100, stream=stream, interval_seconds=1000)
    progress.start(0)
    for step in range(1, 101):
        progress.update(step, 2.0)
    progress.close()
    assert stream.getvalue() == "step 1/100  loss 2\nstep 100/100  loss 2\n"


def test_a_live_line_on_a_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    stream = Terminal()
    progress = Progress(100, stream=stream)
    progress.start(40)
    progress.update(50, 1.5, seconds_per_step=0.1, tokens_per_second=1000)
    progress.say("a [bracket] stays")
    progress.close()
    shown = stream.getvalue()
    assert "step 50/100" in shown and "1k tokens/s" in shown and "a [bracket] stays" in shown


def test_throughput_leaves_out_what_is_no_training(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("llm.training.progress.time.perf_counter", lambda: now[0])
    throughput = Throughput()

    def step(seconds):
        now[0] += seconds
        throughput.tick()

    assert throughput.end_interval() is None
    step(60.0)  # compilation
    step(1.0)
    step(3.0)
    throughput.skip()
    step(50.0)  # an evaluation
    step(2.0)
    assert throughput.end_interval() == 2.0
    assert throughput.end_interval() is None and throughput.seconds_per_step == 2.0
