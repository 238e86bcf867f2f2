"""Chat templates: messages to text, rendered as `transformers` renders them (Jinja, sandboxed).
Templates come with tokenizers, from anywhere: they run without access to Python."""

import datetime
import functools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox

Messages = Sequence[Mapping[str, Any]]  # {"role": …, "content": …}, and what the template reads

# Unicode noncharacters, never assigned: "for internal use".
MARKS = [chr(code) for code in range(0xFDD0, 0xFDF0)]

# The template of tokenizers trained here: a role's marker, the content, the end token.
DEFAULT_CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] == 'assistant' %}
        {{- '<|assistant|>' }}
        {%- generation %}
            {{- message['content'] + eos_token }}
        {%- endgeneration %}
    {%- elif message['role'] in ['system', 'user'] %}
        {{- '<|' + message['role'] + '|>' + message['content'] + eos_token }}
    {%- else %}
        {{- raise_exception('unknown role ' + message['role'] + ': use system, user, assistant') }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>' }}
{%- endif %}
"""


class ChatError(ValueError):
    """Messages or a template that cannot be rendered."""


def render_template(
    template: str, messages: Messages, *, add_generation_prompt: bool = False, **variables: Any
) -> str:
    """Return the text of a conversation.

    Args:
      template: Jinja source, with the extensions of Hugging Face chat templates.
      messages: dicts with role and content; fields that are None count as absent.
      add_generation_prompt: end with the marker that asks for the assistant's next turn.
      **variables: what else the template reads: bos_token, eos_token, tools, …

    Raises:
      ChatError: the template is broken or refuses the messages.
    """
    if not messages:
        raise ChatError("a chat needs at least one message")
    variables = {"tools": None, "documents": None, **variables}
    present = [{k: v for k, v in message.items() if v is not None} for message in messages]
    try:
        return _compile(template).render(
            messages=present,
            add_generation_prompt=add_generation_prompt,
            range=_CountedRange(),
            **variables,
        )
    except Exception as error:  # a template is a program of somebody's: it may raise anything
        text = " ".join(str(error).split()) or type(error).__name__
        raise ChatError(f"the chat template cannot render these messages: {text:.300}") from error


def render_with_spans(
    template: str, messages: Messages, **variables: Any
) -> tuple[str, list[tuple[int, int]]]:
    """Return the text of a conversation, and from where to where in it the assistant speaks.

    Templates say so with `{% generation %}`. Without it a turn begins where the conversation before
    it ends with `add_generation_prompt`, and ends with the conversation up to it, less white space
    after an end token.

    Raises:
      ChatError: the template is broken, refuses the messages, or renders the start of this
        conversation otherwise than alone, so that the turns cannot be told apart.
    """
    if _GENERATION.search(template):
        texts = "".join(text for message in messages for text in strings(message))
        begin, end = [mark for mark in MARKS if mark not in texts][-2:]
        text = render_template(template, messages, **variables, **{_MARKS: (begin, end)})
        return _without_marks(text, begin, end)
    text, spans = render_template(template, messages, **variables), []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = ""
        if i:
            before = render_template(
                template, messages[:i], add_generation_prompt=True, **variables
            )
        through = render_template(template, messages[: i + 1], **variables)
        if not text.startswith(through) or not through.startswith(before):
            raise ChatError(
                f"turn {i + 1}: the chat template renders a conversation otherwise when it goes "
                "on; mark what the assistant says with {% generation %} … {% endgeneration %}"
            )
        end_token = variables.get("eos_token")
        said = through.rstrip() if end_token and through.rstrip().endswith(end_token) else through
        spans.append((len(before), len(said)))
    return text, spans


def strings(value: Any) -> Iterable[str]:
    """Yield every text in a message."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from strings(item)
    elif isinstance(value, Sequence):
        for item in value:
            yield from strings(item)


def map_strings(value: Any, function: Callable[[str], str]) -> Any:
    """Return a message with every text in it replaced."""
    if isinstance(value, str):
        return function(value)
    if isinstance(value, Mapping):
        return {key: map_strings(item, function) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [map_strings(item, function) for item in value]
    return value


def _without_marks(text: str, begin: str, end: str) -> tuple[str, list[tuple[int, int]]]:
    pieces, spans, length = [], [], 0
    for piece in re.split(f"([{begin}{end}])", text):
        if piece == begin:
            start = length
        elif piece == end:
            spans.append((start, length))
        else:
            pieces.append(piece)
            length += len(piece)
    return "".join(pieces), spans


_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_MARKS = "_marks_of_generation"


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks what the assistant says; the text is changed only where asked."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # A block of its own scope, as in transformers: assignments inside do not leak out.
        call = self.call_method("_said", [jinja2.nodes.ContextReference()])
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _said(self, context: jinja2.runtime.Context, caller: jinja2.runtime.Macro) -> str:
        begin, end = context.get(_MARKS, ("", ""))
        return begin + caller() + end


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja's sandbox, in which `'a' * 10**10` is refused too."""

    intercepted_binops = frozenset(("*", "**"))

    def call_binop(
        self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any
    ) -> Any:
        sizes = [x if isinstance(x, int) else len(x) if hasattr(x, "__len__") else 0
                 for x in (left, right)]  # fmt: skip
        if max(map(abs, sizes)) > _MOST_REPEATS or (operator == "**" and abs(sizes[1]) > 64):
            raise jinja2.TemplateError(f"{operator} of numbers as large as {max(sizes)}")
        return super().call_binop(context, operator, left, right)


class _CountedRange:
    """`range` in one rendering: it gives so many numbers in all, nested loops or not."""

    def __init__(self):
        self._left = _MOST_REPEATS

    def __call__(self, *arguments: int) -> range:
        numbers = range(*arguments)
        self._left -= len(numbers)
        if self._left < 0:
            raise jinja2.TemplateError(f"range gives more than {_MOST_REPEATS} numbers")
        return numbers


_MOST_REPEATS = 1_000_000


@functools.lru_cache(maxsize=64)
def _compile(template: str) -> jinja2.Template:
    environment = _Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment.from_string(template)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML, which a chat is not.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)
