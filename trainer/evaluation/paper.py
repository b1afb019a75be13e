"""The BLIP-2 paper's results, which are printed next to ours.

Source: Li et al., "BLIP-2: Bootstrapping Language-Image Pre-training with Frozen Image Encoders and Large Language
Models" (2023), tables 2, 3 and 5.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

VISION_BY_WIDTH = {1024: "ViT-L", 1408: "ViT-g"}
LANGUAGE_BY_WIDTH = {
    ("opt", 2560): "OPT 2.7B",
    ("opt", 4096): "OPT 6.7B",
    ("t5", 2048): "FlanT5 XL",
    ("t5", 4096): "FlanT5 XXL",
}


@dataclass(frozen=True)
class PaperTable:
    """One table; a figure is named task/figure."""

    title: str
    columns: Mapping[str, str]
    """Header -> figure."""
    rows: Mapping[tuple[str, str], Sequence[float]]
    """Vision encoder and language model -> figures, in the order of the columns."""


_RANKS = {f"{way.upper()}@{k}": f"flickr30k/{way}_r{k}" for way in ("tr", "ir") for k in (1, 5, 10)}
TABLES = (
    PaperTable(
        "Zero-shot visual question answering (BLIP-2, table 2)",
        {"VQAv2 val": "vqav2/accuracy", "OK-VQA test": "okvqa/accuracy", "GQA test-dev": "gqa/accuracy"},
        {
            ("ViT-L", "OPT 2.7B"): (50.1, 30.2, 33.9),
            ("ViT-g", "OPT 2.7B"): (53.5, 31.7, 34.6),
            ("ViT-g", "OPT 6.7B"): (54.3, 36.4, 36.4),
            ("ViT-L", "FlanT5 XL"): (62.6, 39.4, 44.4),
            ("ViT-g", "FlanT5 XL"): (63.1, 40.7, 44.2),
            ("ViT-g", "FlanT5 XXL"): (65.2, 45.9, 44.7),
        },
    ),
    PaperTable(
        "Captions, CIDEr and BLEU-4 (BLIP-2, table 3: after fine-tuning on COCO)",
        {
            "NoCaps in": "nocaps/in-domain_cider",
            "near": "nocaps/near-domain_cider",
            "out": "nocaps/out-domain_cider",
            "overall": "nocaps/cider",
            "COCO B@4": "coco/bleu4",
            "COCO C": "coco/cider",
        },
        {
            ("ViT-g", "OPT 2.7B"): (123.0, 117.8, 123.4, 119.7, 43.7, 145.8),
            ("ViT-g", "OPT 6.7B"): (123.7, 119.2, 124.4, 121.0, 43.5, 145.2),
            ("ViT-g", "FlanT5 XL"): (123.7, 120.2, 124.8, 121.6, 42.4, 144.5),
        },
    ),
    PaperTable(
        "Retrieval on Flickr30k, 1K test (BLIP-2, table 5: after fine-tuning on COCO)",
        _RANKS,
        {
            ("ViT-L", ""): (96.9, 100.0, 100.0, 88.6, 97.6, 98.9),
            ("ViT-g", ""): (97.6, 100.0, 100.0, 89.7, 98.1, 98.9),
        },
    ),
)


def model_names(model: Any) -> tuple[str, str]:
    """Return the names of a stage's encoder and language model as the paper calls them; empty: another, or none."""
    language = getattr(model, "language", None)
    kind = (language.model.config.model_type, language.width) if language is not None else ("", 0)
    return VISION_BY_WIDTH.get(model.vision.width, ""), LANGUAGE_BY_WIDTH.get(kind, "")


def paper_rows(table: PaperTable, names: tuple[str, str]) -> dict[tuple[str, str], Sequence[float]]:
    """Return the row of the same models; where the paper has none, all rows."""
    same = {key: row for key, row in table.rows.items() if key == (names[0], names[1] if key[1] else "")}
    return same or dict(table.rows)


def beside_paper(figures: Mapping[str, float], names: tuple[str, str]) -> list[str]:
    """Return the lines of every table of which there are figures: this model's row above the paper's.

    Args:
        figures: By task/figure.
        names: What `model_names` returned for the models of this run.
    """
    lines: list[str] = []
    for table in TABLES:
        wanted = list(table.columns.values())
        if not any(figure in figures for figure in wanted):
            continue
        ours: dict[str, Sequence[float | None]] = {"this model": [figures.get(figure) for figure in wanted]}
        plain = [figures.get(figure.replace("/", "/itc_")) for figure in wanted]
        ours |= {"this model, not re-ranked": plain} if any(value is not None for value in plain) else {}
        ours |= {" ".join(("BLIP-2", *key)).strip(): row for key, row in paper_rows(table, names).items()}
        lines += [table.title, *_aligned(list(table.columns), ours), ""]
    return lines


def _aligned(columns: Sequence[str], rows: Mapping[str, Sequence[float | None]]) -> list[str]:
    width = max(map(len, rows))
    head = " ".join([" " * width, *(f"{name:>12}" for name in columns)])
    cells = {name: [f"{'-' if value is None else f'{value:.1f}':>12}" for value in row] for name, row in rows.items()}
    return [head, *(" ".join([name.ljust(width), *row]) for name, row in cells.items())]
