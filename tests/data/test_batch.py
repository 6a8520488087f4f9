"""One data path: the same pictures and words give the same tensors, whatever file they came in."""

import base64
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from llava_train import load_recipe, prepare
from llava_train.data.batch import BatchReader, ImageReader, StepDataset, load_steps
from llava_train.data.micro_batches import Cut, MicroBatch
from llava_train.data.mixture import Mixture
from llava_train.data.pictures.processors import build_image_processor
from llava_train.data.pictures.shapes import Square
from llava_train.data.plan import Plan
from llava_train.errors import RecordError
from tests import tiny

CAPTIONS = ["A red field.", "A blue field.", "A green field."]


def pictures(folder: Path) -> list[bytes]:
    return [(folder / f"{index}.png").read_bytes() for index in range(3)]


def as_llava(folder: Path, content: list[bytes]) -> dict[str, Any]:
    turns = [[{"from": "human", "value": "<image>"}, {"from": "gpt", "value": caption}] for caption in CAPTIONS]
    records = [{"image": f"{index}.png", "conversations": turns[index]} for index in range(3)]
    (folder / "llava.json").write_text(json.dumps(records))
    return {"path": str(folder / "llava.json")}


def as_openai(folder: Path, content: list[bytes]) -> dict[str, Any]:
    lines = []
    for picture, caption in zip(content, CAPTIONS):
        url = "data:image/png;base64," + base64.b64encode(picture).decode()
        parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "\n"}]
        lines.append({"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": caption}]})
    (folder / "openai.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return {"path": str(folder / "openai.jsonl")}


def as_tar(folder: Path, content: list[bytes]) -> dict[str, Any]:
    with tarfile.open(folder / "shard-0.tar", "w") as archive:
        for index, (picture, caption) in enumerate(zip(content, CAPTIONS)):
            for suffix, data in (("png", picture), ("txt", caption.encode())):
                member = tarfile.TarInfo(f"{index:05d}.{suffix}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return {"path": str(folder / "shard-{0..0}.tar")}


def as_parquet(folder: Path, content: list[bytes]) -> dict[str, Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    cells = [{"bytes": picture, "path": None} for picture in content]
    pq.write_table(pa.table({"image": cells, "caption": CAPTIONS}), folder / "rows.parquet", row_group_size=2)
    return {"path": str(folder / "rows.parquet")}


def as_hub(folder: Path, content: list[bytes]) -> dict[str, Any]:
    as_parquet(folder / "hub", content)
    return {"hub": str(folder / "hub")}


def as_video(folder: Path, content: list[bytes]) -> dict[str, Any]:
    """Only the shape is compared: a video is not lossless."""
    av = pytest.importorskip("av")
    with av.open(str(folder / "v_1.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width, stream.height = 32, 32
        for picture in content * 3:
            image = Image.open(io.BytesIO(picture)).convert("RGB").resize((32, 32))
            container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode())
    (folder / "video.json").write_text(json.dumps([{"q": "What?", "a": c, "video_id": "v_1"} for c in CAPTIONS]))
    return {"path": str(folder / "video.json"), "video_frames": 3}


WAYS = {"llava": as_llava, "openai": as_openai, "tar": as_tar, "parquet": as_parquet, "hub": as_hub}


def read(workplace: Path, *sources: dict[str, Any]) -> tuple[Any, BatchReader]:
    recipe = tiny.make_recipe(workplace, data__train=list(sources), data__validation_fraction=0, data__template="plain")
    prepared = prepare(load_recipe(recipe)).train
    processor = build_image_processor(str(workplace / "vision"), "pad", 28)
    return prepared, BatchReader(prepared, ImageReader(Square(processor, 4)), 0, Cut(3))


def whole(reader: BatchReader, count: int = 3) -> Any:
    return reader(MicroBatch(tuple(range(count)), (1.0,) * count))


@pytest.mark.parametrize("way", WAYS)
def test_every_container_gives_the_same_tensors(workplace: Path, way: str) -> None:
    folder = workplace / "data"
    (folder / "hub").mkdir()
    content = pictures(folder)
    _, expected = read(workplace, as_llava(folder, content))
    _, reader = read(workplace, WAYS[way](folder, content))
    one, two = whole(expected), whole(reader)
    for name in ("input_ids", "attention_mask", "predictors", "targets", "weights", "pixel_values"):
        assert torch.equal(getattr(one, name), getattr(two, name)), name


def test_a_video_is_its_frames(workplace: Path) -> None:
    _, reader = read(workplace, as_video(workplace / "data", pictures(workplace / "data")))
    batch = whole(reader)
    assert batch.pixel_values.shape == (9, 3, 28, 28)
    assert (batch.input_ids == reader.prepared.info["image_token_id"]).sum() == 9 * 4
    means = batch.pixel_values[:3].mean((2, 3))
    assert not torch.allclose(means[0], means[1], atol=0.1)


def test_sources_differ_in_template_and_shape(workplace: Path) -> None:
    folder, content = workplace / "data", pictures(workplace / "data")
    plain = as_llava(folder, content)
    prepared, reader = read(
        workplace, plain, {**plain, "name": "stretched", "template": "chatml", "image_aspect_ratio": "square"}
    )
    assert prepared.rows_of_source(1).tolist() == [3, 4, 5]
    one, two = (reader(MicroBatch((row,), (1.0,))) for row in (0, 3))
    processor = build_image_processor(str(workplace / "vision"), "square", 28)
    picture = Image.open(io.BytesIO(content[0])).convert("RGB")
    assert torch.equal(two.pixel_values, processor(images=[picture], return_tensors="pt")["pixel_values"])
    assert not torch.equal(one.pixel_values, two.pixel_values)
    tokenizer = tiny.make_tokenizer(workplace / "tokenizer")
    assert "<|im_start|>" in tokenizer.decode(two.input_ids[0])
    assert "<|im_start|>" not in tokenizer.decode(one.input_ids[0])


def test_a_preference_pair_keeps_both_answers(workplace: Path) -> None:
    folder = workplace / "data"
    record = {"id": "p", "image": "0.png", "question": "<image>\nWhat?", "chosen": "red", "rejected": "It is blue"}
    (folder / "pairs.json").write_text(json.dumps([record]))
    prepared, _ = read(workplace, {"path": str(folder / "pairs.json"), "template": "chatml"})
    values = prepared.values(0)
    tokenizer = tiny.make_tokenizer(workplace / "tokenizer")
    said = {}
    for side in ("", "rejected_"):
        (start, end) = values[side + "spans"]
        said[side] = tokenizer.decode(values[side + "input_ids"][start:end])
    assert said == {"": "red<|im_end|>", "rejected_": "It is blue<|im_end|>"}


@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_that_vanished_while_training_is_named(workplace: Path, workers: int) -> None:
    _, reader = read(workplace, as_llava(workplace / "data", pictures(workplace / "data")))
    (workplace / "data" / "1.png").unlink()
    plan = Plan.of(Mixture.whole(3), 3, 1, None, 0)
    with pytest.raises(RecordError, match=r"llava\.json\[1\] \(id .*\): .*1\.png: no such image") as caught:
        next(load_steps(StepDataset(reader, plan, 0, 1), 0, workers))
    assert "Traceback" not in str(caught.value)


def test_a_picture_that_vanished_is_named_with_its_record(workplace: Path) -> None:
    _, reader = read(workplace, as_llava(workplace / "data", pictures(workplace / "data")))
    (workplace / "data" / "1.png").unlink()
    with pytest.raises(RecordError, match=r"llava\.json\[1\] \(id .*\): .*1\.png: no such image"):
        whole(reader)
