"""What a judge of responses learns from. Third floor, without JAX or scikit-learn."""

import dataclasses

from llm.data.config import SourceConfig
from llm.parallel.checks import check_ranges


@dataclasses.dataclass(frozen=True)
class JudgeConfig:
    """Where labelled texts are, and what the judged are asked for."""

    # Labels to learn from: rows that neither policy nor rewards have seen.
    training: SourceConfig = SourceConfig()
    # Prompts whose rows have the label that they ask for, and a real response.
    asked: SourceConfig = SourceConfig()
    label_field: str = "label"
    by_characters: bool = False  # n-grams of characters, for scripts without spaces
    num_responses: int = 512  # to be judged, of each policy
    seed: int = 0  # of their sampling

    def __post_init__(self):
        check_ranges(self, section="judge.", size="num_responses", seed="seed")
