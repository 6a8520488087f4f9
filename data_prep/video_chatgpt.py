"""Video-ChatGPT: 100K questions and answers about ActivityNet videos (VideoInstruct-100K).

    python -m data_prep.video_chatgpt --out data

* What: the instruction data of Video-ChatGPT; some 13,300 videos, one question a record.
* From: https://huggingface.co/datasets/MBZUAI/VideoInstruct-100K. Licence: CC-BY-SA-4.0 (the questions).
* Size: 42 MB of questions. By hand: the videos, which ActivityNet (http://activity-net.org/download.html) gives
  on request; put them into `DIR/video_chatgpt/videos/` as VIDEO_ID.mp4 (or .mkv, .webm, .avi) and run again.
* Expected: 100K records; the exact count is not verified.
* Writes `DIR/video_chatgpt/`: `videos.json`, LLaVA JSON with `video` relative to DIR and the marker <video>
  after or before the question by turns, as the original places it; `videos_available.json` with the records
  whose video is there.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_prep.common.command import Dataset, Job, needed
from data_prep.common.records import Record, RecordFile, read_array, write_array, write_available
from data_prep.common.transfer import Remote
from llava_train.errors import DataError
from llava_train.files import inside

QUESTIONS = Remote(
    "https://huggingface.co/datasets/MBZUAI/VideoInstruct-100K/resolve/main/VideoInstruct100K.json",
    "video_chatgpt/published/VideoInstruct100K.json",
    about=42_400_000,
)
SUFFIXES = (".mp4", ".mkv", ".webm", ".avi")
PLACES = ("{question}\n<video>", "<video>\n{question}")


def convert(job: Job) -> None:
    """Write all the records, and those whose video is there."""
    path = job.home / "videos.json"
    write_array(path, _records(needed(inside(job.out, QUESTIONS.path)), job.home / "videos"))
    write_available(path, job.out, key="video")


def _records(path: Path, videos: Path) -> Iterator[Record]:
    there = {file.stem: file.name for file in videos.glob("*") if file.suffix.lower() in SUFFIXES}
    for number, item in enumerate(read_array(path)):
        try:
            video, asked, answer = item["video_id"], item["q"], item["a"]
        except (KeyError, TypeError) as error:
            raise DataError(f"{path}[{number}]: not a question of VideoInstruct: {error} is missing") from error
        turns = [
            {"from": "human", "value": PLACES[number % 2].format(question=asked)},
            {"from": "gpt", "value": answer},
        ]
        name = f"video_chatgpt/videos/{there.get(video, f'{video}.mp4')}"
        yield {"id": f"{video}-{number}", "video": name, "conversations": turns}


DATASET = Dataset(
    name="video_chatgpt",
    document=__doc__,
    parts={"questions": [QUESTIONS]},
    records=[
        RecordFile("video_chatgpt/videos.json", key="video", complete=False),
        RecordFile("video_chatgpt/videos_available.json", key="video"),
    ],
    convert=convert,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; see `Dataset.main`."""
    return DATASET.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
