"""Malformed records of every format, by the thousand, through the path that `prepare` takes.

Each is kept or is a fault with a known cause, kept and faults are all that was read, and nothing else is raised.
300 rounds in the default suite, enough for 10,000 records and more with `-m corpus`.
"""

import itertools
import json
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from llava_train.data.encode import Encoder
from llava_train.data.pictures.media import Media
from llava_train.data.preparing.pieces import make_piece
from llava_train.data.preparing.rows import Job
from llava_train.data.records.containers import CONTAINERS, detect_container
from llava_train.data.records.formats import FORMATS
from llava_train.data.sample import CAUSES
from llava_train.data.templates.fit import resolve_template
from llava_train.errors import DataError
from llava_train.model.llm import add_image_token, load_tokenizer
from llava_train.recipe import load_recipe
from llava_train.training.material import prepare
from tests import tiny

EXAMPLES = Path(__file__).parents[1] / "examples"
_numbers = itertools.count()


def valid_records() -> dict[str, list[Any]]:
    """The JSON records of the examples, and of each format without any its own shape from the tables."""
    found: dict[str, list[Any]] = {name: [] for name in FORMATS}
    for path in sorted(EXAMPLES.glob("*/*.json*")):
        if path.name != "expected.json":
            text = path.read_text(encoding="utf-8")
            rows = json.loads(text) if path.suffix == ".json" else [json.loads(x) for x in text.splitlines() if x]
            found[path.parent.name] += rows
    turns = [{"user": "Which flag?", "assistant": "The red one."}]
    found["cauldron"].append({"images": ["pictures/red.png"], "texts": turns})
    return found


VALID = valid_records()
ODD_TEXTS = [
    "", " ", "<image>", "<video>", "<image>\n<image>", "</s>", "<|im_end|>", "<s>", "\ud800", "\udcff\ud83d", "\0",
    "\x1b[31m", "\u2028", "{{ bos_token }}", "{% endgeneration %}", "../../etc/passwd", "/etc/passwd", "file:///",
    "http://127.0.0.1:1/a.png", "data:image/png;base64,AAAA", "data:image/png;base64,!", "pictures/red.png",
    "pictures/clip.mp4", "pictures", "user", "gpt", "tool", "x" * 3000, "é" * 300, "😀",
]  # fmt: skip
TEXTS = st.sampled_from(ODD_TEXTS) | st.text(st.characters(), max_size=12)  # surrogates and control characters too
NUMBERS = st.one_of(st.integers(-3, 3), st.sampled_from([10**30, -(2**63), 1e308, float("nan"), float("inf")]))
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=6,
)


def paths(value: Any) -> list[tuple[Any, ...]]:
    """Where values stand in nested lists and objects; () is the whole."""
    keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [(), *((key, *rest) for key in keys for rest in paths(value[key]))]


def put(values: Any, path: tuple[Any, ...], change: Any) -> Any:
    """A copy in which the value at `path` is `change(value)`, or is left out where that is `...`."""
    if not path:
        return change(values)
    copy: Any = dict(values) if isinstance(values, dict) else list(values)
    made = put(copy[path[0]], path[1:], change)
    if made is ...:
        del copy[path[0]]
    else:
        copy[path[0]] = made
    return copy


@st.composite
def records(draw: Any, name: str) -> Any:
    """A record of a format with up to four values replaced, left out, wrapped, doubled or added to; or anything."""
    generator = random.Random(draw(st.integers(0, 2**32)))
    if not generator.randrange(12):
        return draw(VALUES)
    record = generator.choice(VALID[name])
    for _ in range(generator.choice([0, 1, 1, 1, 2, 2, 4])):
        value, odd = draw(VALUES), generator.choice(ODD_TEXTS)
        other = generator.choice(VALID[generator.choice(sorted(VALID))])
        change = generator.choice(
            [
                lambda _, value=value: value,
                lambda _, odd=odd: odd,
                lambda _, other=other: other,
                lambda _: ...,
                lambda old: [old],
                lambda old: {"a": old},
                lambda old, odd=odd: odd + old if isinstance(old, str) else old * 2 if isinstance(old, list) else odd,
                lambda old, odd=odd, value=value: {**old, odd: value} if isinstance(old, dict) else value,
            ]
        )
        places = paths(record)
        record = put(record, generator.choice(places[1:] or places), change)
        record = None if record is ... else record
    return record


