from pathlib import Path

import pytest

from llava_train.errors import DataError, StorageError
from llava_train.files import atomic_folder, ensure_space, inside, read_json, write_json


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(RuntimeError), atomic_folder(target) as folder:
        (folder / "half").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    for text in ("first", "second"):
        with atomic_folder(target) as folder:
            (folder / "file").write_text(text)
    assert (target / "file").read_text() == "second"
    assert list(tmp_path.iterdir()) == [target]


def test_space_is_checked_with_both_numbers(tmp_path: Path) -> None:
    ensure_space(tmp_path / "not" / "yet", 1, "x")
    with pytest.raises(StorageError, match=r"the model needs 1,000,000,000,000,000,000 bytes, [\d,]+ are free"):
        ensure_space(tmp_path, 10**18, "the model")
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="is a file"):
        ensure_space(tmp_path / "file" / "below", 1, "x")


@pytest.mark.parametrize("path", ["../x", "/etc/passwd", "a/../../x", "http://host/x.png", "a\0b", "link/x"])
def test_no_path_leaves_its_root(tmp_path: Path, path: str) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "link").symlink_to(tmp_path)
    with pytest.raises(DataError):
        inside(root, path)


def test_the_root_itself_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "root").symlink_to(tmp_path / "real")
    assert inside(tmp_path / "root", "a.png") == tmp_path / "real" / "a.png"


def test_json_says_where_it_breaks(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"ä": 1})
    assert read_json(tmp_path / "a.json") == {"ä": 1}
    (tmp_path / "b.json").write_text('{"a": 1,\n "b" 2}')
    with pytest.raises(DataError, match=r"b\.json:2:6"):
        read_json(tmp_path / "b.json")
    with pytest.raises(DataError, match="cannot be read"):
        read_json(tmp_path / "none.json")
