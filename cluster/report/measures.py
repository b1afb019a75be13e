"""The result table: evaluation results with chance levels and simple baselines on the same samples."""

from collections import Counter
from typing import NamedTuple

from isthmus.cluster.report.folder import StageFacts

K_OF_RECALL = {f"{way}_r{k}": k for way in ("i2t", "t2i") for k in (1, 5, 10)}
LABELS = {
    "i2t_r{}": "image to text, recall@{}",
    "t2i_r{}": "text to image, recall@{}",
}
CAPTION_LABELS = {
    "cider_d": "captions, CIDEr-D",
    "bleu4": "captions, BLEU-4",
    "exact": "captions, exact matches",
    "loss": "caption loss, nats a token (less is better)",
}


WRONG_IMAGE = "eval/loss_wrong_image"


class Baseline(NamedTuple):
    """What a simpler method reaches in the same measure."""

    name: str
    value: float


class Measure(NamedTuple):
    """One line of the table."""

    label: str
    value: float
    baselines: list[Baseline]
    contrast: float | None = None
    """Recall before matching has re-ranked."""


def retrieval(stage: StageFacts) -> list[Measure]:
    """Return the recalls of stage 1; chance is that of a random order, one right partner for each."""
    figures = stage.last("eval/")
    count = len(stage.samples.texts) if stage.samples else 0
    found = []
    for name, k in K_OF_RECALL.items():
        if f"eval/{name}" in figures:
            chance = [Baseline("chance", min(1.0, k / count))] if count else []
            label = LABELS[name.replace(str(k), "{}")].format(k)
            baselines = [*chance, *_before_training(stage, f"eval/{name}")]
            found.append(Measure(label, figures[f"eval/{name}"], baselines, figures.get(f"eval/itc_{name}")))
    return found


def captioning(stage: StageFacts) -> list[Measure]:
    """Return the caption scores of stage 2, with those of guesses that ignore the image."""
    figures = stage.last("eval/")
    guesses = _guesses(stage.samples.texts) if stage.samples else {}
    found = []
    wrong_image = figures.pop(WRONG_IMAGE, None)
    for name, value in figures.items():
        short = name.removeprefix("eval/")
        baselines = [Baseline(guess, scores[short]) for guess, scores in guesses.items() if short in scores]
        baselines += _before_training(stage, name)
        if short == "loss" and wrong_image is not None:
            baselines.append(Baseline("with a wrong image", wrong_image))
        found.append(Measure(CAPTION_LABELS.get(short, short), value, baselines))
    return found


def _before_training(stage: StageFacts, figure: str) -> list[Baseline]:
    """Return what the untrained bridge reached, where `evaluation.before_training` asked for it."""
    series = stage.series(figure)
    trained = len(series) > 1 and series[0][0] == 0
    return [Baseline("before training", series[0][1])] if trained else []


def _guesses(texts: list[dict[str, str]]) -> dict[str, dict[str, float]]:
    """Score the most frequent caption, and the captions generated for the next image, against the true ones."""
    from isthmus.trainer.evaluation.caption_metrics import score_captions  # noqa: PLC0415 - slow to import, and only needed here

    pairs = [(text["caption"], text["generated"]) for text in texts if "generated" in text and "caption" in text]
    if len(pairs) < 2:
        return {}
    frequent = Counter(caption for caption, _ in pairs).most_common(1)[0][0]
    truth = {str(i): [caption] for i, (caption, _) in enumerate(pairs)}
    return {
        "most frequent caption": score_captions(dict.fromkeys(truth, frequent), truth),
        "caption of another image": score_captions({str(i): pairs[i - 1][1] for i in range(len(pairs))}, truth),
    }
