"""Scaling curves of 77M to 3.4B parameters on a TPU slice of 64 chips (v5p-128).

    python -m experiments.scaling --config=configs/scaling_tpu.py --workdir=gs://BUCKET/scaling

Each run spreads over the whole slice (fsdp). Compiled for v5p:4x4x4 without one
(experiments.plan; benchmarks/RESULTS.md has the memory); not run.
"""

from configs.dataclass_config import to_config_dict
from configs.scaling_gpu import MUON, web_text
from configs.schema import ScalingConfig
from llm.models.config import ComputeConfig
from llm.parallel.config import MeshConfig
from llm.scaling.config import LadderConfig
from llm.training.config import ScheduleConfig


def get_config(arg=None):
    ladder = LadderConfig(
        depths=(8, 12, 16, 20, 24, 32, 40),
        flops=(3e18, 1e19, 3e19, 1e20, 3e20),
        tokens_per_param_between=(3.0, 300.0),
        learning_rates=(0.02,),
        optimizer=MUON,
        schedule=ScheduleConfig(name="linear", warmup_steps=100, final_fraction=0.0),
    )
    config = to_config_dict(ScalingConfig(ladders={"isoflop": ladder}))
    config.compute = to_config_dict(
        ComputeConfig(dtype="bfloat16", remat="attention", unroll_layers=False)
    )
    config.mesh = to_config_dict(MeshConfig(data=1, fsdp=-1))
    config.data.tokenizer.kind = "gpt2"
    config.data.tokenizer.vocab_size = 50257
    web_text(config, length_tokens=2048, batch_sequences=512)
    return config
