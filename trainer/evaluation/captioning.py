"""Captions of held-out images by the frozen language model, scored against the true ones."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from isthmus.data_pipeline.reading.batch import Batch
from isthmus.model.generate import Decoding, caption
from isthmus.model.text.language_tokenizer import LanguageEncoder
from isthmus.trainer.config.schema import EvaluationConfig
from isthmus.trainer.engine.collectives import gather_lists
from isthmus.trainer.engine.precision import Precision
from isthmus.trainer.evaluation.attention_maps import query_attention
from isthmus.trainer.evaluation.caption_metrics import score_captions
from isthmus.trainer.evaluation.figures import Picture, attention_map, sample_grid
from isthmus.trainer.monitoring.loggers import Pictures
from isthmus.trainer.monitoring.samples import Example, Examples, thumbnail

SHOWN = 16


def evaluate_captions(
    model: Any,
    engine: Precision,
    encoder: LanguageEncoder,
    batches: Iterable[Batch],
    images_of: Callable[[Batch], Any],
    losses_of: Callable[[Batch], tuple[dict[str, float], float]],
    config: EvaluationConfig,
    beat: Callable[[], None],
) -> tuple[dict[str, float], Pictures, list[dict[str, str]], Examples]:
    """Return `eval/cider_d`, `eval/bleu4`, `eval/exact` and mean losses, pictures, texts per sample, examples.

    `losses_of` returns means over a global batch's target tokens, and how many these are; returned are the means over
    all. Collective: every rank generates for its rows of every batch, holes included, so that all run the same passes.
    """
    decoding = Decoding(max_new_tokens=config.max_new_tokens, num_beams=config.num_beams)
    texts: list[dict[str, str]] = []
    shown: list[Picture] = []
    attention: Picture | None = None
    losses: Counter[str] = Counter()  # sums over tokens
    num_tokens = 0.0
    for batch in batches:
        means, tokens = losses_of(batch)
        losses.update({name: mean * tokens for name, mean in means.items()})
        num_tokens += tokens
        images_BCHW = images_of(batch)
        with engine.autocast():
            generated = caption(model, encoder, images_BCHW, decoding=decoding)
        beat()
        for row in batch.valid_B.nonzero().flatten().tolist():
            texts.append({"key": batch.keys[row], "caption": batch.captions[row], "generated": generated[row]})
            if len(shown) < SHOWN:
                shown.append(batch.images_BCHW[row].permute(1, 2, 0).numpy())
        if attention is None:  # on every rank, rows or not: the bridge may be sharded
            with engine.autocast():
                attention = attention_of(model, images_BCHW, batch, generated)
    own = texts[: len(shown)]
    grid = sample_grid(shown, [text["caption"] for text in own], [text["generated"] for text in own]) if shown else None
    texts = gather_lists(texts)
    # Captions of one image are one entry each: keys are unique, references are those of the same key.
    scores = score_captions({t["key"]: t["generated"] for t in texts}, {t["key"]: [t["caption"]] for t in texts})
    pictures = {"samples": grid, "attention": attention if shown else None}
    kept = {name: picture for name, picture in pictures.items() if picture is not None}
    examples = Examples([Example(i) for i in range(len(shown))], {i: thumbnail(shown[i]) for i in range(len(shown))})
    figures = {f"eval/{name}": value for name, value in scores.items()}
    figures |= {f"eval/{name}": total / max(num_tokens, 1) for name, total in losses.items()}
    return figures, kept, texts, examples


def first_samples(batches: Iterable[Batch], num_samples: int, world_size: int) -> Iterator[Batch]:
    """Yield batches until the ranks together have had `num_samples` rows."""
    seen = 0
    for batch in batches:
        yield batch
        seen += len(batch.rows_B) * world_size
        if seen >= num_samples:
            return


def attention_of(model: Any, images_BCHW: Any, batch: Batch, titles: list[str]) -> Picture:
    """Return the heat map of the first valid row, or of a hole where there is none."""
    row = int(batch.valid_B.int().argmax())
    features_BPD = model.encode(images_BCHW[row : row + 1])
    weights_QP = query_attention(model.qformer, features_BPD)[0].cpu().numpy()
    return attention_map(batch.images_BCHW[row].permute(1, 2, 0).numpy(), weights_QP, titles[row])
