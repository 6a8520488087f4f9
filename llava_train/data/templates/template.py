"""Chat templates as text: one Jinja file a template, with generation marks around what the model must say.

The marks (`{% generation %}`) make labels exact in training; they are removed for export, because chat
back ends render with plain Jinja. `fit.py` says whether a template goes with a tokenizer.

The comment a template begins with may hold lines for us; a template of the user may have them too:

    stop: <|im_end|>        the text every answer ends with, inside the marks: a control token of the tokenizer,
                            or `eos_token`, or `none`. Without the line it is found by rendering a conversation.
    tokens: <|user|> <|x|>  what the tokenizer must know as single tokens, or `none`. Without the line it is all
                            that looks like a control token (`<|x|>`, `<start_of_x>`, `</s>`) in a rendering.
"""

from __future__ import annotations

import re
from pathlib import Path

from llava_train.errors import DataError
from llava_train.registry import suggest

OWN = "tokenizer"
"""The name that stands for the tokenizer's own chat template."""

_FOLDER = Path(__file__).parent
_MARK = re.compile(r"\{%(-?)\s*(?:end)?generation\s*(-?)%\}")
_HEADER = re.compile(r"\A\{#-?((?:(?!#\}).)*?)(?:-#\}\s*|#\}\n?)", re.DOTALL)
_DECLARED = re.compile(r"^\s*(stop|tokens):[ \t]*(\S.*?)\s*$", re.MULTILINE)
_ADDED = re.compile(r"\{\{-?''\}\}\{#=(.*?)=#\}.*?\{#=#\}\{\{''-?\}\}", re.DOTALL)


def template_names() -> list[str]:
    """Names of the templates in the package."""
    return sorted(path.stem for path in _FOLDER.glob("*.jinja"))


def has_marks(text: str) -> bool:
    """Whether a template says what is supervised."""
    return bool(_MARK.search(text))


def declared(text: str) -> dict[str, str]:
    """What the template's header says about `stop` and `tokens`.

    >>> declared("{#- Mine.\\nstop: <|im_end|>\\n-#}{{ messages }}")
    {'stop': '<|im_end|>'}
    """
    header = _HEADER.match(text)
    return dict(_DECLARED.findall(header.group(1))) if header else {}


def load_template(name: str, own: str | None = None) -> str:
    """The Jinja text of a template: a name of ours, a path to a `.jinja` file, or `tokenizer` for its own.

    `fit.resolve_template` does this and more for a tokenizer: `auto`, marks for its own, and checks.

    Args:
        name: "vicuna_v1", "plain", ..., "my/template.jinja", or "tokenizer".
        own: the tokenizer's own chat template, if it has one.

    Raises:
        DataError: no such template, or one without generation marks (nothing would be supervised).
    """
    if name == OWN:
        if not own:
            raise DataError("template: tokenizer: this tokenizer carries no chat template; name one of ours")
        text = own
    elif name.endswith(".jinja"):
        try:
            text = Path(name).read_text(encoding="utf-8")
        except OSError as error:
            raise DataError(f"template {name}: cannot be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise DataError(f"template {name}: is not UTF-8 text: {error}") from error
    elif name in template_names():
        text = (_FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    else:
        raise DataError(f"unknown template {name!r}{suggest(name, [*template_names(), OWN, 'auto'])}")
    if not has_marks(text):
        raise DataError(
            f"template {name}: has no {{% generation %}} marks, so no answer would be supervised; "
            f"add them, or use one of {', '.join(template_names())}"
        )
    return text


def marked_region(original: str, marked: str, left: str, right: str) -> str:
    """`marked` in place of `original`, a piece of a template's source, so that `strip_marks` brings it back.

    The empty expressions carry the whitespace control of the original (`left`, `right`: "-" or "") and keep
    Jinja from eating whitespace around the tags in between.
    """
    return f"{{{{{left}''}}}}{{#={original}=#}}{marked}{{#=#}}{{{{''{right}}}}}"


def strip_marks(text: str) -> str:
    """The same template without generation marks and without our header comment; renders the same text.

    A mark becomes an empty comment, which eats the same whitespace around it.

    >>> strip_marks("a{% generation %}b{%- endgeneration %}")
    'a{# #}b{#- #}'
    """
    text = _HEADER.sub("", _ADDED.sub(r"\1", text))
    return _MARK.sub(r"{#\1 \2#}", text)


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
    return _PARTS_PREAMBLE + strip_marks(template) if has_marks(template) else template
