"""Preparing as `train` and the command line do it: through a recipe, on real files."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from llava_train import load_recipe, prepare
from llava_train.data.preparing import pieces, pool
from llava_train.data.preparing.composition import composition_table
from llava_train.data.records import jsontext
from llava_train.errors import DataError, RecipeError, TrainingError
from tests import tiny


def change(workplace: Path, edit: Any) -> Path:
    """Apply `edit` to the list of records and write it back."""
    file = workplace / "data" / "data.json"
    records = json.loads(file.read_text())
    edit(records)
    file.write_text(json.dumps(records))
    return file


def source(workplace: Path, **settings: Any) -> list[str]:
    """Overrides that make the data file the one source, with these settings."""
    return [f"data.train={json.dumps([{'path': f'{workplace}/data/data.json', **settings}])}"]


def stamps(workplace: Path) -> dict[str, int]:
    """When each finished piece (its `.json` is written last) was written."""
    finished = (workplace / "prepared" / "pieces").glob("[!.]*.json")
    return {file.stem: file.with_suffix(".arrow").stat().st_mtime_ns for file in finished}


def test_a_set_is_made_once_and_found_again(workplace: Path) -> None:
    recipe = load_recipe(tiny.make_recipe(workplace))
    first = prepare(recipe)
    before = stamps(workplace)
    made = (first.train.folder / "prepared.json").stat().st_mtime_ns
    again = prepare(recipe)
    assert again.train.folder == first.train.folder
    assert (first.train.folder / "prepared.json").stat().st_mtime_ns == made
    assert stamps(workplace) == before
    assert len(first.train) == 24
    row = first.train.row(3)
    assert (row.id, row.place) == ("r3", f"{workplace}/data/data.json[3]")
    assert len(row.input_ids) == len(row.labels) == first.train.lengths[3]
    assert [image.path for image in row.images] == ["3.png"]


@pytest.mark.parametrize("what", ["data", "template", "max_length", "image_tokens", "exif_orientation"])
def test_any_input_that_changes_makes_another_set(workplace: Path, what: str) -> None:
    path = tiny.make_recipe(workplace)
    before = prepare(load_recipe(path)).train.fingerprint
    overrides = {
        "template": ["data.template=chatml"],
        "max_length": ["data.max_length=200"],
        "image_tokens": ["model.connector=qformer", "model.connector_options={num_queries: 2}"],
        "exif_orientation": ["data.exif_orientation=true"],
    }.get(what, [])
    if what == "data":
        change(workplace, lambda records: records[1].update(id="another"))
    assert prepare(load_recipe(path, overrides)).train.fingerprint != before


def test_what_does_not_shape_a_row_changes_nothing(workplace: Path) -> None:
    path = tiny.make_recipe(workplace)
    before = prepare(load_recipe(path)).train.fingerprint
    changed = [*source(workplace, repeat=2, cap=9, name="other"), "optimization.learning_rate=1", "seed=9"]
    assert prepare(load_recipe(path, changed)).train.fingerprint == before


def test_a_change_rebuilds_only_the_pieces_it_touches(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsontext, "PIECE_RECORDS", 4)
    path = tiny.make_recipe(workplace)
    prepare(load_recipe(path))
    before = stamps(workplace)
    assert len(before) == 6
    change(workplace, lambda records: records[9]["conversations"][1].update(value="Changed."))
    prepared = prepare(load_recipe(path))
    after = stamps(workplace)
    assert len(after) == 7
    assert all(after[name] == stamp for name, stamp in before.items())
    assert [row for row in range(24) if prepared.train.row(row).place != f"{workplace}/data/data.json[{row}]"] == []


BAD = {
    0: (lambda r, w: r.update(image="nowhere.png"), "image_missing", "no such image"),
    2: (lambda r, w: r.update(conversations=[]), "no_turns", "has no turns"),
    5: (lambda r, w: r["conversations"][1].update(value="</s>"), "control_token", "control token"),
    6: (lambda r, w: (w / "data" / "6.png").write_text("no picture"), "image_unreadable", "6.png"),
    7: (lambda r, w: r["conversations"][0].update(value="no marker"), "marker_count", "0 <image> markers"),
    8: (lambda r, w: r.update(id="r3"), "duplicate_id", "the same id as"),
    10: (lambda r, w: r["conversations"].reverse(), "role_order", "ends without an answer"),
    11: (lambda r, w: (w / "data" / "11.png").write_bytes(b""), "image_empty", "11.png"),
}


def spoil(workplace: Path) -> None:
    def edit(records: list[dict]) -> None:
        for index, (make, _, _) in BAD.items():
            make(records[index], workplace)

    change(workplace, edit)


def test_all_bad_records_are_named_together(workplace: Path) -> None:
    spoil(workplace)
    with pytest.raises(DataError) as caught:
        prepare(load_recipe(tiny.make_recipe(workplace)))
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{len(BAD)} of 24 records cannot be used"
    for index, (_, cause, told) in BAD.items():
        identity = "r3" if index == 8 else f"r{index}"
        assert any(f"data.json[{index}] (id {identity})" in line and told in line for line in lines), (index, lines)
        assert any(line.strip() == f"{cause}: 1" for line in lines), (cause, lines)
    listed = [json.loads(line) for line in (workplace / "prepared" / "faults.jsonl").read_text().splitlines()]
    assert sorted(row["cause"] for row in listed) == sorted(cause for _, cause, _ in BAD.values())
    assert not any((workplace / "prepared").glob("*/prepared.json"))


def test_skipped_records_are_counted_and_listed(workplace: Path) -> None:
    spoil(workplace)
    recipe = load_recipe(tiny.make_recipe(workplace), source(workplace, policy="skip", max_skipped=0.5))
    prepared = prepare(recipe).train
    (counted,) = prepared.info["sources"]
    assert counted["skipped"] == {cause: 1 for _, cause, _ in BAD.values()}
    assert counted["read"] == 24 == counted["kept"] + sum(counted["skipped"].values())
    assert counted["kept"] == counted["samples"] == len(prepared) == 24 - len(BAD)
    skipped = [json.loads(line) for line in (prepared.folder / "skipped.jsonl").read_text().splitlines()]
    assert {row["place"] for row in skipped} == {f"{workplace}/data/data.json[{index}]" for index in BAD}
    ids = [prepared.row(row).id for row in range(len(prepared))]
    assert ids == [f"r{index}" for index in range(24) if index not in BAD]


def test_skipping_stops_above_its_share(workplace: Path) -> None:
    spoil(workplace)
    path = tiny.make_recipe(workplace)
    with pytest.raises(DataError, match=r"8 bad records are 33.33% of it, more than max_skipped 0.10%"):
        prepare(load_recipe(path, source(workplace, policy="skip")))


@pytest.mark.parametrize("name", ["../data.json", "/etc/passwd", "http://127.0.0.1/a.png", "a\0b.png", ".", "pipe"])
@pytest.mark.parametrize("verify", ["none", "exists", "header", "decode"])
def test_what_leads_outside_is_never_skipped(workplace: Path, name: str, verify: str) -> None:
    if name in (".", "pipe") and verify == "none":
        return  # not looked at
    os.mkfifo(workplace / "data" / "pipe")
    change(workplace, lambda records: records[0].update(image=name))
    path = tiny.make_recipe(workplace)
    with pytest.raises(DataError, match="which no policy may skip"):
        prepare(load_recipe(path, source(workplace, policy="skip", max_skipped=1, verify=verify)))


def test_links_are_admitted_by_name_alone(workplace: Path) -> None:
    (workplace / "elsewhere.png").write_bytes((workplace / "data" / "0.png").read_bytes())
    (workplace / "data" / "0.png").unlink()
    (workplace / "data" / "0.png").symlink_to(workplace / "elsewhere.png")
    (workplace / "linked").symlink_to(workplace / "data")
    path = tiny.make_recipe(workplace)
    with pytest.raises(DataError, match="leads outside the image root"):
        prepare(load_recipe(path))
    root = str(workplace / "linked")
    assert len(prepare(load_recipe(path, source(workplace, allow_links=True, image_root=root))).train) == 24


@pytest.mark.parametrize(
    ("verify", "missing", "cut"), [("none", 0, 0), ("exists", 1, 0), ("header", 1, 0), ("decode", 1, 1)]
)
def test_pictures_are_looked_at_as_closely_as_asked(workplace: Path, verify: str, missing: int, cut: int) -> None:
    (workplace / "data" / "0.png").unlink()
    content = (workplace / "data" / "23.png").read_bytes()
    (workplace / "data" / "23.png").write_bytes(content[: len(content) // 2])
    settings = source(workplace, verify=verify, policy="skip", max_skipped=1)
    info = prepare(load_recipe(tiny.make_recipe(workplace), settings)).train.info
    skipped = info["sources"][0]["skipped"]
    assert (skipped.get("image_missing", 0), skipped.get("image_unreadable", 0)) == (missing, cut)


def test_a_piece_with_faults_is_kept_unless_they_are_mended(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsontext, "PIECE_RECORDS", 4)
    spoil(workplace)
    path = tiny.make_recipe(workplace)
    with pytest.raises(DataError):
        prepare(load_recipe(path))
    before = stamps(workplace)
    with pytest.raises(DataError, match=f"{len(BAD)} of 24"):
        prepare(load_recipe(path))
    assert stamps(workplace) == before
    shutil.copy(workplace / "data" / "1.png", workplace / "data" / "6.png")
    with pytest.raises(DataError, match=f"{len(BAD) - 1} of 24"):
        prepare(load_recipe(path))
    assert [name for name, stamp in stamps(workplace).items() if stamp != before[name]] != []
    assert sum(stamp != before[name] for name, stamp in stamps(workplace).items()) == 1


def test_settings_of_a_set_are_those_of_the_recipe(workplace: Path) -> None:
    """Nothing that a source says is taken from an older set of the same rows."""
    path = tiny.make_recipe(workplace)
    prepare(load_recipe(path))
    before = stamps(workplace)
    square = prepare(load_recipe(path, source(workplace, image_aspect_ratio="square", name="new"))).train
    assert (square.row(0).aspect_ratio, square.row(0).source) == ("square", "new")
    assert prepare(load_recipe(path, source(workplace, name="newer"))).train.row(0).source == "newer"
    assert stamps(workplace) == before
    change(workplace, lambda records: records[0].update(image="gone.png"))
    assert len(prepare(load_recipe(path, source(workplace, policy="skip", max_skipped=0.5))).train) == 23
    with pytest.raises(DataError, match="more than max_skipped"):
        prepare(load_recipe(path, source(workplace, policy="skip")))


def test_a_picture_that_is_there_again_is_seen(workplace: Path) -> None:
    content = (workplace / "data" / "0.png").read_bytes()
    (workplace / "data" / "0.png").unlink()
    path = tiny.make_recipe(workplace)
    with pytest.raises(DataError, match="image_missing: 1"):
        prepare(load_recipe(path))
    (workplace / "data" / "0.png").write_bytes(content)
    recipe = load_recipe(path)
    assert len(prepare(recipe).train) == 24
    (workplace / "data" / "0.png").unlink()
    assert len(prepare(recipe).train) == 24, "a finished set is believed"
    with pytest.raises(DataError, match="image_missing: 1"):
        prepare(recipe, rebuild=True)


def test_doubles(workplace: Path) -> None:
    def edit(records: list[dict]) -> None:
        records.append(dict(records[3]))
        records.append({**records[4], "id": "new"})
        records.append({**records[5], "conversations": records[6]["conversations"]})

    change(workplace, edit)
    path = tiny.make_recipe(workplace)
    dropped = {"id": [24, 26], "content": [9, 14, 19, 24, 25], "allow": []}
    for duplicates, rows in dropped.items():
        settings = source(workplace, duplicates=duplicates, policy="skip", max_skipped=1)
        prepared = prepare(load_recipe(path, settings)).train
        places = {prepared.place(row) for row in range(len(prepared))}
        assert {f"{workplace}/data/data.json[{row}]" for row in range(27)} - places == {
            f"{workplace}/data/data.json[{row}]" for row in rows
        }
        assert prepared.row(len(prepared) - 1).place == prepared.place(len(prepared) - 1)


def test_notes_are_counted_over_sources(workplace: Path) -> None:
    folder = workplace / "data"
    (folder / "0.png").rename(folder / "0.jpg")
    Image.new("RGB", (9, 9)).save(folder / "1.gif", save_all=True, append_images=[Image.new("RGB", (9, 9), "red")])
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (9, 6)).save(folder / "2.jpg", exif=exif)
    names = {0: "0.jpg", 1: "1.gif", 2: "2.jpg"}
    change(workplace, lambda records: [records[index].update(image=name) for index, name in names.items()])
    twice = [{"path": f"{folder}/data.json"}, {"path": f"{folder}/data.json"}]
    info = prepare(load_recipe(tiny.make_recipe(workplace, data__train=twice))).train.info
    for source in info["sources"]:
        assert source["notes"] == {"wrong_extension": 1, "animated": 1, "exif_orientation": 1}
    assert [source["name"] for source in info["sources"]] == [f"{folder}/data.json", f"{folder}/data.json (2)"]
    assert "2 wrong_extension, 2 animated, 2 exif_orientation" in composition_table(info)


def test_doubles_by_content_look_into_containers(workplace: Path) -> None:
    """Two shards with the same words at the same rows are no doubles unless their pictures are."""
    pictures = {name: (workplace / "data" / f"{name}.png").read_bytes() for name in (0, 1)}
    for shard, names in (("a", (0, 1)), ("b", (1, 1))):
        cells = [{"bytes": pictures[name], "path": None} for name in names]
        table = pa.table({"image": cells, "question": ["Which?", "Which?"], "answer": ["This.", "This."]})
        pq.write_table(table, workplace / f"{shard}.parquet")
    settings = {"path": f"{workplace}/?.parquet", "duplicates": "content", "policy": "skip", "max_skipped": 1}
    prepared = prepare(load_recipe(tiny.make_recipe(workplace, data__train=[settings], data__validation_fraction=0)))
    places = [Path(prepared.train.place(row)).name for row in range(len(prepared.train))]
    assert places == ["a.parquet[0]", "a.parquet[1]"]


def test_a_video_that_came_later_is_seen(workplace: Path) -> None:
    av = pytest.importorskip("av")
    (workplace / "videos.json").write_text(json.dumps([{"q": "What?", "a": "A field.", "video_id": "v_1"}]))
    recipe = load_recipe(
        tiny.make_recipe(workplace, data__train=[{"path": f"{workplace}/videos.json"}], data__validation_fraction=0)
    )
    with pytest.raises(DataError, match="video_missing: 1"):
        prepare(recipe)
    with av.open(str(workplace / "v_1.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width, stream.height = 32, 32
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_image(Image.new("RGB", (32, 32)))))
        container.mux(stream.encode())
    assert len(prepare(recipe).train) == 1


def test_what_was_damaged_is_made_again(workplace: Path) -> None:
    recipe = load_recipe(tiny.make_recipe(workplace))
    prepared = prepare(recipe).train
    whole = [prepared.values(row) for row in range(len(prepared))]
    (piece,) = (workplace / "prepared" / "pieces").glob("*.arrow")
    damages = {
        "cut": lambda: piece.write_bytes(piece.read_bytes()[:-9]),
        "gone": lambda: piece.unlink(),
        "piece": lambda: piece.with_suffix(".json").write_text("{"),
        "set": lambda: (prepared.folder / "prepared.json").write_text("["),
        "all": lambda: shutil.rmtree(workplace / "prepared" / "pieces"),
    }
    for name, damage in damages.items():
        damage()
        again = prepare(recipe).train
        assert [again.values(row) for row in range(len(again))] == whole, name


def test_a_mended_set_is_another_set_to_a_run(workplace: Path) -> None:
    content = (workplace / "data" / "0.png").read_bytes()
    (workplace / "data" / "0.png").unlink()
    recipe = load_recipe(tiny.make_recipe(workplace), source(workplace, policy="skip", max_skipped=1))
    before = prepare(recipe).train
    (workplace / "data" / "0.png").write_bytes(content)
    after = prepare(recipe, rebuild=True).train
    assert before.fingerprint == after.fingerprint
    assert before.contents != after.contents
    assert len(after) == len(before) + 1


def start_preparing(workplace: Path, pieces: int) -> tuple[subprocess.Popen[str], list[str]]:
    """A real `prepare` of 24,000 records by two workers, when so many pieces are done; and its command."""
    records = json.loads((workplace / "data" / "data.json").read_text())
    many = [{**records[index % 24], "id": f"m{index}"} for index in range(24_000)]
    (workplace / "data" / "data.json").write_text(json.dumps(many))
    recipe = tiny.make_recipe(workplace, data__prepare_workers=2)
    command = [sys.executable, "-m", "llava_train", "prepare", str(recipe)]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # a suite in the background ignores it
    )
    limit = time.time() + 60
    while len(stamps(workplace)) < pieces and time.time() < limit:
        time.sleep(0.05)
    return process, command


def test_a_stopped_parent_takes_its_workers_along(workplace: Path) -> None:
    process, _ = start_preparing(workplace, 2)
    process.kill()
    process.communicate(timeout=30)
    limit = time.time() + 20
    while _group_is_alive(process.pid) and time.time() < limit:
        time.sleep(0.1)
    assert not _group_is_alive(process.pid)


def _group_is_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_missing_files_are_named(workplace: Path) -> None:
    path = tiny.make_recipe(workplace)
    with pytest.raises(DataError, match="no such file"):
        prepare(load_recipe(path, ["data.train=[{path: nowhere.json}]"]))
    with pytest.raises(DataError, match="no such image root"):
        prepare(load_recipe(path, source(workplace, image_root="nowhere")))
    with pytest.raises(RecipeError, match="no source"):
        prepare(load_recipe(path, ["data.train=[]"]))
    with pytest.raises(DataError, match="no such file"):
        prepare(load_recipe(path, [f"data.train=[{{path: '{workplace}/data/*.jsonl'}}]"]))


def test_held_out_samples_are_not_trained_on(workplace: Path) -> None:
    prepared = prepare(load_recipe(tiny.make_recipe(workplace)))
    assert len(prepared.validation_rows) == 5
    train_rows = np.concatenate([part.rows for part in prepared.mixture.parts])
    assert not set(train_rows) & set(prepared.validation_rows)
    assert sorted([*train_rows, *prepared.validation_rows]) == list(range(24))
    file = workplace / "data" / "data.json"
    recipe = load_recipe(
        tiny.make_recipe(workplace), ["data.validation_fraction=0", f"data.validation=[{{path: '{file}'}}]"]
    )
    assert len(prepare(recipe).validation_rows) == 24
    capped = load_recipe(
        workplace / "recipe.yaml", ["data.validation_fraction=0", f"data.validation=[{{path: '{file}', cap: 7}}]"]
    )
    assert len(prepare(capped).validation_rows) == 7


def test_a_fraction_is_held_out_of_each_source(workplace: Path) -> None:
    shutil.copy(workplace / "data" / "data.json", workplace / "data" / "again.json")
    both = [{"path": f"{workplace}/data/{name}.json"} for name in ("data", "again")]
    prepared = prepare(load_recipe(tiny.make_recipe(workplace), [f"data.train={json.dumps(both)}"]))
    held = prepared.train.source_of[prepared.validation_rows]
    assert [(held == number).sum() for number in (0, 1)] == [5, 5]


def test_a_pool_makes_the_set_that_one_process_makes(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsontext, "PIECE_RECORDS", 5)
    path = tiny.make_recipe(workplace)
    sets = []
    for workers in (1, 2):
        overrides = [f"data.prepare_workers={workers}", f"data.cache_dir={workplace}/cache{workers}"]
        sets.append(prepare(load_recipe(path, overrides)).train)
    assert sets[0].info == sets[1].info
    for row in range(24):
        assert sets[0].values(row) == sets[1].values(row)


def test_a_worker_that_dies_is_told_and_what_is_done_is_kept(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsontext, "PIECE_RECORDS", 4)
    whole = pieces.make_piece

    def dies(piece: Any, *rest: Any) -> Any:
        if piece.first == 12:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(piece, *rest)

    monkeypatch.setattr(pool, "make_piece", dies)
    path = tiny.make_recipe(workplace)
    with pytest.raises(TrainingError, match=r"a worker process died while preparing .*data\.json from record"):
        prepare(load_recipe(path, ["data.prepare_workers=2"]))
    before = stamps(workplace)
    monkeypatch.setattr(pool, "make_piece", whole)
    assert len(prepare(load_recipe(path, ["data.prepare_workers=2"])).train) == 24
    after = stamps(workplace)
    assert all(after[name] == stamp for name, stamp in before.items())


def test_ctrl_c_keeps_what_is_done(workplace: Path) -> None:
    process, command = start_preparing(workplace, 3)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert "the same command goes on" in err
    assert "Traceback" not in err
    before = stamps(workplace)
    assert 3 <= len(before) < 12
    assert not list((workplace / "prepared" / "pieces").glob(".*"))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert json.loads(done.stdout)["samples"] == 24_000, done.stderr
    assert all(stamps(workplace)[name] == stamp for name, stamp in before.items())
