"""Configuration of the bootstrap stages: captioner, scorers, and batches."""

from typing import Literal

from pydantic import Field

from isthmus.data_pipeline.config import Config
from isthmus.model.decoding import Decoding


class CaptionConfig(Config):
    """Generation of candidates. These settings and the model's weights determine the captions."""

    model: str
    """Folder of a stage-2 export, or of BLIP, BLIP-2 or GIT in transformers format: local or s3://."""
    name: str = Field("captioner", min_length=1)
    """Name of this captioner in the layer."""
    num_candidates: int = Field(5, gt=0, le=64)
    """Captions per image."""
    method: Literal["nucleus", "beam"] = "nucleus"
    """Decoding: sampling, seeded per image, or the best beams (BLIP, section 4.3: sampling helps more)."""
    top_p: float = Field(0.9, gt=0, le=1)
    """Probability mass of nucleus sampling."""
    temperature: float = Field(1.0, gt=0)
    """Sampling temperature."""
    num_beams: int = Field(5, gt=0)
    """Number of beams; at least the number of candidates is used."""
    max_new_tokens: int = Field(30, gt=0)
    """Longest caption, in tokens."""
    batch_size: int = Field(32, gt=0)
    """Images per pass. Fixed for a layer, because the last bits of a result depend on the batch shape."""
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
    """Folders of stage-1 exports (scores itc, itm) and of CLIP or SigLIP in transformers format (score clip)."""
    language: str = Field("en", pattern=r"^[a-z]{2,3}$")
    """ISO 639 code; the score `language` is the probability that a text is in it."""
    batch_size: int = Field(32, gt=0)
    """Images per pass. Fixed for a layer."""
