"""A reward model as a plain reward function of texts. Third floor."""

import logging
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from llm.data.comparisons import encode_answers
from llm.data.rows import tell_rows
from llm.data.tokenizers import Tokenizer
from llm.generation.prompts import bucket_length
from llm.models.scalar import ScalarModel, at_last_token
from llm.models.transformer import logical_axes
from llm.parallel.config import MeshConfig
from llm.parallel.mesh import make_mesh
from llm.parallel.rules import batch_sharding, make_shardings
from llm.rl.prompts import Prompt
from llm.rl.rewards import RewardFn

log = logging.getLogger(__name__)


def make_model_reward(
    model: ScalarModel,
    params: dict,
    tokenizer: Tokenizer,
    *,
    shift: float = 0.0,
    scale: float = 1.0,
    batch_responses: int = 64,
    usual_tokens: int = 1,
) -> RewardFn:
    """Return the reward (score − shift) / scale of each response as an assistant's turn.

    Texts are encoded anew, by the reward model's own tokenizer and as in its training, so that it
    reads what it was trained on whatever tokens the policy made them of. Batches are filled
    up, and rows are as wide as `usual_tokens`, the longest that are to be expected, so that one
    program serves them all; longer ones are bucketed. The function raises a ValueError for a prompt
    that leaves no room for a response; a row that is longer than the model's window loses its
    beginning, since the score is read at the end, and is named in the log.

    Each process scores its own responses, on its own devices, which share the parameters.
    """
    mesh = _own_mesh(model.config.width)
    params = jax.device_put(params, make_shardings(mesh, logical_axes(model), params))
    num_rows = -(-batch_responses // mesh.size) * mesh.size
    length_limit = model.config.max_length_tokens

    @jax.jit
    def scores_of(params, tokens, segment_ids):
        values = model.apply({"params": params}, tokens, segment_ids=segment_ids)
        return at_last_token(values, segment_ids)

    def reward(prompts: Sequence[Prompt], responses: Sequence[str]) -> np.ndarray:
        rows = _encode(prompts, responses, tokenizer, length_limit)
        width = min(bucket_length(max(usual_tokens, *map(len, rows))), length_limit)
        found = []
        for start in range(0, len(rows), num_rows):
            part = rows[start : start + num_rows]
            tokens = np.zeros((num_rows, width), np.int32)
            real = np.zeros((num_rows, width), np.int32)
            for i, row in enumerate(part):
                tokens[i, : len(row)], real[i, : len(row)] = row, 1
            with jax.set_mesh(mesh):
                placed = jax.device_put((tokens, real), batch_sharding(mesh, tokens.shape))
                found.append(np.asarray(scores_of(params, *placed))[: len(part)])
        return (np.concatenate(found) - shift) / scale

    return reward


def _encode(
    prompts: Sequence[Prompt], responses: Sequence[str], tokenizer: Tokenizer, limit: int
) -> list[list[int]]:
    """Return prompts and responses as rows of at most `limit` tokens."""
    rows, cut = [], []
    for prompt, response in zip(prompts, responses, strict=True):
        ((row, start),) = encode_answers(prompt.messages, [response], tokenizer, prompt.id)
        if start >= limit:
            raise ValueError(
                f"{prompt.id}: the prompt alone has {start} tokens for the reward model, whose "
                f"window is {limit}; leave it out, or train a reward model of a longer window"
            )
        if len(row) > limit:
            cut.append(f"{prompt.id} ({len(row)} tokens)")
        rows.append(row[-limit:])
    if cut:
        what = f"responses scored without the beginning of their prompt, the window being {limit}"
        log.warning(tell_rows(cut, what))
    return rows


def _own_mesh(width: int) -> Mesh:
    """Return a mesh of this process's devices over which parameters of such a width can be cut."""
    devices = jax.local_devices()
    parts = own_parts(width, len(devices))
    return make_mesh(MeshConfig(data=len(devices) // parts, fsdp=parts), devices)


def own_parts(width: int, num_devices: int) -> int:
    """Return into how many parts a process's devices cut a reward model of that width."""
    return math.gcd(width, num_devices)