@st.composite
def files(draw: Any) -> tuple[str, str, bytes]:
    """The format that is insisted on, a name, and bytes of JSON or lines, some of them damaged."""
    generator = random.Random(draw(st.integers(0, 2**32)))
    name = generator.choice(sorted(FORMATS))
    rows = [draw(records(name)) for _ in range(generator.randint(1, 8))]
    lines = generator.random() < 0.5
    text = "\n".join(map(json.dumps, rows)) if lines else json.dumps(rows, indent=generator.choice([None, 1]))
    content = bytearray(text.encode())
    for _ in range(generator.choice([0, 0, 0, 1, 4])):
        at = generator.randrange(len(content))
        content[at : at + generator.randrange(3)] = generator.randbytes(generator.randrange(3))
    kept = generator.choice([1, 1, 1, 1, 0.5, 0.9, 0.99])
    return name, "a.jsonl" if lines else "a.json", bytes(content[: int(kept * len(content))])


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.make_tokenizer(folder)
    tokenizer = load_tokenizer(str(folder))
    add_image_token(tokenizer)
    return Encoder(tokenizer, resolve_template("vicuna_v1", tokenizer)[1], 4, 400)


def run(case: tuple[str, str, bytes], encoder: Encoder, folder: Path, counts: Counter[str]) -> None:
    """One file through the real path; `counts` gets what became of its records."""
    name, file, content = case
    path = folder / file
    path.write_bytes(content)
    media = Media(EXAMPLES, video_frames=2)
    job = Job(name, encoder, media, "decode" if len(content) % 4 == 0 else "header")
    try:
        container = CONTAINERS[detect_container(str(path))]
        pieces = list(container.cut(str(path)))
    except DataError as error:
        assert str(error).startswith(str(path))
        counts["file"] += 1
        return
    for piece in pieces:
        key = f"{next(_numbers)}"
        read = sum(1 for _ in container.read(piece))
        outcome = make_piece(piece, job, folder, key)
        assert (outcome.kept + len(outcome.faults)) == read == outcome.kept + len(outcome.faults)
        assert all(fault.message.startswith(f"{path}{fault.at}") for fault in outcome.faults)
        counts.update(fault.cause for fault in outcome.faults)
        counts["kept"] += outcome.kept
        assert set(counts) <= {*CAUSES, "kept", "file"}
        with pa.ipc.open_stream(folder / f"{key}.arrow") as stream:
            assert len(stream.read_all()) == outcome.kept
        for left in folder.glob(f"{key}.*"):
            left.unlink()


COMMON = {
    "derandomize": True,
    "deadline": None,
    "database": None,
    "suppress_health_check": list(HealthCheck),
    "phases": [Phase.generate],
}


def outcomes(examples: int, encoder: Encoder, folder: Path) -> Counter[str]:
    """What became of the records of so many generated files."""
    counts: Counter[str] = Counter()

    @settings(max_examples=examples, **COMMON)  # type: ignore[arg-type]
    @given(files())
    def every(case: tuple[str, str, bytes]) -> None:
        run(case, encoder, folder, counts)

    every()
    return counts


def test_malformed_records_are_kept_or_named(encoder: Encoder, tmp_path: Path) -> None:
    counts = outcomes(300, encoder, tmp_path)
    assert counts["kept"] > 100 and sum(counts.values()) > 600
    assert len(counts) > 12


