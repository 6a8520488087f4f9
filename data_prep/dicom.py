"""DICOM files -> PNG pictures and captions, as LLaVA JSON, without anything that names a patient.

    python -m data_prep.dicom FOLDER --out data

* What: every DICOM file in FOLDER and below; 8-bit RGB pictures (see data_prep/common/dicom_pixels.py), each frame of
  a multi-frame file its own (`--frames N`: N of them, evenly spread).
* Licence: that of your files. Size: about that of your files. Expected: a record for each frame.
* Captions say modality, part of the body, side and view. They are made of the words in this script alone,
  chosen by the file's codes: no text of the file is copied. Descriptions, comments and dates are free text in
  which hospitals write names: they are not read.
* Numbers instead of identifiers: pictures and ids have the file's place in the sorted list of files. A UID
  identifies too, and so does its hash to whoever has the UID. `group` numbers the patients, so that a test set
  can be kept free of patients that are trained on; it cannot be traced back.
* Burned-in text cannot be seen here: a file that says it has some (BurnedInAnnotation YES) is left out, unless
  `--allow-burned-in`; how many do not say is in the report (`burned_in_unknown`): look at those (ultrasound,
  secondary capture) before you pass the pictures on. Faces can be rebuilt of slices of a head.
* Writes `DIR/dicom/`: `images/FILE-FRAME.png`, `dicom.json` (`image` relative to DIR), `.skipped.json` (numbers
  of the files left out, by cause; their paths are told on stderr only, for paths hold names as well).
* Needs pydicom: pip install "llava-train[medical]" (and pylibjpeg with its plugins for JPEG-LS and lossless JPEG).
"""

from __future__ import annotations

import argparse
import hashlib
import hmac
import importlib.util
import json
import os
import secrets
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_prep.common.command import guarded, positive, say
from data_prep.common.records import Record, question, write_array
from data_prep.common.transfer import full_disk
from llava_train.errors import DataError, StorageError
from llava_train.files import atomic_folder, ensure_space, write_json

PROMPT = "Describe the image."
# Our words for the standard's codes. A code that is not here says nothing: it may be anything.
MODALITIES = {
    "CR": "radiograph", "DX": "radiograph", "RG": "radiograph", "CT": "CT image", "MR": "MR image",
    "US": "ultrasound image", "MG": "mammogram", "XA": "angiogram", "RF": "fluoroscopy image", "PT": "PET image",
    "NM": "nuclear medicine image", "IO": "dental radiograph", "PX": "panoramic dental radiograph",
    "OP": "ophthalmic photograph", "OPT": "optical coherence tomogram", "SM": "microscope image",
    "ES": "endoscopic image", "XC": "photograph", "GM": "microscope image",
}  # fmt: skip
PARTS = (
    "ABDOMEN", "ANKLE", "AORTA", "ARM", "BLADDER", "BRAIN", "BREAST", "CALCANEUS", "CHEST", "CLAVICLE", "COCCYX",
    "ELBOW", "ESOPHAGUS", "EYE", "FACE", "FEMUR", "FINGER", "FOOT", "FOREARM", "HAND", "HEAD", "HEART", "HIP",
    "HUMERUS", "JAW", "KIDNEY", "KNEE", "LEG", "LIVER", "LUNG", "MANDIBLE", "MAXILLA", "NECK", "ORBIT", "PANCREAS",
    "PATELLA", "PELVIS", "PROSTATE", "RADIUS", "RIB", "SACRUM", "SCAPULA", "SHOULDER", "SKULL", "SPINE", "SPLEEN",
    "STERNUM", "THIGH", "THYROID", "TIBIA", "TOE", "ULNA", "UTERUS", "WRIST",
)  # fmt: skip
BODY_PARTS = {part: part.lower() for part in PARTS} | {
    "CSPINE": "cervical spine", "TSPINE": "thoracic spine", "LSPINE": "lumbar spine", "SSPINE": "sacral spine",
    "LUMBAR SPINE": "lumbar spine", "THORAX": "chest", "CAROTID": "carotid artery", "WHOLEBODY": "whole body",
    "EXTREMITY": "extremity", "COLON": "colon", "STOMACH": "stomach",
}  # fmt: skip
SIDES = {"L": "left", "R": "right", "B": "both sides"}
VIEWS = {
    "AP": "AP view", "PA": "PA view", "LL": "left lateral view", "RL": "right lateral view", "LATERAL": "lateral view",
    "LAT": "lateral view", "CC": "craniocaudal view", "MLO": "mediolateral oblique view", "ML": "mediolateral view",
    "LLD": "left lateral decubitus view", "RLD": "right lateral decubitus view", "LAO": "left anterior oblique view",
    "RAO": "right anterior oblique view", "LPO": "left posterior oblique view", "RPO": "right posterior oblique view",
}  # fmt: skip


