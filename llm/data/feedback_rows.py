"""What the fields of feedback rows mean, kind by kind, as public data sets have them.
Used by `feedback`, which makes records of what is read here."""

import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llm.data.conversations import Messages, check_messages

_HUMAN, _ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}

# Prompt, responses, levels, and the names of the fields that they come from.
Parts = tuple[Messages, tuple[str, ...], Sequence[float], tuple[str, ...]]


class FeedbackError(ValueError):
    """A row is no feedback that can be learnt from; the message is a reason for a report."""


def _comparison(row: Mapping[str, Any]) -> Parts:
    """chosen, rejected: answers to `prompt`; or whole dialogues, as texts or lists of messages.

    Only who won counts: `score_chosen` and the like are details, `margin` is the margin.
    """
    chosen, rejected = _need(row, "chosen"), _need(row, "rejected")
    used = tuple(name for name in ("chosen", "rejected", "margin") if name in row)
    if _is_answer(chosen, row):
        prompt, name = _prompt(row)
        responses = (_answer(row, "chosen"), _answer(row, "rejected"))
        return prompt, responses, (1.0, 0.0), (name, *used)
    good, bad = _dialogue(chosen), _dialogue(rejected)
    if bad[:-1] != good[:-1]:
        raise FeedbackError("chosen and rejected answer different prompts")
    if "prompt" in row:
        _check_same_prompt(row, good[:-1])
    return good[:-1], (good[-1]["content"], bad[-1]["content"]), (1.0, 0.0), ("prompt", *used)


def _ranking(row: Mapping[str, Any]) -> Parts:
    """responses, and `ranks` (1 is best, ties allowed) or `ranking` (indices, best first)."""
    prompt, asked = _prompt(row)
    responses = _answer_list(row, "responses")
    name = "ranks" if "ranks" in row else "ranking"
    ranks = [number(rank) for rank in _list(row, name, len(responses))]
    if name == "ranking":
        if sorted(ranks) != list(range(len(responses))):
            raise FeedbackError(
                f"ranking {row[name]} is no order of the {len(responses)} responses, counted from 0"
            )
        ranks = [ranks.index(i) + 1.0 for i in range(len(responses))]
    return prompt, responses, [-rank for rank in ranks], (asked, "responses", name)


def _rating(row: Mapping[str, Any]) -> Parts:
    """responses and ratings; one response and its rating; or UltraFeedback's completions."""
    prompt, asked = _prompt(row)
    if "responses" in row:
        responses = _answer_list(row, "responses")
        ratings = [number(rating) for rating in _list(row, "ratings", len(responses))]
        return prompt, responses, ratings, (asked, "responses", "ratings")
    if "completions" in row:  # they stay in the details: they tell more than a number each
        completions = _list(row, "completions")
        if not all(isinstance(completion, Mapping) for completion in completions):
            raise FeedbackError("field 'completions' is not a list of objects")
        responses = tuple(_answer(completion, "response") for completion in completions)
        return prompt, responses, [_overall(each) for each in completions], (asked,)
    rating = number(_need(row, "rating"))
    return prompt, (_answer(row, "response"),), [rating], (asked, "response", "rating")


def _thumbs(row: Mapping[str, Any]) -> Parts:
    """responses and labels, or one `response` (or `completion`) and its `label`.

    Labels are true or false, or the share of thumbs up.
    """
    prompt, asked = _prompt(row)
    if "responses" in row:
        responses = _answer_list(row, "responses")
        labels, used = _list(row, "labels", len(responses)), ("responses", "labels")
    else:
        name = "completion" if "completion" in row else "response"
        responses = (_answer(row, name),)
        labels, used = [_need(row, "label")], (name, "label")
    if not all(isinstance(label, bool | int | float) and 0 <= label <= 1 for label in labels):
        raise FeedbackError(f"labels {labels} are not true or false, nor between 0 and 1")
    return prompt, responses, [float(label) for label in labels], (asked, *used)


def _correction(row: Mapping[str, Any]) -> Parts:
    """response, and `edited` (or `edit`, or `correction`), which is better."""
    prompt, asked = _prompt(row)
    name = next((n for n in ("edited", "edit", "correction") if n in row), "edited")
    responses = (_answer(row, name), _answer(row, "response"))
    return prompt, responses, (1.0, 0.0), (asked, name, "response")


READERS: dict[str, Callable[[Mapping[str, Any]], Parts]] = {
    "comparison": _comparison,
    "ranking": _ranking,
    "rating": _rating,
    "thumbs": _thumbs,
    "correction": _correction,
}


def guess_kind(row: Mapping[str, Any]) -> str:
    """Return the kind whose fields a row has."""
    if "chosen" in row and "rejected" in row:
        return "comparison"
    if row.keys() & {"edited", "edit", "correction"}:
        return "correction"
    if row.keys() & {"ranks", "ranking"}:
        return "ranking"
    if row.keys() & {"label", "labels"}:
        return "thumbs"
    if row.keys() & {"completions", "ratings", "rating"}:
        return "rating"
    raise FeedbackError(
        f"the fields {', '.join(row)} are none of the kinds {', '.join(READERS)}: see llm/data/"
        "feedback_rows.py for their fields, or rename them with field_names"
    )


