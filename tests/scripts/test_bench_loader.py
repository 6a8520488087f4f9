"""The benchmark measures what training does, and says what it cannot measure."""

import json
from pathlib import Path

import numpy as np
import pytest

from scripts import bench_loader
from scripts.bench_loader import decoder, make_pictures, rate


def test_it_ends_with_its_figures(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--images", "20", "--workers", "0", "--images-per-second", "50", "--gpus", "4"]
    assert bench_loader.main(arguments) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    decode = figures["decode"]
    assert set(decode) == {"pillow", "ours", "simplejpeg", "turbojpeg", "torchvision"}
    assert decode["pillow"] > 0 < decode["ours"]
    assert 0 < figures["preprocess"] < decode["ours"]
    assert 0 < figures["loader"]["0"] < 2 * figures["preprocess"]
    assert figures["cores"] == pytest.approx(50 / figures["preprocess"], rel=0.02)
    assert figures["cores_per_gpu"] == pytest.approx(figures["cores"] / 4, abs=0.01)
    assert 100 < figures["kilobytes"] < 170


def test_decoders_give_the_picture(tmp_path: Path) -> None:
    (data,) = make_pictures(tmp_path, 1)
    assert (tmp_path / "0.jpg").read_bytes() == data
    wanted = np.asarray(decoder("pillow")(data)).astype(int)
    assert wanted.shape == (480, 640, 3)
    for name in bench_loader.DECODERS:
        if call := decoder(name):
            found = np.asarray(call(data)).astype(int)
            found = found.transpose(1, 2, 0) if found.shape[0] == 3 else found
            assert np.abs(found - wanted).mean() < 3, name


def test_what_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken() -> bench_loader.Decoder:
        raise RuntimeError("built for another torch")

    def missing() -> bench_loader.Decoder:
        import no_such_library

        return no_such_library.decode

    monkeypatch.setattr(bench_loader, "DECODERS", {"broken": broken, "missing": missing})
    assert decoder("broken") is decoder("missing") is None
    assert capsys.readouterr().err == "broken: does not load: built for another torch\nmissing: not installed\n"


def test_a_rate_is_of_the_fastest_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 4.0, 10.0, 12.0, 20.0, 23.0])
    monkeypatch.setattr(bench_loader.time, "perf_counter", lambda: next(clock))
    assert rate(lambda item: None, range(10)) == 10 / 2.0


def test_wrong_numbers_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench_loader.main(["--images", "0"])
    assert "must be above 0" in capsys.readouterr().err
