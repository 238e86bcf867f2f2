"""A reward model as a plain reward function of texts. Third floor."""

from collections.abc import Sequence

import jax
import numpy as np

from llm.data.tokenizers import Tokenizer
from llm.generation.prompts import bucket_length
from llm.models.scalar import ScalarModel, at_last_token
from llm.rl.prompts import Prompt
from llm.rl.rewards import RewardFn


def make_model_reward(
    model: ScalarModel,
    params: dict,
    tokenizer: Tokenizer,
    *,
    shift: float = 0.0,
    scale: float = 1.0,
    batch_responses: int = 64,
) -> RewardFn:
    """Return the reward (score − shift) / scale of each response as an assistant's turn.

    Texts are encoded anew, by the reward model's own tokenizer, so that it reads what it was
    trained on whatever tokens the policy made them of. Few shapes are compiled: lengths are
    bucketed and batches filled up.
    """
    params = jax.device_put(params)
    length_limit = model.config.max_length_tokens

    @jax.jit
    def scores_of(params, tokens, segment_ids):
        values = model.apply({"params": params}, tokens, segment_ids=segment_ids)
        return at_last_token(values, segment_ids)

    def reward(prompts: Sequence[Prompt], responses: Sequence[str]) -> np.ndarray:
        rows = [
            tokenizer.encode_chat([*p.messages, {"role": "assistant", "content": response}])
            for p, response in zip(prompts, responses, strict=True)
        ]
        # What does not fit loses its beginning: the score is read at the end.
        rows = [row[-length_limit:] for row in rows]
        width = min(bucket_length(max(map(len, rows))), length_limit)
        found = []
        for start in range(0, len(rows), batch_responses):
            part = rows[start : start + batch_responses]
            tokens = np.zeros((batch_responses, width), np.int32)
            real = np.zeros((batch_responses, width), np.int32)
            for i, row in enumerate(part):
                tokens[i, : len(row)], real[i, : len(row)] = row, 1
            found.append(np.asarray(scores_of(params, tokens, real))[: len(part)])
        return (np.concatenate(found) - shift) / scale

    return reward
