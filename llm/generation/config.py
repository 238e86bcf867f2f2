"""How the next token is chosen and when to stop: SamplingConfig. Generation floor, without JAX."""

import dataclasses

from llm.parallel.checks import check_ranges


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
        check_ranges(
            self,
            size="max_new_tokens top_k",
            not_negative="temperature",
            positive="repetition_penalty",
            share="min_p",
            within={"top_p": "(0, 1]"},
        )

    @property
    def is_plain(self) -> bool:
        """Whether tokens are drawn by softmax(logits / temperature) as it is."""
        filters = self.top_k, self.top_p, self.min_p
        return self.temperature > 0 and filters == (None,) * 3 and self.repetition_penalty == 1.0
