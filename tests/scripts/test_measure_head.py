import json

import pytest

from scripts import measure_head


@pytest.mark.corpus(reason="three processes that load the libraries")
def test_parts_take_less_than_all(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--vocabulary", "40000", "--width", "32", "--positions", "2000"]
    assert measure_head.main(sizes) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["all"] > 2 * figures["supervised"]  # a fifth of the positions
    assert figures["difference"] < 1e-5
