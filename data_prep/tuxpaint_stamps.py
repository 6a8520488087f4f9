"""Tux Paint stamps: 785 pictures with a caption each, as LLaVA JSON.

    python -m data_prep.tuxpaint_stamps --out assets

* What: photographs and drawings of animals, fruit, houses, letters, ... cut out on a transparent ground. The
  first line of the text file beside each picture is its English caption; its folder is its class.
* From: the Debian package `tuxpaint-stamps-default`, taken with the `apt-get` client and checked by sha256.
* Licence: GPL-2 (kept as `stamps/COPYRIGHT`). Size: 161 MB to download (most of it sound), 25 MB on disk.
* Expected: 785 captioned pictures.
* Writes `DIR/stamps/`: `images/` (transparency flattened onto white, RGB PNG, original size), `captions.json`
  and `instructions.json` (85 % of each category), `test.json` (the other 15 %); `image` is relative to DIR.
"""

from __future__ import annotations

import io
import os
import random
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from PIL import Image
from tqdm import tqdm

from data_prep.common.command import Dataset, say_built
from data_prep.common.packages import check_sha256, run_client
from data_prep.common.records import Record, RecordFile
from llava_train.errors import DataError
from llava_train.files import atomic_folder, ensure_space, write_json

PACKAGE, VERSION, LICENCE = "tuxpaint-stamps-default", "2022.06.04-1", "GPL-2"
SHA256 = "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34"
SOURCE = (PACKAGE, VERSION, LICENCE, SHA256)
PAIRS = 785
COUNTS = {"captions": 672, "instructions": 916, "test": 113}
STAMPS, COPYRIGHT = "./usr/share/tuxpaint/stamps/", f"./usr/share/doc/{PACKAGE}/copyright"

# Folder -> category, the deepest folder named here wins. A stamp under none of them (flags, people, weather:
# too few or too mixed to be a class) has no category and is used for captions only.
CATEGORIES = {
    "animals": "animals",
    "clothes": "clothes",
    "food": "food",
    "hobbies/music": "instruments",
    "household": "household",
    "plants": "plants",
    "seasonal": "holidays",
    "space": "space",
    "sports": "sports",
    "symbols": "symbols",
    "symbols/alphabets": "letters",
    "symbols/alphabets/asl": "hands",
    "symbols/money": "money",
    "town/cartoon": "buildings",
    "town/houses": "buildings",
    "town/monuments": "buildings",
    "town/roadsigns": "signs",
    "vehicles": "vehicles",
}
ONE_WORD = "Answer with one word."
NAMES = ", ".join(sorted(set(CATEGORIES.values())))
CATEGORY_QUESTION = f"Which category fits this picture best: {NAMES}? {ONE_WORD}"
ANIMAL_QUESTION, NAME_QUESTION = f"Is this an animal? {ONE_WORD}", "What is this?"
CAPTION_PROMPTS = ("Describe the image.", "What does the image show?", NAME_QUESTION)
# Where "Is this an animal?" would be answered wrongly or doubtfully: toys, a paw print, Easter bunnies.
DOUBTFUL = (
    "animals/mammals/bears/cartoon", "animals/mammals/bears/toys", "animals/insects/cartoon/wings",
    "seasonal", "symbols/shapes", "household/rubberduck", "vehicles/farming",
)  # fmt: skip
# Two files of a folder whose names differ only in these words or in a number show one thing twice.
VIEW_WORDS = {"filled", "outline", "photo", "front", "side", "in", "out", "flying", "eating", "baby", "stand"}
VIEW_WORDS |= {"sitting", "open", "closed", "new", "old", "small", "white", "red", "yellow", "green"}


@dataclass(frozen=True)
class Stamp:
    """One picture: its path below the stamps folder without suffix ("animals/birds/owl"), its caption."""

    name: str
    caption: str

    @property
    def category(self) -> str | None:
        """The class the folder stands for, or None."""
        folders = map(str, PurePosixPath(self.name).parents)
        return next((CATEGORIES[folder] for folder in folders if folder in CATEGORIES), None)

    @property
    def keys(self) -> list[str]:
        """What a look-alike has in common with it: the caption, or the folder and the words of the name."""
        folder, _, stem = self.name.casefold().rpartition("/")
        words = [word for word in re.findall("[a-z]+", stem) if word not in VIEW_WORDS]
        caption = " ".join(re.findall(r"\w+", self.caption.casefold()))
        return [f"caption {caption}"] + [f"name {folder}/{' '.join(words)}"] * bool(words)


