"""Stage 1 over gloo ranks: the global batch decides, not its split; what crosses ranks is counted."""

from pathlib import Path

import pytest
import torch

from benchmarks.host_syncs import measure
from isthmus.model.objectives.communicator import ProcessGroupCommunicator
from tests.fixtures_stage1 import LOSSES, Reference, _case2, fixture_folder, losses_and_gradients
from tests.ranks import run_ranks

pytestmark = pytest.mark.integration
FOLDER = fixture_folder("stage1_reference")


def splits(rank: int, world_size: int, folder: str) -> list:
    """Run several cases on this rank; rows are dealt in turn, as lanes are."""
    reference, found = Reference(Path(folder)), []
    for size, itc_grad, drop in ((3, "anchor", ()), (2, "anchor", ()), (1, "full", ()), (2, "anchor", (1, 3, 5))):
        communicator = ProcessGroupCommunicator()
        inputs = reference.rows(list(range(rank, 6, world_size)))
        inputs.valid_B[[i for i, row in enumerate(inputs.rows_B.tolist()) if row in drop]] = False
        model = reference.model(itc_grad=itc_grad)
        calls: list = []
        losses, gradients = losses_and_gradients(model, inputs, size, communicator, calls)
        total = {name: communicator.all_reduce_sum(x).numpy() for name, x in gradients.items()}
        found.append((losses, total, len(calls)))
    return found


def test_two_ranks_equal_one():
    reference = Reference(FOLDER)
    outputs = run_ranks(splits, 2, str(FOLDER))
    for case, (itc_grad, rows) in enumerate(
        (("anchor", range(6)), ("anchor", range(6)), ("full", range(6)), ("anchor", (0, 2, 4)))
    ):
        model = reference.model(itc_grad=itc_grad)
        losses, gradients = losses_and_gradients(model, reference.rows(list(rows)), 6)
        for rank in (0, 1):
            found, total, _ = outputs[rank][case]
            assert max(abs(found[name] - losses[name]) for name in LOSSES.values()) < 1e-6
            assert max(float((torch.from_numpy(total[n]) - x).abs().max()) for n, x in gradients.items()) < 1e-9
        assert outputs[0][case][2] == outputs[1][case][2], "backward calls differ between ranks"


def drawn_matching(rank: int, world_size: int, folder: str) -> list:
    """Match some rows, of which neither ranks nor micro-batches get equally many without a share that is filled up."""
    reference, communicator, found = Reference(Path(folder)), ProcessGroupCommunicator(), []
    for num_rows, size in ((1, 3), (3, 1), (4, 2), (5, 3)):
        calls: list = []
        model, inputs = reference.model(itm_rows=num_rows), reference.rows(list(range(rank, 6, world_size)))
        losses, gradients = losses_and_gradients(model, inputs, size, communicator, calls)
        total = {name: communicator.all_reduce_sum(x).numpy() for name, x in gradients.items()}
        found.append((num_rows, losses, total, len(calls)))
    return found


@pytest.mark.parametrize("world_size", [2, 3])
def test_drawn_rows_are_the_same_on_any_number_of_ranks(world_size):
    reference = Reference(FOLDER)
    outputs = run_ranks(drawn_matching, world_size, str(FOLDER))
    for by_rank in zip(*outputs, strict=True):
        expected, gradients = losses_and_gradients(reference.model(itm_rows=by_rank[0][0]), reference.rows(), 6)
        assert len({calls for *_, calls in by_rank}) == 1, "backward calls differ between ranks"
        for _, losses, total, _ in by_rank:
            assert max(abs(losses[name] - expected[name]) for name in LOSSES.values()) < 1e-6
            assert max(float((torch.from_numpy(total[n]) - x).abs().max()) for n, x in gradients.items()) < 1e-6


def test_two_ranks_equal_the_original():
    assert [x for x in _case2(Reference(FOLDER)) if x.deviation > x.allowed] == []


def traffic(rank: int, world_size: int, folder: str) -> dict[str, int]:
    """Return what reached this rank in one step, and how many foreign images its negatives needed."""
    reference, communicator = Reference(Path(folder)), ProcessGroupCommunicator()
    reference.inputs = {name: torch.cat([x, x]) for name, x in reference.inputs.items()}
    rows = list(range(3 * rank, 3 * rank + 3))
    model = reference.model()
    drawn = []
    choose = model.choose_negatives
    model.choose_negatives = lambda draw: drawn.append(choose(draw)) or drawn[-1]
    losses_and_gradients(model, reference.rows(rows), 3, communicator)
    images = {column for column in drawn[0].tolist() if column not in rows}
    return {**communicator.bytes_received, "images": len(images)}


def test_only_chosen_negatives_cross_ranks():
    reference = Reference(FOLDER)
    sizes = reference.config
    image_bytes = sizes["vision_tokens"] * sizes["vision_width"] * 8
    # Per row: identities and tokens, features, and the place of the wanted image.
    integers = 8 * (4 + 2 * sizes["text_length"] + 1)
    features = 8 * (sizes["num_query_tokens"] + 1) * sizes["projection_dim"]
    outputs = run_ranks(traffic, 4, str(FOLDER))
    for found in outputs:
        assert found["all_gather"] == 9 * (integers + features)
        assert found["all_to_all_rows"] == found["images"] * image_bytes
    assert sum(found["images"] for found in outputs) <= 12 < 4 * 9, "fewer images than a gather of all would bring"


def test_a_step_on_two_ranks_waits_once_at_most():
    """The wait: how many images travel between ranks depends on the draw of negatives."""
    found = measure(2)
    assert len(found) == 10
    for case, counts in found.items():
        assert counts == ({"cpu": 1} if case.startswith("stage1") else {}), case
