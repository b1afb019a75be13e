"""A month of training on spot nodes, event by event: goodput against the checkpoint interval, beside Young-Daly.

    python -m benchmarks.scale.spot [--quick] [--json FILE] [--png FILE]

Nodes are lost at random, with or without a notice. A notice lets the run save before the node goes (a drain). After
the loss of a node that it used, the run starts again on the nodes that are left, in the largest size that it may take;
it grows when replacements allow a larger one. A save blocks training for a moment and counts only when its upload has
ended; a planned stop waits for that. With replicas, snapshots in other nodes' memory answer the loss of one node.
Goodput: full-size seconds of training kept, over the seconds of the month.
"""

import argparse
import heapq
import json
import math
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

HOUR = 3600.0
MONTH = 30 * 24 * HOUR


@dataclass(frozen=True)
class Weather:
    """The cluster and its accidents; seconds."""

    nodes: int = 16
    node_life: float = 96 * HOUR
    """Mean time to the loss of one node."""
    noticed: float = 0.5
    """Share of losses with a notice long enough to save."""
    replacement: float = 20 * 60.0
    """Mean time until a lost node is replaced."""
    restart: float = 60.0
    """From a loss to the next step."""
    stall: float = 2.0
    """For which a save blocks training."""
    upload: float = 30.0
    """After which a save counts."""
    sizes: tuple[int, ...] = ()
    """Numbers of nodes with which the run may train (the product: divisors of data.lanes); empty: any."""
    peer_every: float = 0.0
    """Seconds between snapshots in replica buffers; 0: none."""
    peer_stall: float = 0.5

    @property
    def full(self) -> int:
        """Nodes of the largest group."""
        return max(self.sizes, default=self.nodes)

    def largest(self, alive: int) -> int:
        """Return with how many of these nodes the run trains; 0: it waits."""
        return max((size for size in self.sizes if size <= alive), default=0) if self.sizes else alive

    @property
    def between_failures(self) -> float:
        """Seconds between losses without notice, of the whole job."""
        return self.node_life / self.full / (1 - self.noticed)


@dataclass
class Run:
    """The state of a simulated run; `work` is in full-size seconds."""

    work: float = 0.0
    committed: float = 0.0
    peer: float = 0.0
    lost: float = 0.0


@dataclass
class Nodes:
    """How many nodes are alive, and when the lost ones are replaced."""

    weather: Weather
    rng: random.Random
    alive: int
    back: list[float]

    def next_stop(self, now: float) -> tuple[float, str]:
        """Return when the run has to stop next, and why: "loss" of a node it uses, "grow", or "end" of the month."""
        weather, size = self.weather, self.weather.largest(self.alive)
        while True:
            loss = now + self.rng.expovariate(self.alive / weather.node_life) if self.alive else math.inf
            grow = self.back[0] if self.back else math.inf
            now = min(loss, grow)
            if now >= MONTH:
                return MONTH, "end"
            if grow <= loss:
                heapq.heappop(self.back)
                self.alive += 1
                if weather.largest(self.alive) > size:
                    return now, "grow"
                continue
            is_used = size == self.alive or self.rng.random() < size / self.alive
            self.alive -= 1
            heapq.heappush(self.back, now + self.rng.expovariate(1 / weather.replacement))
            if size and is_used:
                return now, "loss"


def simulate(weather: Weather, interval: float, seed: int) -> float:
    """Return the goodput of one month."""
    rng = random.Random(seed)
    run, now = Run(), 0.0
    nodes = Nodes(weather, rng, weather.nodes, [])
    planned_stop = weather.stall + weather.upload
    while now < MONTH:
        size = weather.largest(nodes.alive)
        end, why = nodes.next_stop(now)
        if size:
            _train(run, weather, interval, max(0.0, end - now), size / weather.full)
        now = max(now, end)
        if why == "end":
            break
        if why == "grow" or rng.random() < weather.noticed:
            _save_all(run)
            now += planned_stop if size else 0.0
        else:
            kept = max(run.committed, run.peer)
            run.lost += run.work - kept
            run.work = run.committed = run.peer = kept
        now += weather.restart
    return run.work / MONTH