def build(out: Path) -> bool:
    """Make `out/stamps` whole or not at all; False if it is there already. DataError, StorageError."""
    if (out / "stamps").is_dir():
        return False
    ensure_space(out, 250_000_000, "fetching the stamps")
    deb = fetch_deb(out / ".downloads")
    pictures = pair(files := unpack(deb))
    if len(pictures) != PAIRS:
        raise DataError(f"{deb}: {len(pictures)} captioned pictures, expected {PAIRS}")
    with atomic_folder(out / "stamps") as folder:
        for stamp, png in tqdm(pictures, desc="stamps", unit="picture", disable=None):
            path = folder / "images" / f"{stamp.name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            flatten(png).save(path)
        (folder / "COPYRIGHT").write_bytes(files[COPYRIGHT])
        for name, records in all_records([stamp for stamp, _ in pictures]).items():
            write_json(folder / f"{name}.json", records)
    deb.unlink()
    return True


def fetch_deb(downloads: Path) -> Path:
    """The Debian package as a verified file in `downloads`; one that is there already is used."""
    deb = downloads / f"{PACKAGE}_{VERSION}_all.deb"
    by_hand = f"or copy {deb.name} from a Debian 12 machine to {downloads} and run again"
    if not deb.is_file():
        if shutil.which("apt-get") is None:
            raise DataError(f"the stamps are a Debian package and apt-get is not here: use Debian, {by_hand}")
        downloads.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=downloads) as temporary:
            try:
                _apt_download(Path(temporary))
            except DataError as error:
                raise DataError(f"{error}. Try `apt-get update` as root, {by_hand}") from error
            check_sha256(Path(temporary, deb.name), SHA256)
            Path(temporary, deb.name).replace(deb)
    check_sha256(deb, SHA256)
    return deb


def _apt_download(folder: Path) -> None:
    command = ["apt-get", "download", f"{PACKAGE}={VERSION}"]
    try:
        run_client(command, folder)
    except DataError:
        if os.geteuid() != 0:
            raise
        run_client(["apt-get", "update"], folder)  # no package lists yet, or old ones
        run_client(command, folder)


def unpack(deb: Path) -> dict[str, bytes]:
    """The pictures, the texts and the licence in the package, by path. Nothing is installed or written."""
    if shutil.which("dpkg-deb") is None:
        raise DataError(f"{deb}: dpkg-deb, which opens it, is not here: install the package dpkg")
    wanted: dict[str, bytes] = {}
    process = subprocess.Popen(["dpkg-deb", "--fsys-tarfile", deb], stdout=subprocess.PIPE)
    with process, tarfile.open(fileobj=process.stdout, mode="r|") as archive:
        for member in tqdm(archive, desc="unpacking", unit="file", disable=None):
            stamp = member.name.startswith(STAMPS) and member.name.endswith((".png", ".txt"))
            if (stamp or member.name == COPYRIGHT) and (stream := archive.extractfile(member)):
                wanted[member.name] = stream.read()
    return wanted


def pair(files: dict[str, bytes]) -> list[tuple[Stamp, bytes]]:
    """Each picture with a text file beside it, captioned with that file's first line; sorted by name."""
    pairs = []
    for path in sorted(path for path in files if path.startswith(STAMPS) and path.endswith(".png")):
        text = files.get(f"{path[:-4]}.txt", b"").decode("utf-8", errors="replace").partition("\n")[0].strip()
        if text:
            pairs.append((Stamp(path[len(STAMPS) : -4], text), files[path]))
    return pairs


def flatten(png: bytes) -> Image.Image:
    """The picture as RGB on white, in its own size."""
    picture = Image.open(io.BytesIO(png)).convert("RGBA")
    ground = Image.new("RGBA", picture.size, "white")
    ground.alpha_composite(picture)
    return ground.convert("RGB")


