"""The pictures that several data sets share, as the recipes expect them below DIR.

| Set | Folder | Pictures | Licence | Download |
|---|---|---|---|---|
| COCO train2017 | coco/train2017 | 118,287 | annotations CC-BY-4.0, pictures: Flickr's terms | 19.3 GB |
| GQA | gqa/images | 148,854 | not verified; pictures of COCO and Visual Genome | 21.8 GB |
| TextVQA train+val | textvqa/train_images | 25,119 | CC-BY-4.0 | 7.1 GB |
| Visual Genome | vg/VG_100K, vg/VG_100K_2 | 64,346 + 43,903 | CC-BY-4.0 | 9.7 + 5.5 GB |
| OCR-VQA | ocr_vqa/images | 80,000 in mix665k | not stated; the covers belong to their publishers | 2.3 GB |

The counts are those that users of LLaVA found after unpacking (haotian-liu/LLaVA, issue 702); the MD5 of COCO
is in many projects' download scripts; no checksum of the others is known, so the first download is trusted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path, PurePosixPath

from data_prep.common.archives import Archive
from data_prep.common.command import Job, needed, say
from data_prep.common.fetching import fetch_links
from data_prep.common.pictures import as_jpeg, is_jpeg
from data_prep.common.transfer import FetchError, Remote, full_disk
from data_prep.common.vqa import listed_parquet, rows
from llava_train.errors import DataError
from llava_train.files import inside, read_json, write_json

_VG = "https://cs.stanford.edu/people/rak248/VG_100K_2/"
COCO = Archive(
    Remote(
        "http://images.cocodataset.org/zips/train2017.zip",
        "coco/train2017.zip",
        "md5:cced6f7f71b7629ddf16f17bbcfab6b2",
        about=19_300_000_000,
    ),
    "coco", "coco/train2017", 118_287,
)  # fmt: skip
GQA = Archive(
    Remote("https://downloads.cs.stanford.edu/nlp/data/gqa/images.zip", "gqa/images.zip", about=21_800_000_000),
    "gqa", "gqa/images", 148_854,
)  # fmt: skip
TEXTVQA = Archive(
    Remote(
        "https://dl.fbaipublicfiles.com/textvqa/images/train_val_images.zip",
        "textvqa/train_val_images.zip",
        about=7_070_000_000,
    ),
    "textvqa", "textvqa/train_images", 25_119,
)  # fmt: skip
VISUAL_GENOME = (
    Archive(Remote(f"{_VG}images.zip", "vg/images.zip", about=9_730_000_000), "vg", "vg/VG_100K", 64_346),
    Archive(Remote(f"{_VG}images2.zip", "vg/images2.zip", about=5_470_000_000), "vg", "vg/VG_100K_2", 43_903),
)
# The publisher's own copy is in a Google Drive folder, which cannot be fetched as a file.
OCR_VQA = Remote(
    "https://huggingface.co/datasets/hunarbatra/LLaVA-finetune665k/resolve/main/ocr_vqa_dataset.json",
    "ocr_vqa/dataset.json",
    about=113_000_000,
)
# All the pictures, collected when the links were alive: 207,549 in three splits (2.3 GB by the data set's card).
OCR_VQA_HUB = Remote("https://huggingface.co/api/datasets/howard-hou/OCR-VQA/parquet", "ocr_vqa/parquet/list.json")


def take_ocr_vqa(job: Job, names: Iterable[str]) -> None:
    """Take the pictures `names` out of the hub's parquet files, which are deleted then; done once."""
    marker = inside(job.out, "ocr_vqa/parquet/taken.json")
    left = {PurePosixPath(name).stem: path for name in set(names) if not _settled(path := inside(job.out, name))}
    if marker.exists() or not left:
        return
    wanted = len(left)
    for table in listed_parquet(job, OCR_VQA_HUB, "train"):  # the mix was made of this split
        for row in rows(table, ("image_id", "image")):
            if row["image_id"] in left:
                path = left.pop(row["image_id"])
                raw = path.with_name(f".{path.name}.raw")
                raw.parent.mkdir(parents=True, exist_ok=True)
                with full_disk(raw):
                    raw.write_bytes((row["image"] or {}).get("bytes") or b"")
                with suppress(FetchError):  # no picture: its link is tried
                    as_jpeg(raw, path)
    write_json(marker, {"wanted": wanted, "not there": len(left)})
    if not job.keep_archives:
        for table in marker.parent.glob("*.parquet"):
            table.unlink()
    say(f"OCR-VQA: {wanted - len(left):,} of {wanted:,} pictures taken from the hub")


def fetch_ocr_vqa(job: Job, names: Iterable[str]) -> None:
    """Fetch the pictures `names` ("ocr_vqa/images/ID.jpg") that are lacking from the links in the dataset.json.

    Each becomes a JPEG, whatever the link gave. Pictures got elsewhere and put into ocr_vqa/images are taken;
    those that are GIFs called .jpg are converted. The dead links are in ocr_vqa/missing.jsonl.
    """
    path = needed(inside(job.out, OCR_VQA.path))
    listed = read_json(path)
    if not isinstance(listed, dict):
        raise DataError(f"{path}: must map books to their links; delete it and run again")
    links: dict[str, str] = {}
    causes: Counter[str] = Counter()
    wanted = sorted(set(names))
    for name in wanted:
        key = PurePosixPath(name).stem
        if _settled(inside(job.out, name)):
            causes["there already"] += 1
        elif isinstance(book := listed.get(key), dict) and isinstance(book.get("imageURL"), str):
            links[f"ocr_vqa/.links/{key}"] = book["imageURL"]
        else:
            causes["not in dataset.json"] += 1

    def finish(remote: Remote, path: Path) -> None:
        as_jpeg(path, inside(job.out, f"ocr_vqa/images/{path.name}.jpg"))

    remotes = [Remote(url, path) for path, url in links.items()][: job.limit]
    dead = fetch_links(job.fetcher, remotes, finish, inside(job.out, "ocr_vqa/missing.jsonl"), "OCR-VQA")
    told = [f"{count:,} {cause}" for cause, count in [*causes.items(), *sorted(dead.items())]]
    say(f"OCR-VQA: {len(wanted):,} pictures wanted: {', '.join(told) or 'all fetched'}")


def _settled(path: Path) -> bool:
    """True if the picture is there as a JPEG, if need be converted now; a file that is no picture is removed."""
    if not path.is_file():
        return False
    if not is_jpeg(path):
        try:
            as_jpeg(path, path)
        except FetchError:
            path.unlink(missing_ok=True)
            return False
    return True
