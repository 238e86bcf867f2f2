"""Human feedback of five kinds as one typed record, and back. Imports no reader.

Higher levels are better; equal ones are a tie. `details` keep what else a row had, so that nothing
is lost: `to_row` gives back the row that `from_row` took, in the canonical form of its kind.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from llm.data.conversations import ConversationError, Messages, check_messages

Kind = Literal["comparison", "ranking", "rating", "thumbs", "correction"]
KINDS: tuple[str, ...] = get_args(Kind)
_HUMAN, _ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


class FeedbackError(ValueError):
    """A row is no feedback that can be learnt from; the message is a reason for a report."""


@dataclasses.dataclass(frozen=True)
class Feedback:
    """Responses to one prompt, and which are better."""

    kind: Kind
    prompt: Messages  # up to the turn that is answered
    responses: tuple[str, ...]
    levels: tuple[float, ...]
    margin: float = 0.0  # that scores are to differ by
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    id: str = ""  # "file:row"

    @property
    def group(self) -> str:
        """What a split must not cut: the prompt."""
        return hashlib.sha256(json.dumps(self.prompt).encode()).hexdigest()[:16]

    @property
    def num_pairs(self) -> int:
        """Pairs of responses of which one is better."""
        return sum(a > b for a in self.levels for b in self.levels)


def from_row(row: Mapping[str, Any], kind: str, identity: str = "") -> Feedback:
    """Return a row's feedback; kind "auto" goes by its fields.

    Raises:
      FeedbackError: fields are missing or empty, or the responses are the same.
    """
    row = {name: value for name, value in _plain(row).items() if value is not None}
    kind = _guess(row) if kind == "auto" else kind
    try:
        feedback = _READERS[kind](row)
    except ConversationError as error:
        raise FeedbackError(str(error)) from error
    _check(feedback)
    return dataclasses.replace(feedback, id=identity)


def to_row(feedback: Feedback) -> dict[str, Any]:
    """Return the row of a record, in its kind's canonical form; prompts are lists of messages."""
    prompt, details = [dict(message) for message in feedback.prompt], dict(feedback.details)
    responses, levels = list(feedback.responses), list(feedback.levels)
    match feedback.kind:
        case "comparison":
            row = {"chosen": responses[0], "rejected": responses[1]}
            row |= {"margin": feedback.margin} if feedback.margin else {}
        case "ranking":
            row = {"responses": responses, "ranks": [-level for level in levels]}
        case "rating":
            row = {"responses": responses, "ratings": levels}
        case "thumbs":
            row = {"responses": responses, "labels": [level > 0 for level in levels]}
        case "correction":
            row = {"edited": responses[0], "response": responses[1]}
    return {"prompt": prompt, **row, **details}


def join(records: Sequence[Feedback]) -> Feedback:
    """Return ratings or thumbs that different rows give responses to one prompt, as one record.

    A response that was given twice keeps the mean of its levels.
    """
    levels: dict[str, list[float]] = {}
    for record in records:
        for response, level in zip(record.responses, record.levels, strict=True):
            levels.setdefault(response, []).append(level)
    return dataclasses.replace(
        records[0],
        responses=tuple(levels),
        levels=tuple(sum(given) / len(given) for given in levels.values()),
        details={} if len(records) > 1 else records[0].details,
    )


def _guess(row: Mapping[str, Any]) -> str:
    if "chosen" in row and "rejected" in row:
        return "comparison"
    if "edited" in row or "correction" in row:
        return "correction"
    if "ranks" in row or "ranking" in row:
        return "ranking"
    if "label" in row or "labels" in row:
        return "thumbs"
    if "completions" in row or "ratings" in row or "rating" in row:
        return "rating"
    raise FeedbackError(
        f"the fields {', '.join(row)} are none of the kinds {', '.join(KINDS)}: see llm/data/"
        "feedback.py for their fields, or rename them with field_names"
    )


# --- Kinds ----------------------------------------------------------------------------------


