"""DICOM files of every kind become pictures; patients stay behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from data_prep import dicom
from data_prep.common.dicom_pixels import frame_numbers, windowed

PACKAGED = Path(pydicom.__file__).parent / "data" / "test_files"
RAMP = np.arange(256, dtype=np.uint16).reshape(16, 16)
SECRETS = {
    "PatientName": "Roe^Jane Quixote",
    "PatientID": "MRN-7781234",
    "PatientBirthDate": "19441231",
    "AccessionNumber": "ACC998877",
    "ReferringPhysicianName": "Zweistein^Berta",
    "InstitutionName": "Sankt Elswhere",
    "StudyDescription": "Thorax of Jane Quixote",
    "SeriesDescription": "for Dr Zweistein",
    "ImageComments": "call MRN-7781234",
    "OtherPatientIDs": "OTHER-5550",
}


def make(path: Path, pixels: Any = RAMP, **elements: Any) -> Path:
    """A file with the pixels (frames first, colour last) and the elements; with all the SECRETS."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID, dataset.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.7", generate_uid()
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    colour = pixels.shape[-1] == 3
    dataset.SamplesPerPixel = 3 if colour else 1
    dataset.PhotometricInterpretation = "RGB" if colour else "MONOCHROME2"
    if colour:
        dataset.PlanarConfiguration = 0
    dataset.Rows, dataset.Columns = pixels.shape[-3:-1] if colour else pixels.shape[-2:]
    if pixels.ndim == (4 if colour else 3):
        dataset.NumberOfFrames = pixels.shape[0]
    dataset.BitsAllocated = dataset.BitsStored = 8 * pixels.dtype.itemsize
    dataset.HighBit, dataset.PixelRepresentation = dataset.BitsStored - 1, int(pixels.dtype.kind == "i")
    dataset.PixelData = pixels.tobytes()
    for keyword, value in {**SECRETS, **elements}.items():
        setattr(dataset, keyword, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)
    return path


def run(folder: Path, out: Path, capsys: pytest.CaptureFixture[str], *more: str) -> tuple[dict[str, Any], list[Any]]:
    """The report and the records."""
    assert dicom.main([str(folder), "--out", str(out), "--workers", "1", *more]) == 0
    return json.loads(capsys.readouterr().out), json.loads((out / "dicom" / "dicom.json").read_text())


def grey(out: Path, name: str = "0000000-0000.png") -> Any:
    with Image.open(out / "dicom" / "images" / name) as picture:
        assert (picture.mode, picture.info) == ("RGB", {})
        pixels = np.asarray(picture)
    assert (pixels[..., 0] == pixels[..., 1]).all()
    return pixels[..., 0]


