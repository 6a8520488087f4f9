"""What docs/data.md lists is what there is."""

import re

from llava_train.data.preparing.source import Source
from llava_train.data.records.formats import FORMATS
from llava_train.data.sample import CAUSES
from llava_train.data.templates.template import template_names
from llava_train.recipe import SourceSettings
from tests.conftest import REPOSITORY
from tests.data_prep.test_datasets import SCRIPTS

GUIDE = (REPOSITORY / "docs" / "data.md").read_text(encoding="utf-8")


def rows(header: str) -> dict[str, str]:
    """First column -> second column of the table under a header row that begins so."""
    table = GUIDE.split(f"| {header} |", 1)[1].split("\n\n", 1)[0]
    found = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in table.splitlines()[2:]]
    return {line[0].strip("`"): line[1] for line in found}


def test_every_cause_is_explained() -> None:
    assert rows("cause") == CAUSES


def test_every_format_is_described() -> None:
    assert set(rows("`format`")) == set(FORMATS)


def test_every_template_and_every_setting_of_a_source_is_named() -> None:
    for name in template_names():
        assert f"`{name}`" in GUIDE, name
    for name in SourceSettings.__dataclass_fields__:
        assert re.search(rf"\b{name}\b", GUIDE), name
    assert set(Source.__dataclass_fields__) > {"policy", "max_skipped", "duplicates", "verify"}


def test_every_script_is_named() -> None:
    for name in SCRIPTS:
        assert name in GUIDE, name
