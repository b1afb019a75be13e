"""Configuration of the stages of bootstrapping: what writes, what scores, and in which batches."""

from typing import Literal

from pydantic import Field

from isthmus.data_pipeline.config import Config
from isthmus.model.decoding import Decoding


class CaptionConfig(Config):
    """Writing candidates. All of it, and the weights of the model, decides the captions."""

    model: str
    """Folder of an export of stage 2, or of BLIP, BLIP-2 or GIT of transformers: local or s3://."""
    name: str = Field("captioner", min_length=1)
    """Source of the candidates in the layer."""
    num_candidates: int = Field(5, gt=0, le=64)
    """Captions per image."""
    method: Literal["nucleus", "beam"] = "nucleus"
    """How they are written: sampling, seeded per image, or the best beams (BLIP, section 4.3: sampling helps more)."""
    top_p: float = Field(0.9, gt=0, le=1)
    """Smallest probability mass from which is sampled."""
    temperature: float = Field(1.0, gt=0)
    """Divisor of the logits when sampling."""
    num_beams: int = Field(5, gt=0)
    """Beams; at least as many as candidates are used."""
    max_new_tokens: int = Field(30, gt=0)
    """Longest caption, in tokens."""
    batch_size: int = Field(32, gt=0)
    """Images per pass. Fixed for a layer: the last bits of a result depend on the shape of its batch."""
    seed: int = Field(0, ge=0)
    """Seed of sampling."""

    @property
    def decoding(self) -> Decoding:
        """How the model decodes."""
        return Decoding(
            self.max_new_tokens, self.num_beams, self.method == "nucleus", self.temperature, top_p=self.top_p
        )


class ScoreConfig(Config):
    """Scoring candidates and the texts of the data set."""

    models: tuple[str, ...] = ()
    """Folders of exports of stage 1 (scores itc, itm) and of CLIP or SigLIP of transformers (score clip)."""
    language: str = Field("en", pattern=r"^[a-z]{2,3}$")
    """ISO 639 code; the score `language` is the probability that a text is in it."""
    batch_size: int = Field(32, gt=0)
    """Images per pass. Fixed for a layer."""
