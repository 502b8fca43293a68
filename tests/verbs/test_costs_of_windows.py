"""``costs`` and ``paper`` for networks that take the windows of a hyperspectral scene, or answer with an image."""

import json

import pytest
from typer.testing import CliRunner

from excite.cli import app
from excite.errors import UsageError
from excite.verbs.costs import costs
from excite.verbs.paper import paper


def test_the_input_is_the_tables_by_default():
    plain, attended, image = costs(["hybridsn:norm=none", "hybridsn+sk", "resnet20"], latency=False)
    assert (plain["size"], plain["channels"], plain["classes"]) == (25, 30, 16)
    assert plain["parameters"] == 5_122_176
    assert 1.9 < attended["macs"] / plain["macs"] < 2.1
    assert (image["size"], image["channels"], image["classes"]) == (32, 3, 10)


@pytest.mark.parametrize(("spec", "size"), [("hybridsn", 9), ("hybridsn:window=9", None), ("hybridsn:window=9", 9)])
def test_a_network_is_built_for_the_size(spec, size):
    (row,) = costs([spec], size=size, classes=3, latency=False)
    assert (row["spec"], row["size"], row["classes"]) == (spec, 9, 3)
    assert row["parameters"] == costs(["hybridsn:window=9"], classes=3, latency=False)[0]["parameters"]


def test_sizes_that_contradict_each_other():
    with pytest.raises(UsageError, match=r"for windows of 9×9 pixels, but these are 25×25"):
        costs(["hybridsn:window=9"], size=25, latency=False)


def test_counted_as_the_paper_counts():
    first, second, flat, solid = paper("hybridsn")
    assert first["parameters"] == first["paper_parameters"] == second["parameters"] == 5.122176
    assert (first["in_channels"], first["input_size"], first["top1"], second["top1"]) == (30, 25, 0.25, 1.61)
    assert flat["macs"] == pytest.approx(first["macs"], rel=0.05)
    assert solid["macs"] < first["macs"]


def test_networks_without_classes():
    grey, colour = costs(["dncnn_s", "dncnn_color"], classes=7, latency=False)
    assert (grey["size"], grey["channels"], grey["classes"]) == (40, 1, None)
    assert (colour["size"], colour["channels"], colour["classes"]) == (50, 3, None)
    assert grey["macs"] == 40 * 40 * 9 * (64 + 15 * 64 * 64 + 64)
    (larger,) = costs(["dncnn_s"], size=80, latency=False)
    assert larger["macs"] == 4 * grey["macs"]
    (row,) = paper("dncnn_s")
    assert (row["in_channels"], row["parameters"], row["macs"]) == (1, 0.556097, grey["macs"] / 1e9)


def test_on_the_command_line():
    listed = CliRunner().invoke(app, ["networks", "hybridsn"]).stdout
    assert "25²×30" in listed
    entries = json.loads(CliRunner().invoke(app, ["networks", "hybridsn", "--json"]).stdout)["networks"]
    assert {entry["in_channels"] for entry in entries} == {30}
    counted = CliRunner().invoke(app, ["cost", "hybridsn", "--no-latency"])
    assert counted.exit_code == 0
    assert "25²×30" in counted.stdout
