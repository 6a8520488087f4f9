"""The page: a question with pictures, and the answers of one model, or of two side by side."""

from __future__ import annotations

import html
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.processing_utils import save_pil_to_cache
from gradio.utils import get_upload_folder
from PIL import Image

from llava_train.chat.pictures import PictureLimits, read_picture
from llava_train.errors import DataError, LlavaTrainError
from llava_train.model.assemble import Assembly
from llava_train.web.talk import DEFAULTS, Question, Request, Settings, Talk

_LIMITS = PictureLimits(urls=False)
_MOST_PICTURES = 8
_LONGEST = 4096
_FORGOTTEN_S = 3600
"""Pictures that are older are removed from the disk."""
STYLE = "button[aria-label=Share] { display: none }"
"""Gradio's button beside pictures: it would send them to a public site."""


@dataclass
class Visit:
    """One visitor: a talk with each model, what each is still to answer, and what may yet be stopped."""

    talks: tuple[Talk, ...]
    waiting: tuple[deque[Request], ...]
    open: list[Request] = field(default_factory=list)

    def request(self, question: Question | None) -> None:
        """Ask every model."""
        request = Request(question)
        self.open.append(request)
        for each in self.waiting:
            each.append(request)

    def stop(self) -> None:
        """Nobody wants the answers any more that were asked for so far."""
        for each in self.open:
            each.stopped.set()
        self.open.clear()


def build_page(models: Sequence[tuple[str, Assembly]], settings: Settings = DEFAULTS) -> gr.Blocks:
    """The page for one or two models, each with its name. Visitors share the models, one answer at a time."""
    with gr.Blocks(title="llava-train", analytics_enabled=False, delete_cache=(_FORGOTTEN_S, _FORGOTTEN_S)) as page:
        visit = gr.State(time_to_live=24 * 3600)
        with gr.Row():
            chats = [_chat(name) for name, _ in models]
        question = gr.MultimodalTextbox(
            file_types=["image"],
            file_count="multiple",
            placeholder="Ask about a picture; add pictures here, by the clip, by dropping or by pasting",
            show_label=False,
            submit_btn="Ask",
            autofocus=True,
            max_plain_text_length=1_000_000,
            elem_id="question",
        )
        with gr.Row():
            again, stop, new = (gr.Button(name) for name in ("Regenerate", "Stop", "New conversation"))
        with gr.Accordion("Settings", open=False):
            temperature = gr.Slider(0, 2, settings.temperature, step=0.05, label="Temperature (0: greedy)")
            top_p = gr.Slider(0.01, 1, settings.top_p or 1, step=0.01, label="Top-p (1: the model's own)")
            longest = gr.Slider(1, _LONGEST, settings.max_new_tokens, step=1, label="Longest answer in tokens")

        assemblies = [assembly for _, assembly in models]
        # At once for everybody. What is not queued cannot warn.
        here: dict[str, Any] = {"concurrency_limit": None, "show_progress": "hidden", "api_visibility": "private"}
        asked = question.submit(_asker(assemblies), [question, visit], [question, visit], **here)
        asked_again = again.click(_ask_again, visit, None, **here)
        stop.click(_stop, visit, None, **here)
        left = gr.on([new.click, *(chat.clear for chat in chats)], _stop, visit, None, **here)
        for number, (chat, (name, _)) in enumerate(zip(chats, models)):
            # One name, one line of visitors: a model makes one answer at a time.
            turn: dict[str, Any] = {"concurrency_id": f"model-{number}", "concurrency_limit": 1}
            shown: dict[str, Any] = {"show_progress": "minimal", "api_visibility": "private"}
            answer = _answerer(number, name if len(models) > 1 else "")
            for event in (asked, asked_again):
                event.success(answer, [visit, temperature, top_p, longest], [chat, question], **turn, **shown)
            left.success(_clearer(number), visit, chat, **turn, **shown)
    return page


def _chat(name: str) -> gr.Chatbot:
    return gr.Chatbot(
        label=name,
        height="60vh",
        # What a model or a visitor writes is text: as Markdown it could be pictures from anywhere.
        render_markdown=False,
        latex_delimiters=[],
        buttons=[],  # they would copy the text as it is escaped
        feedback_options=None,
        group_consecutive_messages=False,
    )


def _asker(assemblies: Sequence[Assembly]) -> Callable[..., Any]:
    def ask(asked: dict[str, Any], visit: Visit | None) -> tuple[Any, Visit]:
        visit = visit or _arrived(assemblies)
        try:
            visit.request(_read(asked))
        except LlavaTrainError as error:
            _warn(error)
            return gr.skip(), visit
        return {"text": "", "files": []}, visit

    return ask


def _arrived(assemblies: Sequence[Assembly]) -> Visit:
    talks = tuple(Talk(assembly, _keep) for assembly in assemblies)
    return Visit(talks, tuple(deque() for _ in talks))


def _keep(image: Image.Image) -> str:
    return save_pil_to_cache(image, get_upload_folder(), "boxes", "png")


def _read(asked: dict[str, Any]) -> Question:
    """What is in the question's box. DataError for a picture that cannot be read, and for no question."""
    text, paths = asked["text"].strip(), tuple(asked["files"])
    if not text:
        raise DataError("there is no question; write one")
    if len(paths) > _MOST_PICTURES:
        raise DataError(f"{len(paths)} pictures are too many for one question; {_MOST_PICTURES} is the most")
    return Question(text, tuple(map(_picture, paths)), paths)


def _picture(path: str) -> Image.Image:
    try:
        return read_picture(Path(path), _LIMITS)
    except DataError as error:  # where it lies is nobody's business
        raise DataError(str(error).replace(path, Path(path).name)) from error


def _ask_again(visit: Visit | None) -> None:
    if visit is None:
        gr.Warning("there is no question yet that could be answered again; ask one")
        return
    visit.request(None)


def _stop(visit: Visit | None) -> None:
    if visit is not None:
        visit.stop()


def _answerer(number: int, name: str) -> Callable[..., Iterator[tuple[Any, Any]]]:
    def answer(visit: Visit | None, temperature: float, top_p: float, longest: int) -> Iterator[tuple[Any, Any]]:
        if visit is None or not visit.waiting[number]:  # what was asked could not be
            yield gr.skip(), gr.skip()
            return
        request, talk = visit.waiting[number].popleft(), visit.talks[number]
        settings = Settings(int(longest), temperature, top_p if top_p < 1 else None)
        before = talk.length
        try:
            if not request.stopped.is_set():
                for shown in talk.answer(request, settings):
                    yield shown, gr.skip()
        except LlavaTrainError as error:
            _warn(error, name)
        asked = request.question
        if asked is None or talk.length > before:
            yield talk.shown, gr.skip()
        else:
            yield talk.shown, {"text": asked.text, "files": list(asked.paths)}

    return answer


def _clearer(number: int) -> Callable[..., Any]:
    def clear(visit: Visit | None) -> list[Any]:
        if visit is not None:
            visit.talks[number].clear()
        return []

    return clear


def _warn(error: LlavaTrainError, name: str = "") -> None:
    gr.Warning(html.escape(f"{name}: {error}" if name else str(error)))  # what is shown is HTML
