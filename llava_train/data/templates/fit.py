"""Which template goes with which tokenizer, and what ends an answer: read off the tokenizer, never off a name.

The stop rule. What a template ends an answer with must be

1. supervised, that is within the generation marks, or the model never learns to stop;
2. one control token of the tokenizer: a stop of several tokens, or of ordinary text, is none for a back end;
3. the tokenizer's EOS, if that EOS is what one of our templates ends a turn with (`<|im_end|>`, `<|eot_id|>`, ..):
   such a tokenizer was made for another template.

The stop need not be the EOS otherwise: Gemma's `<eos>`, Phi-3's and Qwen's `<|endoftext|>` and Llama-3's
`<|end_of_text|>` end documents, not turns. Who generates has to stop at `stop_token` as well as at the EOS.
`stop: none` in a template's header says that it has no stop by design (`plain`: stage 1 writes captions).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from llava_train.data.templates.marking import PROBES, add_marks, control_tokens, leading_control, rendering
from llava_train.data.templates.template import OWN, declared, has_marks, load_template, template_names
from llava_train.errors import DataError

AUTO = "auto"
"""The name that stands for what `choose_template` chooses."""

_PROBE = PROBES[0]
_CONTROL_LIKE = re.compile(r"<\|[^|<>\s]+\|>|</?[a-z]+_of_[a-z]+>|</?s>")


@dataclass(frozen=True)
class _Evidence:
    """What a tokenizer shows that a template goes with; every part that is given must hold.

    Attributes:
        template: a name of ours.
        tokens: control tokens.
        written: texts in the tokenizer's own chat template.
        edges: BOS and EOS.
    """

    template: str
    tokens: tuple[str, ...] = ()
    written: tuple[str, ...] = ()
    edges: tuple[str, str] | None = None

    def holds(self, tokenizer: PreTrainedTokenizerBase, own: str) -> bool:
        return (
            set(self.tokens) <= control_tokens(tokenizer)
            and all(text in own for text in self.written)
            and self.edges in (None, (tokenizer.bos_token, tokenizer.eos_token))
        )

    def weight(self, tokenizer: PreTrainedTokenizerBase, own: str) -> tuple[bool, bool]:
        """What decides between rows that hold: the tokenizer's own chat template, then its EOS."""
        return any(text in own for text in self.tokens + self.written), tokenizer.eos_token in self.tokens


_EVIDENCE = (
    _Evidence("chatml", tokens=("<|im_start|>", "<|im_end|>")),
    _Evidence("llama3", tokens=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
    _Evidence("gemma", tokens=("<start_of_turn>", "<end_of_turn>")),
    _Evidence("phi3", tokens=("<|user|>", "<|assistant|>", "<|end|>")),
    _Evidence("llava_llama_2", written=("[INST]", "<<SYS>>")),
    _Evidence("mistral", written=("[INST]",)),
    _Evidence("mistral", tokens=("[INST]", "[/INST]")),
    _Evidence("vicuna_v1", edges=("<s>", "</s>")),
)
"""Rows of equal weight: the first counts. The sources of the tokens are in the templates' headers."""


def choose_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The template of ours that goes with a tokenizer, by its control tokens and its own chat template.

    Raises DataError, with the choices, when nothing about the tokenizer fits.
    """
    own = _own(tokenizer) or ""
    rows = [row for row in _EVIDENCE if row.holds(tokenizer, own)]
    if not rows:
        raise DataError(
            "template: auto: the tokenizer has the control tokens of no template here; "
            f"choose one of {', '.join([*template_names(), OWN])} (data.template)"
        )
    return max(rows, key=lambda row: row.weight(tokenizer, own)).template


def resolve_template(name: str, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """(name, Jinja text with marks) of a template for a tokenizer, checked.

    Args:
        name: what `load_template` takes, or `auto`. `tokenizer` gets marks where its own template has none.
        tokenizer: the tokenizer the template is for.

    Raises:
        DataError: no such template, marks that cannot be added, or a template that does not go with the tokenizer.
    """
    if name == AUTO:
        name = choose_template(tokenizer)
    own = _own(tokenizer)
    if name == OWN and own:
        try:
            own = add_marks(own, tokenizer)
        except DataError as error:
            raise DataError(
                f"template: tokenizer: generation marks cannot be added to its chat template: {error}; "
                f"{_advice(tokenizer)}"
            ) from error
    text = load_template(name, own)
    check_template(text, tokenizer, name)
    return name, text


def stop_token(template: str, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The text that ends an answer, as the template declares it or as a rendering shows it; None without one.

    Raises DataError when nothing is declared and the template cannot be rendered.
    """
    said = declared(template).get("stop")
    if said is None:
        return _found_stop(template, tokenizer)
    return {"none": None, "eos_token": tokenizer.eos_token}.get(said, said)


def check_template(template: str, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Raise DataError, with the fix, unless a template with marks goes with a tokenizer (see the stop rule above).

    Besides the stop: a template that fails, and control tokens that the tokenizer would split into text. A
    tokenizer's own template (`name` is `tokenizer`) may write what looks like a control token and is none.
    """
    fault = _fault(template, tokenizer, own=name == OWN)
    if fault:
        raise DataError(f"template {name}: {fault}; {_advice(tokenizer, but=name)}")


def _fault(template: str, tokenizer: PreTrainedTokenizerBase, own: bool) -> str | None:
    said = declared(template)
    try:
        text, marks = rendering(template, tokenizer, _PROBE)
    except DataError as error:
        return str(error)
    known = control_tokens(tokenizer)
    needed = said["tokens"].split() if "tokens" in said else _CONTROL_LIKE.findall(text)
    missing = [] if own else sorted(set(needed) - known - {"none"})
    if missing:
        return f"it writes {', '.join(missing)}, which this tokenizer does not know as single tokens"
    if said.get("stop") == "none":
        return None
    stop = stop_token(template, tokenizer)
    if not stop:
        return "no stop follows the answer inside its generation marks, so the model would never learn to stop"
    if stop not in known:
        return f"it ends an answer with {stop!r}, which is not one control token of this tokenizer"
    if not marks or not text[slice(*marks[-1])].rstrip().endswith(stop):
        return f"its generation marks do not end with its stop {stop!r}"
    eos = tokenizer.eos_token
    if eos != stop and eos in _turn_ends():
        return f"it ends an answer with {stop!r}, but this tokenizer ends a turn with its EOS {eos!r}"
    return None


def _found_stop(template: str, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """What follows an answer inside the marks; without marks, a control token that follows it."""
    text, marks = rendering(template, tokenizer, _PROBE)
    _, answer, tail = text[: marks[-1][1] if marks else None].rpartition(_PROBE[-1]["content"])
    tail = tail.strip() if answer else ""
    return leading_control(tail, tokenizer) or (tail if has_marks(template) else "") or None


def _turn_ends() -> set[str]:
    """Control tokens that our templates end a turn with; `</s>` and the like end documents too."""
    return {declared(load_template(name)).get("stop", "") for name in template_names()} - {"eos_token", "none", ""}


def _advice(tokenizer: PreTrainedTokenizerBase, but: str = "") -> str:
    """What to write instead."""
    try:
        choice = choose_template(tokenizer)
    except DataError:
        choice = but
    if choice == but:
        return f"data.template: choose one of {', '.join([*template_names(), OWN])}"
    return f"use data.template: {choice}, or auto"


def _own(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The tokenizer's own chat template; of several, its default."""
    own = tokenizer.chat_template
    return own.get("default") if isinstance(own, dict) else own