def _train(run: Run, weather: Weather, interval: float, seconds: float, speed: float) -> None:
    """Train for a while from a fresh start of the clock: saves every `interval` seconds of training."""
    share = 1.0
    if weather.peer_every:
        share = weather.peer_every / (weather.peer_every + weather.peer_stall)
    cycle = interval / share + weather.stall
    cycles, rest = divmod(seconds, cycle)
    begin = run.work
    trained = cycles * interval + min(rest * share, interval)
    run.work = begin + trained * speed
    saves = int(cycles) if rest >= weather.upload or cycles == 0 else int(cycles) - 1
    run.committed = max(run.committed, begin + saves * interval * speed)
    if weather.peer_every:
        run.peer = begin + math.floor(trained / weather.peer_every) * weather.peer_every * speed


def _save_all(run: Run) -> None:
    run.committed = run.peer = run.work


def expected(weather: Weather, interval: float) -> float:
    """Return the share of time lost to saves and repeated work by Young's and Daly's first-order model."""
    return weather.stall / interval + (interval / 2 + weather.upload) / weather.between_failures


def young_daly(weather: Weather) -> float:
    """Return the interval that loses least."""
    return math.sqrt(2 * weather.stall * weather.between_failures)


def curve(weather: Weather, intervals: list[float], months: int) -> list[float]:
    """Return the mean goodput at each interval, over the same months of weather."""
    return [sum(simulate(weather, i, seed) for seed in range(months)) / months for i in intervals]


def draw(intervals: list[float], curves: dict[str, list[float]], best: dict[str, float], path: Path) -> None:
    """Write the PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for name, values in curves.items():
        (line,) = axis.plot([i / 60 for i in intervals], values, marker=".", label=name)
        axis.axvline(best[name] / 60, color=line.get_color(), linestyle=":", linewidth=1)
    axis.set(xscale="log", xlabel="minutes between checkpoints (dotted: Young-Daly)", ylabel="goodput")
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=80)


def main() -> None:
    """Print goodput by interval for several kinds of weather."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer months")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--png", type=Path)
    options = parser.parse_args()
    months = 20 if options.quick else 200
    calm = Weather()
    kinds = {
        "16 nodes, any size": calm,
        "16 nodes, fixed size": replace(calm, sizes=(16,)),
        "128 nodes, any size": replace(calm, nodes=128),
        "128 nodes, sizes 128, 64, 32": replace(calm, nodes=128, sizes=(32, 64, 128)),
        "128 nodes, 8 of them spare, sizes 120, 60, 40": replace(calm, nodes=128, sizes=(40, 60, 120)),
        "128 nodes, any size, replicas every 30 s": replace(calm, nodes=128, peer_every=30.0),
    }
    intervals = [15.0 * 2 ** (i / 2) for i in range(19)]
    result: dict[str, Any] = {"intervals_seconds": intervals, "months": months}
    curves = {name: curve(weather, intervals, months) for name, weather in kinds.items()}
    best = {name: young_daly(weather) for name, weather in kinds.items()}
    for name, weather in kinds.items():
        top = max(curves[name])
        at_young_daly = curve(weather, [best[name]], months)[0]
        result[name] = {
            "goodput": [round(value, 4) for value in curves[name]],
            "best interval s": round(intervals[curves[name].index(top)]),
            "best goodput": round(top, 4),
            "Young-Daly interval s": round(best[name]),
            "goodput at Young-Daly": round(at_young_daly, 4),
            "loss by Young-Daly's model": round(expected(weather, best[name]), 4),
            "goodput at 1 hour": round(curve(weather, [HOUR], months)[0], 4),
        }
    print(json.dumps(result, indent=1))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))
    if options.png:
        draw(intervals, curves, best, options.png)


if __name__ == "__main__":
    main()
