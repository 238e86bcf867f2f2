"""Learning-rate schedules as fractions of the peak. Second floor."""

import math
from collections.abc import Callable

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from llm.training.config import ScheduleConfig

Schedule = Callable[[Int[Array, ""] | int], Float[Array, ""]]


def make_schedule(config: ScheduleConfig, *, total_steps: int, tokens_per_step: int) -> Schedule:
    """Return step → fraction of the peak learning rate: 1 when warm-up ends.

    Step 0 trains at 1/warm-up of the peak, not at 0: no step is wasted.

    Raises:
      ValueError: warm-up and decay do not fit into total_steps.

    Source: cosine, Loshchilov & Hutter 2017, arXiv:1608.03983; inverse square root, Vaswani et al.
    2017, arXiv:1706.03762, with the peak at the end of warm-up; warm-up, stable, decay: Hu et al.
    2024, arXiv:2404.06395, with a linear decay.
    """
    warmup = _steps(config.warmup_steps, config.warmup_tokens, tokens_per_step)
    decay = _steps(config.decay_steps, config.decay_tokens, tokens_per_step)
    if warmup + decay > total_steps:
        raise ValueError(
            f"schedule.warmup_steps={warmup} and decay_steps={decay} (or what warmup_tokens and "
            f"decay_tokens make of them) exceed the run's {total_steps} steps; shorten them, or "
            "train longer"
        )
    rest, final = max(1, total_steps - warmup), config.final_fraction
    match config.name:
        case "constant":
            after = optax.constant_schedule(1.0)
        case "cosine":
            after = optax.cosine_decay_schedule(1.0, rest, alpha=final)
        case "linear":
            after = optax.linear_schedule(1.0, final, rest)
        case "warmup_stable_decay":
            after = optax.linear_schedule(1.0, final, max(1, decay), total_steps - warmup - decay)
        case "inverse_sqrt":
            scale = max(1, warmup)
            # clipped: join_schedules also evaluates it before its time
            after = lambda step: jnp.sqrt(scale / (scale + jnp.maximum(step, 0)))  # noqa: E731
    if warmup == 0:
        return after
    rise = optax.linear_schedule(1 / warmup, 1.0, warmup - 1) if warmup > 1 else lambda step: 1.0
    return optax.join_schedules([rise, after], [warmup])


def _steps(steps: int | None, tokens: int | None, tokens_per_step: int) -> int:
    return math.ceil(tokens / tokens_per_step) if tokens is not None else steps or 0
