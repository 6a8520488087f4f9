"""See what a recipe trains on: which records, their tokens, which of them are supervised, where pictures stand."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from llava_train.data.encode import IGNORE
from llava_train.data.preparing.prepared import Origin, Row, as_row
from llava_train.data.preparing.rows import Fault, Job, Keeper, rows_of
from llava_train.data.preparing.source import Source
from llava_train.data.reading import find_format, read_entries
from llava_train.errors import RecipeError, RecordError
from llava_train.recipe import Recipe
from llava_train.registry import suggest
from llava_train.training.material import prepare, sources_of

_CHUNK = 64


@dataclass(frozen=True)
class Choice:
    """Which records to show: the first ones, or those of an id or source; `longest` or `random` of the prepared set."""

    n: int | None = None
    id: str | None = None
    source: str | None = None
    longest: bool = False
    random: bool = False


def inspect(recipe: Recipe, limit: int | None = None, choice: Choice | None = None) -> Iterator[dict[str, Any]]:
    """For each training record in order: `id, input_ids, labels, image_token_id, image_tokens`.

    Labels are unshifted, -100 where unsupervised; `image_tokens` is a list where they depend on the picture. Raises
    RecordError at the first record that cannot be used.
    """
    sources = sources_of(recipe)
    for row in choose(recipe, sources, choice or Choice(n=limit)):
        yield {
            "id": row.id,
            "input_ids": row.input_ids.tolist(),
            "labels": row.labels.tolist(),
            "image_token_id": sources[0].encoder.image_token_id,
            "image_tokens": list(row.image_tokens) if sources[0].encoder.sized else sources[0].encoder.shaping,
        }


def choose(recipe: Recipe, sources: list[Source], choice: Choice) -> Iterator[Row]:
    """The rows of a choice. In order they are read from the sources; by length or chance from the prepared set.

    Raises RecipeError for a source or an id that is not there. A record that cannot be used is a RecordError when
    its turn comes, unless its source skips such records or the choice is by id.
    """
    names = [source.name for source in sources]
    if choice.source is not None and choice.source not in names:
        raise RecipeError(f"--source {choice.source}: no such source{suggest(choice.source, names)}")
    if choice.longest or choice.random:
        yield from _from_prepared(recipe, names, choice)
        return
    chosen = [source for source in sources if choice.source in (None, source.name)]
    found = 0
    for row in islice((row for source in chosen for row in _usable(source, choice)), choice.n):
        found += 1
        yield row
    if choice.id is not None and not found:
        raise RecipeError(f"--id {choice.id}: no record of this recipe that can be used has this id")


def _usable(source: Source, choice: Choice) -> Iterator[Row]:
    for item in _read(source):
        if isinstance(item, Fault):
            if choice.id in (None, item.id) and source.policy == "error":
                raise RecordError(item.message, item.cause, item.hostile)
        elif choice.id in (None, item.id):
            yield item


def _from_prepared(recipe: Recipe, names: list[str], choice: Choice) -> Iterator[Row]:
    prepared = prepare(recipe).train
    rows = list(range(len(prepared)))
    if choice.source is not None:
        rows = prepared.rows_of_source(names.index(choice.source)).tolist()
    count = min(len(rows), 5 if choice.n is None else choice.n)
    if choice.longest:
        rows.sort(key=lambda row: (-prepared.lengths[row], row))
    else:
        rows = random.sample(rows, count)
    for row in rows[:count]:
        yield prepared.row(row)


def _read(source: Source) -> Iterator[Row | Fault]:
    """Records of a source in order, made as `prepare` makes them, pictures not looked at."""
    job = Job(find_format(source.files[0], source.format), source.encoder, source.media, verify="none")
    with tempfile.TemporaryFile() as nowhere:
        for file in source.files:
            entries = read_entries(file)
            origin = Origin(source.name, file, Path(), source.media, source.aspect_ratio)
            while chunk := list(islice(entries, _CHUNK)):
                keep = Keeper(nowhere)
                made = rows_of(chunk, file, job, keep)
                rows = {values["at"]: as_row(values, origin, source.encoder.image_token_id) for values in made.rows}
                faults = {fault.at: fault for fault in made.faults}
                for _, at in chunk:
                    row = rows.get(at)
                    yield faults[at] if row is None else replace(row, images=tuple(map(keep.bytes_of, row.images)))


def coloured(row: Row, tokenizer: PreTrainedTokenizerBase, image_token_id: int, colour: bool = True) -> str:
    """A record for the terminal: supervised text green, the rest dim, neighbouring pictures as one block.

    Without `colour` supervised text stands between >> and <<. What would act on a terminal is shown as its escape.
    """
    supervised = int((row.labels != IGNORE).sum())
    name = row.place if row.id == row.place else f"{row.id}  {row.place}"
    pieces = [_tame(f"{name}  [{row.source}]: {len(row.input_ids)} tokens, {supervised} supervised") + "\n"]
    for run in runs(row, image_token_id):
        block = bool(run.image_tokens)
        text = f"[{_block(run.image_tokens)}]" if block else _tame(tokenizer.decode(run.ids, skip_special_tokens=False))
        before, after = _MARKS[colour, run.supervised]
        pieces.append(f"{before}{text}{after}")
    return "".join(pieces)


_MARKS = {
    (True, True): ("\033[32m", "\033[0m"),
    (True, False): ("\033[2m", "\033[0m"),
    (False, True): (">>", "<<"),
    (False, False): ("", ""),
}


def _tame(text: str) -> str:
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def _block(image_tokens: tuple[int, ...]) -> str:
    each = f"{image_tokens[0]} tokens each" if len(set(image_tokens)) == 1 else f"{sum(image_tokens)} tokens"
    return f"image x{len(image_tokens)}: {each}"


@dataclass(frozen=True)
class Run:
    """Neighbouring tokens of one kind: text that is supervised or not, or pictures (`image_tokens` of each)."""

    ids: list[int]
    supervised: bool = False
    image_tokens: tuple[int, ...] = ()


def runs(row: Row, image_token_id: int) -> Iterator[Run]:
    """A row as runs, in order."""
    ids, said = row.input_ids.tolist(), (row.labels != IGNORE).tolist()
    waiting = list(row.image_tokens)
    start = 0
    for end in range(1, len(ids) + 1):
        kind = (said[start], ids[start] == image_token_id)
        if end < len(ids) and (said[end], ids[end] == image_token_id) == kind:
            continue
        if kind[1]:
            shown, left = [], end - start
            while left > 0:
                shown.append(waiting.pop(0))
                left -= shown[-1]
            yield Run(ids[start:end], image_tokens=tuple(shown))
        else:
            yield Run(ids[start:end], supervised=kind[0])
        start = end