@pytest.mark.corpus
def test_ten_thousand_malformed_records(encoder: Encoder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counts = outcomes(4000, encoder, tmp_path)
    with capsys.disabled():
        print(f"\n{sum(counts.values()):,} records: {dict(counts.most_common())}")
    assert sum(counts.values()) - counts["file"] >= 10_000
    assert set(counts) >= {
        "kept",
        "not_json",
        "not_utf8",
        "file_truncated",
        "marker_count",
        "control_token",
        "image_path",
    }


def malformed(count: int) -> Iterator[dict[str, Any]]:
    """Records about `tiny.make_data`'s pictures, each broken in one of several ways, with its id."""
    generator = random.Random(0)
    for number in range(count):
        turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Red."}]
        record: dict[str, Any] = {"id": f"bad{number}", "image": "0.png", "conversations": turns}
        ways = [
            lambda r: r.update(image="none.png"), lambda r: r.update(image=3), lambda r: r.update(conversations=[]),
            lambda r: r["conversations"].pop(), lambda r: r["conversations"][0].update({"from": "tool"}),
            lambda r: r["conversations"][1].update(value="</s>"), lambda r: r.update(conversations={"a": 1}),
            lambda r: r["conversations"][1].update(value="\ud800"), lambda r: r["conversations"][0].update(value="x"),
        ]  # fmt: skip
        ways[generator.randrange(len(ways))](record)
        yield record


def prepared(recipe: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "llava_train", "prepare", str(recipe), *overrides]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_the_command_lists_every_malformed_record(workplace: Path) -> None:
    file = workplace / "data" / "data.json"
    good = json.loads(file.read_text())
    rows = [*malformed(100), *good, *malformed(100)]
    for number, row in enumerate(rows[-100:]):
        row["id"] = f"worse{number}"
    file.write_text(json.dumps(rows))
    recipe = tiny.make_recipe(workplace)
    refused = prepared(recipe)
    assert refused.returncode == 2, refused.stderr
    assert "Traceback" not in refused.stderr
    assert f"200 of {len(rows)} records cannot be used" in refused.stderr
    for index in [*range(100), *range(len(rows) - 100, len(rows))]:
        assert f"{file}[{index}] (id {rows[index]['id']})" in refused.stderr
    source = f"data.train=[{{path: '{file}', policy: skip, max_skipped: 1}}]"
    passed = prepared(recipe, source)
    assert passed.returncode == 0, passed.stderr
    info = prepare(load_recipe(recipe, [source])).train.info
    (told,) = info["sources"]
    assert (told["read"], told["kept"]) == (len(rows), len(good))
    assert told["read"] == told["kept"] + sum(told["skipped"].values()) == info["samples"] + info["skipped"]
    assert set(told["skipped"]) <= set(CAUSES)


@pytest.mark.parametrize("image", ["http://127.0.0.1:1/a.png", "file:///etc/passwd", "../data.json", "/dev/zero"])
@pytest.mark.parametrize("verify", ["none", "header"])
def test_no_policy_skips_a_hostile_picture(workplace: Path, image: str, verify: str) -> None:
    file = workplace / "data" / "data.json"
    rows = json.loads(file.read_text())
    rows[2]["image"] = image
    file.write_text(json.dumps(rows))
    source = f"data.train=[{{path: '{file}', policy: skip, max_skipped: 1, verify: {verify}}}]"
    with pytest.raises(DataError, match="no policy may skip") as caught:
        prepare(load_recipe(tiny.make_recipe(workplace), [source]))
    assert f"{file}[2] (id r2)" in str(caught.value) and "image_path: 1" in str(caught.value)


@pytest.mark.parametrize("name", ["bytes.json", "bytes.jsonl"])
def test_bytes_that_are_not_utf8_are_the_fault_of_their_record(workplace: Path, name: str) -> None:
    rows = [json.dumps(row).encode() for row in json.loads((workplace / "data" / "data.json").read_bytes())]
    rows[3] = rows[3].replace(b"colour", b"col\xffour")
    file = workplace / "data" / name
    file.write_bytes(b"\n".join(rows) if file.suffix == ".jsonl" else b"[" + b",".join(rows) + b"]")
    source = f"data.train=[{{path: '{file}', policy: skip, max_skipped: 1}}]"
    info = prepare(load_recipe(tiny.make_recipe(workplace), [source])).train.info
    assert info["sources"][0]["skipped"] == {"not_utf8": 1}