def _comparison(row: Mapping[str, Any]) -> Feedback:
    """chosen, rejected: answers to `prompt`; or whole dialogues, as texts or lists of messages."""
    chosen, rejected = _need(row, "chosen"), _need(row, "rejected")
    if "prompt" in row and isinstance(chosen, str):
        prompt, used = _prompt(row)
        responses = (chosen, _text(row, "rejected"))
    else:
        used = [name for name in ("prompt", "instruction") if name in row]
        good, bad = _dialogue(chosen), _dialogue(rejected)
        prompt, responses = good[:-1], (good[-1]["content"], bad[-1]["content"])
        if bad[:-1] != prompt:
            raise FeedbackError("chosen and rejected answer different prompts")
    details = _rest(row, *used, "chosen", "rejected", "margin")
    margin = _number(row.get("margin", 0.0))
    return Feedback("comparison", prompt, responses, (1.0, 0.0), margin, details)


def _ranking(row: Mapping[str, Any]) -> Feedback:
    """responses, and `ranks` (1 is best, ties allowed) or `ranking` (indices, best first)."""
    prompt, used = _prompt(row)
    responses = _texts(row, "responses")
    if "ranks" in row:
        ranks = [float(rank) for rank in row["ranks"]]
    else:
        order = list(row["ranking"])
        if sorted(order) != list(range(len(responses))):
            raise FeedbackError(
                f"ranking {order} is no order of the {len(responses)} responses, counted from 0"
            )
        ranks = [float(order.index(i) + 1) for i in range(len(responses))]
    _same_length(responses, ranks, "ranks")
    details = _rest(row, *used, "responses", "ranks", "ranking")
    return Feedback("ranking", prompt, responses, tuple(-rank for rank in ranks), 0.0, details)


def _rating(row: Mapping[str, Any]) -> Feedback:
    """responses and ratings; one response and its rating; or UltraFeedback's completions."""
    prompt, used = _prompt(row)
    details = _rest(row, *used, "responses", "ratings", "response", "rating")
    if "completions" in row:
        completions = list(row["completions"])
        responses = tuple(_text(completion, "response") for completion in completions)
        ratings = [_overall(completion) for completion in completions]
    elif "responses" in row:
        responses, ratings = _texts(row, "responses"), list(_need(row, "ratings"))
    else:
        responses, ratings = (_text(row, "response"),), [_need(row, "rating")]
    _same_length(responses, ratings, "ratings")
    return Feedback("rating", prompt, responses, tuple(map(_number, ratings)), 0.0, details)


def _thumbs(row: Mapping[str, Any]) -> Feedback:
    """responses and labels, or one `response` (or `completion`) and its `label`: true is good."""
    prompt, used = _prompt(row)
    if "responses" in row:
        responses, labels = _texts(row, "responses"), list(_need(row, "labels"))
    else:
        name = "completion" if "completion" in row else "response"
        answer = row.get(name)
        text = _dialogue(answer)[-1]["content"] if isinstance(answer, list) else _text(row, name)
        responses, labels = (text,), [_need(row, "label")]
    _same_length(responses, labels, "labels")
    if any(label not in (True, False) for label in labels):
        raise FeedbackError(f"labels {labels} are not all true or false")
    details = _rest(row, *used, "responses", "labels", "response", "completion", "label")
    return Feedback("thumbs", prompt, responses, tuple(map(float, labels)), 0.0, details)


def _correction(row: Mapping[str, Any]) -> Feedback:
    """response, and `edited` (or `correction`), which is better."""
    prompt, used = _prompt(row)
    name = "edited" if "edited" in row else "correction"
    responses = (_text(row, name), _text(row, "response"))
    details = _rest(row, *used, "edited", "correction", "response")
    return Feedback("correction", prompt, responses, (1.0, 0.0), 0.0, details)


_READERS = {
    "comparison": _comparison,
    "ranking": _ranking,
    "rating": _rating,
    "thumbs": _thumbs,
    "correction": _correction,
}


