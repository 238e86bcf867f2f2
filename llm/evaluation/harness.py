"""A model of ours as one of lm-evaluation-harness's, whose tasks it then answers. Third floor.

Needs the extra `[harness]`; nothing else imports this file. Texts become tokens as the harness's
own `hf` model has them, so that both give the same scores for the same weights.
"""

import functools
from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from llm.data.chat import ChatError
from llm.evaluation.batched import BatchedModel
from llm.generation.config import SamplingConfig

DEFAULT_NEW_TOKENS = 256  # what `hf` generates at most where the task does not say
# generation arguments of a task → fields of SamplingConfig
_SAMPLING = {"temperature", "top_k", "top_p", "min_p", "repetition_penalty"}

TokenRequest = tuple[tuple[str, str] | None, list[int], list[int]]  # key, context, continuation


class HarnessModel(BatchedModel, TemplateLM):
    """What `lm_eval.simple_evaluate(model=…)` asks: likelihoods and texts.

    Contexts longer than the window lose their beginning, longer texts are scored window by window.
    A request's number, on which its draws depend, is its place in its task.
    """

    # --- Tokens -------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self.tokenizer.bos_id

    @property
    def tokenizer_name(self) -> str:
        """A name for the harness's cache of rendered requests."""
        return f"ontogeny-{self.tokenizer.digest[:16]}"

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Return a text's tokens, those before it that the model expects included.

        Spelled control tokens become tokens, as a rendered chat needs it.
        """
        prefix, bos = self.tokenizer.text_prefix, self.tokenizer.decode([self.prefix_token_id])
        if add_special_tokens is False or (add_special_tokens is None and string.startswith(bos)):
            prefix = ()
        return [*prefix, *self.tokenizer.encode(string, control=True)]

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return a conversation as text, its last message left open without a generation prompt.

        A template that knows no system role gets the messages without theirs, as under `hf`.
        """
        try:
            text = self.tokenizer.render_chat(chat_history, add_generation_prompt)
        except ChatError:
            chat_history = [m for m in chat_history if m["role"] != "system"]
            text = self.tokenizer.render_chat(chat_history, add_generation_prompt)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"]
        start = text.rindex(last.strip())  # templates may trim what was said
        whole = text.startswith(last.lstrip(), start)
        return text[: start + len(last.lstrip() if whole else last.strip())]

    # --- Likelihoods --------------------------------------------------------------------------

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log-likelihood of each text, in nats, all of it scored once."""
        windows: list[TokenRequest] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            for window in get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, 1
            ):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(owner)
        totals = [0.0] * len(requests)
        scores = self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)
        for owner, (nats, _) in zip(owners, scores, strict=True):
            totals[owner] += nats
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(
        self, requests: Sequence[TokenRequest], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Return log p(continuation | context) and whether each of its tokens was the likeliest."""
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        with tqdm(total=len(requests), desc="Scoring", disable=disable_tqdm) as progress:
            for i, answer in self.score_tokens([request[1:] for request in requests]):
                answers[i] = answer
                if requests[i][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[i][0], answer)
                progress.update()
        return answers

    # --- Texts --------------------------------------------------------------------------------

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return what follows each context, up to the first of its stop strings or EOS."""
        texts = [""] * len(requests)
        plans = [self._plan(request.args[1]) for request in requests]
        with tqdm(total=len(requests), desc="Generating", disable=disable_tqdm) as progress:
            for sampling, stops in dict.fromkeys(plans):
                prompts = {
                    i: self._prompt(requests[i].args[0])
                    for i, plan in enumerate(plans)
                    if plan == (sampling, stops)
                }
                ended = functools.partial(_holds_any, stops)
                for i, text in self.generate_texts(prompts, sampling, ended):
                    texts[i] = postprocess_generated_text(text, list(stops), None)
                    self.cache_hook.add_partial("generate_until", requests[i].args, texts[i])
                    progress.update()
        return texts

    def _plan(self, given: dict[str, Any]) -> tuple[SamplingConfig, tuple[str, ...]]:
        """Return how a task wants its texts generated, and where they stop."""
        wanted = dict(normalize_gen_kwargs(given, DEFAULT_NEW_TOKENS))
        eos = self.tokenizer.decode([self.eot_token_id])
        stops = handle_stop_sequences(wanted.pop("until"), eos)
        limit = wanted.pop("max_gen_toks")
        if not wanted.pop("do_sample"):
            wanted["temperature"] = 0.0
        if unknown := sorted(set(wanted) - _SAMPLING):
            raise ValueError(
                f"generation arguments {', '.join(unknown)}: unknown here; "
                f"known are until, max_gen_toks, do_sample, {', '.join(sorted(_SAMPLING))}"
            )
        if limit >= self.max_length:
            raise ValueError(
                f"max_gen_toks={limit} leaves no room for a prompt in the model's "
                f"{self.max_length} tokens; set gen_kwargs' max_gen_toks, or max_length"
            )
        return SamplingConfig(max_new_tokens=limit, **wanted), tuple(stop for stop in stops if stop)

    def _prompt(self, text: str) -> list[int]:
        return self.tok_encode(text) or [self.prefix_token_id]


def _holds_any(stops: Sequence[str], number: int, text: str) -> bool:
    return any(stop in text for stop in stops)
