"""The first screen: what the run did in one sentence, a few held-out images, three numbers with chance levels."""

from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

from isthmus.cluster.report.folder import RunFacts
from isthmus.cluster.report.markup import Html, h, picture
from isthmus.cluster.report.measures import Measure, captioning, retrieval

NUM_IMAGES = 6
SHORT_SECONDS = 120
HEADLINES = ("image to text, recall@1", "image to text, recall@10", "captions, CIDEr-D")


class HeldOut(NamedTuple):
    """A held-out image with what the run makes of it."""

    key: str
    thumbnail: bytes
    caption: str
    found: str
    """Caption that stage 1 ranks first among all held-out ones."""
    generated: str | None
    """Caption of stage 2; None if it did not caption this image."""


def summary(facts: RunFacts) -> Html:
    """Return the first screen; parts that the run has not reached are left out."""
    cards = [_card(example) for example in islice(held_out(facts), NUM_IMAGES)]
    tiles = [_tile(measure) for measure in _headlines(facts)]
    return h(
        "div",
        h("p", sentence(facts), class_="sentence"),
        h("div", *tiles, class_="tiles") if tiles else None,
        h("div", *cards, class_="cards gallery") if cards else None,
    )


def sentence(facts: RunFacts) -> str:
    """Say what was trained, on how much, how long it took, and what restarts cost."""
    steps = {name: max((int(record["step"]) for record in s.records), default=0) for name, s in facts.stages.items()}
    trained = [f"{step:,} steps of {name.replace('stage', 'stage ')}" for name, step in steps.items() if step]
    parts = [f"Trained {' and '.join(trained)}" if trained else "Nothing has been trained yet"]
    if (status := facts.status) is None:
        return f"{parts[0]}."
    if status.world_size:
        parts.append(f"on {status.world_size} worker{'s' if status.world_size > 1 else ''}")
    if status.state.is_final and status.updated_at > status.started_at > 0:
        seconds = status.updated_at - status.started_at
        parts.append(f"in {seconds:.0f} seconds" if seconds < SHORT_SECONDS else f"in {seconds / 60:.0f} minutes")
    text = " ".join(parts)
    if status.restarts:
        seconds = sum(restart.recovery_seconds or 0 for restart in status.restarts)
        lost = sum(restart.lost_steps or 0 for restart in status.restarts)
        count = len(status.restarts)
        text += f"; {count} restart{'s' if count > 1 else ''} cost {seconds:.0f} s and {lost} repeated steps"
    return f"{text}."


def held_out(facts: RunFacts) -> Iterator[HeldOut]:
    """Yield the images that stage 1 kept, in their order, whether it is right about them or not."""
    samples = {name: stage.samples for name, stage in facts.stages.items() if stage.samples}
    known = samples.get("stage1")
    if known is None:
        return
    captioned = samples["stage2"].texts if "stage2" in samples else []
    generated = {text["key"]: text["generated"] for text in captioned if {"key", "generated"} <= text.keys()}
    for example in known.examples:
        text, thumbnail = known.texts[example.index], known.thumbnail(example.index)
        if example.texts and thumbnail:
            found = known.texts[example.texts[0]].get("caption", "")
            key = text.get("key", "")
            yield HeldOut(key, thumbnail, text.get("caption", ""), found, generated.get(key))


def is_right(answer: str, caption: str) -> bool:
    """Return whether an answer is the caption, but for case and outer spaces."""
    return answer.strip().lower() == caption.strip().lower()


def _headlines(facts: RunFacts) -> list[Measure]:
    measures: list[Measure] = []
    for name, find in (("stage1", retrieval), ("stage2", captioning)):
        if name in facts.stages:
            measures += find(facts.stages[name])
    return [measure for label in HEADLINES for measure in measures if measure.label == label]


def _tile(measure: Measure) -> Html:
    beside = f"{measure.baselines[0].name} {measure.baselines[0].value:.3f}" if measure.baselines else ""
    return h("div", h("b", f"{measure.value:.3f}"), h("span", measure.label), h("small", beside), class_="tile")


def _card(example: HeldOut) -> Html:
    def line(label: str, answer: str) -> Html:
        return h("div", f"{label}: ", h("b", answer, class_="right" if is_right(answer, example.caption) else None))

    said = None if example.generated is None else line("says", example.generated or "(nothing)")
    truth = h("div", "true: ", example.caption, class_="truth")
    return h(
        "div", picture(example.thumbnail, example.caption), line("finds", example.found), said, truth, class_="card"
    )