@pytest.mark.filterwarnings("ignore:Invalid value for VR")
def test_no_output_byte_names_the_patient(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    uids = {"StudyInstanceUID": generate_uid(), "SeriesInstanceUID": generate_uid()}
    folder = tmp_path / "in" / "Roe^Jane Quixote" / "MRN-7781234"
    make(folder / "Zweistein.dcm", Modality="CR", BodyPartExamined="CHEST", ViewPosition="PA", **uids)
    make(folder / "odd.dcm", Modality="CT", BodyPartExamined="Quixote", ViewPosition="Jane", Laterality="R", **uids)
    (folder / "broken.dcm").write_bytes(b"no DICOM")
    report, records = run(tmp_path / "in", tmp_path / "out", capsys)
    assert report["skipped"] == {"not_dicom": 1}
    assert [record["conversations"][1]["value"] for record in records] == [
        "A radiograph of the chest, PA view.",
        "A CT image, right.",
    ]
    written = b"".join(
        str(path.relative_to(tmp_path / "out")).encode() + path.read_bytes()
        for path in sorted((tmp_path / "out").rglob("*"))
        if path.is_file()
    )
    words = [word for value in SECRETS.values() for word in value.replace("^", " ").split() if len(word) > 3]
    for word in [*words, "Roe", *uids.values(), "Quixote"]:
        assert word.lower().encode() not in written.lower(), word


def test_patients_are_numbered_so_that_they_can_be_kept_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, patient in enumerate(["a", "b", "a", ""]):
        make(tmp_path / "in" / f"{number}.dcm", PatientID=patient, PatientName=patient, PatientBirthDate="")
    report, records = run(tmp_path / "in", tmp_path, capsys)
    assert [record["group"] for record in records] == [0, 1, 0, 2]
    assert report["groups"] == 3


def test_the_window_of_the_file_the_one_asked_for_or_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(
        tmp_path / "in" / "1.dcm",
        RAMP,
        WindowCenter=[1128, 40],
        WindowWidth=[257, 400],
        RescaleSlope=1,
        RescaleIntercept=1000,
    )
    run(tmp_path / "in", tmp_path / "file", capsys)
    assert np.abs(grey(tmp_path / "file").astype(int) - RAMP).max() <= 1  # 1000..1255 -> 0..255
    run(tmp_path / "in", tmp_path / "asked", capsys, "--window", "1128,1")
    assert set(np.unique(grey(tmp_path / "asked"))) == {0, 255}
    make(tmp_path / "none" / "1.dcm", RAMP * 200 + 3)
    run(tmp_path / "none", tmp_path / "percentile", capsys)
    assert np.abs(grey(tmp_path / "percentile").astype(int) - RAMP).max() <= 3


@pytest.mark.parametrize(
    ("shape", "values"),
    [("LINEAR", [0, 0, 127, 255, 255]), ("LINEAR_EXACT", [0, 0, 128, 255, 255]), ("SIGMOID", [2, 30, 128, 225, 253])],
)
def test_the_standard_says_how_a_window_maps(shape: str, values: list[int]) -> None:
    got = windowed(np.array([-120, -50, 0, 50, 120.0]), (0.0, 100.0), shape)
    assert np.abs(got.astype(int) - values).max() <= 2


def test_monochrome1_is_turned_and_signed_values_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    signed = (RAMP.astype(np.int16) - 128) * 10
    made = {"WindowCenter": 0, "WindowWidth": 2560}
    make(tmp_path / "in" / "1.dcm", signed, PhotometricInterpretation="MONOCHROME1", **made)
    make(tmp_path / "in" / "2.dcm", signed, **made)
    run(tmp_path / "in", tmp_path, capsys)
    one, two = grey(tmp_path), grey(tmp_path, "0000001-0000.png")
    assert (one == 255 - two).all()
    assert np.abs(two.astype(int) - RAMP).max() <= 1


def test_frames_all_of_them_or_some_evenly_spread(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    frames = np.stack([np.full((4, 4), 20 * number, np.uint8) for number in range(10)])
    make(tmp_path / "in" / "1.dcm", frames, Modality="US", WindowCenter=128, WindowWidth=256)
    report, records = run(tmp_path / "in", tmp_path / "all", capsys)
    assert (report["records"], len(records)) == (10, 10)
    _, records = run(tmp_path / "in", tmp_path / "some", capsys, "--frames", "2")
    assert [record["conversations"][1]["value"] for record in records] == [
        "An ultrasound image, frame 3 of 10.",
        "An ultrasound image, frame 8 of 10.",
    ]
    assert [int(grey(tmp_path / "some", f"0000000-{number:04}.png")[0, 0]) for number in (2, 7)] == [40, 140]
    assert frame_numbers(3, 5) == [0, 1, 2]


def test_enhanced_files_keep_window_and_slope_for_each_frame(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def group(centre: float) -> Dataset:
        voi, values, holder = Dataset(), Dataset(), Dataset()
        voi.WindowCenter, voi.WindowWidth = centre, 257
        values.RescaleSlope, values.RescaleIntercept = 2, 0
        holder.FrameVOILUTSequence, holder.PixelValueTransformationSequence = [voi], [values]
        return holder

    frames = np.stack([RAMP // 2, RAMP // 2])
    make(tmp_path / "in" / "1.dcm", frames, PerFrameFunctionalGroupsSequence=[group(128), group(-1000)])
    run(tmp_path / "in", tmp_path, capsys)
    assert np.abs(grey(tmp_path).astype(int) - RAMP).max() <= 2
    assert (grey(tmp_path, "0000000-0001.png") == 255).all()


def test_colour_of_16_bits_loses_its_low_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pixels = np.zeros((4, 4, 3), np.uint16)
    pixels[..., 0], pixels[..., 2] = 0xABCD, 0x00FF
    make(tmp_path / "in" / "1.dcm", pixels)
    run(tmp_path / "in", tmp_path, capsys)
    with Image.open(tmp_path / "dicom" / "images" / "0000000-0000.png") as picture:
        assert picture.getpixel((0, 0)) == (0xAB, 0, 0)


def test_burned_in_text_is_left_out_unless_allowed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, said in enumerate(["YES", "NO", ""]):
        make(tmp_path / "in" / f"{number}.dcm", BurnedInAnnotation=said)
    report, _ = run(tmp_path / "in", tmp_path / "a", capsys)
    assert (report["records"], report["skipped"], report["burned_in_unknown"]) == (2, {"burned_in_annotation": 1}, 1)
    assert json.loads((tmp_path / "a" / "dicom" / ".skipped.json").read_text()) == {"burned_in_annotation": [0]}
    report, _ = run(tmp_path / "in", tmp_path / "b", capsys, "--allow-burned-in")
    assert (report["records"], report["skipped"]) == (3, {})


def test_a_file_that_breaks_in_its_frames_leaves_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "in" / "1.dcm")
    make(tmp_path / "in" / "2.dcm", np.stack([RAMP] * 3), PixelData=RAMP.tobytes())
    make(tmp_path / "in" / "3.dcm", Rows=65_535, Columns=65_535)
    report, _ = run(tmp_path / "in", tmp_path, capsys)
    assert report["records"] == len(list((tmp_path / "dicom" / "images").iterdir())) == 1
    assert report["skipped"] == {"damaged": 1, "too_large": 1}


def test_pydicom_s_own_files_none_of_which_raises(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In two processes; what cannot be decoded here needs a plugin, is no picture or is damaged on purpose."""
    shutil.copytree(PACKAGED, tmp_path / "in")
    assert dicom.main([str(tmp_path / "in"), "--out", str(tmp_path), "--workers", "2", "--frames", "2"]) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert report["records"] >= 50
    assert report["files"] == sum(path.is_file() for path in PACKAGED.rglob("*"))
    assert set(report["skipped"]) <= {"not_dicom", "no_pixels", "no_decoder", "damaged", "incomplete"}
    assert captured.err.count("left out: ") == sum(report["skipped"].values())
    records = json.loads((tmp_path / "dicom" / "dicom.json").read_text())
    for record in records:
        with Image.open(tmp_path / record["image"]) as picture:
            assert picture.mode == "RGB"


@pytest.mark.parametrize(
    ("name", "colours"),
    [("examples_palette.dcm", 50), ("examples_ybr_color.dcm", 50), ("SC_ybr_full_422_uncompressed.dcm", 5)],
)
def test_palettes_and_ybr_become_rgb(
    name: str, colours: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    shutil.copy(next(PACKAGED.rglob(name)), tmp_path / "in")
    run(tmp_path / "in", tmp_path, capsys, "--frames", "1")
    (path,) = (tmp_path / "dicom" / "images").iterdir()
    with Image.open(path) as picture:
        pixels = np.asarray(picture)
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) >= colours
    assert (pixels[..., 0] != pixels[..., 1]).any()


def test_faults_of_the_request_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("a")
    for folder, told in (("empty", "holds no file"), ("nowhere", "holds no file"), ("text", "no picture in 1 files")):
        assert dicom.main([str(tmp_path / folder), "--out", str(tmp_path / "out"), "--workers", "1"]) == 1
        assert told in capsys.readouterr().err
    assert not (tmp_path / "out" / "dicom").exists()
    (tmp_path / "out" / "dicom").mkdir(parents=True)
    assert dicom.main([str(tmp_path / "text"), "--out", str(tmp_path / "out")]) == 1
    assert "there already" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        dicom.main([str(tmp_path), "--window", "wide"])
