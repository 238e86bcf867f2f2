"""Five phenomena at small sizes, for 2 CPU cores.

python -m experiments.emergence --workdir=runs/emergence
"""

import dataclasses

from configs.dataclass_config import to_config_dict
from configs.schema import EmergenceConfig
from llm.models.config import TransformerConfig
from llm.models.presets import from_depth
from llm.scaling.emergence_config import (
    AdditionConfig,
    FewShotConfig,
    GrokkingConfig,
    InductionConfig,
    ParityConfig,
)
from llm.training.config import OptimizerConfig, ScheduleConfig


def get_config(arg=None):
    """Return all five; with an argument, "grokking", "addition", …, that one alone."""
    sections = {
        "grokking": grokking(modulus=59, train_fraction=0.45, total_steps=700, seeds=(0, 1, 2)),
        "addition": addition(),
        "induction": induction(),
        "parity": parity(),
        "few_shot": few_shot(),
    }
    return to_config_dict(EmergenceConfig(**chosen(sections, arg)))


def chosen(sections: dict, arg: str | None) -> dict:
    """Return the section that was asked for, or all."""
    if arg is not None and arg not in sections:
        raise ValueError(f"no phenomenon {arg!r}; they are {', '.join(sections)}")
    return sections if arg is None else {arg: sections[arg]}


def grokking(*, modulus: int, train_fraction: float, total_steps: int, seeds) -> GrokkingConfig:
    return GrokkingConfig(
        modulus=modulus,
        train_fraction=train_fraction,
        total_steps=total_steps,
        seeds=tuple(seeds),
        num_evaluations=100,
        weight_decays=(1.0, 0.0),
        model=TransformerConfig(
            vocab_size=modulus + 1,
            vocab_multiple=1,
            width=128,
            num_layers=1,
            num_heads=4,
            num_kv_heads=4,
            head_dim=32,
            mlp_width=512,
            max_length_tokens=3,
            positions="learned",
            activation="relu",
        ),
        # A larger epsilon than usual and a small clip: once the training loss is nearly 0, Adam
        # throws the weights about ("slingshots", Thilak et al. 2022, arXiv:2206.04817). With these
        # the dips are fewer (RESULTS.md).
        optimizer=OptimizerConfig(learning_rate=3e-3, beta2=0.98, epsilon=1e-5, clip_norm=0.1),
    )


def addition() -> AdditionConfig:
    return AdditionConfig(
        digits=(2, 3),
        num_examples=(500, 1000, 2000),
        num_held_out=500,
        seeds=(0, 1, 2, 3, 4),  # plain runs of one size differ widely
        total_steps=1200,
        num_evaluations=20,
        models={f"w{width}": adder(width, num_layers=2) for width in (32, 64)},
        optimizer=OptimizerConfig(learning_rate=3e-3, beta2=0.98),
        schedule=ScheduleConfig(name="linear", warmup_steps=50, final_fraction=0.0),
    )


def adder(width: int, *, num_layers: int, head_dim: int = 16) -> TransformerConfig:
    """Return a model with learned positions, as Lee et al.'s. (With rotary ones sums of three
    digits were learnt more surely plain than reversed: RESULTS.md.)"""
    model = small(width, num_layers=num_layers, vocab=12, head_dim=head_dim)
    return dataclasses.replace(model, positions="learned")


def induction(
    *, width: int = 64, head_dim: int = 16, vocab: int = 64, length_tokens: int = 64
) -> InductionConfig:
    return InductionConfig(
        vocab_size=vocab,
        length_tokens=length_tokens,
        batch_sequences=16,
        num_held_out=32,
        total_steps=1500,
        models={
            f"{layers} layer{'s' * (layers > 1)}": TransformerConfig(
                vocab_size=vocab,
                vocab_multiple=1,
                width=width,
                num_layers=layers,
                num_heads=width // head_dim,
                num_kv_heads=width // head_dim,
                head_dim=head_dim,
                max_length_tokens=length_tokens,
                activation="none",
            )
            for layers in (1, 2)
        },
        optimizer=OptimizerConfig(learning_rate=1e-3, beta2=0.98, weight_decay=0.01),
        schedule=ScheduleConfig(name="constant", warmup_steps=50),
    )


def parity() -> ParityConfig:
    return ParityConfig(
        num_subtasks=50,
        num_bits=30,
        subset_bits=3,
        batch_rows=2048,
        total_steps=4000,
        widths=(16, 32, 64, 128, 256),
        optimizer=OptimizerConfig(learning_rate=1e-3, beta2=0.999, weight_decay=0.0),
    )


def few_shot() -> FewShotConfig:
    return FewShotConfig(
        word_letters=3,
        shots=(0, 1, 2, 4),
        batch_sequences=32,
        num_held_out=512,
        total_steps=2000,
        num_evaluations=20,
        models={
            f"{layers}x{width}": small(width, num_layers=layers, vocab=28)
            for width, layers in ((16, 1), (32, 1), (32, 2), (48, 2), (64, 2), (96, 2))
        },
        optimizer=OptimizerConfig(learning_rate=2e-3, beta2=0.98),
        schedule=ScheduleConfig(name="linear", warmup_steps=50, final_fraction=0.0),
    )


def small(width: int, *, num_layers: int, vocab: int, head_dim: int = 16) -> TransformerConfig:
    """Return our own kind of model, of that width and depth."""
    model = from_depth(
        1, vocab_size=vocab, max_length_tokens=64, head_dim=head_dim, width_per_layer=width
    )
    return dataclasses.replace(model, num_layers=num_layers, vocab_multiple=1)
