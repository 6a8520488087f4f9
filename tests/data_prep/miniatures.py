"""Each data set in small, with the layout of the real one, at the address of the real one."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from collections.abc import Callable
from typing import Any

import pyarrow
from PIL import Image
from pyarrow import parquet

from data_prep import (
    cc3m_wds,
    llava_instruct_150k,
    llava_med,
    llava_mix665k,
    llava_pretrain,
    path_vqa,
    sharegpt4v,
    slake,
    video_chatgpt,
    vqa_rad,
)
from data_prep.common import image_sets
from tests.data_prep.server import Server

Files = dict[str, bytes]


def picture(kind: str = "JPEG", colour: str = "red", size: int = 8) -> bytes:
    stream = io.BytesIO()
    Image.new("P" if kind == "GIF" else "RGB", (size, size), 1 if kind == "GIF" else colour).save(stream, kind)
    return stream.getvalue()


def zipped(names: list[str]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name in names:
            archive.writestr(name, picture())
    return stream.getvalue()


def tarred(files: Files, mode: str = "w") -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=mode) as archive:  # type: ignore[call-overload]
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def dumped(value: Any) -> bytes:
    return json.dumps(value).encode()


def llava(image: str | None, number: int = 0) -> dict[str, Any]:
    asked = "<image>\nWhat?" if image else "What?"
    turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": "This."}]
    return {"id": f"{number}"} | ({"image": image} if image else {}) | {"conversations": turns}


def table(rows: list[tuple[bytes, str, str]]) -> bytes:
    columns = {
        "image": [{"bytes": content, "path": None} for content, *_ in rows],
        "question": [asked for _, asked, _ in rows],
        "answer": [answer for *_, answer in rows],
    }
    return parquet_bytes(columns)


def parquet_bytes(columns: dict[str, list[Any]]) -> bytes:
    stream = io.BytesIO()
    parquet.write_table(pyarrow.table(columns), stream, row_group_size=1)
    return stream.getvalue()


QUESTIONS = [(picture(), "is there a nodule?", "Yes"), (picture(), "where?", "left"), (picture("PNG"), "what?", "lung")]
COCO = {image_sets.COCO.remote.url: zipped(["train2017/000000000009.jpg", "train2017/000000000025.jpg"])}


def make_llava_pretrain(server: Server) -> Files:
    names = ["00000/000000010.jpg", "00453/004539375.jpg"]
    return {
        llava_pretrain.SOURCE + llava_pretrain.JSON: dumped([llava(name) for name in names]),
        f"{llava_pretrain.SOURCE}images.zip": zipped(names),
    }


def make_llava_instruct_150k(server: Server) -> Files:
    return {llava_instruct_150k.SOURCE: dumped([llava("000000000009.jpg"), llava("000000000025.jpg")]), **COCO}


def make_llava_mix665k(server: Server) -> Files:
    """Seven books: a JPEG, a GIF, a dead link, a one-pixel placeholder, a web page, an unlisted one, one on the hub."""
    books = ["jpeg", "gif", "dead", "pixel", "page", "unlisted", "kept"]
    names = ["coco/train2017/000000000009.jpg", "gqa/images/1.jpg", "textvqa/train_images/a.jpg"]
    names += ["vg/VG_100K/1.jpg", "vg/VG_100K_2/2.jpg", *(f"ocr_vqa/images/{book}.jpg" for book in books)]
    one, two = image_sets.VISUAL_GENOME
    links = {book: {"imageURL": f"http://books.example/{book}.jpg"} for book in books[:-2]}
    hub = {"image_id": ["kept", "unwanted"], "image": [{"bytes": picture("PNG"), "path": None}] * 2}
    listing = image_sets.OCR_VQA_HUB.url
    return {
        listing: dumped({"default": {"train": [f"{listing}/default/train/0.parquet"]}}),
        f"{listing}/default/train/0.parquet": parquet_bytes(hub),
        llava_mix665k.SOURCE: dumped([*map(llava, names), llava(None)]),
        **COCO,
        image_sets.GQA.remote.url: zipped(["images/1.jpg"]),
        image_sets.TEXTVQA.remote.url: zipped(["train_images/a.jpg"]),
        one.remote.url: zipped(["VG_100K/1.jpg"]),
        two.remote.url: zipped(["VG_100K_2/2.jpg"]),
        image_sets.OCR_VQA.url: dumped(links),
        "http://books.example/jpeg.jpg": picture(),
        "http://books.example/gif.jpg": picture("GIF"),
        "http://books.example/pixel.jpg": picture("GIF", size=1),
        "http://books.example/page.jpg": b"<html>gone</html>",
    }


def make_cc3m_wds(server: Server) -> Files:
    def shard(split: str, number: int) -> Files:
        files = {"0.jpg": picture(), "0.txt": b"a caption", "0.json": b"{}", "1.jpg": picture(), "1.txt": b"another"}
        return {cc3m_wds.shard(split, number).url: tarred(files)}

    return {**shard("train", 0), **shard("train", 1), **shard("validation", 0)}


def make_sharegpt4v(server: Server) -> Files:
    names = [
        "coco/train2017/000000000009.jpg",
        "sam/images/sa_1.jpg",
        "llava/llava_pretrain/images/00000/000000010.jpg",
    ]
    records = dumped([llava(name) for name in names])
    pictures = {f"{llava_pretrain.SOURCE}images.zip": zipped(["00000/000000010.jpg"])}
    return {remote.url: records for remote in sharegpt4v.REMOTES.values()} | COCO | pictures


def make_llava_med(server: Server) -> Files:
    """Three figures: in an article, missing in an article, and of an article that is gone."""
    pairs = ["1_F1", "1_F2", "2_F1"]
    records = [llava(f"{pair}.jpg") for pair in pairs]
    misspelt = [{"conversatons" if key == "conversations" else key: value for key, value in records[0].items()}]
    home = "https://ftp.ncbi.nlm.nih.gov/pub/pmc/oa_package"
    links = [
        {"pmc_tar_url": f"{home}/PMC{pair[0]}.tar.gz", "image_file_path": f"PMC{pair[0]}/{pair}.jpg", "pair_id": pair}
        for pair in pairs
    ]
    members = {"PMC1/1_F1.jpg": picture(), "PMC1/article.nxml": b"text", "../evil.jpg": picture()}
    files = {remote.url: dumped(records) for remote in llava_med.PUBLISHED.values()}
    files[llava_med.PUBLISHED["instruct/llava_med_instruct_60k.json"].url] = dumped(misspelt)
    files[llava_med.LINKS.url] = b"\n".join(map(dumped, links))
    return files | {f"{home}/PMC1.tar.gz": tarred(members, "w:gz")}


def make_vqa_rad(server: Server) -> Files:
    return {f"{vqa_rad.SOURCE}/{name}": table(QUESTIONS) for name, *_ in vqa_rad.SPLITS.values()}


def make_path_vqa(server: Server) -> Files:
    urls = {split: [f"{path_vqa.LIST.url}/default/{split}/{n}.parquet" for n in range(2)] for split in path_vqa.SPLITS}
    files = {url: table(QUESTIONS[:2]) for listed in urls.values() for url in listed}
    return files | {path_vqa.LIST.url: dumped({"default": urls})}


def make_slake(server: Server) -> Files:
    common = {"img_name": "xmlab1/source.jpg", "question": "What?", "answer": "Lung", "answer_type": "OPEN"}
    items = [common | {"qid": number, "q_lang": language} for number, language in enumerate(("en", "zh", "en"))]
    files = {f"{slake.SOURCE}/{split}.json": dumped(items) for split in slake.SPLITS}
    return files | {f"{slake.SOURCE}/imgs.zip": zipped(["imgs/xmlab1/source.jpg", "imgs/xmlab1/mask.png"])}


def make_video_chatgpt(server: Server) -> Files:
    items = [{"video_id": f"v_{number}", "q": "What happens?", "a": "A dog runs."} for number in range(3)]
    return {video_chatgpt.QUESTIONS.url: dumped(items)}


# script -> (what it is served, records it must write by file, pictures that are missing in the end)
MINIATURES: dict[str, tuple[Callable[[Server], Files], dict[str, int], int]] = {
    "llava_pretrain": (make_llava_pretrain, {"LLaVA-Pretrain/blip_laion_cc_sbu_558k.json": 2}, 0),
    "llava_instruct_150k": (make_llava_instruct_150k, {"llava_instruct_158k.json": 2}, 0),
    "llava_mix665k": (
        make_llava_mix665k,
        {"llava_v1_5_mix665k.json": 13, "llava_v1_5_mix665k_available.json": 9},
        4,
    ),
    "cc3m_wds": (make_cc3m_wds, {"cc3m_wds/train": 4, "cc3m_wds/validation": 2}, 0),
    "sharegpt4v": (
        make_sharegpt4v,
        {remote.path: 3 for remote in sharegpt4v.REMOTES.values()}
        | {remote.path.replace(".json", "_available.json"): 2 for remote in sharegpt4v.REMOTES.values()},
        3,
    ),
    "llava_med": (
        make_llava_med,
        {
            "llava_med/alignment_500k.json": 3,
            "llava_med/alignment_500k_available.json": 1,
            "llava_med/instruct_60k.json": 1,
            "llava_med/instruct_60k_available.json": 1,
            "llava_med/instruct_60k_inline_mention.json": 3,
            "llava_med/instruct_60k_inline_mention_available.json": 1,
        },
        4,
    ),
    "vqa_rad": (make_vqa_rad, {"vqa_rad/train.json": 3, "vqa_rad/test.json": 3}, 0),
    "path_vqa": (make_path_vqa, {f"path_vqa/{split}.json": 4 for split in path_vqa.SPLITS}, 0),
    "slake": (
        make_slake,
        {f"slake/{split}.json": 2 for split in slake.SPLITS} | {f"slake/{split}_zh.json": 1 for split in slake.SPLITS},
        0,
    ),
    "video_chatgpt": (
        make_video_chatgpt,
        {"video_chatgpt/videos.json": 3, "video_chatgpt/videos_available.json": 0},
        3,
    ),
}