def all_records(stamps: Sequence[Stamp], seed: int = 0) -> dict[str, list[Record]]:
    """`captions` and `instructions` of the training stamps, `test` of the held-out ones."""
    (train, test), rng = split(stamps, seed), random.Random(seed)
    captions = [_record(stamp, "caption", [(rng.choice(CAPTION_PROMPTS), stamp.caption)]) for stamp in train]
    return {
        "captions": captions,
        "instructions": _naming(train) + _animal_questions(train, rng),
        "test": [_record(stamp, "category", [(CATEGORY_QUESTION, stamp.category or "")]) for stamp in test],
    }


def split(stamps: Sequence[Stamp], seed: int = 0) -> tuple[list[Stamp], list[Stamp]]:
    """(train, test): at most 15 % of each category is held out, whole groups of look-alikes at a time.

    Stamps without a category are all for training: the test asks for categories.
    """
    rng = random.Random(seed)
    strata: dict[str, list[list[Stamp]]] = {}
    for group in look_alikes(stamps):
        for category in sorted({stamp.category for stamp in group if stamp.category})[:1]:
            strata.setdefault(category, []).append(group)
    held: set[Stamp] = set()
    for groups in dict(sorted(strata.items())).values():
        rng.shuffle(groups)
        room = round(0.15 * sum(map(len, groups)))
        for group in groups:
            if len(group) <= room and all(stamp.category for stamp in group):
                held.update(group)
                room -= len(group)
    return [stamp for stamp in stamps if stamp not in held], [stamp for stamp in stamps if stamp in held]


def look_alikes(stamps: Sequence[Stamp]) -> list[list[Stamp]]:
    """The stamps in groups: two that share a key (`Stamp.keys`), directly or over others, are together."""
    parent: dict[str, str] = {}

    def root(key: str) -> str:
        while parent.setdefault(key, key) != key:
            key = parent[key]
        return key

    for stamp in stamps:
        for key in stamp.keys:
            parent[root(key)] = root(stamp.keys[0])
    groups: dict[str, list[Stamp]] = defaultdict(list)
    for stamp in stamps:
        groups[root(stamp.keys[0])].append(stamp)
    return list(groups.values())


def _naming(train: Sequence[Stamp]) -> list[Record]:
    """Category, if it has one, then name: one conversation a stamp."""
    category = {stamp: [(CATEGORY_QUESTION, stamp.category)] if stamp.category else [] for stamp in train}
    return [_record(stamp, "name", [*category[stamp], (NAME_QUESTION, stamp.caption)]) for stamp in train]


def _animal_questions(train: Sequence[Stamp], rng: random.Random) -> list[Record]:
    """The animal question about as many animals as other things; doubtful pictures are left out."""
    sides: dict[str, list[Stamp]] = {"yes": [], "no": []}
    for stamp in train:
        if stamp.category and not stamp.name.startswith(DOUBTFUL):
            sides["yes" if stamp.category == "animals" else "no"].append(stamp)
    size = min(map(len, sides.values()))
    asked = [(stamp, answer) for answer, side in sides.items() for stamp in rng.sample(side, size)]
    return [_record(stamp, "animal", [(ANIMAL_QUESTION, answer)]) for stamp, answer in asked]


def _record(stamp: Stamp, kind: str, pairs: Iterable[tuple[str, str]]) -> Record:
    turns = []
    for number, (question, answer) in enumerate(pairs):
        turns.append({"from": "human", "value": question if number else f"<image>\n{question}"})
        turns.append({"from": "gpt", "value": answer})
    image = f"stamps/images/{stamp.name}.png"
    return {"id": f"stamp-{stamp.name}-{kind}", "image": image, "conversations": turns}


DATASET = Dataset(
    name="tuxpaint_stamps",
    document=__doc__,
    parts={},
    records=[RecordFile(f"stamps/{name}.json", count) for name, count in COUNTS.items()],
    convert=lambda job: say_built(job.out / "stamps", build(job.out)),
    out="assets",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; see `Dataset.main`."""
    return DATASET.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
