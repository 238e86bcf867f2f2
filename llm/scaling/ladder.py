"""From a ladder's config to the groups of runs that it asks for. Third floor."""

import dataclasses
import itertools
import math

from llm.models.config import TransformerConfig
from llm.models.presets import from_depth
from llm.scaling.accounting import count_flops, num_active_params
from llm.scaling.config import LadderConfig
from llm.training.config import OptimizerConfig, ScheduleConfig
from llm.training.members import Member


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs of one shape and length, which train together."""

    ladder: str
    depth: int
    model: TransformerConfig
    num_steps: int
    tokens_per_step: int
    executed_flops_per_token: float  # of training, attention counted
    budget: float  # what its length was asked by: tokens, FLOPs or tokens a parameter
    unique_tokens: int | None  # asked for; None: all there are
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    members: tuple[Member, ...]

    @property
    def name(self) -> str:
        """The group's directory: unique within a ladder, and readable."""
        unique = "" if self.unique_tokens is None else f"_unique{self.unique_tokens}"
        return f"{self.ladder}/d{self.depth}_{self.num_steps}steps{unique}"

    @property
    def num_tokens(self) -> int:
        """Tokens that each member trains on."""
        return self.num_steps * self.tokens_per_step

    @property
    def flops(self) -> float:
        """Training FLOPs of all members together, 6·N·D each."""
        return 6.0 * num_active_params(self.model) * self.num_tokens * len(self.members)


def make_groups(
    name: str, config: LadderConfig, *, vocab_size: int, length_tokens: int, batch_sequences: int
) -> list[Group]:
    """Return the groups of a ladder, smallest first.

    Raises:
      ValueError: a length is less than the warm-up and one step, two lengths are the same number of
        steps, or a size does not fit its heads.
    """
    tokens_per_step = batch_sequences * length_tokens
    members = tuple(
        Member(learning_rate=rate, weight_decay=decay, init_scale=scale, seed=seed, data_seed=seed)
        for rate, decay, scale, seed in itertools.product(
            config.learning_rates, config.weight_decays, config.init_scales, config.seeds
        )
    )
    groups = []
    for depth in config.depths:
        model = make_model(config, depth, vocab_size=vocab_size, length_tokens=length_tokens)
        executed = count_flops(model, length_tokens).training()
        for (budget, tokens), unique in itertools.product(
            _lengths(config, model), config.unique_tokens
        ):
            group = Group(
                ladder=name,
                depth=depth,
                model=model,
                num_steps=round(tokens / tokens_per_step),
                tokens_per_step=tokens_per_step,
                executed_flops_per_token=executed,
                budget=budget,
                unique_tokens=unique,
                optimizer=config.optimizer,
                schedule=config.schedule,
                members=members,
            )
            least = (config.schedule.warmup_steps or 0) + 1
            if group.num_steps < least:
                raise ValueError(
                    f"ladder {name!r}: {tokens:.3g} tokens at depth {depth} are {group.num_steps} "
                    f"steps of {tokens_per_step} tokens, less than {least}: leave out that depth "
                    "or length, or take a smaller batch or warm-up"
                )
            groups.append(group)
    if not groups:
        raise ValueError(
            f"ladder {name!r}: no length has {config.tokens_per_param_between} tokens a parameter"
        )
    names = [group.name for group in groups]
    for twice in {n for n in names if names.count(n) > 1}:
        raise ValueError(f"ladder {name!r} asks for {twice} twice: two lengths are the same")
    return sorted(groups, key=lambda group: group.flops)


def make_model(
    config: LadderConfig, depth: int, *, vocab_size: int, length_tokens: int
) -> TransformerConfig:
    """Return the model of one size of the ladder."""

    def dial(depth: int) -> TransformerConfig:
        return from_depth(
            depth,
            vocab_size=vocab_size,
            max_length_tokens=length_tokens,
            head_dim=config.head_dim,
            width_per_layer=config.width_per_layer,
        )

    model = dial(depth)
    if config.num_layers is not None:
        model = dataclasses.replace(model, num_layers=config.num_layers)
    if config.mup_base_depth is not None:
        model = dataclasses.replace(model, mup_base_width=dial(config.mup_base_depth).width)
    return model


def _lengths(config: LadderConfig, model: TransformerConfig) -> list[tuple[float, float]]:
    """Return (what was asked for, tokens) of each length of the ladder at one size."""
    params = num_active_params(model)
    low, high = config.tokens_per_param_between or (0.0, math.inf)
    lengths = [
        *((float(tokens), float(tokens)) for tokens in config.tokens),
        *((flops, flops / (6.0 * params)) for flops in config.flops),
        *((ratio, ratio * params) for ratio in config.tokens_per_param),
    ]
    return [(budget, tokens) for budget, tokens in lengths if low <= tokens / params <= high]
