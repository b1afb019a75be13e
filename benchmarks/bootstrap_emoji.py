"""Does bootstrapping help on the demo's corpus? Stage 1 on cached image features, 30% of the captions exchanged.

    OMP_NUM_THREADS=1 python -m benchmarks.bootstrap_emoji FOLDER [--demo .cache/demo]   # after `make demo`

Every run has the settings of recipes/demo.yaml and its 200 steps of 64, on whole pictures instead of random crops. As
in BLIP (section 3.3), filter and captioner are the model trained on the raw captions, fine-tuned on the clean tenth.
It scores captions by contrast (ITC). The lowest 30%, the share that was exchanged, are dropped (`filtered`) or replaced
by what its generation pass (ITG) writes, token by token (`bootstrapped`). Finished runs are not repeated.
"""

import argparse
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from isthmus.cluster.config import JobConfig
from isthmus.data_pipeline.sample.images import decode_image, resize_square
from isthmus.demo.tiny.scenes import exchanged_captions
from isthmus.model.frozen.vision import load_vision
from isthmus.model.objectives.communicator import LocalCommunicator
from isthmus.model.objectives.stage1 import Stage1Model, causal_mask
from isthmus.model.objectives.stage1_batch import Stage1Inputs
from isthmus.model.objectives.step import StepContext
from isthmus.model.qformer.bert_init import load_bert
from isthmus.model.qformer.layers import Rows
from isthmus.model.qformer.packing import pack_captions
from isthmus.model.qformer.qformer import QFormer
from isthmus.model.text.qformer_tokenizer import QFormerEncoder
from isthmus.trainer.config.loading import load_config
from isthmus.trainer.config.schema import OptimizerConfig
from isthmus.trainer.engine.optimizer import ClippedAdamW, learning_rate, parameter_groups
from isthmus.trainer.evaluation.caption_metrics import score_captions
from isthmus.trainer.evaluation.retrieval_metrics import recalls, relevance

RECIPE = Path(__file__).parents[1] / "recipes" / "demo.yaml"
EXCHANGED = 0.3
BATCH = 64
TUNING_STEPS = 100
TUNING = {"peak_lr": 3e-4, "warmup_steps": 10}
"""Of the filter on the clean tenth: seven epochs at half of the rate."""
MAX_IMAGE_PIXELS = 1 << 26
MAX_NEW_TOKENS = 8
MEASURES = ("r1", "i2t_r1", "t2i_r1", "i2t_r10", "t2i_r10")


@dataclass(frozen=True)
class Corpus:
    """The demo's pictures by number, and their names."""

    paths: list[Path]
    names: list[str]
    clean: range
    noisy: range
    held_out: range
    raw: list[str]
    """Captions of `noisy`, of which a share is another picture's."""

    @classmethod
    def read(cls, folder: Path) -> "Corpus":
        """Shuffle the training pictures, keep a tenth clean, and exchange captions of the others."""
        train, held_out = (_pairs(folder / f"{split}.jsonl") for split in ("train", "val"))
        random.Random(0).shuffle(train)
        names = [pair["caption"].lower() for pair in train + held_out]
        tenth = len(train) // 10
        noisy = range(tenth, len(train))
        carried = exchanged_captions(noisy, EXCHANGED)
        return cls(
            paths=[folder / pair["path"] for pair in train + held_out],
            names=names,
            clean=range(tenth),
            noisy=noisy,
            held_out=range(len(train), len(names)),
            raw=[names[carried.get(number, number)] for number in noisy],
        )

    def own(self, images: Sequence[int], texts: Sequence[str]) -> list[bool]:
        """Return whether each text is the picture's name."""
        return [self.names[image] == text for image, text in zip(images, texts, strict=True)]


