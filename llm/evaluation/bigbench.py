"""Scores of a model on BIG-bench tasks, each beside what chance would give. Third floor.

A jump with scale can come from the metric (Schaeffer et al. 2023, arXiv:2304.15004): so every task
also has smooth scores, in probabilities and nats.

Source: Srivastava et al. 2022, arXiv:2206.04615. Where this differs from `bigbench` 1.0.0's models:
likelihoods are those of the tokens of question and answer as one text, not of the two apart.
"""

import dataclasses
import functools
import math
import os
import re
from collections.abc import Sequence

import numpy as np
from sklearn.metrics import f1_score

from llm.data.tokenizers import Tokenizer
from llm.evaluation.batched import BatchedModel
from llm.evaluation.bigbench_metrics import (
    BRIER,
    TEXT_METRICS,
    choice_scores,
    cut_response,
    text_scores,
)
from llm.evaluation.bigbench_tasks import (
    DEFAULT_REGEX,
    REFERENCE_SEED,
    Prompt,
    Task,
    TaskError,
    draw_prompts,
)
from llm.generation.config import SamplingConfig

# whose best is 1, so that the way from chance to there can be told
_UP_TO_ONE = ("multiple_choice_grade", "macro_f1", *TEXT_METRICS)
_MOST_NEW_TOKENS = 256


@dataclasses.dataclass(frozen=True)
class Score:
    """A metric over the examples of a task; None where no such figure is known.

    `multiple_choice_grade`: the target score of the likeliest choice. `…_length_normalised`: of the
    likeliest a UTF-8 byte. `probability_mass`: the target score expected of a choice drawn by the
    model's probabilities. `choice_nats`: −log of the right choices' share of them. `answer_nats`:
    −log of the probability of the right answers among all texts.
    """

    value: float
    random: float | None  # expected of a uniformly random choice, or of uniform probabilities
    standard_error: float | None


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a model made of one example."""

    task: str
    example: int
    shots: tuple[int, ...]
    prompt: str
    targets: tuple[str, ...]
    log_likelihoods: dict[str, float]  # nats of each choice, or of each target
    chosen: str | None  # the likeliest choice
    response: str | None  # what was written, cut as the task says
    scores: dict[str, float]
    random: dict[str, float]


@dataclasses.dataclass(frozen=True)
class TaskResult:
    """The scores of a task, or of several subtasks together."""

    name: str
    metric: str | None  # the preferred one of those known here; None: subtasks differ in it
    num_examples: int
    scores: dict[str, Score]
    normalised: float | None  # that metric's place between chance, 0, and perfect, 1
    cut_contexts: int  # prompts longer than the model's window, which lost their beginning
    num_tasks: int
    answers: tuple[Answer, ...]  # none where tasks are taken together


def evaluate_task(
    model: BatchedModel,
    task: Task,
    *,
    num_shots: int = 0,
    limit: int | None = None,
    seed: int = REFERENCE_SEED,
    max_new_tokens: int | None = None,
) -> TaskResult:
    """Return a model's scores on a task, and all of its answers in the order of the prompts.

    Texts are written greedily, up to `max_new_tokens`: by default what the longest target needs and
    some more, 256 at most.

    Raises:
      TaskError: no metric of the task is known, it has too few examples, or the window is too short
        for an answer.
    """
    if not task.metrics:
        names = ", ".join(task.unknown_metrics) or "nothing"
        raise TaskError(f"{task.name} is measured by {names}, which is not computed here")
    prompts = draw_prompts(task, num_shots, limit=limit, seed=seed)
    if not prompts:
        raise TaskError(f"{task.name} has no example that can be asked")
    likelihoods, cut = _log_likelihoods(model, task, prompts)
    responses: list[str | None] = [None] * len(prompts)
    if task.has_texts:
        responses, more = _responses(model, task, prompts, max_new_tokens)
        cut |= more
    answers = [_answer(task, *each) for each in zip(prompts, likelihoods, responses, strict=True)]
    scores = {metric: _mean(answers, metric) for metric in answers[0].scores}
    if "macro_f1" in task.metrics:
        scores["macro_f1"] = _macro_f1(prompts, answers)
    metric = task.metrics[0]
    return TaskResult(
        name=task.name,
        metric=metric,
        num_examples=len(answers),
        scores={metric: scores[metric]} | scores,
        normalised=_normalised(metric, scores[metric]),
        cut_contexts=len(cut),
        num_tasks=1,
        answers=tuple(answers),
    )


def combine_results(name: str, results: Sequence[TaskResult]) -> TaskResult:
    """Return the scores of a task whose subtasks are given: means in which each counts the same."""
    metrics = dict.fromkeys(metric for result in results for metric in result.scores)
    preferred = {result.metric for result in results}
    parts = [result.normalised for result in results]
    return TaskResult(
        name=name,
        metric=preferred.pop() if len(preferred) == 1 else None,
        num_examples=sum(result.num_examples for result in results),
        scores={
            metric: _mean_score([r.scores[metric] for r in results if metric in r.scores])
            for metric in metrics
        },
        normalised=None if None in parts else float(np.mean(parts)),
        cut_contexts=sum(result.cut_contexts for result in results),
        num_tasks=len(results),
        answers=(),
    )


# --- Choices --------------------------------------------------------------------------------


def encode_answers(
    tokenizer: Tokenizer, prompt: str, answers: Sequence[str]
) -> tuple[list[int], list[list[int]]]:
    """Return the tokens of a prompt, and of each answer after it.

    Prompt and answer are one text, whose tokens need not end where the prompt does: the space
    before a word is mostly the word's. They part where the first answer's tokens leave those of the
    prompt alone, at the same place for all answers, so that their likelihoods can be compared.
    """
    alone, *whole = tokenizer.encode_batch([prompt, *(prompt + answer for answer in answers)])
    seam = min(len(os.path.commonprefix([alone, tokens[:-1]])) for tokens in whole)
    context = [*tokenizer.text_prefix, *alone[:seam]]
    return context or [tokenizer.bos_id], [tokens[seam:] for tokens in whole]


def _log_likelihoods(
    model: BatchedModel, task: Task, prompts: Sequence[Prompt]
) -> tuple[list[dict[str, float]], set[int]]:
    """Return the nats of each prompt's choices, or targets, and which prompts were cut."""
    requests, owners, cut = [], [], set()
    found: list[dict[str, float]] = []
    for i, prompt in enumerate(prompts):
        texts = prompt.example.choices if task.has_choices else prompt.example.targets
        context, answers = encode_answers(model.tokenizer, prompt.text, texts)
        longest = max(map(len, answers))
        if longest > model.max_length:
            raise TaskError(
                f"{task.name}: example {prompt.example.number} has an answer of {longest} tokens, "
                f"more than the model's window of {model.max_length}"
            )
        if len(context) + longest > model.max_length + 1:
            cut.add(i)
        requests += [(context, answer) for answer in answers]
        owners += [(i, text) for text in texts]
        found.append(dict.fromkeys(texts, 0.0))
    for number, (nats, _) in model.score_tokens(requests):
        i, text = owners[number]
        found[i][text] = nats
    return found, cut


