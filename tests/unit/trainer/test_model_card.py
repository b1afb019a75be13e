"""The card of an export says what was trained, on what, and how good it is; a push is private by default."""

import pytest
import yaml
from huggingface_hub import HfApi
from huggingface_hub.errors import LocalTokenNotFoundError
from typer.testing import CliRunner

from isthmus.cluster.cli.model import app
from isthmus.model.errors import ModelError
from isthmus.model.imports.hub import upload
from isthmus.trainer.checkpoint.train_state import TrainState
from isthmus.trainer.config.schema import TrainConfig
from isthmus.trainer.runs.model_card import model_card

pytestmark = pytest.mark.unit


def config() -> TrainConfig:
    stage = {"global_batch_size": 32, "micro_batch_size": 16}
    return TrainConfig.model_validate(
        {
            "run": {"name": "demo", "url": "s3://bucket/runs"},
            "data": {"sources": [{"manifest": "s3://bucket/web", "weight": 2.0}], "lanes": 4},
            "model": {"vision": {"path": "s3://bucket/vit"}, "language": {"path": "s3://bucket/opt"}},
            "stage1": {"steps": 100, "deepspeed": "stage1_zero1", **stage},
            "stage2": {"steps": 50, "deepspeed": "stage2_zero3", **stage},
        }
    )


def state(**fields) -> TrainState:
    return TrainState("stage2", 50, "c", "d" * 32, {"vision": "a" * 64, "language": "b" * 64}, **fields)


def test_the_card_says_what_was_trained_on_what_and_how_good_it_is():
    card = model_card(config(), "stage2", state(metrics={"eval/cider_d": 0.5}, versions={"torch": "2"}), form="hf")
    _, front, text = card.split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "transformers"
    assert "step 50 of 50, global batch 32" in text
    assert "1,600 samples seen" in text
    assert "| cider_d | 0.5000 |" in text
    assert "| s3://bucket/web | 2 |" in text
    assert f"| language | s3://bucket/opt | `{'b' * 16}` |" in text
    assert yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])["run"]["name"] == "demo"


def test_an_own_export_is_used_by_isthmus_and_one_of_stage_1_by_stage_2():
    assert "isthmus serve" in model_card(config(), "stage2", state(), form="own")
    assert "Not evaluated" in model_card(config(), "stage2", state(), form="own")
    stage1 = model_card(config(), "stage1", state(), form="own")
    assert "stage2.init_from" in stage1
    assert "s3://bucket/opt |" not in stage1


@pytest.fixture
def hub(monkeypatch):
    calls = []
    monkeypatch.setattr(HfApi, "create_repo", lambda _self, name, **options: calls.append((name, options)))
    monkeypatch.setattr(HfApi, "upload_folder", lambda _self, **options: calls.append(options) or "https://hub/x")
    return calls


def test_a_push_is_private_unless_asked_and_a_dry_run_sends_nothing(hub, tmp_path):
    (tmp_path / "README.md").write_text("card")
    shown = CliRunner().invoke(app, ["push", str(tmp_path), "me/model", "--dry-run"])
    assert (shown.exit_code, hub) == (0, [])
    assert "README.md" in shown.output
    assert "private; not uploaded" in shown.output
    assert CliRunner().invoke(app, ["push", str(tmp_path), "me/model"]).output.strip() == "https://hub/x"
    assert hub[0] == ("me/model", {"private": True, "exist_ok": True})
    assert hub[1]["folder_path"] == tmp_path
    CliRunner().invoke(app, ["push", str(tmp_path), "me/model", "--public"])
    assert hub[2][1]["private"] is False


def test_without_a_token_a_push_says_so(monkeypatch, tmp_path):
    def refuse(*_args, **_options):
        raise LocalTokenNotFoundError("Token is required, but no token found")

    monkeypatch.setattr(HfApi, "create_repo", refuse)
    with pytest.raises(ModelError, match="set HF_TOKEN to a token with write access"):
        upload(tmp_path, "me/model")
