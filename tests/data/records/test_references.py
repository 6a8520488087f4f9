"""How records name their pictures: paths, URLs, data URLs, cells."""

import base64

import pytest

from llava_train.data.records.references import IMAGE_KEYS
from llava_train.data.sample import ImageRef
from tests.data.records.test_formats import PICTURE, fault, read, record, said, url

DATA = base64.b64encode(b"any bytes").decode()


@pytest.mark.parametrize(
    "value",
    [
        f"data:image/png;base64,{DATA}",
        f"DATA:IMAGE/PNG;BASE64,{DATA}",
        f"data:image/svg+xml;charset=utf-8;base64,{DATA}",
        f"data:image/jpeg;base64,{DATA[:4]}\n {DATA[4:]}\r\n",
    ],
)
def test_data_urls_are_bytes(value: str) -> None:
    held = ImageRef("", "bytes", data=b"any bytes")
    assert read(record("<image>", "x", image=value)).images == (held,)
    assert read(said([url(value)], "x")).images == (held,)


@pytest.mark.parametrize(
    "value",
    ["data:", "data:image/png;base64,a", "data:image/png;base64,é", "data:text/plain;base64,aa==", "data:image/png,a"],
)
def test_broken_data_urls_are_named(value: str) -> None:
    for values in (record("<image>", "x", image=value), said([url(value)], "x")):
        error = fault(values)
        assert error.cause == "image_unreadable" and "a data URL" in str(error)


@pytest.mark.parametrize("value", ["http://a/b.png", "https://a/b.png", "HTTPS://a/b.png", "file:///a/b.png"])
def test_urls_are_urls_in_messages_and_paths_elsewhere(value: str) -> None:
    assert read(said([url(value)], "x")).images == (ImageRef(value, "url"),)
    assert read(record("<image>", "x", image=value)).images == (ImageRef(value),)  # which is then refused
    assert read({"image": value, "caption": "x"}).images == (ImageRef(value),)


@pytest.mark.parametrize("key", IMAGE_KEYS)
def test_every_key_of_a_picture(key: str) -> None:
    for value in ("a.png", ["a.png"], {"path": "a.png"}, {"bytes": None, "path": "a.png"}):
        assert read(record("<image>", "x", **{key: value})).images == (PICTURE,)
    cell = ImageRef("", "cell", 3, 0, key)
    assert read({"question": "x", "answer": "y", key: cell}).images == (cell,)
    same = read(record("<image>", "x", **{"image": ["a.png"], "images": ["a.png"], key: ["a.png"]}))
    assert same.images == (PICTURE,)
    assert read(record("Hi", "x", **{key: None})).images == () == read(record("Hi", "x", **{key: []})).images
