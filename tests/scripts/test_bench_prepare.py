import json

import pytest

from scripts import bench_prepare


@pytest.mark.corpus(reason="four processes, each of which loads the libraries anew")
def test_the_benchmark_ends_with_its_figures(tmp_path, capfd: pytest.CaptureFixture[str]) -> None:
    assert bench_prepare.main(["--records", "5000", "--folder", str(tmp_path)]) == 0
    figures = json.loads(capfd.readouterr().out.strip().splitlines()[-1])
    assert figures["records"] == figures["read"] == figures["samples"] == 5000
    assert figures["skipped"] == 0
    assert 0 < figures["resumed_seconds"] < 200
    assert 0 < figures["seconds"] < 200
    assert 100 < figures["peak_memory_mb"] < 2048
    assert 600 < figures["mean_length"] < 1000
