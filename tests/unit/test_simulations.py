"""The simulations of benchmarks/scale against what is known in closed form, and the table of `make bench`."""

from dataclasses import replace

import pytest

from benchmarks.run_all import Figure, objects, table
from benchmarks.scale.plan import cache_hit_rates, measure
from benchmarks.scale.spot import Weather, curve, expected, simulate, young_daly

pytestmark = pytest.mark.unit
MONTHS = 12


def test_without_accidents_only_saves_cost_time():
    calm = Weather(node_life=1e12)
    assert simulate(calm, 100.0, seed=0) == pytest.approx(100.0 / (100.0 + calm.stall), rel=1e-4)


def test_young_daly_is_near_the_best_interval():
    weather = Weather()
    intervals = [young_daly(weather) * factor for factor in (0.1, 0.5, 1.0, 2.0, 10.0)]
    goodput = curve(weather, intervals, MONTHS)
    assert goodput[2] > max(goodput) - 0.002
    assert goodput[0] < goodput[2] - 0.02
    assert goodput[4] < goodput[2] - 0.02


def test_losses_are_those_of_the_first_order_model():
    """Without notices, replaced at once and restarted at once, saves and repeated work are all that is lost."""
    weather = Weather(noticed=0.0, replacement=1e-3, restart=0.0, upload=0.0)
    interval = young_daly(weather)
    (goodput,) = curve(weather, [interval], MONTHS)
    assert 1 - goodput == pytest.approx(expected(weather, interval), rel=0.15)


def test_training_on_fewer_nodes_and_replicas_pay():
    weather = replace(Weather(), nodes=128)
    kinds = (weather, replace(weather, sizes=(128,)), replace(weather, peer_every=30.0))
    elastic, fixed, peers = (curve(kind, [600.0], MONTHS)[0] for kind in kinds)
    assert fixed < elastic < peers


def test_spare_nodes_pay_where_sizes_are_few():
    """A run whose sizes divide data.lanes halves at the first loss, unless spare nodes stand by."""
    halving = replace(Weather(), nodes=128, sizes=(32, 64, 128))
    spare = replace(Weather(), nodes=128, sizes=(40, 60, 120))
    without, with_spare = (curve(kind, [147.0], MONTHS)[0] for kind in (halving, spare))
    assert without < 0.85
    assert with_spare > 0.9


def test_lanes_are_balanced_and_hardly_anything_is_fetched_twice():
    (row,) = measure("100M", (64,))
    assert row["most / least samples of a rank"] < 1.0001
    assert 1.0 <= row["fetched / used"] < 1.01


def test_a_larger_cache_answers_more():
    small, large = (row["hit rate"] for row in cache_hit_rates((0.25, 1.0)))
    assert 0 < small < large < 1


def test_the_table_names_command_ratio_and_failures():
    figure = Figure("save", "s", 2.0, "torch.save", 3.0)
    entries = [
        {"command": "python -m a", "figures": [vars(figure) | {"ratio": figure.ratio}]},
        {"command": "python -m b", "figures": [], "error": "no disk"},
    ]
    spent = {"wall seconds": 1.0, "CPU seconds": 1.0, "load average": 1.0}
    entries = [entry | spent for entry in entries]
    machine = {"cpu": "x", "cores": 2, "load average": 1.0, "versions": {"torch": "2"}, "peers": {"webdataset": "1"}}
    text = table({"date": "d", "quick": True, "machine": machine, "benchmarks": entries, "left out": ["recovery"]})
    assert "| save | s | 2 | torch.save | 3 | 1.5 | `python -m a` |" in text
    assert "- `python -m b`: no disk" in text
    assert "Left out: recovery." in text
    assert objects('warning\n{"a": 1}\n[2]\nend {') == [{"a": 1}, [2]]
