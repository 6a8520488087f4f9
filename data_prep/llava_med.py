"""LLaVA-Med: 500K captions to align on and 60K conversations to tune on, about PubMed Central's figures.

    python -m data_prep.llava_med --out data --mirror https://hanoverprod.z21.web.core.windows.net/med_llava/=URL/

* What: `alignment` (the released 500K of the paper's 600K) and `instruct` (60K, without and with the sentences
  of the article that mention the figure); `images` takes the figures out of the articles.
* From: the addresses of microsoft/LLaVA-Med's README, which answer 404 since 2025 (its issue 122): name a copy
  with --mirror, or put the files into `DIR/llava_med/published/`. Their sha256 is known (the pointers in that
  repository), so any copy is as good. The articles: https://ftp.ncbi.nlm.nih.gov, a .tar.gz each.
* Licence: CC-BY-NC-4.0 and OpenAI's terms of use, research only; each figure: its article's licence.
* Size: 663 MB of JSON. The articles are 3.6 TB by users' reports, their figures 69 GB: every article is deleted
  once its figures are out. `--limit N`: at most N articles; `--only instruct,images`: those of `instruct`.
* Expected: 500K and 60K records; the exact counts are not verified. Articles and figures are missing: they are
  counted, and listed in `DIR/llava_med/missing.jsonl`.
* Writes `DIR/llava_med/`: `alignment_500k.json`, `instruct_60k.json`, `instruct_60k_inline_mention.json` (the
  misspelt key "conversatons" put right), each with a `_available.json` of the records whose figure is there;
  `images/PAIR.jpg`; `image` is relative to DIR.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from data_prep.common.archives import tar_files
from data_prep.common.command import Dataset, Job, needed, say
from data_prep.common.fetching import fetch_links
from data_prep.common.pictures import as_jpeg
from data_prep.common.records import Record, RecordFile, pictures_of, read_array, write_array, write_available
from data_prep.common.transfer import FetchError, Remote, full_disk
from llava_train.errors import DataError
from llava_train.files import inside

SOURCE, HOME = "https://hanoverprod.z21.web.core.windows.net/med_llava", "llava_med"
# (part, path at the source, name of the record file, sha256, bytes)
FILES = (
    ("alignment", "alignment/llava_med_alignment_500k.json", "alignment_500k.json",
     "007456f3d6c2091466b3fb6cd0573f61a63fd0c937e568f44113d5a1f23e8b93", 358_112_840),
    ("instruct", "instruct/llava_med_instruct_60k.json", "instruct_60k.json",
     "cf84c82fb58e391d6cf198e2657b6fc8584a180509b8813c3604ce46f6275c19", 88_758_916),
    ("instruct", "instruct/llava_med_instruct_60k_inline_mention.json", "instruct_60k_inline_mention.json",
     "b3649f4193a51215aee4519b44d8436a4200e182d6a78a3cb78672d97bea948a", 87_669_379),
    ("images", "llava_med_image_urls.jsonl", "",
     "2604441ec3d1f6324d21846cfd44f92eab29454beed1da42a98d943b41731e44", 128_785_989),
)  # fmt: skip
PUBLISHED = {
    source: Remote(f"{SOURCE}/{source}", f"{HOME}/published/{Path(source).name}", f"sha256:{digest}", size)
    for _, source, _, digest, size in FILES
}
RECORDS = [(part, PUBLISHED[source], name) for part, source, name, _, _ in FILES if name]
LINKS = PUBLISHED["llava_med_image_urls.jsonl"]


def convert(job: Job) -> None:
    """Put the records right, fetch the figures they name, and write down which records can be used."""
    made = []
    for part, remote, name in RECORDS:
        if part in job.parts:
            made.append(job.home / name)
            write_array(made[-1], _records(needed(inside(job.out, remote.path))))
    if "images" in job.parts:
        wanted = made or [job.home / name for *_, name in RECORDS if (job.home / name).is_file()]
        fetch_figures(job, {name for path in wanted for record in read_array(path) for name in pictures_of(record)})
    for path in made:
        write_available(path, job.out)


def _records(path: Path) -> Iterator[Record]:
    for number, record in enumerate(read_array(path)):
        turns = record.get("conversations") or record.get("conversatons")
        if not turns or "image" not in record:
            raise DataError(f"{path}[{number}]: not a record of LLaVA-Med: no conversation or no image")
        yield {"id": record.get("id", number), "image": f"{HOME}/images/{record['image']}", "conversations": turns}


def fetch_figures(job: Job, wanted: set[str]) -> None:
    """Fetch the articles of the figures that are not there yet, and take the figures out."""
    members: dict[str, dict[str, Path]] = defaultdict(dict)  # article's URL -> member of the archive -> figure
    for link in read_array(needed(inside(job.out, LINKS.path))):
        pair, url, member = (str(link.get(key)) for key in ("pair_id", "pmc_tar_url", "image_file_path"))
        name = f"{HOME}/images/{pair}.jpg"
        if name in wanted and not (figure := inside(job.out, name)).is_file():
            members[url][member] = figure
    urls = sorted(members)[: job.limit]
    remotes = [Remote(url, f"{HOME}/.articles/{PurePosixPath(urlsplit(url).path).name}") for url in urls]

    def finish(remote: Remote, path: Path) -> None:
        take_figures(path, members[remote.url])

    dead = fetch_links(job.fetcher, remotes, finish, job.home / "missing.jsonl", "articles")
    told = ", ".join(f"{count:,} {cause}" for cause, count in sorted(dead.items()))
    say(f"LLaVA-Med: {len(wanted):,} figures wanted, {len(urls):,} articles asked for; missing: {told or 'none'}")


def take_figures(article: Path, figures: dict[str, Path]) -> None:
    """Write each figure that the archive has, then delete it; FetchError if one is not in it or is no picture."""
    left = dict(figures)
    try:
        for name, content in tar_files(article):
            if name in left:
                figure = left.pop(name)
                figure.parent.mkdir(parents=True, exist_ok=True)
                raw = figure.with_name(f".{figure.name}.raw")
                with full_disk(raw):
                    raw.write_bytes(content.read())
                as_jpeg(raw, figure)
    except FetchError:
        raise
    except DataError as error:
        raise FetchError(str(error), "damaged_archive") from error
    finally:
        article.unlink(missing_ok=True)
    if left:
        raise FetchError(f"{article.name}: has no {min(left)}", "not_in_article")


DATASET = Dataset(
    name=HOME,
    document=__doc__,
    parts={
        part: [PUBLISHED[source] for of, source, *_ in FILES if of == part]
        for part in ("alignment", "instruct", "images")
    },
    records=[
        RecordFile(f"{HOME}/{name}", complete=False, part=part)
        for part, _, stem in RECORDS
        for name in (stem, stem.replace(".json", "_available.json"))
    ],
    convert=convert,
    limit="articles",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; see `Dataset.main`."""
    return DATASET.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
