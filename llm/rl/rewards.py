"""Rewards: plain functions (prompts, responses) → a number a response. Third floor."""

import hashlib
import importlib
import inspect
import math
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from llm.rl.config import RewardConfig
from llm.rl.prompts import Prompt

# Responses are texts, cut where they ended, without control tokens.
RewardFn = Callable[[Sequence[Prompt], Sequence[str]], Sequence[float] | np.ndarray]


class RewardError(ValueError):
    """A reward function did not give a finite number for each response."""


def score(
    rewards: Mapping[str, tuple[RewardFn, float]],
    prompts: Sequence[Prompt],
    responses: Sequence[str],
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return the weighted sum of all rewards, and each by itself, float32 a response.

    `rewards` are functions and weights by name.

    Raises:
      RewardError: a function returned another number of scores, or one that is not finite.
    """
    by_name = {}
    for name, (reward, _) in rewards.items():
        scores = np.asarray(reward(prompts, responses), np.float32)
        if scores.shape != (len(responses),):
            raise RewardError(
                f"reward {name!r} returned shape {scores.shape} for {len(responses)} responses; "
                "it must return one number for each"
            )
        if not np.isfinite(scores).all():
            worst = int(np.flatnonzero(~np.isfinite(scores))[0])
            raise RewardError(
                f"reward {name!r} gave {scores[worst]} to the response {responses[worst][:80]!r} "
                f"to {prompts[worst].id}: it must be finite"
            )
        by_name[name] = scores
    total = sum(weight * by_name[name] for name, (_, weight) in rewards.items())
    return np.asarray(total, np.float32), by_name


def make_verifier(config: RewardConfig) -> RewardFn:
    """Return the reward function of a config that needs no model.

    Raises:
      ValueError: the function, pattern or data set that it names is not there.
    """
    match config.kind:
        case "arithmetic":
            return arithmetic_reward(config.answer_field)
        case "pattern":
            return pattern_reward(config.path)
        case "reasoning_gym":
            return reasoning_gym_reward(config.path)
        case "python":
            return import_reward(config.path)
        case kind:
            raise ValueError(f"a reward of kind {kind!r} needs a model")


_NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?(?:/\d+)?")


def arithmetic_reward(answer_field: str) -> RewardFn:
    """Return 1 for a response whose last number equals the answer in the prompt's row, else 0."""

    def reward(prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        return [
            float(_same(_last_number(response), _last_number(str(_answer(prompt, answer_field)))))
            for prompt, response in zip(prompts, responses, strict=True)
        ]

    return reward


def pattern_reward(pattern: str) -> RewardFn:
    """Return 1 for a response that the regular expression matches as a whole, else 0."""
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ValueError(f"reward pattern {pattern!r} is no regular expression: {error}") from error
    return lambda prompts, responses: [float(bool(compiled.fullmatch(r))) for r in responses]


def reasoning_gym_reward(name: str) -> RewardFn:
    """Return the score of reasoning-gym's own checker, 0 to 1; rows hold its entries.

    The prompts' source keeps the fields `answer` and `metadata`. What a response says in the last
    <answer> … </answer> is checked, or all of it where there is none. The sets arc_agi and rearc
    compare tuples, which JSON does not have: their rows are refused.
    """
    try:
        import reasoning_gym
        from reasoning_gym.utils import extract_answer
    except ImportError as error:
        raise ValueError("a reward of kind 'reasoning_gym': pip install reasoning-gym") from error
    try:
        check = reasoning_gym.get_score_answer_fn(name)
    except ValueError as error:
        raise ValueError(
            f"rewards: path {name!r} names no set of reasoning-gym: {error}"
        ) from error
    sound: set[str] = set()  # ids of rows whose own answer is right by the checker

    def reward(prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        scores = []
        for prompt, response in zip(prompts, responses, strict=True):
            entry = {field: _answer(prompt, field) for field in ("answer", "metadata")}
            if prompt.id not in sound:
                _check_entry(check, entry, prompt.id, name)
                sound.add(prompt.id)
            try:
                found = extract_answer(response)
                scores.append(float(check(response.strip() if found is None else found, entry)))
            except Exception:  # prime_factorization's fails on what is no number
                scores.append(0.0)
        return scores

    return reward


def _check_entry(check: Callable, entry: Mapping, identity: str, name: str) -> None:
    """Raise a RewardError unless the checker finds a row's own answer right."""
    if entry["answer"] is None:  # of puzzles with many solutions
        return
    try:
        found = check(entry["answer"], entry)
    except Exception as error:
        found = f"{type(error).__name__} ({error})"
    if found != 1:
        raise RewardError(
            f"{identity}: reasoning-gym's checker for {name!r} gives {found} to the row's own "
            "answer, not 1: the row is of another set, or did not come through its file unchanged"
        )


def import_reward(path: str) -> RewardFn:
    """Return the function that "package.module:name" names."""
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"reward function {path!r}, module:name, is not there: {error}") from error


def source_digest(path: str) -> str:
    """Return the SHA-256 of the file of the function that "package.module:name" names."""
    file = inspect.getsourcefile(inspect.getmodule(import_reward(path)))
    return hashlib.sha256(pathlib.Path(file).read_bytes()).hexdigest()


def _answer(prompt: Prompt, field: str):
    if field not in prompt.fields:
        raise RewardError(f"{prompt.id} has no field {field!r} to check an answer against")
    return prompt.fields[field]


def _last_number(text: str) -> float | None:
    found = _NUMBER.findall(text)
    if not found:
        return None
    top, _, bottom = found[-1].replace(",", "").partition("/")
    if bottom and not float(bottom):
        return None
    return float(top) / float(bottom) if bottom else float(top)


def _same(a: float | None, b: float | None) -> bool:
    return a is not None and b is not None and math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-9)
