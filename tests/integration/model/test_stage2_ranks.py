"""Stage 2 on several ranks: the loss of the global batch, and generation from a partitioned language model."""

from pathlib import Path

import pytest
import torch

from isthmus.model.decoding import Decoding
from isthmus.model.generate import caption
from isthmus.model.objectives.communicator import LocalCommunicator, ProcessGroupCommunicator
from isthmus.model.objectives.step import StepContext
from tests.ranks import run_ranks
from tests.stage2_parts import CAPTIONS, picture, stage2_parts

pytestmark = pytest.mark.integration
KINDS = ("opt", "t5")


def losses_and_gradients(model, inputs, micro_batch_size, communicator):
    model.zero_grad()
    output = model.loss_and_backward(
        inputs, StepContext(communicator, micro_batch_size, backward=lambda loss: loss.backward())
    )
    gradients = {name: communicator.all_reduce_sum(p.grad) for name, p in model.trainable_parameters().items()}
    return float(output.total), {name: gradient.numpy() for name, gradient in gradients.items()}


def both_kinds(rank, world_size, function, root):
    return [function(rank, world_size, root, kind) for kind in KINDS]


def rank_losses(rank, world_size, root, kind):
    parts = stage2_parts(Path(root), kind)
    communicator = ProcessGroupCommunicator()
    rows = list(range(len(CAPTIONS)))[rank * 2 : rank * 2 + 2]
    inputs = parts.inputs([CAPTIONS[row] for row in rows], rows=rows)
    return [losses_and_gradients(parts.model, inputs, size, communicator) for size in (2, 1)]


def test_two_ranks_and_micro_batches_give_the_loss_of_one_process(tmp_path):
    expected = []
    for kind in KINDS:
        parts = stage2_parts(tmp_path, kind)
        expected.append(losses_and_gradients(parts.model, parts.inputs(), 4, LocalCommunicator()))
    for kinds in run_ranks(both_kinds, 2, rank_losses, str(tmp_path)):
        for results, (total, gradients) in zip(kinds, expected, strict=True):
            for rank_total, rank_gradients in results:
                assert rank_total == pytest.approx(total, abs=1e-5)
                for name, gradient in gradients.items():
                    torch.testing.assert_close(
                        torch.as_tensor(rank_gradients[name]), torch.as_tensor(gradient), atol=1e-5, rtol=1e-4
                    )


def partitioned_captions(rank, world_size, root, kind):
    from isthmus.data_pipeline.store.object_store import ObjectStore
    from isthmus.trainer.context import LocalContext
    from isthmus.trainer.frozen.zero3 import load_frozen_lm

    parts = stage2_parts(Path(root), kind)
    context = LocalContext()
    config, folder = parts.language
    parts.model.language = load_frozen_lm(config, str(folder), ObjectStore(), context.rank)
    held = sum(parameter.numel() for parameter in parts.model.language.parameters())
    # Ranks bring different numbers of rows and of tokens: rank 1 ends long before rank 0.
    images = torch.stack([picture(row) for row in range(3 if rank == 0 else 1)])
    texts = [
        caption(parts.model, parts.encoder, images, decoding=Decoding(max_new_tokens=tokens, num_beams=beams))
        for beams, tokens in ((1, 7 if rank == 0 else 2), (3, 6))
    ]
    return texts, held


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_a_partitioned_language_model_generates_what_the_whole_one_does(tmp_path, kind):
    parts = stage2_parts(tmp_path, kind)
    results = run_ranks(partitioned_captions, 2, str(tmp_path), kind)
    for rank, (texts, held) in enumerate(results):
        images = torch.stack([picture(row) for row in range(3 if rank == 0 else 1)])
        for found, (beams, tokens) in zip(texts, ((1, 7 if rank == 0 else 2), (3, 6)), strict=True):
            decoding = Decoding(max_new_tokens=tokens, num_beams=beams)
            assert found == caption(parts.model, parts.encoder, images, decoding=decoding)
        assert held == 0
