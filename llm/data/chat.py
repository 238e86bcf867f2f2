"""Chat templates: messages to text, rendered as `transformers` renders them (Jinja, sandboxed).
Templates come with tokenizers, from anywhere: they run without access to Python."""

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

Messages = Sequence[Mapping[str, Any]]  # {"role": …, "content": …}, and what the template reads

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
            messages=present, add_generation_prompt=add_generation_prompt, **variables
        )
    except (jinja2.TemplateError, TypeError) as error:
        raise ChatError(f"the chat template cannot render these messages: {error}") from error


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks what the assistant says; for the text it changes nothing."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # A block of its own scope, as in transformers: assignments inside do not leak out.
        return jinja2.nodes.Scope(body).set_lineno(line)


@functools.lru_cache(maxsize=64)
def _compile(template: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
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
