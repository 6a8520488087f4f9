"""Chat templates: one Jinja file a template, with generation marks around what the model must say.

The marks (`{% generation %}`) make labels exact in training; they are removed for export, because chat
back ends render with plain Jinja.
"""

from __future__ import annotations

import re
from pathlib import Path

from llava_train.errors import DataError
from llava_train.registry import suggest

_FOLDER = Path(__file__).parent / "templates"
_MARK = re.compile(r"\{%(-?)\s*(?:end)?generation\s*(-?)%\}")


def template_names() -> list[str]:
    """Names of the templates in the package."""
    return sorted(path.stem for path in _FOLDER.glob("*.jinja"))


def load_template(name: str, own: str | None = None) -> str:
    """The Jinja text of a template: a name of ours, a path to a `.jinja` file, or `tokenizer` for its own.

    Args:
        name: "vicuna_v1", "plain", ..., "my/template.jinja", or "tokenizer".
        own: the tokenizer's own chat template, if it has one.

    Raises:
        DataError: no such template, or one without generation marks (nothing would be supervised).
    """
    if name == "tokenizer":
        if not own:
            raise DataError("template: tokenizer: this tokenizer carries no chat template; name one of ours")
        text = own
    elif name.endswith(".jinja"):
        try:
            text = Path(name).read_text(encoding="utf-8")
        except OSError as error:
            raise DataError(f"template {name}: cannot be read: {error.strerror}") from error
    elif name in template_names():
        text = (_FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    else:
        raise DataError(f"unknown template {name!r}{suggest(name, [*template_names(), 'tokenizer'])}")
    if not _MARK.search(text):
        raise DataError(
            f"template {name}: has no {{% generation %}} marks, so no answer would be supervised; "
            f"add them, or use one of {', '.join(template_names())}"
        )
    return text


def strip_marks(text: str) -> str:
    """The same template without generation marks and without our header comment; renders the same text.

    >>> strip_marks("a{% generation %}b{% endgeneration %}")
    'ab'
    """

    def unmarked(match: re.Match[str]) -> str:
        left, right = match.groups()
        return f"{{#{left} {right}#}}" if left or right else ""

    return _MARK.sub(unmarked, re.sub(r"\A\{#-?.*?-#\}\n?", "", text, flags=re.DOTALL))


_PARTS_PREAMBLE = """\
{%- set flat = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- if message['content'] is string -%}
{%- set flat.messages = flat.messages + [message] -%}
{%- else -%}
{%- set piece = namespace(images='', text='') -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}
{%- set piece.images = piece.images + '<image>\\n' -%}
{%- elif part['type'] == 'text' -%}
{%- set piece.text = piece.text + part['text'] -%}
{%- endif -%}
{%- endfor -%}
{%- set flat.messages = flat.messages + [{'role': message['role'], 'content': piece.images + piece.text}] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = flat.messages -%}
"""


def portable(template: str) -> str:
    """The template for chat: without marks, and for messages whose content is a list of image and text parts.

    Images are written first, each followed by a newline, as training data has them. A template that was made
    for chat already (it has no marks) is returned as it is.
    """
    return _PARTS_PREAMBLE + strip_marks(template) if _MARK.search(template) else template
