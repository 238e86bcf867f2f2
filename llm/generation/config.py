"""How the next token is chosen and when to stop: SamplingConfig. Generation floor, without JAX."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How tokens are drawn. A filter that is None is left out; temperature 0: the likeliest."""

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_k: int | None = None  # keep the k likeliest tokens
    top_p: float | None = None  # keep the likeliest tokens that together reach probability p
    min_p: float | None = None  # keep tokens at least p times as likely as the likeliest
    repetition_penalty: float = 1.0  # above 1: tokens of the prompt and the reply get less likely

    def __post_init__(self) -> None:
        _require(
            self.max_new_tokens >= 1,
            f"max_new_tokens={self.max_new_tokens}: must be at least 1",
        )
        _require(self.temperature >= 0, f"temperature={self.temperature}: must not be negative")
        _require(self.top_k is None or self.top_k >= 1, f"top_k={self.top_k}: must be at least 1")
        _require(
            self.top_p is None or 0 < self.top_p <= 1, f"top_p={self.top_p}: must lie in (0, 1]"
        )
        _require(
            self.min_p is None or 0 <= self.min_p <= 1, f"min_p={self.min_p}: must lie in [0, 1]"
        )
        _require(
            self.repetition_penalty > 0,
            f"repetition_penalty={self.repetition_penalty}: must be positive; 1 changes nothing",
        )

    @property
    def is_plain(self) -> bool:
        """Whether tokens are drawn by softmax(logits / temperature) as it is."""
        filters = self.top_k, self.top_p, self.min_p
        return self.temperature > 0 and filters == (None,) * 3 and self.repetition_penalty == 1.0


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
