"""Configuration: every problem at once, overrides, content hash, hostile YAML."""

from pathlib import Path

import pytest

from isthmus.cluster.config import JobConfig
from isthmus.trainer.config.changes import check_changes
from isthmus.trainer.config.loading import check_config, config_hash, diff_configs, load_config, parse_yaml, to_yaml
from isthmus.trainer.engine.deepspeed_config import trainable_config
from isthmus.trainer.errors import ConfigError

pytestmark = pytest.mark.unit

RECIPE = """
run: {name: small, url: s3://bucket/runs}
data: {sources: [{manifest: s3://bucket/manifest.json}], lanes: 8}
model: {vision: {path: vision}, language: {path: llm}}
stage1: {steps: 10, global_batch_size: 16, micro_batch_size: 4, deepspeed: stage1_zero1}
stage2: {steps: 10, global_batch_size: 16, micro_batch_size: 4, deepspeed: stage2_zero3}
cluster: {workers: {min: 1, max: 4}}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def problems_of(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides, JobConfig)
    return [line.strip() for line in str(caught.value).splitlines()[1:]]


def test_overrides_reach_nested_keys_and_list_items(recipe):
    config = load_config(
        recipe, ["stage1.optimizer.peak_lr=1e-3", "data.sources.0.weight=2", "evaluation.manifest=m"], JobConfig
    )
    assert config.stage1.optimizer.peak_lr == 1e-3
    assert config.data.sources[0].weight == 2.0
    assert config.evaluation.manifest == "m"


def test_misspelt_key_wrong_type_and_impossible_batch_come_together(recipe):
    assert problems_of(
        recipe, "data.shufle_chunks=3", "stage2.steps=many", "stage1.global_batch_size=12", "evaluation.batch_size=4"
    ) == [
        "data.shufle_chunks: unknown key; did you mean data.shuffle_chunks?",
        "stage2.steps: 'many' is wrong: input should be a valid integer, unable to parse string as an integer",
        "stage1.global_batch_size: 12 is not divisible by data.lanes = 8; set a multiple of 8",
        "evaluation.batch_size: 4 is not divisible by data.lanes = 8; set a multiple of 8",
    ]


def test_a_rule_is_not_applied_to_a_value_that_is_itself_wrong(recipe):
    (problem,) = problems_of(recipe, "stage1.global_batch_size=lots")
    assert problem.startswith("stage1.global_batch_size: 'lots' is wrong")


def test_a_key_at_the_wrong_place_is_found_at_the_right_one(recipe):
    assert problems_of(recipe, "lanes=4") == ["lanes: unknown key; did you mean data.lanes?"]


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["stage1=null"], "stage2.init_from"),
        (["stage1=null", "stage2=null"], "stage1, stage2"),
        (["model.language=null"], "model.language"),
        (["cluster.workers.min=5"], "cluster.workers"),
        (["cluster.workers.min=3", "cluster.workers.max=3"], "cluster.workers"),
        (["run.name=Big_Run"], "run.name"),
        (["data.sources=[]"], "data.sources"),
        (["run=null"], "run"),
    ],
)
def test_rules_across_fields_name_the_key(recipe, overrides, key):
    assert any(problem.startswith(f"{key}: ") for problem in problems_of(recipe, *overrides))


@pytest.mark.parametrize("value", ["0123", "1.5", "true", "2026-11-27"])
def test_a_name_that_yaml_reads_as_something_else_wants_quotes(recipe, value):
    with pytest.raises(ConfigError, match=r"run\.name: .*put it in quotes"):
        load_config(recipe, [f"run.name={value}"], JobConfig)
    assert load_config(recipe, [f"run.name='{value.replace('.', '-')}'"], JobConfig).run.name


def test_the_best_checkpoint_of_stage_1_needs_a_comparison(recipe):
    problems = problems_of(recipe, "stage2.init_choice=best")
    assert [problem.split("needs ")[1].split(",")[0] for problem in problems] == [
        "checkpoint.keep_best",
        "evaluation.manifest",
    ]
    load_config(recipe, ["stage2.init_choice=best", "checkpoint.keep_best=eval/r1", "evaluation.manifest=m"], JobConfig)


def test_frozen_types_follow_the_precision_of_each_stage(recipe):
    mixed = load_config(recipe, ["stage1.precision=bf16", "stage2.precision=tf32"], JobConfig)
    assert mixed.model.vision.dtype == "auto"
    assert mixed.model_at("stage1").vision.dtype == "bfloat16"
    assert mixed.model_at("stage2").vision.dtype == mixed.model_at("stage2").language.dtype == "float32"
    assert mixed.slow_frozen_parts("stage1") == mixed.slow_frozen_parts("stage2") == []


def test_frozen_parts_in_fp32_beside_a_bf16_stage_are_said(recipe):
    half = ["stage1.precision=bf16", "stage2.precision=bf16"]
    config = load_config(recipe, [*half, "model.vision.dtype=float32", "model.language.dtype=float32"], JobConfig)
    (first,) = config.slow_frozen_parts("stage1")
    assert "model.vision.dtype is float32 while stage1.precision is bf16" in first
    assert "ten times slower" in first
    assert [text.split(".dtype")[0] for text in config.slow_frozen_parts("stage2")] == [
        "model.vision",
        "model.language",
    ]


@pytest.mark.parametrize(("precision", "stored"), [("fp32", "float32"), ("bf16", "bfloat16")])
def test_a_run_that_stored_the_type_of_its_frozen_parts_resumes_with_auto(recipe, precision, stored):
    overrides = [f"stage1.precision={precision}", f"stage2.precision={precision}"]
    new = load_config(recipe, overrides, JobConfig).model_dump(mode="json")
    types = [f"model.vision.dtype={stored}", f"model.language.dtype={stored}"]
    old = load_config(recipe, [*overrides, *types], JobConfig).model_dump(mode="json")
    assert check_changes(old, new, [], "url") == []
    other = load_config(recipe, [*overrides, "model.vision.dtype=float16"], JobConfig).model_dump(mode="json")
    with pytest.raises(ConfigError, match=rf"model.vision.dtype: 'float16' -> '{stored}'"):
        check_changes(other, new, [], "url")


def test_matching_on_some_rows_is_bounded_by_the_batch_and_new_to_old_runs(recipe):
    (problem,) = problems_of(recipe, "stage1.loss.itm_rows=17")
    assert problem.startswith("stage1.loss.itm_rows: 17 exceeds stage1.global_batch_size = 16; lower it")
    new = load_config(recipe, [], JobConfig).model_dump(mode="json")
    old = load_config(recipe, [], JobConfig).model_dump(mode="json")
    del old["stage1"]["loss"]["itm_rows"]  # as a run of an earlier release stored it
    assert check_changes(old, new, [], "url") == []
    some = load_config(recipe, ["stage1.loss.itm_rows=4"], JobConfig).model_dump(mode="json")
    with pytest.raises(ConfigError, match=r"stage1.loss.itm_rows: None -> 4"):
        check_changes(old, some, [], "url")


def test_virtual_ranks_belong_to_the_run_and_are_new_to_old_ones(recipe):
    new = load_config(recipe, [], JobConfig).model_dump(mode="json")
    old = load_config(recipe, [], JobConfig).model_dump(mode="json")
    del old["run"]["virtual_ranks"], old["safety"]["same_bits"]  # as a run of an earlier release stored it
    old["safety"]["deterministic"] = False
    assert [change.key for change in check_changes(old, new, [], "url")] == ["safety.deterministic"]
    assert JobConfig.model_validate(old).model_dump(mode="json") == new
    cut = load_config(recipe, ["run.virtual_ranks=4"], JobConfig).model_dump(mode="json")
    with pytest.raises(ConfigError, match=r"run.virtual_ranks: None -> 4"):
        check_changes(old, cut, [], "url")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], "none"),
        (["run.virtual_ranks=4"], "world_size"),
        (["run.virtual_ranks=4", "safety.same_bits=none"], "none"),
        (["safety.deterministic=true"], "run"),
        (["safety.deterministic=false"], "none"),
    ],
)
def test_what_ends_with_the_same_bits(recipe, overrides, expected):
    assert load_config(recipe, overrides, JobConfig).same_bits == expected


def test_world_sizes_divide_the_lanes_and_the_virtual_ranks(recipe):
    assert load_config(recipe, [], JobConfig).world_sizes == (1, 2, 4)
    more = ["data.lanes=16", "cluster.workers={min: 1, max: 16}"]
    assert load_config(recipe, more, JobConfig).world_sizes == (1, 2, 4, 8, 16)
    assert load_config(recipe, [*more, "run.virtual_ranks=4"], JobConfig).world_sizes == (1, 2, 4)


@pytest.mark.parametrize("override", ["stage1.steps", "=3", "a..b=3", "data.sources.7.weight=1", "run.name.x=1"])
def test_an_override_that_cannot_be_set_is_quoted(recipe, override):
    with pytest.raises(ConfigError, match="override"):
        load_config(recipe, [override], JobConfig)


def test_the_hash_follows_the_content_and_yaml_reads_back_equal(recipe):
    config = load_config(recipe, [], JobConfig)
    again = check_config(parse_yaml(to_yaml(config), "dump"), JobConfig, "dump")
    assert again == config
    assert config_hash(again) == config_hash(config)
    changed = load_config(recipe, ["stage1.steps=11"], JobConfig)
    assert config_hash(changed) != config_hash(config)
    (change,) = diff_configs(config.model_dump(mode="json"), changed.model_dump(mode="json"))
    assert change == ("stage1.steps", 10, 11)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &x [1]\nb: *x", "aliases"),
        ("a: 1\na: 2", "appears twice"),
        ("a: !!python/object/apply:os.system ['true']", "not plain YAML"),
        ("- 1", "not a mapping"),
        ("a: [" * 5000, "not plain YAML"),
    ],
)
def test_hostile_yaml_is_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_yaml(text, "hostile.yaml")


def test_unreadable_and_oversized_files_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"missing\.yaml"):
        load_config(tmp_path / "missing.yaml", [], JobConfig)
    large = tmp_path / "large.yaml"
    large.write_text("a: 1\n" * 300_000)
    with pytest.raises(ConfigError, match="larger than"):
        load_config(large, [], JobConfig)


def test_an_unknown_recipe_lists_the_packaged_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"absent\.yaml: cannot be read.*tiny\.yaml"):
        load_config("absent.yaml", [], JobConfig)
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    assert load_config("tiny.yaml", [], JobConfig).run.name != "tiny", "a file of that name comes first"


def test_a_deepspeed_template_becomes_part_of_the_configuration(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "mine.json").write_text('{"zero_optimization": {"stage": 2}}')
    config = load_config("recipe.yaml", ["stage1.deepspeed=mine.json"], JobConfig)
    (tmp_path / "mine.json").unlink()
    (tmp_path / "resolved.yaml").write_text(to_yaml(config))
    template = trainable_config(load_config("resolved.yaml", [], JobConfig).stage1.deepspeed)
    assert template["zero_optimization"]["stage"] == 2
    with pytest.raises(ConfigError, match=r"mine\.json is not a readable JSON file"):
        load_config("recipe.yaml", ["stage1.deepspeed=mine.json"], JobConfig)
