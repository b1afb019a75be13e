"""Stage 1 against the numbers of the original code, and the same numbers however the work is done."""

from dataclasses import replace

import pytest
import torch

from isthmus.model.objectives.communicator import LocalCommunicator
from isthmus.model.objectives.negatives import draw_negatives
from isthmus.model.objectives.step import StepContext
from isthmus.model.qformer.qformer import VOCABULARY_MULTIPLE
from tests.fixtures_stage1 import (
    LOSSES,
    Reference,
    _case1,
    _case3,
    _case4,
    _full_contrast,
    _intermediates,
    _per_loss,
    fixture_folder,
    losses_and_gradients,
    plain_losses_and_gradients,
)

pytestmark = pytest.mark.unit
TOLERANCE = 1e-6  # losses are reported in fp32
FOLDER = fixture_folder("stage1_reference")
reference = Reference(FOLDER)


@pytest.mark.parametrize("check", [_intermediates, _case1, _per_loss, _full_contrast, _case3, _case4])
def test_equals_the_original(check):
    found = list(check(reference))
    assert found
    assert [x for x in found if x.deviation > x.allowed] == []


def difference(found, expected):
    (losses, gradients), (losses_0, gradients_0) = found, expected
    relative = [float((gradients[name] - x).abs().max()) for name, x in gradients_0.items()]
    return max(abs(losses[name] - losses_0[name]) for name in LOSSES.values()), max(relative)


@pytest.mark.parametrize("itc_grad", ["anchor", "full"])
@pytest.mark.parametrize("image_ids", [False, True])
def test_equals_the_plain_implementation(itc_grad, image_ids):
    model, inputs = reference.model(itc_grad=itc_grad), reference.rows(image_ids=image_ids)
    expected = plain_losses_and_gradients(model, inputs)
    assert max(difference(losses_and_gradients(model, inputs, 6), expected)) < TOLERANCE


def test_drawn_negatives_are_those_of_the_plain_implementation():
    model, inputs = reference.model(), reference.rows()
    model.choose_negatives = draw_negatives
    expected = plain_losses_and_gradients(model, inputs)
    assert max(difference(losses_and_gradients(model, inputs, 2), expected)) < TOLERANCE


def test_a_padded_vocabulary_changes_nothing(monkeypatch):
    expected = losses_and_gradients(reference.model(), reference.rows(), 6)
    monkeypatch.setitem(VOCABULARY_MULTIPLE, "cpu", 64)
    assert reference.model().qformer.config.vocab_size % 64
    assert max(difference(losses_and_gradients(reference.model(), reference.rows(), 6), expected)) < TOLERANCE


def test_activation_checkpointing_changes_nothing():
    model = reference.model()
    expected = losses_and_gradients(model, reference.rows(), 6)
    model.qformer.config = model.qformer.config.model_copy(update={"activation_checkpointing": True})
    assert max(difference(losses_and_gradients(model, reference.rows(), 6), expected)) < TOLERANCE


@pytest.mark.parametrize("size", [2, 6])
def test_a_scaled_backward_scales_every_gradient(size):
    gradients = []
    for factor in (1.0, 65536.0 * 3):
        model = reference.model()
        model.loss_and_backward(
            reference.rows(),
            StepContext(LocalCommunicator(), size, backward=lambda loss, factor=factor: (factor * loss).backward()),
        )
        gradients.append({name: p.grad / factor for name, p in model.trainable_parameters().items()})
    assert max(float((gradients[1][name] - x).abs().max()) for name, x in gradients[0].items()) < 1e-12


@pytest.mark.parametrize("itc_grad", ["anchor", "full"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_micro_batches_change_nothing(size, itc_grad):
    expected = losses_and_gradients(reference.model(itc_grad=itc_grad), reference.rows(), 6)
    found = losses_and_gradients(reference.model(itc_grad=itc_grad), reference.rows(), size)
    assert max(difference(found, expected)) < TOLERANCE


def test_equal_texts_match_where_that_is_asked_for():
    inputs = reference.rows()
    inputs.input_ids_BT[3], inputs.attention_mask_BT[3] = inputs.input_ids_BT[1], inputs.attention_mask_BT[1]
    pairs = torch.tensor([0, 1, 2, 1, 4, 5])
    chosen = []
    for match, image_ids in ((True, None), (False, pairs), (False, None)):
        model = reference.model(match_equal_texts=match)
        choose = model.choose_negatives
        model.choose_negatives = lambda draw, choose=choose: chosen.append(draw.scores_BN) or choose(draw)
        losses_and_gradients(model, replace(inputs, image_ids_B=image_ids), 6)
    for found, as_one_image, apart in zip(chosen[:2], chosen[2:4], chosen[4:], strict=True):
        assert found[1, 3] == found[3, 1] == -torch.inf < apart[1, 3]
        assert torch.equal(found, as_one_image)


def test_holes_take_no_part():
    inputs = reference.rows()
    expected = losses_and_gradients(reference.model(), inputs.at(torch.tensor([0, 2, 3, 5])), 6)
    holes = torch.tensor([True, False, True, True, False, True])
    mask = inputs.attention_mask_BT.masked_fill(~holes[:, None], 0)
    features = inputs.image_BPD.masked_fill(~holes[:, None, None], float("nan"))
    masked = replace(inputs, valid_B=holes, attention_mask_BT=mask, image_BPD=features)
    for size in (6, 2, 1):
        assert max(difference(losses_and_gradients(reference.model(), masked, size), expected)) < TOLERANCE


def test_one_valid_row_and_none():
    inputs = reference.rows()
    for valid in ([3], []):
        mask = torch.zeros(6, dtype=torch.bool)
        mask[valid] = True
        for size in (6, 2):
            losses, gradients = losses_and_gradients(reference.model(), replace(inputs, valid_B=mask), size)
            assert all(torch.isfinite(x).all() for x in gradients.values())
            assert (losses["loss_lm"] > 0) == bool(valid)


def test_batch_of_one_row():
    losses, gradients = losses_and_gradients(reference.model(), reference.rows([2]), 1)
    assert losses["loss_itc"] == 0.0
    assert losses["loss_itm"] > 0
    assert all(torch.isfinite(x).all() for x in gradients.values())


def test_dropout_is_a_function_of_the_place_and_the_same_in_both_passes():
    model = reference.model()
    model.qformer.config = model.qformer.config.model_copy(update={"dropout": 0.5})
    for module in model.modules():
        if hasattr(module, "dropout"):
            module.dropout = 0.5
    # Only the contrast: with micro-batches its gradient is taken on features of the first pass.
    model.config = model.config.model_copy(update={"itm_weight": 0.0, "itg_weight": 0.0})
    first = losses_and_gradients(model, reference.rows(), 2)
    torch.manual_seed(99)
    again = losses_and_gradients(model, reference.rows(), 2)
    assert first[0] == again[0]
    assert all(torch.equal(first[1][name], x) for name, x in again[1].items())
    seen = []
    encode = model.encode
    model.encode = lambda *inputs, **options: seen.append(encode(*inputs, **options)) or seen[-1]
    losses_and_gradients(model, reference.rows(), 2)
    for one, other in zip(seen[:3], seen[3:], strict=True):
        assert torch.equal(one.image_BQE, other.image_BQE)
        assert torch.equal(one.text_BE, other.text_BE)
    assert not torch.equal(seen[0].image_BQE, seen[1].image_BQE)
