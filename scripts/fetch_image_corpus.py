"""Pillow's own test pictures, good and broken: what our picture reader is tested with (pytest -m corpus).

    python scripts/fetch_image_corpus.py             # runs/corpus/pillow-13.0.0: fetches 47 MB, keeps 58
    python scripts/fetch_image_corpus.py --out DIR

1,060 files of some forty formats: truncated and corrupt ones, decompression bombs, EXIF orientations, animations.
They come in the source package of Pillow 13.0.0 (licence: MIT-CMU, also called HPND; it is put beside them),
which pip fetches and this script checks by sha256. What is there is not fetched again; delete it to do so.
Without a network, put the source package into DIR and run again.
"""

from __future__ import annotations

import argparse
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_prep.common.packages import check_sha256, run_client
from llava_train.errors import DataError, LlavaTrainError
from llava_train.files import atomic_folder, ensure_space, inside

VERSION = "13.0.0"
SDIST = f"pillow-{VERSION}.tar.gz"
SHA256 = "cdcd1ba258178f7356d74170c9a81ba4eab6a5d55748bc402a5a2a6fe6be3510"
FILES, MOST_BYTES = 1_060, 100_000_000
PICTURES, LICENCE = f"pillow-{VERSION}/Tests/images/", f"pillow-{VERSION}/LICENSE"
OUT = Path(__file__).resolve().parents[1] / "runs" / "corpus" / f"pillow-{VERSION}"


def main() -> int:
    """Command line; exit status 0 done, 1 the work failed, 130 interrupted."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--out", type=Path, default=OUT, metavar="DIR", help="default: runs/corpus/ of the repository")
    try:
        print(fetch(parser.parse_args().out))
    except (LlavaTrainError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; nothing is half-written: run it again", file=sys.stderr)
        return 130
    return 0


def fetch(out: Path = OUT) -> Path:
    """The folder of pictures, `out/images`; made if it is not there. Raises DataError or StorageError."""
    pictures = out / "images"
    if pictures.is_dir():
        return pictures
    ensure_space(out, 2 * MOST_BYTES, "the image corpus")
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as temporary:
        sdist = out / SDIST
        if not sdist.is_file():
            sdist = download(Path(temporary))
        check_sha256(sdist, SHA256)
        with atomic_folder(pictures) as folder:
            count = extract(sdist, folder)
            if count != FILES:
                raise DataError(f"{sdist}: {count} pictures, expected {FILES}")
    return pictures


def download(folder: Path) -> Path:
    """The source package in `folder`. pip checks it against its index's own digest, and asks it for its name."""
    client = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary=pillow"]
    try:
        run_client([*client, "--disable-pip-version-check", f"pillow=={VERSION}"], folder)
    except DataError as error:
        raise DataError(f"{error}; or put {SDIST} into {folder.parent} and run again") from error
    return folder / SDIST


def extract(sdist: Path, folder: Path) -> int:
    """Write the pictures (and the licence) below `folder`; how many pictures. DataError for an unsafe member."""
    count = size = 0
    with tarfile.open(sdist) as archive:
        for member in tqdm(_wanted(archive), total=FILES + 1, desc="pictures", unit="file"):
            size += member.size
            if not member.isreg() or size > MOST_BYTES:
                raise DataError(f"{sdist}: {member.name}: no regular file, or too large; nothing is unpacked")
            target = inside(folder, member.name.removeprefix(PICTURES).replace(LICENCE, "LICENSE.txt"))
            stream = archive.extractfile(member)
            assert stream is not None  # a regular file has one
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(stream.read())
            count += member.name != LICENCE
    return count


def _wanted(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    for member in archive:
        if member.name == LICENCE or (member.name.startswith(PICTURES) and not member.isdir()):
            yield member


if __name__ == "__main__":
    sys.exit(main())
