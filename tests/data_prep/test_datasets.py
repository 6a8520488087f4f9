"""Every data script: the shape they share, and a whole run on the data set in small."""

from __future__ import annotations

import importlib
import json
import pkgutil
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

import data_prep
from data_prep import llava_mix665k
from data_prep.common.archives import Archive
from data_prep.common.command import Dataset
from data_prep.common.records import read_array
from data_prep.common.transfer import Remote
from llava_train.data.records.formats import detect, parse_record
from tests.data_prep.miniatures import MINIATURES, parquet_bytes, picture
from tests.data_prep.server import Server

SCRIPTS = sorted({module.name for module in pkgutil.iter_modules(data_prep.__path__) if not module.ispkg})
HOSTS = [
    "https://huggingface.co/", "http://images.cocodataset.org/", "https://downloads.cs.stanford.edu/",
    "https://dl.fbaipublicfiles.com/", "https://cs.stanford.edu/", "http://books.example/",
    "https://ftp.ncbi.nlm.nih.gov/", "https://hanoverprod.z21.web.core.windows.net/",
]  # fmt: skip


def script(name: str) -> ModuleType:
    return importlib.import_module(f"data_prep.{name}")


def shrunk(dataset: Dataset, server: Server) -> Dataset:
    """The data set without the counts, sizes and checksums of the real one, and with what the server has."""

    def small(source: Remote | Archive) -> Remote | Archive:
        if isinstance(source, Archive):
            return replace(source, remote=small(source.remote), count=None)  # type: ignore[arg-type]
        return replace(source, checksum=None, size=None, about=None)

    def served(source: Remote | Archive) -> bool:
        url = source.remote.url if isinstance(source, Archive) else source.url
        return f"/{url.partition('://')[2]}" in server.files

    parts = {name: [small(source) for source in sources if served(source)] for name, sources in dataset.parts.items()}
    return replace(dataset, parts=parts, records=[replace(file, count=None) for file in dataset.records])


def arguments(server: Server, out: Path, *more: str) -> list[str]:
    mirrors = [argument for host in HOSTS for argument in server.mirror(host)]
    return ["--out", str(out), *mirrors, *more]


