"""The store of features: every picture once, found again by sample, and never taken for done before it is on the disk.

Pixels stand in for features here: what is read must be what `ImageReader` gives, rounded to bf16.
"""

import json
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from llava_train import load_recipe, prepare
from llava_train.data import features as module
from llava_train.data.batch import BatchReader, ImageReader, load_steps
from llava_train.data.features import FeatureReader, FeatureStore, PictureBatches, Pictures, Writer
from llava_train.data.micro_batches import Cut, deal
from llava_train.data.pictures.processors import build_image_processor
from llava_train.data.pictures.shapes import Square
from llava_train.data.preparing.prepared import PreparedSet
from llava_train.errors import RecordError, StorageError
from tests import tiny
from tests.data.test_batch import as_llava, as_openai, as_parquet, as_tar, as_video, pictures
from tests.training.test_objective import make_records

SHAPE = (3, 28 * 28)


def sets(folder: Path, *sources: dict[str, Any]) -> tuple[PreparedSet, ImageReader]:
    path = tiny.make_recipe(folder, data__train=list(sources), data__validation_fraction=0)
    processor = build_image_processor(str(folder / "vision"), "pad", 28)
    return prepare(load_recipe(path)).train, ImageReader(Square(processor, 4))


@pytest.fixture
def several(workplace: Path) -> tuple[PreparedSet, ImageReader]:
    """Sixteen samples about three pictures: some have two, some none, many begin alike."""
    return sets(workplace, {"path": str(make_records(workplace / "data"))})


@pytest.fixture
def made(several: tuple[PreparedSet, ImageReader], tmp_path: Path) -> Iterator[FeatureReader]:
    prepared, reader = several
    found = Pictures.of(prepared, np.arange(len(prepared)))
    store = FeatureStore(tmp_path / "features", {"set": prepared.contents}, (len(found), *SHAPE))
    rows = np.flatnonzero(store.open())
    with Writer(store, rows, 0) as writer:
        for pixels in load_steps(PictureBatches(prepared, found, rows, reader, 2), 0, 0):
            writer.write(pixels.flatten(2))
    store.close()
    return FeatureReader(store, found)


def as_lists(folder: Path, content: list[bytes]) -> dict[str, Any]:
    """A cell that holds all pictures."""
    cells = [[{"bytes": picture, "path": None} for picture in content]]
    texts = [[{"user": "What is it?", "assistant": "A field."}]]
    pq.write_table(pa.table({"images": cells, "texts": texts}), folder / "lists.parquet")
    return {"path": str(folder / "lists.parquet")}


def test_a_picture_is_one_wherever_it_lies(workplace: Path) -> None:
    """Two places have the same number if reference, file and reading are the same, and only then."""
    pytest.importorskip("av")
    folder, content = workplace / "data", pictures(workplace / "data")
    ways = [make(folder, content) for make in (as_llava, as_openai, as_parquet, as_tar, as_video)]
    shutil.copy(folder / "shard-0.tar", folder / "shard-1.tar")  # the same places in another file
    ways.append(as_lists(folder, content))
    more = [
        {**ways[0], "name": "again"},
        {**ways[0], "name": "stretched", "image_aspect_ratio": "square"},
        {**ways[1], "name": "the same blobs"},
        {"path": str(folder / "shard-1.tar")},
        {"path": str(make_records(folder))},
    ]
    prepared, _ = sets(workplace, *({**source, "duplicates": "allow"} for source in [*ways, *more]))
    found = Pictures.of(prepared, np.arange(len(prepared)))
    rows = [prepared.row(sample) for sample in range(len(prepared))]
    keys = [(ref, str(row.media), row.aspect_ratio) for row in rows for ref in row.images]
    assert len(found.numbers) == len(keys) == found.starts[-1] > 40
    numbers = dict.fromkeys(keys)
    assert [list(numbers).index(key) for key in keys] == found.numbers.tolist()  # in the order in which they come
    assert len(found) == len(numbers) < len(keys)
    owners = [sample for sample, row in enumerate(rows) for _ in row.images]
    for number, (sample, place) in enumerate(found.firsts.tolist()):
        first = found.numbers.tolist().index(number)
        assert (sample, place) == (owners[first], first - found.starts[sample])


def test_doubles_that_were_dropped_have_no_place(workplace: Path) -> None:
    source = as_llava(workplace / "data", [])
    path = Path(source["path"])
    records = json.loads(path.read_text())
    path.write_text(json.dumps([records[0], records[0], *records[1:]]))
    prepared, _ = sets(workplace, {**source, "duplicates": "content", "policy": "skip", "max_skipped": 1.0})
    assert prepared.info["dropped"] == [1]
    found = Pictures.of(prepared, np.array([0, 2]))
    assert found.numbers.tolist() == [0, -1, 1]
    assert found.firsts.tolist() == [[0, 0], [2, 0]]
    with pytest.raises(ValueError, match="sample 1 was left out"):
        FeatureReader(FeatureStore(workplace, {}, (2, *SHAPE)), found).pictures(1, prepared.row(1), 0)


