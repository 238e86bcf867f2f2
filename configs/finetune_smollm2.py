"""SmolLM2-135M-Instruct taught to write film reviews on demand, with low-rank factors.

    python -m experiments.finetune --config=configs/finetune_smollm2.py --workdir=runs/smollm2_chat

The weights come with a Python package (98 MB, 4-bit); `--config.source=…` names others.
"""

from configs import finetune_tiny
from configs.dataclass_config import to_config_dict
from configs.schema import FinetuneConfig


def get_config(arg=None):
    config = to_config_dict(FinetuneConfig(source="smollm2", total_epochs=2.0))
    config.data.sources = finetune_tiny.get_config().data.sources
    config.data.length_tokens = 512
    config.data.batch_sequences = 16
    config.adapter.rank = 16
    config.adapter.alpha = 32.0
    config.compute.remat = "dots_with_no_batch"
    config.compute.unroll_layers = False
    config.optimizer.learning_rate = 2e-4
    config.optimizer.weight_decay = 0.0
    config.schedule.warmup_steps = 20
    config.evaluation.every_steps = 50
    config.evaluation.at_start = True
    config.evaluation.max_sequences = 64
    config.evaluation.prompts = (
        "Write a positive review of Frida.",
        "Write a negative review of Frida.",
    )
    config.run.save_every_steps = 50
    return config
