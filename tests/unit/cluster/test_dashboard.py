"""The Grafana dashboard shows exactly the figures that runs export."""

import json
import re
from pathlib import Path

import pytest

from isthmus.cluster.metrics import DRIVER_METRICS, WORKER_GAUGES

pytestmark = pytest.mark.unit
DASHBOARD = json.loads((Path(__file__).parents[3] / "cluster" / "manifests" / "grafana.json").read_text())
OURS = {f"ray_isthmus_{name}" for name in (*(name for name, _ in WORKER_GAUGES.values()), *DRIVER_METRICS)}


def test_every_exported_figure_is_shown_and_no_other_is_asked_for():
    expressions = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    shown = {name for text in expressions for name in re.findall(r"ray_isthmus_\w+", text)}
    assert shown == OURS


def test_panels_do_not_overlap_and_have_titles():
    cells = set()
    for panel in DASHBOARD["panels"]:
        assert panel["title"]
        place = panel["gridPos"]
        mine = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not mine & cells, panel["title"]
        assert all(x < 24 for x, _ in mine)
        cells |= mine
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