@pytest.mark.parametrize("cut", [Cut(4), Cut(4, budget=300), Cut(4, budget=300, share=True)])
def test_a_batch_has_features_where_it_had_pixels(several: Any, made: FeatureReader, cut: Cut) -> None:
    prepared, reader = several
    assert len(made.store.read(np.arange(3))) == len(made.places) == 3
    sent = pickle.dumps(made)  # as a process that is spawned gets it: without the map
    assert len(sent) < made.store.path.stat().st_size / 2
    again = pickle.loads(sent)
    pixels, features = BatchReader(prepared, reader, 0, cut), BatchReader(prepared, again, 0, cut)
    (batches,) = deal(range(16), prepared.sizes, 1, cut)
    seen = 0
    for batch in [*batches, deal([7, 15], prepared.sizes, 1, cut)[0][0]]:
        one, two = pixels(batch), features(batch)
        assert two.pixel_values is one.features is None
        assert torch.equal(one.input_ids, two.input_ids)
        if one.pixel_values is None:
            assert two.features is None
            continue
        assert two.features.dtype == torch.bfloat16
        assert torch.equal(two.features, one.pixel_values.flatten(2).bfloat16())
        seen += len(two.features)
    assert seen < 17 if cut.share else seen == 17


def test_what_is_missing_is_known_whatever_ended_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = FeatureStore(tmp_path, {"a": 1}, (10, 2, 3))
    values = torch.arange(60.0).view(10, 2, 3)
    assert np.flatnonzero(store.open()).tolist() == list(range(10))
    killed, failed = Writer(store, np.arange(5), 0), Writer(store, np.arange(5, 10), 1)
    monkeypatch.setattr(module, "SYNC_S", 0.0)
    killed.__enter__().write(values[:2])
    monkeypatch.setattr(module, "SYNC_S", 60.0)
    killed.write(values[2:4])  # and no more is heard of it
    with pytest.raises(KeyboardInterrupt), failed as writer:
        writer.write(values[5:6])
        writer.write(values[6:8])
        raise KeyboardInterrupt
    missing = np.flatnonzero(store.open())
    assert missing.tolist() == [2, 3, 4, 8, 9]
    assert np.flatnonzero(store.open()).tolist() == missing.tolist()  # rank 0 may be killed after that, too
    (tmp_path / f"{store.fingerprint}.rank-7.done").write_text("{half a fi")
    for rank, share in enumerate(np.array_split(missing, 3)):
        with Writer(store, share, rank) as writer:
            writer.write(values[share])
    store.close()
    assert not store.open().any()
    assert torch.equal(store.read(np.arange(10)).float(), values)
    about = json.loads(store.path.with_suffix(".json").read_text())
    assert (about["rows"], about["shape"], about["dtype"], about["done"]) == (10, [2, 3], "bfloat16", [[0, 10]])
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".bin", ".json"]


@pytest.mark.parametrize("damage", ["short", "long", "gone", "not json", "no list"])
def test_a_damaged_file_is_made_again(made: FeatureReader, damage: str) -> None:
    store, about = made.store, made.store.path.with_suffix(".json")
    before = {path: path.stat().st_mtime_ns for path in store.folder.iterdir()}
    assert not store.open().any()
    assert {path: path.stat().st_mtime_ns for path in store.folder.iterdir()} == before  # found, not touched
    size = store.path.stat().st_size
    if damage in ("short", "long"):
        with store.path.open("r+b") as stream:
            stream.truncate(size - 1 if damage == "short" else size + 1)
    elif damage == "gone":
        store.path.unlink()
    else:
        about.write_text("{" if damage == "not json" else '{"done": 3}')
    assert store.open().all()
    assert store.path.stat().st_size == size
    assert json.loads(about.read_text())["done"] == []


def test_no_room_is_said_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"the features of 1,000 pictures needs 2,000,\S+ bytes, .* are free"):
        FeatureStore(tmp_path / "new", {}, (1000, 10**6, 10**6)).open()
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_that_is_gone_is_told_of_its_record(several: Any, workplace: Path, workers: int) -> None:
    prepared, reader = several
    found = Pictures.of(prepared, np.arange(16))
    (workplace / "data" / "p1.png").unlink()
    batches = PictureBatches(prepared, found, np.arange(3), reader, 1)
    with pytest.raises(RecordError, match=r"several\.json\[1\] \(id s1\): .*p1\.png: no such image"):
        list(load_steps(batches, 0, workers))


def test_pictures_that_are_checked_again_are_made_again(made: FeatureReader, workplace: Path) -> None:
    cache = workplace / "prepared"
    made.store.folder.rename(cache / "features")
    (cache / "features" / "odd.json").write_text("[]")
    recipe = load_recipe(workplace / "recipe.yaml")
    prepare(recipe)
    assert len(list((cache / "features").iterdir())) == 3
    prepare(recipe, rebuild=True)
    assert [path.name for path in (cache / "features").iterdir()] == ["odd.json"]