def report(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_says_what_it_is_its_licence_and_its_size(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        script(name).main(["--help"])
    told = capsys.readouterr().out
    assert stopped.value.code == 0
    for word in (f"python -m data_prep.{name}", "* What:", "Licence:", "Size:", "Expected:", "Writes", "--out"):
        assert word in told, word


@pytest.mark.parametrize("name", sorted(set(SCRIPTS) - {"dicom"}))
def test_the_scripts_have_one_shape(name: str) -> None:
    module = script(name)
    assert isinstance(module.DATASET, Dataset)
    assert module.DATASET.name == name
    assert module.DATASET.document is module.__doc__
    assert module.DATASET.records
    sources = [source for part in module.DATASET.parts.values() for source in part]
    assert all(part in {None, *module.DATASET.parts} for part in (file.part for file in module.DATASET.records))
    for source in sources:
        remote = source.remote if isinstance(source, Archive) else source
        assert remote.url.startswith(("http://", "https://"))
        assert remote.checksum is None or remote.checksum.startswith(("sha256:", "md5:"))


def test_every_script_has_a_miniature() -> None:
    assert set(MINIATURES) == set(SCRIPTS) - {"dicom", "easy_vqa", "tuxpaint_stamps"}


@pytest.mark.parametrize("name", MINIATURES)
def test_a_whole_run_on_a_miniature(
    name: str, server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, written, missing = MINIATURES[name]
    for url, content in make(server).items():
        server.put(url, content)
    dataset = shrunk(script(name).DATASET, server)
    assert dataset.main(arguments(server, tmp_path)) == 0
    told = report(capsys)
    assert {path: counted["records"] for path, counted in told["records"].items()} == written
    assert (told["name"], told["missing"], told["complete"]) == (name, missing, True)
    assert not list(tmp_path.rglob("*.part*"))
    assert not list(tmp_path.rglob("*.zip")) + list(tmp_path.rglob("*.tar.gz"))
    for path in written:
        for record in read_array(tmp_path / path):
            parse_record(detect(record, path), record, path)  # as training reads it

    server.asked.clear()
    assert dataset.main(arguments(server, tmp_path)) == 0
    assert server.asked == []
    assert report(capsys) == told
    assert dataset.main(arguments(server, tmp_path, "--check")) == 0
    assert report(capsys) == told


@pytest.mark.parametrize("name", sorted(set(MINIATURES) - {"llava_med", "video_chatgpt"}))
def test_too_few_records_fail_the_check(
    name: str, server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for url, content in MINIATURES[name][0](server).items():
        server.put(url, content)
    dataset = script(name).DATASET
    assert shrunk(dataset, server).main(arguments(server, tmp_path)) == 0
    capsys.readouterr()
    assert dataset.main(["--out", str(tmp_path), "--check"]) == 1
    captured = capsys.readouterr()
    assert json.loads(captured.out)["complete"] is False
    assert "incomplete: " in captured.err


def test_the_books_of_ocr_vqa(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for url, content in MINIATURES["llava_mix665k"][0](server).items():
        server.put(url, content)
    (tmp_path / "ocr_vqa" / "images").mkdir(parents=True)
    (tmp_path / "ocr_vqa" / "images" / "dead.jpg").write_bytes(picture("GIF"))  # got elsewhere
    assert shrunk(llava_mix665k.DATASET, server).main(arguments(server, tmp_path)) == 0
    captured = capsys.readouterr()
    assert "OCR-VQA: 1 of 6 pictures taken from the hub" in captured.err
    assert "7 pictures wanted: 2 there already, 1 not in dataset.json, 1 not_an_image, 1 placeholder" in captured.err
    images = tmp_path / "ocr_vqa" / "images"
    assert sorted(path.name for path in images.iterdir()) == ["dead.jpg", "gif.jpg", "jpeg.jpg", "kept.jpg"]
    for path in images.iterdir():
        with Image.open(path) as opened:
            assert (opened.format, opened.mode) == ("JPEG", "RGB")
    assert (images / "jpeg.jpg").read_bytes() == picture()  # a JPEG stays as it is
    listed = [json.loads(line) for line in (tmp_path / "ocr_vqa" / "missing.jsonl").read_text().splitlines()]
    assert {fault["path"]: fault["cause"] for fault in listed} == {
        "ocr_vqa/.links/page": "not_an_image",
        "ocr_vqa/.links/pixel": "placeholder",
    }
    usable = json.loads((tmp_path / "llava_v1_5_mix665k_available.json").read_text())
    assert {"coco/train2017/000000000009.jpg", "ocr_vqa/images/gif.jpg", None} <= {item.get("image") for item in usable}
    assert "ocr_vqa/images/page.jpg" not in {item.get("image") for item in usable}


def test_some_links_of_ocr_vqa(server: Server, tmp_path: Path) -> None:
    for url, content in MINIATURES["llava_mix665k"][0](server).items():
        server.put(url, content)
    dataset = shrunk(llava_mix665k.DATASET, server)
    wanted = ["--only", "annotations,ocr_vqa_links"]
    for limit, asked in ((["--limit", "2"], 2), ([], 3)):  # of five links one is dead and asked for once
        server.asked.clear()
        assert dataset.main(arguments(server, tmp_path, *wanted, *limit)) == 0
        assert len([path for path, _ in server.asked if "books.example" in path]) == asked


def test_a_part_alone_and_the_archives_kept(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for url, content in MINIATURES["llava_mix665k"][0](server).items():
        server.put(url, content)
    dataset = shrunk(llava_mix665k.DATASET, server)
    assert dataset.main(arguments(server, tmp_path, "--only", "coco", "--keep-archives")) == 0
    told = report(capsys)
    assert told["records"] == {}
    assert told["images"] == {"coco/train2017": {"found": 2, "expected": None, "complete": True}}
    assert (tmp_path / "coco" / "train2017.zip").exists()
    with pytest.raises(SystemExit) as stopped:
        dataset.main(["--only", "imagenet"])
    assert stopped.value.code == 2
    assert "'imagenet' is none of annotations, coco, gqa" in capsys.readouterr().err


def test_some_shards_of_cc3m(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for url, content in MINIATURES["cc3m_wds"][0](server).items():
        server.put(url, content)
    dataset = script("cc3m_wds").DATASET
    assert dataset.main(arguments(server, tmp_path, "--only", "train", "--limit", "1")) == 0
    expected = {"records": 2, "images": 2, "missing": 0, "expected": 2_905_954, "complete": True}
    assert report(capsys)["records"] == {"cc3m_wds/train": expected}
    assert dataset.main(["--out", str(tmp_path), "--only", "train", "--check"]) == 1


def test_answers_are_open_or_closed_and_pictures_are_written_once(server: Server, tmp_path: Path) -> None:
    for url, content in MINIATURES["vqa_rad"][0](server).items():
        server.put(url, content)
    assert shrunk(script("vqa_rad").DATASET, server).main(arguments(server, tmp_path)) == 0
    records = json.loads((tmp_path / "vqa_rad" / "test.json").read_text())
    assert [record["answer_type"] for record in records] == ["closed", "open", "open"]
    assert sorted(path.suffix for path in (tmp_path / "vqa_rad" / "images").iterdir()) == [".jpg", ".png"]


def test_videos_that_are_there_are_found_by_any_suffix(server: Server, tmp_path: Path) -> None:
    for url, content in MINIATURES["video_chatgpt"][0](server).items():
        server.put(url, content)
    (tmp_path / "video_chatgpt" / "videos").mkdir(parents=True)
    (tmp_path / "video_chatgpt" / "videos" / "v_1.mkv").write_bytes(b"video")
    assert shrunk(script("video_chatgpt").DATASET, server).main(arguments(server, tmp_path)) == 0
    (usable,) = json.loads((tmp_path / "video_chatgpt" / "videos_available.json").read_text())
    assert usable["video"] == "video_chatgpt/videos/v_1.mkv"
    assert usable["conversations"][0]["value"] == "<video>\nWhat happens?"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"PAR1 not really", "not a parquet file"),
        (parquet_bytes({"image": [1]}), "has no column 'question'"),
        (parquet_bytes({"image": [{"bytes": b""}], "question": ["?"], "answer": ["!"]}), "row 0: needs a picture"),
        (parquet_bytes({"image": [{"bytes": b"x"}], "question": ["?"], "answer": ["!"]}), "row 0: not a picture"),
    ],
)
def test_a_table_that_is_wrong_is_named(
    content: bytes, told: str, server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for url in MINIATURES["vqa_rad"][0](server):
        server.put(url, content)
    assert shrunk(script("vqa_rad").DATASET, server).main(arguments(server, tmp_path)) == 1
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "which", "content"),
    [
        ("llava_mix665k", "ocr_vqa_dataset.json", b"[]"),
        ("llava_mix665k", "mix665k.json", b"[3]"),
        ("path_vqa", "path-vqa/parquet", b"[]"),
        ("slake", "train.json", b'[{"q_lang": "en"}]'),
        ("video_chatgpt", "VideoInstruct100K.json", b'[{"q": "?"}]'),
        ("llava_med", "alignment_500k.json", b'[{"id": 1}]'),
    ],
)
def test_published_files_of_another_layout_are_named(
    name: str, which: str, content: bytes, server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for url, right in MINIATURES[name][0](server).items():
        server.put(url, content if url.endswith(which) else right)
    assert shrunk(script(name).DATASET, server).main(arguments(server, tmp_path)) == 1
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith(f"error: {tmp_path}")


def test_easy_vqa_runs_through_the_same_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("easy_vqa")
    assert script("easy_vqa").main(["--out", str(tmp_path), "--check"]) == 1
    assert report(capsys)["records"]["easy_vqa/captions.json"]["records"] == 0
