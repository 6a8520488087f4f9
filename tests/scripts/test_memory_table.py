import pytest

from scripts import memory_table


@pytest.mark.corpus(reason="measures twelve arrangements of 7B shapes")
def test_the_table_of_the_docs(capsys: pytest.CaptureFixture[str]) -> None:
    assert memory_table.main(["--llm", "7B"]) == 0
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert len(rows) == 12
    full = {row[2]: row for row in rows if row[1] == "stage 2, full"}
    assert full["DDP, or one GPU"][-1].startswith("no: ")  # 108 GB of states and activations on top
    assert full["ZeRO-3 over 8"][3] == "1.8 GB"  # 7.06e9 weights of 2 bytes over 8
