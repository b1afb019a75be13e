"""The zero-shot protocol of BLIP-2: its tasks, published files, prompts and beams.

Source: Li et al., "BLIP-2" (2023), sections 4.1 to 4.4 and appendix; where the paper is silent, the evaluation
configurations of its code (LAVIS, lavis/projects/blip2/eval).
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from isthmus.model.decoding import Decoding

Kind = Literal["caption", "question", "retrieval"]
CAPTION_PROMPT = "a photo of"
CAPTION_DECODING = Decoding(max_new_tokens=30, min_length=8, num_beams=5)
QUESTION_PROMPTS = {"decoder": "Question: {} Answer:", "encoder-decoder": "Question: {} Short answer:"}
ANSWER_DECODING = Decoding(max_new_tokens=10, min_length=1, num_beams=5, length_penalty=-1.0)
RERANKED = 128
"""Candidates of each image and of each text that matching re-ranks."""
MAX_RETRIEVAL_TOKENS = 35
MAX_WORDS = 50
"""Of a caption to be retrieved, and of a question."""


@dataclass(frozen=True)
class EvalTask:
    """One task of a suite."""

    name: str
    """Also the folder of its manifest."""
    kind: Kind
    published: int
    """Images of the published split; for questions, questions."""
    exact: bool = False
    """Answers count by exact match rather than by agreement with ten people."""

    @property
    def stage(self) -> Literal["stage1", "stage2"]:
        """The stage whose model does it."""
        return "stage1" if self.kind == "retrieval" else "stage2"

    def settings(self) -> dict[str, Any]:
        """Return what a result depends on in addition to model and data."""
        if self.kind == "retrieval":
            return {"reranked": RERANKED, "max_tokens": MAX_RETRIEVAL_TOKENS}
        if self.kind == "caption":
            return {"prompt": CAPTION_PROMPT, **asdict(CAPTION_DECODING)}
        return {"prompt": QUESTION_PROMPTS, "exact": self.exact, **asdict(ANSWER_DECODING)}


SUITES: dict[str, tuple[EvalTask, ...]] = {
    "blip2": (
        EvalTask("coco", "caption", 5000),
        EvalTask("nocaps", "caption", 4500),
        EvalTask("flickr30k", "retrieval", 1000),
        EvalTask("vqav2", "question", 214_354),
        EvalTask("okvqa", "question", 5046),
        EvalTask("gqa", "question", 12_578, exact=True),
    )
}
