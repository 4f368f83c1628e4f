"""A pytest plugin: the report of results of all stages, made only once for all tests."""

from __future__ import annotations

import pytest

from grains.report import page
from helpers.report_page import Page
from helpers.results import write_everything


@pytest.fixture(scope="session")
def everything(tmp_path_factory):
    """Results of all stages, where their report lies, its text and its page."""
    place = tmp_path_factory.mktemp("everything")
    folder, output = write_everything(place / "Größe #1 100%"), place / "reports" / "new" / "r.html"
    text = page.build([folder], output, 6)[0]
    return folder, output, text, Page(text)
