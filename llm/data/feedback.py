"""Human feedback of five kinds as one typed record, and back, so that nothing is lost.
`feedback_rows` tells the fields of each kind's rows. Imports no reader."""

import dataclasses
import hashlib
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from llm.data.conversations import Messages
from llm.data.feedback_rows import READERS, FeedbackError, guess_kind, number, plain

Kind = Literal["comparison", "ranking", "rating", "thumbs", "correction"]


@dataclasses.dataclass(frozen=True)
class Feedback:
    """Responses to one prompt, and which are better."""

    kind: Kind
    prompt: Messages  # up to the turn that is answered
    responses: tuple[str, ...]
    levels: tuple[float, ...]  # higher is better; equal is a tie
    margin: float = 0.0  # that scores are to differ by
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # what else a row had
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
    """Return a row's feedback; kind "auto" goes by its fields. Fields that are None are absent.

    Raises:
      FeedbackError: fields are missing, empty or of another type, or the responses are the same.
    """
    row = {name: value for name, value in plain(row).items() if value is not None}
    kind = guess_kind(row) if kind == "auto" else kind
    prompt, responses, levels, used = READERS[kind](row)
    margin = number(row["margin"]) if "margin" in used else 0.0
    details = {name: value for name, value in row.items() if name not in used}
    feedback = Feedback(kind, prompt, responses, tuple(levels), margin, details, identity)
    _check(feedback)
    again = details.keys() & _answers(feedback).keys()
    if again:
        raise FeedbackError(
            f"field {min(again)!r} says what {', '.join(used)} say already; drop one or the other"
        )
    return feedback


def to_row(feedback: Feedback) -> dict[str, Any]:
    """Return the row of a record, in its kind's canonical form.

    The prompt is a list of messages, of role and content only. Answers are texts: `chosen` and
    `rejected` (`margin`, unless it is 0); `responses` and `ranks`, `ratings` or `labels`; `edited`
    and `response`. Read with the record's kind, the row gives the same record again, less its id.
    """
    prompt = [dict(message) for message in feedback.prompt]
    return {"prompt": prompt, **_answers(feedback), **feedback.details}


def _answers(feedback: Feedback) -> dict[str, Any]:
    responses, levels = list(feedback.responses), list(feedback.levels)
    match feedback.kind:
        case "comparison":
            margin = {"margin": feedback.margin} if feedback.margin else {}
            return {"chosen": responses[0], "rejected": responses[1], **margin}
        case "ranking":
            return {"responses": responses, "ranks": [-level for level in levels]}
        case "rating":
            return {"responses": responses, "ratings": levels}
        case "thumbs":
            labels = [bool(level) if level in (0.0, 1.0) else level for level in levels]
            return {"responses": responses, "labels": labels}
        case "correction":
            return {"edited": responses[0], "response": responses[1]}


def join(records: Sequence[Feedback]) -> Feedback:
    """Return ratings, or thumbs, that different rows give responses to one prompt, as one record.

    A response that was given twice keeps the mean of its levels: the share of thumbs up, say. What
    else the rows had, and their ids, become the list `rows` of the details.
    """
    if len(records) == 1:
        return records[0]
    levels: dict[str, list[float]] = {}
    for record in records:
        for response, level in zip(record.responses, record.levels, strict=True):
            levels.setdefault(response, []).append(level)
    return dataclasses.replace(
        records[0],
        responses=tuple(levels),
        # Exact: a rounded mean of equal levels would break a tie.
        levels=tuple(statistics.mean(given) for given in levels.values()),
        details={"rows": [{"id": each.id, "details": dict(each.details)} for each in records]},
    )


def _check(feedback: Feedback) -> None:
    if feedback.prompt[-1]["role"] == "assistant":
        raise FeedbackError("the prompt ends with the assistant's turn: nothing is asked")
    if not feedback.prompt[-1]["content"].strip():
        raise FeedbackError("the prompt is empty")
    if not feedback.responses:
        raise FeedbackError("there is no response")
    for count, response in enumerate(feedback.responses, 1):
        if not response.strip():
            raise FeedbackError(f"response {count} is empty")
    if not all(map(math.isfinite, (*feedback.levels, feedback.margin))):
        raise FeedbackError(f"levels {feedback.levels} or the margin are not all finite")
    seen: dict[str, float] = {}
    for response, level in zip(feedback.responses, feedback.levels, strict=True):
        if seen.setdefault(response, level) != level:
            raise FeedbackError("two responses are identical, and one is said to be better")