# --- Texts ----------------------------------------------------------------------------------


def _responses(
    model: BatchedModel, task: Task, prompts: Sequence[Prompt], max_new_tokens: int | None
) -> tuple[list[str | None], set[int]]:
    """Return the answers written after the prompts, and which prompts were cut."""
    tokenizer = model.tokenizer
    if max_new_tokens is None:
        targets = {target for prompt in prompts for target in prompt.example.targets}
        longest = max(map(len, tokenizer.encode_batch(sorted(targets))))
        # a power of two, so that tasks share programs
        max_new_tokens = min(_MOST_NEW_TOKENS, 1 << (max(16, longest + 8) - 1).bit_length())
    room = model.max_length - max_new_tokens
    if room < 1:
        raise TaskError(
            f"{task.name}: {max_new_tokens} new tokens leave no room for a prompt in the model's "
            f"window of {model.max_length}; set fewer"
        )
    # The last spaces are left to the model, whose tokens hold the space before a word.
    asked = [prompt.text.rstrip(" ") for prompt in prompts]
    spaces = [len(prompt.text) - len(text) for prompt, text in zip(prompts, asked, strict=True)]
    start = list(tokenizer.text_prefix)
    encoded = [start + ids or [tokenizer.bos_id] for ids in tokenizer.encode_batch(asked)]

    def ended(i: int, text: str) -> bool:
        return _has_ended(task, _without_spaces(text, spaces[i]))

    sampling = SamplingConfig(max_new_tokens=max_new_tokens, temperature=0.0)
    responses: list[str | None] = [None] * len(prompts)
    for i, text in model.generate_texts(dict(enumerate(encoded)), sampling, ended):
        text = _without_spaces(text, spaces[i])
        responses[i] = cut_response(text, task.format.stop_string, task.format.output_regex)
    return responses, {i for i, ids in enumerate(encoded) if len(ids) > room}


