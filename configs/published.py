"""What the published recipes share: web text, AdamW with cosine decay, bfloat16."""

from ml_collections import ConfigDict

from configs.dataclass_config import to_config_dict
from configs.schema import PretrainConfig
from llm.data.config import SourceConfig
from llm.models.config import ComputeConfig
from llm.models.presets import PRESETS


def published(
    preset: str, *, total_tokens: int, batch_sequences: int, learning_rate: float, dataset: str
) -> ConfigDict:
    """Return the recipe of a published shape on a Hugging Face data set, "owner/name:config"."""
    model = PRESETS[preset]
    config = to_config_dict(PretrainConfig(total_tokens=total_tokens))
    config.model = to_config_dict(model)
    config.compute = to_config_dict(ComputeConfig(dtype="bfloat16", unroll_layers=False))
    config.data.sources = {
        "web": to_config_dict(
            SourceConfig(kind="huggingface", name=dataset, validation_fraction=0.001)
        )
    }
    config.data.length_tokens = model.max_length_tokens
    config.data.batch_sequences = batch_sequences
    config.data.tokenizer.kind = "gpt2"
    config.data.tokenizer.vocab_size = model.vocab_size
    config.data.num_workers = 8
    config.optimizer.learning_rate = learning_rate
    config.run.save_every_steps = 1000
    return config
