"""The table of networks: what it says, and that the documentation says the same."""

from pathlib import Path

import pytest

from excite.report.networks import networks_table
from excite.verbs.paper import paper

DOCUMENT = Path(__file__).parents[2] / "docs" / "networks.md"


@pytest.fixture(scope="module")
def rows():
    return paper()


def test_the_document_holds_the_table_of_today(rows):
    assert DOCUMENT.read_text().endswith("\n\n" + networks_table(rows))


def test_figures_without_a_note_are_within_a_hundredth(rows):
    for row in rows:
        if row["paper_macs"] and not row["note"]:
            assert row["macs"] == pytest.approx(row["paper_macs"], rel=0.01), row["spec"]


def test_a_pattern_chooses(rows):
    names = {row["network"] for row in paper("mobilenet_v2")}
    assert names == {"mobilenet_v2", "mobilenet_v2_cifar"}


def test_notes_are_numbered_once():
    row = {
        "network": "a",
        "spec": "a:width=2",
        "input_size": 224,
        "in_channels": 3,
        "parameters": 1.23456,
        "macs": 0.5,
        "paper_parameters": 1.2,
        "paper_macs": None,
        "top1": 25.0,
        "top5": None,
        "data": "ImageNet validation",
        "source": "Someone 2020, Table 1",
        "note": "counted otherwise",
    }
    lines = networks_table([row, row | {"source": "The same, release", "note": None}]).splitlines()
    assert lines[2] == (
        "| `a:width=2` | 224² | 1.235 | 1.2 [1] | 0.500 |  | 25.00 | Someone 2020, Table 1; ImageNet validation |"
    )
    assert lines[3] == "|  |  |  | 1.2 |  |  | 25.00 | The same, release; ImageNet validation |"
    assert lines[-1] == "[1] counted otherwise."
    assert "| 4396 numbers |" in networks_table([row | {"input_size": 1, "in_channels": 4396}])
    assert "| 25²×30 |" in networks_table([row | {"input_size": 25, "in_channels": 30}])