def _without_spaces(text: str, count: int) -> str:
    """Return a text without up to `count` leading spaces: those that the prompt gave up."""
    return text[min(count, len(text) - len(text.lstrip(" "))) :]


def _has_ended(task: Task, text: str) -> bool:
    """Return whether more text would leave the answer as it is, as far as this can be told."""
    if task.format.stop_string:
        return text.find(task.format.stop_string) > 0
    match = re.search(DEFAULT_REGEX, text) if task.format.output_regex == DEFAULT_REGEX else None
    return match is not None and match.end() < len(text)


# --- Figures --------------------------------------------------------------------------------


def _answer(
    task: Task, prompt: Prompt, likelihoods: dict[str, float], response: str | None
) -> Answer:
    example, nats = prompt.example, np.asarray(list(likelihoods.values()))
    scores: dict[str, float] = {}
    random: dict[str, float] = {}
    chosen = None
    right = np.full(len(nats), True)
    if task.has_choices:
        target_scores = np.asarray(example.scores)
        num_bytes = np.asarray([float(len(choice.encode())) for choice in example.choices])
        right = target_scores == target_scores.max()
        chosen = example.choices[int(nats.argmax())]
        scores |= choice_scores(nats, num_bytes, target_scores)
        random |= choice_scores(np.zeros_like(nats), np.ones_like(nats), target_scores)
    if response is not None:
        written = text_scores(response, example.targets)
        scores |= {metric: written[metric] for metric in task.metrics if metric in written}
        random |= {metric: 0.0 for metric in task.metrics if metric in written}
    scores["answer_nats"] = float(-np.logaddexp.reduce(nats[right]))
    if "log_likelihood" in task.metrics:
        scores["log_likelihood"] = -scores["answer_nats"]
    return Answer(
        task=task.name,
        example=example.number,
        shots=prompt.shots,
        prompt=prompt.text,
        targets=example.targets,
        log_likelihoods=likelihoods,
        chosen=chosen,
        response=response,
        scores=scores,
        random=random,
    )


def _mean(answers: Sequence[Answer], metric: str) -> Score:
    """Return a metric's mean over examples, and its standard error.

    Brier's is a mean over all choices of all examples, as the reference has it.
    """
    values = np.asarray([answer.scores[metric] for answer in answers])
    weights = np.ones_like(values)
    if metric == BRIER:
        weights = np.asarray([float(len(answer.log_likelihoods)) for answer in answers])
    mean = functools.partial(np.average, weights=weights)
    value, error, random = float(mean(values)), None, None
    if (n := len(values)) > 1:  # of a ratio of sums, where weights differ
        spread = float(np.sum((weights * (values - value)) ** 2))
        error = math.sqrt(spread * n / (n - 1)) / float(weights.sum())
    if metric in answers[0].random:
        random = float(mean([answer.random[metric] for answer in answers]))
    return Score(value, random, error)


def _macro_f1(prompts: Sequence[Prompt], answers: Sequence[Answer]) -> Score:
    examples = [prompt.example for prompt in prompts]
    right = [example.choices[int(np.argmax(example.scores))] for example in examples]
    chosen = [answer.chosen for answer in answers]
    return Score(float(f1_score(right, chosen, average="macro")), None, None)


def _mean_score(scores: Sequence[Score]) -> Score:
    """Return the mean of independent scores."""
    randoms = [score.random for score in scores]
    errors = [score.standard_error for score in scores]
    return Score(
        value=float(np.mean([score.value for score in scores])),
        random=None if None in randoms else float(np.mean(randoms)),
        standard_error=None if None in errors else float(np.linalg.norm(errors) / len(errors)),
    )


def _normalised(metric: str, score: Score) -> float | None:
    if metric not in _UP_TO_ONE or score.random is None or score.random >= 1.0:
        return None
    return (score.value - score.random) / (1.0 - score.random)