@dataclass(frozen=True)
class Task:
    """One file, and all that a process needs to convert it."""

    number: int
    path: Path
    images: Path
    frames: int | None
    window: tuple[float, float] | None
    allow_burned_in: bool
    key: bytes  # of this run, never written: makes the patient's digest worthless afterwards


@dataclass(frozen=True)
class Result:
    """What became of a file: the names and captions of its pictures, or the cause why there are none."""

    pictures: tuple[tuple[str, str], ...] = ()
    patient: bytes = b""
    cause: str = ""
    burned_in_unknown: bool = False


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; exit status 0 done, 1 failed or no picture, 2 wrong arguments, 130 interrupted."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("data_prep.dicom", description=__doc__, formatter_class=raw)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--out", type=Path, default=Path("data"), metavar="DIR", help="default: data")
    parser.add_argument(
        "--window", type=_window, metavar="CENTRE,WIDTH", help="instead of each file's own, e.g. --window=-600,1500"
    )
    parser.add_argument("--frames", type=positive, metavar="N", help="at most N frames of a file (default: all)")
    parser.add_argument("--allow-burned-in", action="store_true", help="take files that say text is burned in")
    parser.add_argument("--workers", type=positive, default=os.cpu_count(), metavar="N", help="processes")
    options = parser.parse_args(arguments)
    return guarded(lambda: run(options))


