"""The server as a fixture; retries without the waiting."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest

from data_prep.common import transfer
from tests.data_prep.server import Server, serving

# pydicom is an extra: without it there is nothing to test.
collect_ignore = [] if importlib.util.find_spec("pydicom") else ["test_dicom.py"]


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as running:
        yield running


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "PAUSE", 0.01)
    monkeypatch.setattr(transfer, "TIMEOUT", 5.0)
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