class Runs:
    """Trains stage 1 on cached features and applies it.

    Args:
        folder: For features and trained models.
        models: The folder of models of `make demo`.
        corpus: The pictures.
    """

    def __init__(self, folder: Path, models: Path, corpus: Corpus) -> None:
        settings = [f"model.qformer.init_from={models / 'minilm'}", "stage1.loss.match_equal_texts=true"]
        self._config = load_config(RECIPE, settings, JobConfig)
        assert self._config.stage1 is not None
        self._stage, self._folder, self._corpus = self._config.stage1, folder, corpus
        self._bert = models / "minilm"
        self._encoder = QFormerEncoder(self._bert, self._stage.loss.max_text_tokens)
        encode = lambda: {"features": self._encode(models / "efficientnet-lite0")}  # noqa: E731
        self._features_NPC = self._once("features", encode)["features"]

    def _once(self, name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        path = self._folder / f"{name}.safetensors"
        if not path.exists():
            save_file(make(), path)
        tensors: dict[str, Tensor] = load_file(path)
        return tensors

    def _encode(self, folder: Path) -> Tensor:
        config, parts = self._config.model.vision, []
        vision, side = load_vision(config, folder), config.image_size_pixels
        for paths in _split(self._corpus.paths):
            images = [decode_image(path.read_bytes(), MAX_IMAGE_PIXELS) for path in paths]
            squares = [torch.from_numpy(resize_square(x, (0, 0, *x.shape[:2]), side)) for x in images]
            with torch.inference_mode():
                parts.append(vision(vision.normalize(torch.stack(squares).permute(0, 3, 1, 2))))
        return torch.cat(parts)

    def train(self, name: str, images: Sequence[int], texts: Sequence[str]) -> Stage1Model:
        """Return the model trained on some images with these texts, from BERT."""
        model = self._initial()
        steps, optimizer = self._stage.steps, self._stage.optimizer
        return self._trained(name, model, steps, optimizer, (images, texts))

    def tune(self, name: str, model: Stage1Model, images: Sequence[int], texts: Sequence[str]) -> Stage1Model:
        """Return a model trained further."""
        tuned = self._initial()
        tuned.load_state_dict(model.state_dict())
        return self._trained(
            name, tuned, TUNING_STEPS, self._stage.optimizer.model_copy(update=TUNING), (images, texts)
        )

    def _initial(self) -> Stage1Model:
        torch.manual_seed(self._config.run.seed)
        qformer = QFormer(self._config.model.qformer, self._features_NPC.shape[-1])
        load_bert(qformer, self._bert)
        return Stage1Model(None, qformer, self._stage.loss)

    def _trained(
        self,
        name: str,
        model: Stage1Model,
        steps: int,
        config: OptimizerConfig,
        data: tuple[Sequence[int], Sequence[str]],
    ) -> Stage1Model:
        def run() -> dict[str, Tensor]:
            self._run(model, steps, config, *data)
            return model.state_dict()

        model.load_state_dict(self._once(name, run))
        return model.eval()

    def _run(
        self,
        model: Stage1Model,
        steps: int,
        config: OptimizerConfig,
        images: Sequence[int],
        texts: Sequence[str],
    ) -> None:
        groups = parameter_groups(dict(model.named_parameters()), config.weight_decay)
        optimizer = ClippedAdamW(groups, config, fused=True)
        context = StepContext(LocalCommunicator(), BATCH, seed=self._config.run.seed, backward=Tensor.backward)
        model.train()
        for step, rows in zip(range(steps), _batches(len(images)), strict=False):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, step, steps)
            optimizer.zero_grad()
            inputs = self._inputs([images[row] for row in rows], [texts[row] for row in rows])
            model.loss_and_backward(inputs, replace(context, step=step))
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
            optimizer.step()

    def _inputs(self, images: list[int], texts: list[str]) -> Stage1Inputs:
        tokens = self._encoder(texts)
        return Stage1Inputs(
            input_ids_BT=tokens["input_ids"],
            attention_mask_BT=tokens["attention_mask"],
            valid_B=torch.ones(BATCH, dtype=torch.bool),
            rows_B=torch.arange(BATCH),
            image_BPD=self._features_NPC[images],
        )

    def reached(self, model: Stage1Model) -> dict[str, float]:
        """Return retrieval among the held-out pairs, and CIDEr-D of what the generation pass writes for them."""
        held_out = self._corpus.held_out
        names = [self._corpus.names[number] for number in held_out]
        scores_IT = (self._images(model, held_out) @ self._texts(model, names).T).amax(dim=1)
        found = recalls(scores_IT, relevance(torch.tensor(held_out), names))
        written = dict(zip(map(str, held_out), self.write(model, held_out), strict=True))
        references = {str(number): [name] for number, name in zip(held_out, names, strict=True)}
        figures = {measure: found[measure] for measure in MEASURES} | score_captions(written, references)
        return {name: round(value, 4) for name, value in figures.items()}

    def scores(self, model: Stage1Model) -> Tensor:
        """Return the cosine of every raw pair, N."""
        image_NQE, text_NE = self._images(model, self._corpus.noisy), self._texts(model, self._corpus.raw)
        return torch.einsum("nqe,ne->nq", image_NQE, text_NE).amax(dim=1)

    @torch.inference_mode()
    def _images(self, model: Stage1Model, images: Sequence[int]) -> Tensor:
        return torch.cat([model.image_vectors(self._features_NPC[part]) for part in _split(images)])

    @torch.inference_mode()
    def _texts(self, model: Stage1Model, texts: Sequence[str]) -> Tensor:
        tokens = [self._encoder(part) for part in _split(texts)]
        packed = [pack_captions(part["input_ids"], part["attention_mask"]) for part in tokens]
        return torch.cat([model.text_vectors(text) for text in packed])

    @torch.inference_mode()
    def write(self, model: Stage1Model, images: Sequence[int]) -> list[str]:
        """Return the captions that the generation pass finds likeliest, token by token."""
        return [text for part in _split(images) for text in self._write(model, self._features_NPC[part])]

    def _write(self, model: Stage1Model, image_BPC: Tensor) -> list[str]:
        qformer, end = model.qformer, self._encoder.tokenizer.token_to_id("[SEP]")
        words, image, queries = qformer.tied_embedding(), qformer.image_kv(image_BPC), qformer.config.num_queries
        ids_BT = torch.full((len(image_BPC), 1), qformer.decoder_start_id)
        for _ in range(MAX_NEW_TOKENS):
            text = pack_captions(ids_BT, torch.ones_like(ids_BT))
            rows = Rows.join(qformer.queries(text.batch), model.embed_text(text, words), text.packing)
            mask = F.pad(causal_mask(text.real_BT, queries), (0, 0, queries, 0))
            mask[..., :queries, :queries] = True
            last_BD = qformer(rows, mask, image.layers, text.first_B + text.length - 1).text_ND
            next_B = qformer.language_head(last_BD, words.weight_VD).argmax(dim=1)
            ids_BT = torch.cat([ids_BT, next_B[:, None]], dim=1)
        return [self._encoder.decode(row[1 : [*row, end].index(end)]) for row in ids_BT.tolist()]


