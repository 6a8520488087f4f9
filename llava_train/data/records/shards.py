"""WebDataset shards: neighbours in a tar that share a name up to its first dot are one sample.

`json` and `txt` members are read; pictures are named by their offset and stay where they are.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from typing import Any, BinaryIO

from llava_train.data.records.jsontext import MAX_RECORD, parse_value
from llava_train.data.sample import ImageRef
from llava_train.errors import DataError, RecordError
from llava_train.storage import open_binary

IMAGE_SUFFIXES = {"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff"}
_BLOCK = 512
_PADDING = 1 << 16


def read_shard(path: str) -> Iterator[tuple[Any, str]]:
    """Samples (`__key__`, `__images__`, `json`, `txt`) and their places (":key").

    Where the shard breaks off, its last entry is a RecordError "file_truncated"; the sample it breaks off in is
    not given. Raises DataError where the file cannot be read.
    """
    sample: dict[str, Any] = {}
    with open_binary(path) as stream:
        try:
            for member in _members(stream):
                folder, slash, name = member.name.rpartition("/")
                stem, _, suffix = name.partition(".")
                if not stem or not suffix:  # no sample's: "README", "._0001.jpg"
                    continue
                key = _printable(folder + slash + stem)
                if sample and key != sample["__key__"]:
                    yield sample, f":{sample['__key__']}"
                    sample = {}
                sample.setdefault("__key__", key)
                _add(sample, suffix.lower().rpartition(".")[2], member, stream, f"{path}:{key}")
        except DataError:
            raise
        except Exception as error:  # a damaged header makes tarfile raise many types
            after = sample.get("__key__", "its beginning")
            message = f"{path}: the shard breaks off or is damaged at {after}: {error}"
            yield RecordError(message, "file_truncated"), ":end"
            return
    if sample:
        yield sample, f":{sample['__key__']}"


def _members(stream: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """The regular files of a tar; an error where it breaks off or is damaged, which tarfile may take for its end."""
    with tarfile.open(fileobj=stream, mode="r:") as archive:
        place = -1
        while member := archive.next():
            if archive.offset <= place or member.size < 0:
                raise tarfile.ReadError("a member of negative size")
            place = archive.offset
            vars(archive)["members"].clear()  # tarfile would keep every header it has seen
            if member.isreg():
                yield member
        stream.seek(archive.offset)
        end = stream.read(_PADDING)
        if len(end) < _BLOCK or any(end[:_BLOCK]):
            raise tarfile.ReadError("no end-of-archive block where the members end")
        if end.strip(b"\0"):
            raise tarfile.ReadError("something follows the end of the archive (shards joined by cat?)")


def _add(sample: dict[str, Any], kind: str, member: tarfile.TarInfo, stream: BinaryIO, place: str) -> None:
    if kind not in IMAGE_SUFFIXES and kind not in ("txt", "json"):
        return
    if member.issparse():
        sample[kind] = RecordError(f"{place}.{kind}: a sparse file cannot be read by offset", "malformed")
    elif kind in IMAGE_SUFFIXES:
        sample.setdefault("__images__", []).append(ImageRef("", "span", member.offset_data, member.size))
    elif member.size > MAX_RECORD:
        sample[kind] = RecordError(f"{place}.{kind}: more than {MAX_RECORD:,} bytes", "malformed")
    else:
        stream.seek(member.offset_data)
        content = stream.read(member.size)
        if len(content) < member.size:
            raise EOFError(f"{member.name} is cut short")
        sample[kind] = _decoded(content, kind, place)


def _decoded(content: bytes, kind: str, place: str) -> Any:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return RecordError(f"{place}.{kind}: not UTF-8 (byte {error.start})", "not_utf8")
    return text if kind == "txt" else parse_value(text, f"{place}.json")


def _printable(name: str) -> str:
    """A member's name with what is not UTF-8 in it written as escapes."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