# --- Parts ----------------------------------------------------------------------------------


def _prompt(row: Mapping[str, Any]) -> tuple[Messages, list[str]]:
    """Return the prompt, a text or messages, and the names of the fields that it came from."""
    name = "prompt" if "prompt" in row else "instruction"
    value = _need(row, name)
    turns = [{"role": "user", "content": value}] if isinstance(value, str) else value
    messages = check_messages(turns)
    if messages[-1]["role"] == "assistant":
        raise FeedbackError("the prompt ends with the assistant's turn: nothing is asked")
    return messages, [name]


def _dialogue(value: Any) -> Messages:
    """Return a dialogue that ends with an answer: messages, or hh-rlhf's text."""
    if not isinstance(value, str):
        messages = check_messages(value)
    else:
        if _HUMAN not in value or _ASSISTANT not in value:
            raise FeedbackError("the dialogue has no 'Human:' and 'Assistant:', and no prompt")
        turns, rest = [], value[value.index(_HUMAN) :]
        while rest:
            mark = _HUMAN if rest.startswith(_HUMAN) else _ASSISTANT
            said = rest.removeprefix(mark)
            ends = [i for i in (said.find(_HUMAN), said.find(_ASSISTANT)) if i >= 0]
            end = min(ends, default=len(said))
            role = "user" if mark == _HUMAN else "assistant"
            turns.append({"role": role, "content": said[:end].strip()})
            rest = said[end:]
        messages = check_messages(turns)
    if messages[-1]["role"] != "assistant" or len(messages) < 2:
        raise FeedbackError("the dialogue does not end with an answer to something")
    return messages


def _overall(completion: Mapping[str, Any]) -> float:
    """Return a completion's overall score, or the mean of its annotations' ratings."""
    if completion.get("overall_score") is not None:
        return completion["overall_score"]
    ratings = [
        float(aspect["Rating"])
        for aspect in (completion.get("annotations") or {}).values()
        if str(aspect.get("Rating", "N/A")) != "N/A"
    ]
    if not ratings:
        raise FeedbackError("a completion has neither overall_score nor annotations with ratings")
    return sum(ratings) / len(ratings)


def _check(feedback: Feedback) -> None:
    for number, response in enumerate(feedback.responses, 1):
        if not response.strip():
            raise FeedbackError(f"response {number} is empty")
    if not all(map(math.isfinite, (*feedback.levels, feedback.margin))):
        raise FeedbackError(f"levels {feedback.levels} or the margin are not all finite")
    seen: dict[str, float] = {}
    for response, level in zip(feedback.responses, feedback.levels, strict=True):
        if seen.setdefault(response, level) != level:
            raise FeedbackError("two responses are identical, and one is said to be better")


def _plain(value: Any) -> Any:
    """Return a value as JSON has it: TFDS gives bytes and NumPy's scalars and arrays."""
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise FeedbackError(f"invalid UTF-8, byte {error.start}") from error
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _need(row: Mapping[str, Any], name: str) -> Any:
    if row.get(name) is None:
        raise FeedbackError(f"no field {name!r}")
    return row[name]


def _text(row: Mapping[str, Any], name: str) -> str:
    value = _need(row, name)
    if not isinstance(value, str):
        raise FeedbackError(f"field {name!r} is {type(value).__name__}, not text")
    return value


def _texts(row: Mapping[str, Any], name: str) -> tuple[str, ...]:
    values = _need(row, name)
    if isinstance(values, str) or not all(isinstance(value, str) for value in values):
        raise FeedbackError(f"field {name!r} is not a list of texts")
    return tuple(values)


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise FeedbackError(f"{value!r} is not a number") from error


def _same_length(responses: Sequence, values: Sequence, name: str) -> None:
    if len(responses) != len(values):
        raise FeedbackError(f"{len(responses)} responses and {len(values)} {name}")


def _rest(row: Mapping[str, Any], *used: str) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in used}