def main() -> None:
    """Run what is not finished, then print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--demo", type=Path, default=Path(".cache/demo"))
    parser.add_argument("--out", type=Path, default=Path("bootstrap-emoji.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.folder.mkdir(parents=True, exist_ok=True)
    corpus = Corpus.read(options.demo / "corpus")
    figures = measure(corpus, Runs(options.folder, options.demo / "models", corpus))
    options.out.write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures, indent=1))


def measure(corpus: Corpus, runs: Runs) -> dict[str, Any]:
    """Train, filter, write captions and train again; return the quality of the filters and what all runs reach."""
    noisy, raw, names = corpus.noisy, corpus.raw, corpus.names
    models = {"raw": runs.train("raw", noisy, raw)}
    models["raw, then tenth"] = tuned = runs.tune("filter", models["raw"], corpus.clean, names[: len(corpus.clean)])
    scores = {name: runs.scores(model) for name, model in models.items()}
    kept = keep(scores["raw, then tenth"]).tolist()
    left = [pair for pair, is_kept in zip(zip(noisy, raw, strict=True), kept, strict=True) if is_kept]
    dropped = [image for image, is_kept in zip(noisy, kept, strict=True) if not is_kept]
    written = list(zip(dropped, runs.write(tuned, dropped), strict=True))
    arms = {
        "filtered": left,
        "bootstrapped": left + written,
        "true": [(image, names[image]) for image in noisy],
    }
    reached = {"raw": described(corpus, noisy, raw) | runs.reached(models["raw"])}
    for arm, pairs in arms.items():
        images, texts = zip(*pairs, strict=True)
        reached[arm] = described(corpus, images, texts) | runs.reached(runs.train(arm, images, texts))
    reached["raw, then tenth"] = runs.reached(tuned)
    own_N = torch.tensor(corpus.own(noisy, raw))
    return {
        "filters": {name: quality(found, own_N) for name, found in scores.items()},
        "written": described(corpus, *zip(*written, strict=True)),
        "arms": reached,
    }


def keep(scores_N: Tensor) -> Tensor:
    """Return which captions the filter keeps: all but the lowest 30%."""
    return scores_N >= scores_N.quantile(EXCHANGED)


def quality(scores_N: Tensor, own_N: Tensor) -> dict[str, float]:
    """Return how well scores tell the images' own captions from exchanged ones."""
    kept_N, own, exchanged = keep(scores_N), int(own_N.sum()), int((~own_N).sum())
    right, ranks_N = int((own_N & kept_N).sum()), scores_N.argsort().argsort().double()
    found = {
        "precision": right / int(kept_N.sum()),
        "recall": right / own,
        "exchanged_dropped": int((~own_N & ~kept_N).sum()) / exchanged,
        "auc": (float(ranks_N[own_N].sum()) - own * (own - 1) / 2) / (own * exchanged),
    }
    return {name: round(value, 4) for name, value in found.items()}


def described(corpus: Corpus, images: Sequence[int], texts: Sequence[str]) -> dict[str, float]:
    """Return how many images there are, and which share has its own caption."""
    return {"images": len(images), "own": round(sum(corpus.own(images, texts)) / len(images), 4)}


def _pairs(file: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def _batches(count: int) -> Iterator[Tensor]:
    """Yield the rows of batches, a new permutation for each epoch; what is left of one is not used."""
    generator = torch.Generator().manual_seed(0)
    while True:
        yield from (part for part in torch.randperm(count, generator=generator).split(BATCH) if len(part) == BATCH)


def _split(items: Sequence[Any]) -> list[Any]:
    return [list(items[first : first + BATCH]) for first in range(0, len(items), BATCH)]


if __name__ == "__main__":
    main()