# --- Parts ----------------------------------------------------------------------------------


def _prompt(row: Mapping[str, Any]) -> tuple[Messages, str]:
    """Return the prompt and the name of its field: a text, hh-rlhf's text, or messages."""
    name = "instruction" if "instruction" in row and "prompt" not in row else "prompt"
    value = _need(row, name)
    if not isinstance(value, str):
        return _messages(value), name
    if value.startswith(_HUMAN) and value.rstrip().endswith(_ASSISTANT):
        return _messages(_turns(value)[:-1]), name
    if not value.strip():
        raise FeedbackError("the prompt is empty")
    return _messages([{"role": "user", "content": value}]), name


def _is_answer(chosen: Any, row: Mapping[str, Any]) -> bool:
    """Whether `chosen` answers the row's prompt; otherwise it is a whole dialogue."""
    if not isinstance(chosen, str):
        return len(_messages(chosen)) == 1
    asked = row.get("prompt", row.get("instruction"))
    return asked is not None and not (isinstance(asked, str) and chosen.startswith(_HUMAN))


def _check_same_prompt(row: Mapping[str, Any], prompt: Messages) -> None:
    asked, _ = _prompt(row)
    # A text is one turn of a longer dialogue, often its first.
    turns = [message["content"].strip() for message in prompt]
    is_turn = isinstance(row["prompt"], str) and asked[-1]["content"].strip() in turns
    if asked != prompt and not is_turn:
        raise FeedbackError("the prompt is not the one that chosen and rejected answer")


def _dialogue(value: Any) -> Messages:
    """Return a dialogue that ends with an answer: messages, or hh-rlhf's text."""
    messages = _messages(_turns(value) if isinstance(value, str) else value)
    if messages[-1]["role"] != "assistant" or len(messages) < 2:
        raise FeedbackError("the dialogue does not end with an answer to something")
    return messages


def _turns(text: str) -> list[dict[str, str]]:
    """Return the turns of hh-rlhf's text, without the space around them."""
    before, *pieces = re.split(r"\n\n(Human|Assistant):", text)
    if not pieces:
        raise FeedbackError("the dialogue has no 'Human:' and 'Assistant:', and no prompt")
    if before.strip():
        raise FeedbackError(f"the dialogue begins with {before[:40]!r}, before anybody's turn")
    turns = zip(pieces[::2], pieces[1::2], strict=True)
    return [{"role": _SPEAKERS[who], "content": said.strip()} for who, said in turns]


def _messages(value: Any) -> Messages:
    try:
        return check_messages(value)
    except (TypeError, ValueError) as error:
        raise FeedbackError(str(error)) from error


def _overall(completion: Mapping[str, Any]) -> float:
    """Return a completion's overall score, or the mean of its annotations' ratings."""
    if completion.get("overall_score") is not None:
        return number(completion["overall_score"])
    annotations = completion.get("annotations")
    aspects = annotations.values() if isinstance(annotations, Mapping) else ()
    given = [aspect.get("Rating") for aspect in aspects if isinstance(aspect, Mapping)]
    ratings = [number(rating) for rating in given if rating not in (None, "N/A")]
    if not ratings:
        raise FeedbackError("a completion has neither overall_score nor annotations with ratings")
    return statistics.mean(ratings)


def plain(value: Any) -> Any:
    """Return a value as JSON has it: TFDS gives bytes and NumPy's scalars and arrays."""
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise FeedbackError(f"invalid UTF-8, byte {error.start}") from error
    if isinstance(value, str) and not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise FeedbackError("not Unicode: half of a surrogate pair") from error
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, Mapping):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def _need(row: Mapping[str, Any], name: str) -> Any:
    if row.get(name) is None:
        raise FeedbackError(f"no field {name!r}")
    return row[name]


def _answer(row: Mapping[str, Any], name: str) -> str:
    """Return a field's text; a list of the assistant's one message is one too."""
    return _answer_text(_need(row, name), name)


def _answer_list(row: Mapping[str, Any], name: str) -> tuple[str, ...]:
    return tuple(_answer_text(value, name) for value in _list(row, name))


def _answer_text(value: Any, name: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list | Mapping):
        messages = _messages(value)
        if [message["role"] for message in messages] == ["assistant"]:
            return messages[0]["content"]
        raise FeedbackError(f"field {name!r} is not one message of the assistant's")
    raise FeedbackError(f"field {name!r} is {type(value).__name__}, not text")


def _list(row: Mapping[str, Any], name: str, length: int | None = None) -> list[Any]:
    """Return a field that is a list, with one value a response if their number is given."""
    values = _need(row, name)
    if not isinstance(values, list):
        raise FeedbackError(f"field {name!r} is {type(values).__name__}, not a list")
    if length is not None and len(values) != length:
        raise FeedbackError(f"{length} responses and {len(values)} {name}")
    return values


def number(value: Any) -> float:
    """Return a number, or a text that is one, as a float."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise FeedbackError(f"{str(value)[:40]!r} is not a number") from error
