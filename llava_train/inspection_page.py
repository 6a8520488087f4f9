"""The HTML page of `inspect --html`: one card a record, its pictures, its prompt with the supervised text marked."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable
from pathlib import Path

from PIL import Image
from transformers import PreTrainedTokenizerBase

from llava_train.data.encode import IGNORE
from llava_train.data.pictures.media import name_of, open_picture
from llava_train.data.preparing.prepared import Row
from llava_train.data.sample import ImageRef
from llava_train.errors import RecordError
from llava_train.inspection import Run, runs

_THUMBNAIL = (224, 224)
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2rem auto; padding: 0 1rem;
  color: #1c1e21; background: #fafafa; }
.record { background: #fff; border: 1px solid #ddd; border-radius: 8px; padding: 1rem 1.2rem; margin: 1.2rem 0; }
.record h2 { font-size: 1rem; margin: 0; overflow-wrap: anywhere; }
.facts { color: #606770; font-size: .85rem; margin: .2rem 0 .8rem; overflow-wrap: anywhere; }
.pictures { display: flex; flex-wrap: wrap; gap: .6rem; margin-bottom: .8rem; }
figure { margin: 0; max-width: 224px; } figcaption { font-size: .75rem; color: #606770; overflow-wrap: anywhere; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; color: #606770; font-size: .85rem; }
mark { background: #c9f2d0; color: #0b3d16; border-radius: 3px; }
.image { background: #e7e9ff; color: #30348f; border-radius: 3px; padding: 0 .3em; }
.fault { color: #b00020; }
"""


def write_page(path: Path, title: str, rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase, image_id: int) -> int:
    """Write the page; returns how many records it shows. The page needs nothing beside it."""
    cards = [_card(row, tokenizer, image_id) for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body><h1>{html.escape(title)}</h1>"
        f"<p>{len(cards)} records. <mark>Marked</mark> text is supervised; "
        '<span class="image">image</span> stands for the tokens of a picture.</p>\n'
        + "\n".join(cards)
        + "</body></html>\n",
        encoding="utf-8",
    )
    return len(cards)


def _card(row: Row, tokenizer: PreTrainedTokenizerBase, image_id: int) -> str:
    supervised = int((row.labels != IGNORE).sum())
    facts = (
        f"source {row.source} · {row.place} · {len(row.input_ids):,} tokens · {supervised:,} supervised · "
        f"{len(row.images)} pictures of {sum(row.image_tokens):,} tokens"
    )
    pictures = "".join(_figure(ref, row) for ref in row.images)
    text = "".join(_span(run, tokenizer) for run in runs(row, image_id))
    return (
        f'<section class="record"><h2>{html.escape(row.id)}</h2><p class="facts">{html.escape(facts)}</p>'
        f'<div class="pictures">{pictures}</div><pre>{text}</pre></section>'
    )


def _span(run: Run, tokenizer: PreTrainedTokenizerBase) -> str:
    if run.image_tokens:
        return "".join(f'<span class="image">image: {tokens} tokens</span>' for tokens in run.image_tokens)
    text = html.escape(tokenizer.decode(run.ids, skip_special_tokens=False))
    return f"<mark>{text}</mark>" if run.supervised else text


def _figure(ref: ImageRef, row: Row) -> str:
    name = name_of(ref, row.media) + (f", frame {ref.at + 1} of {ref.size}" if ref.kind == "frame" else "")
    try:
        image = open_picture(ref, row.media)
    except RecordError as error:
        return f'<figure><figcaption class="fault">{html.escape(str(error))}</figcaption></figure>'
    size = f"{image.width} x {image.height}"
    source = _data_url(image)
    return f'<figure><img src="{source}" alt=""><figcaption>{html.escape(name)} ({size})</figcaption></figure>'


def _data_url(image: Image.Image) -> str:
    small = image.copy()
    small.thumbnail(_THUMBNAIL)
    stream = io.BytesIO()
    small.save(stream, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()
