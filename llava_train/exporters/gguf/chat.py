"""The chat template in a GGUF file, and what stands in a text for a picture there."""

from __future__ import annotations

from llava_train.data.templates.template import has_marks, portable
from llava_train.inference import message, render
from llava_train.model.assemble import Assembly

MARKER = "<__media__>"
"""What llama.cpp replaces by a picture; its server writes some letters of its own between the underscores."""

_NEWLINES = """\
{%- set marked = namespace(messages=[], text='', last='') -%}
{%- for message in messages -%}
{%- for piece in message['content'].split('__>') -%}
{%- if loop.first -%}
{%- set marked.text = piece -%}
{%- elif '<__media' in marked.last and piece and not piece.startswith('\\n') -%}
{%- set marked.text = marked.text + '__>\\n' + piece -%}
{%- else -%}
{%- set marked.text = marked.text + '__>' + piece -%}
{%- endif -%}
{%- set marked.last = piece -%}
{%- endfor -%}
{%- set marked.messages = marked.messages + [{'role': message['role'], 'content': marked.text}] -%}
{%- endfor -%}
{%- set messages = marked.messages -%}
"""
"""Our data have a newline behind a picture; llama.cpp joins its marker and the text without one."""


def chat_template(assembly: Assembly) -> str | None:
    """The template for llama.cpp; None for one that drops what users say, and with it the marker (`plain`)."""
    if "Hello" not in render(assembly, [message("user", "Hello", 1)]):
        return None
    template = assembly.template
    return portable(_NEWLINES + template) if has_marks(template) else template