def _window(text: str) -> tuple[float, float]:
    try:
        centre, width = map(float, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not CENTRE,WIDTH") from None
    if not width >= 1:
        raise argparse.ArgumentTypeError("the width must be 1 or more")
    return centre, width


def run(options: argparse.Namespace) -> int:
    """Convert the folder; the report goes to stdout as one JSON object."""
    target = options.out / "dicom"
    if importlib.util.find_spec("pydicom") is None:
        raise DataError('DICOM files are read with pydicom: pip install "llava-train[medical]"')
    if target.exists():
        raise DataError(f"{target}: there already; delete it or choose another --out")
    paths = sorted(path for path in options.folder.rglob("*") if path.is_file() and not path.is_symlink())
    if not paths:
        raise DataError(f"{options.folder}: holds no file")
    ensure_space(options.out, sum(path.stat().st_size for path in paths), "writing the pictures")
    with atomic_folder(target) as folder:
        report = convert(paths, folder, options)
        if not report["records"]:
            raise DataError(f"{options.folder}: no picture in {len(paths):,} files: {report['skipped']}")
    print(json.dumps(report))
    return 0


def convert(paths: Sequence[Path], folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Write pictures, records and the list of what was left out; the report."""
    (folder / "images").mkdir()
    key = secrets.token_bytes(32)
    chosen = (options.frames, options.window, options.allow_burned_in, key)
    tasks = [Task(number, path, folder / "images", *chosen) for number, path in enumerate(paths)]
    patients: dict[bytes, int] = {}
    skipped: dict[str, list[int]] = {}
    counts: Counter[str] = Counter()

    def records() -> Iterator[Record]:
        results = _results(tasks, options.workers)
        for task, result in zip(tasks, tqdm(results, total=len(tasks), desc="dicom", unit="file", disable=None)):
            if result.cause:
                skipped.setdefault(result.cause, []).append(task.number)
                say(f"left out: {task.path}: {result.cause}")
                continue
            counts["burned_in_unknown"] += result.burned_in_unknown
            group = patients.setdefault(result.patient, len(patients))
            for name, caption in result.pictures:
                yield question(f"dicom-{Path(name).stem}", f"dicom/images/{name}", PROMPT, caption, group=group)

    written = write_array(folder / "dicom.json", records())
    write_json(folder / ".skipped.json", skipped)
    report = {"name": "dicom", "files": len(paths), "records": written, "images": written, "groups": len(patients)}
    report |= {"skipped": {cause: len(numbers) for cause, numbers in skipped.items()}, "missing": 0}
    return report | {"burned_in_unknown": counts["burned_in_unknown"]}


def _results(tasks: Sequence[Task], workers: int) -> Iterator[Result]:
    if workers == 1:
        yield from map(convert_file, tasks)
        return
    try:
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            yield from pool.map(convert_file, tasks, chunksize=4)
    except BrokenProcessPool as error:
        raise DataError("a process died while it decoded a file (out of memory?): try fewer --workers") from error


def convert_file(task: Task) -> Result:
    """Write the pictures of one file. A file that cannot be used is a Result with the cause, no exception."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom warns with the values it read
        try:
            return _convert_file(task)
        except StorageError:
            raise
        except Exception as error:
            return Result(cause=_cause(error))


def _convert_file(task: Task) -> Result:
    import pydicom

    from data_prep.common.dicom_pixels import frames

    dataset = pydicom.dcmread(task.path)
    burned_in = str(dataset.get("BurnedInAnnotation") or "").upper()
    if "PixelData" not in dataset:
        return Result(cause="no_pixels")
    if burned_in == "YES" and not task.allow_burned_in:
        return Result(cause="burned_in_annotation")
    text, total = caption(dataset), int(dataset.get("NumberOfFrames") or 1)
    pictures: dict[str, str] = {}
    try:
        for number, picture in frames(dataset, task.frames, task.window):
            name = f"{task.number:07}-{number:04}.png"
            pictures[name] = text if total == 1 else f"{text[:-1]}, frame {number + 1} of {total}."
            with full_disk(task.images):
                picture.save(task.images / name)  # made of an array: it has no metadata of the file
    except Exception:
        for name in pictures:  # no frames of a file that is left out
            (task.images / name).unlink(missing_ok=True)
        raise
    return Result(tuple(pictures.items()), _patient(dataset, task.key), "", burned_in not in ("YES", "NO"))


def caption(dataset: Any) -> str:
    """What the file's codes say, in our words."""
    what = MODALITIES.get(_code(dataset, "Modality"), "medical image")
    body = BODY_PARTS.get(_code(dataset, "BodyPartExamined"))
    side = SIDES.get(_code(dataset, "ImageLaterality") or _code(dataset, "Laterality"))
    view = VIEWS.get(_code(dataset, "ViewPosition"))
    article = "An" if what[0] in "aeiou" or what.startswith("MR ") else "A"
    of = f" of the {body}" if body else ""
    return f"{', '.join(filter(None, [f'{article} {what}{of}', side, view]))}."


def _code(dataset: Any, keyword: str) -> str:
    return str(dataset.get(keyword) or "").strip().upper()


def _patient(dataset: Any, key: bytes) -> bytes:
    """A digest that is the same for files of one patient in this run, and means nothing after it."""
    known = [str(dataset.get(keyword) or "") for keyword in ("PatientID", "PatientName", "PatientBirthDate")]
    named = "\0".join(known) if any(known) else str(dataset.get("StudyInstanceUID") or secrets.token_hex())
    return hmac.new(key, named.encode("utf-8", "replace"), hashlib.sha256).digest()


def _cause(error: Exception) -> str:
    from pydicom.errors import InvalidDicomError

    causes: dict[type[Exception], str] = {
        InvalidDicomError: "not_dicom",
        MemoryError: "too_large",
        AttributeError: "incomplete",
        KeyError: "incomplete",
        RuntimeError: "no_decoder",
    }
    return next((cause for kind, cause in causes.items() if isinstance(error, kind)), "damaged")


if __name__ == "__main__":
    sys.exit(main())
