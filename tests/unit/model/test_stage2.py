"""Stage 2 equals the original, and splitting the batch changes nothing."""

from dataclasses import replace

import pytest
import torch

from isthmus.model.errors import ModelError
from isthmus.model.objectives.communicator import LocalCommunicator
from isthmus.model.objectives.step import StepContext
from tests.fixtures_stage1 import fixture_folder
from tests.fixtures_stage2 import check_stage2
from tests.stage2_parts import CAPTIONS, stage2_parts

pytestmark = pytest.mark.unit
KINDS = ("opt", "llama", "t5")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("stage2")


def run(model, inputs, micro_batch_size=8, step=0):
    model.zero_grad()
    output = model.loss_and_backward(
        inputs, StepContext(LocalCommunicator(), micro_batch_size, step=step, backward=lambda loss: loss.backward())
    )
    return output, {name: p.grad.clone() for name, p in model.trainable_parameters().items()}


@pytest.mark.parametrize("name", ["stage2_reference_opt", "stage2_reference_t5"])
def test_equal_to_the_original(name):
    found = list(check_stage2(fixture_folder(name)))
    assert len(found) == 8
    assert [case for case in found if case.deviation > case.allowed] == []


@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_change_nothing(root, kind):
    parts = stage2_parts(root, kind)
    whole, gradients = run(parts.model, parts.inputs())
    for size in (1, 3):
        cut, cut_gradients = run(parts.model, parts.inputs(), size)
        torch.testing.assert_close(cut.total, whole.total, atol=1e-5, rtol=0)
        torch.testing.assert_close(cut_gradients, gradients, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_holes_take_no_part(root, kind):
    parts = stage2_parts(root, kind)
    rows = [0, 2]
    without, expected = run(parts.model, parts.inputs([CAPTIONS[0], CAPTIONS[2]], rows=rows))
    holes = parts.inputs([CAPTIONS[0], "", CAPTIONS[2], "not a hole's text"], [True, False, True, False], [0, 7, 2, 9])
    holes.tokens["labels"][3, 0] = 5
    with_holes, gradients = run(parts.model, holes, 1)
    torch.testing.assert_close(with_holes.total, without.total, atol=1e-5, rtol=0)
    torch.testing.assert_close(gradients, expected, atol=1e-5, rtol=1e-4)
    assert with_holes.metrics["valid"] == 2


def test_the_number_of_backward_calls_depends_on_the_rows_alone(root):
    parts = stage2_parts(root, "opt")
    for valid in ([True] * 4, [False] * 4):
        calls = []
        parts.model.loss_and_backward(
            parts.inputs(valid=valid),
            StepContext(
                LocalCommunicator(),
                2,
                backward=lambda loss, calls=calls: (loss.backward(), calls.append(float(loss.detach()))),
            ),
        )
        assert len(calls) == 2
    assert calls == [0.0, 0.0]


@pytest.mark.parametrize("kind", KINDS)
def test_the_frozen_parts_stay_frozen_and_quiet(root, kind):
    parts = stage2_parts(root, kind)
    parts.model.train()
    first, _ = run(parts.model, parts.inputs())
    second, _ = run(parts.model, parts.inputs())
    assert first.total == second.total
    frozen = [*parts.model.language.parameters(), *parts.model.vision.parameters()]
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in frozen)
    trained = set(map(id, parts.model.trainable_parameters().values()))
    assert not trained & set(map(id, frozen))


@pytest.mark.parametrize("kind", KINDS[::2])
def test_dropout_of_the_language_model_is_a_switch(root, kind):
    parts = stage2_parts(root, kind, dropout=True)
    quiet = [float(run(parts.model.eval(), parts.inputs())[0].total) for _ in range(2)]
    parts.model.train()
    loud = [float(run(parts.model, parts.inputs(), step=step)[0].total) for step in (0, 1, 0)]
    assert quiet[0] == quiet[1]
    assert len({quiet[0], *loud[:2]}) == 3
    assert loud[0] == loud[2]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dropout", [False, True])
def test_activation_checkpointing_changes_nothing(root, kind, dropout):
    results = []
    for checkpointing in (False, True):
        parts = stage2_parts(root, kind, activation_checkpointing=checkpointing, dropout=dropout)
        parts.model.train()
        calls = _count_layer_calls(parts.model.language.model)
        results.append((*run(parts.model, parts.inputs()), len(calls)))
    (plain, gradients, once), (saved, saved_gradients, twice) = results
    torch.testing.assert_close(saved.total, plain.total, atol=1e-6, rtol=0)
    torch.testing.assert_close(saved_gradients, gradients, atol=1e-6, rtol=1e-5)
    assert twice > once


def _count_layer_calls(model):
    from transformers.modeling_layers import GradientCheckpointingLayer

    calls = []
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            first = next(child for child in layer.modules() if isinstance(child, torch.nn.Linear))
            first.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_bad_inputs_name_both_sides(root):
    parts = stage2_parts(root, "opt")
    good = parts.inputs()
    cases = [
        ({"image_BPD": torch.randn(4, 5, 99)}, "width 99.*24"),
        ({"image_BPD": torch.randn(3, 5, 24)}, r"4 rows.*'image_BPD': 3"),
        ({"tokens": {**good.tokens, "attention_mask": good.tokens["attention_mask"][:, :2]}}, r"\(4, 2\)"),
        ({"tokens": parts.inputs(["a", "b", "", "c"]).tokens}, "1 of 4 valid rows have no target"),
        ({"images_BCHW": None}, "neither images_BCHW nor image_BPD"),
    ]
    for change, message in cases:
        with pytest.raises(ModelError, match=message):
            run(parts.model, replace(good, **change))


def test_text_that_cannot_fit_the_context_is_refused_when_built(root):
    with pytest.raises(ModelError, match=r"num_queries = 4 .* 125 exceed .* context of 128"):
        stage2_parts(root, "opt", max_text_tokens=125)
    assert stage2_parts(root, "t5", max_text_tokens=125)
