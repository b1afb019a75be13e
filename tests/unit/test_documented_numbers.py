"""Numbers in the pages are the code's own: a constant that changes takes its sentence with it."""

import json
import re
import tomllib
from pathlib import Path

import pytest

from isthmus.bootstrap.duplicates.marks import mark_duplicates
from isthmus.cluster.manifests import render
from isthmus.cluster.submission import job_log
from isthmus.cluster.supervision import group, restart_policy
from isthmus.data_pipeline.config import DataConfig
from isthmus.data_pipeline.dataset import index_build, tar_walk
from isthmus.data_pipeline.ingest import download
from isthmus.data_pipeline.reading import part_queue, reader
from isthmus.trainer.checkpoint import format as checkpoint_format
from isthmus.trainer.checkpoint import interval
from isthmus.trainer.estimate.hardware import Assumptions
from isthmus.trainer.evaluation import benchmark, protocol
from isthmus.trainer.frozen import node_cache
from isthmus.trainer.monitoring import monitor, segments
from isthmus.trainer.runs import lease

pytestmark = pytest.mark.unit
ROOT = Path(__file__).parents[2]
WORDS = {2: "twice", 3: "three"}
DURATIONS = {60: "one minute", 300: "five minutes", 86400: "a day"}
STALE = lease.HEARTBEAT_SECONDS * lease.STALE_HEARTBEATS
MAX_DISTANCE = mark_duplicates.__kwdefaults__["max_distance"]
CAPTION, ANSWER = protocol.CAPTION_DECODING, protocol.ANSWER_DECODING
ASSUMED = Assumptions()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OLDEST, TOO_NEW = re.findall(r"3\.(\d+)", PROJECT["requires-python"])


def mebibytes(number: int) -> str:
    return f"{number >> 20} MiB"


SENTENCES = {
    "README.md": [
        f"You need Python 3.{OLDEST} to 3.{int(TOO_NEW) - 1}",
    ],
    "docs/operators.md": [
        f"`isthmus resume` continues the run once the lease is stale ({STALE:g} s)",
        f"the lease of a dead driver is stale after {STALE:g} s",
        f"doubles from `cluster.restart.backoff_seconds` to {DURATIONS[restart_policy.MAX_BACKOFF_SECONDS]}",
        f"Nodes that lost processes {WORDS[restart_policy.EXCLUDE_AFTER_FAILURES]} are avoided",
        f"if they leave the attempt within {group.RETURN_SECONDS:g} s",
        f"{WORDS[part_queue._MAX_DEATHS]} readers die while reading the same samples",
        f"the last {job_log.TAIL_LINES:,} lines (`--tail`), at most {mebibytes(job_log.TAIL_BYTES)}",
        f"written every {monitor.FLUSH_EVERY_SECONDS:g} s in the background",
        f"after {DURATIONS[segments.SEGMENT_SECONDS]}, or at {segments.SEGMENT_BYTES >> 10} KiB",
        f"`data.cache_bytes` plus {100 * (render.CACHE_MARGIN - 1):.0f}%",
        f"`ISTHMUS_CACHE_GB` ({node_cache.DEFAULT_GIGABYTES:g})",
        f"A folder that was used within {DURATIONS[node_cache.IN_USE_SECONDS]} is never deleted",
        f"the image's user is {re.findall(r'^USER (.*)$', (ROOT / 'Dockerfile').read_text(), re.MULTILINE)[-1]}",
    ],
    "docs/data-format.md": [
        f"over {mebibytes(download.MAX_IMAGE_BYTES)} |",
        f"on {WORDS[download._ATTEMPTS]} attempts, or more than {download._SECONDS:g} s in total",
        f"up to {download._AT_ONCE} downloads at a time, {download._AT_ONCE_PER_HOST} per host",
        f"user agent `{download.USER_AGENT.partition('/')[0]}`",
        f"at most {download._REDIRECTS} redirects",
        f"a member over {mebibytes(tar_walk.MAX_MEMBER_BYTES)}",
        f"after {reader._UNUSABLE_SECONDS / 60:g} minutes the reader looks for it again",
        f"in at most {MAX_DISTANCE} of 64 bits",
        f"chunk size ({mebibytes(index_build.CHUNK_BYTES)})",
        f"K = {DataConfig.model_fields['shuffle_chunks'].default} (the default)",
    ],
    "docs/checkpoint-format.md": [
        f"between {interval.LEAST_SECONDS:g} s and {interval.MOST_SECONDS / 3600:g} h",
        f"the first {len(checkpoint_format.state_name('x' * 64)) - len('state-.json')} hex digits",
        f"`{checkpoint_format.step_name(0).replace('0', 'N')}` (steps done, at least nine digits)",
    ],
    "docs/evaluation.md": [
        f"`{protocol.CAPTION_PROMPT}`, {CAPTION.num_beams} beams, at most {CAPTION.max_new_tokens} new tokens, "
        f"at least {CAPTION.min_length} in all",
        f"`{protocol.QUESTION_PROMPTS['decoder']}`, T5 `{protocol.QUESTION_PROMPTS['encoder-decoder']}`; "
        f"{ANSWER.num_beams} beams, length penalty {ANSWER.length_penalty:g}, at most {ANSWER.max_new_tokens} new "
        "tokens",
        f"truncated to {protocol.MAX_RETRIEVAL_TOKENS} tokens; the {protocol.RERANKED} best of each image",
        f"at most {protocol.MAX_WORDS} words",
        f"fixed groups of {benchmark.UNIT_IMAGES}",
    ],
    "docs/estimates.md": [
        f"({ASSUMED.vision_efficiency:.0%} frozen, {ASSUMED.trainable_efficiency:.0%} trainable)".replace("%", " %"),
    ],
    "docs/security.md": [
        f"{mebibytes(tar_walk.MAX_MEMBER_BYTES)} per member, {mebibytes(tar_walk._MAX_EXTENSION_BYTES)} per extension",
        f"{mebibytes(download.MAX_IMAGE_BYTES)} per image (an object's size is checked first), {download._SECONDS:g} s "
        f"in total, {download._AT_ONCE_PER_HOST} connections per host",
    ],
}


@pytest.mark.parametrize("page", SENTENCES)
def test_the_numbers_are_those_of_the_code(page):
    text = " ".join((ROOT / page).read_text().split())
    assert [sentence for sentence in SENTENCES[page] if not sentence or sentence not in text] == []


def test_the_suites_tasks_have_the_published_sizes():
    rows = re.findall(r"^\| `(\w+)` \|.*\| (.*) \|$", (ROOT / "docs/evaluation.md").read_text(), re.MULTILINE)
    tasks = {task.name: task.published for task in protocol.SUITES["blip2"]}
    assert {name: f"{tasks[name]:,}" in content for name, content in rows} == dict.fromkeys(tasks, True)


def test_the_tables_of_the_public_runs_are_what_the_estimate_says():
    from benchmarks.estimate_truth import paper, public_logs, work_of

    text = (ROOT / "docs" / "estimates.md").read_text()
    logs, implied = public_logs(), paper()
    both = ("stage1", "stage2")
    cells = {
        "fitted fraction of the card's 154.8 TFLOP/s": [f"{logs[s]['fitted fraction of peak']:.1%}" for s in both],
        "ours, work per sample": [f"{logs[s]['ours GF per sample']:.0f} GF" for s in both],
        "ours, step at the fitted fraction": [f"{logs[s]['ours s at the same fraction']:.2f} s" for s in both],
        "second run, predicted and logged step": [
            f"{logs[s]['second run, predicted s']:.3f} and {logs[s]['second run, logged s']:.3f} s" for s in both
        ],
        "work per sample, original": [f"{work_of(s, 'flan-t5-xxl', original=True) / 1e9:,.0f} GF" for s in both],
        "fraction of peak that the days imply, at least": [f"{implied[s]['least fraction of peak']:.1%}" for s in both],
        "ours, at that same fraction": [f"{implied[s]['ours, days at that fraction']:.1f} days" for s in both],
    }
    rows = [f"| {name} | {' | '.join(values)} |".replace("%", " %") for name, values in cells.items()]
    assert [row for row in rows if row not in text] == [], json.dumps(logs)


def test_the_memory_of_the_public_run_is_what_the_estimate_says():
    from isthmus.cluster.config import JobConfig
    from isthmus.trainer.config.loading import load_config
    from isthmus.trainer.estimate.architectures import load_parts
    from isthmus.trainer.estimate.hardware import Cluster, find_gpu
    from isthmus.trainer.estimate.step import estimate_stage

    sizes = {"global_batch_size": 8 * 128, "micro_batch_size": 128}
    overrides = [f"{stage}.{key}={size}" for stage in ("stage1", "stage2") for key, size in sizes.items()]
    config = load_config("blip2-vitg-opt2.7b.yaml", ["data.lanes=64", *overrides], JobConfig)
    parts, _ = load_parts(config)
    cluster = Cluster(find_gpu("rtx-a6000"), 8)
    found = [estimate_stage(config, stage, parts, cluster, ASSUMED).memory.total / 2**30 for stage in config.stages]
    row = "| ours, memory at micro-batch 128 (original: 36.6 and 36.5 GiB logged) |"
    assert f"{row} {found[0]:.1f} GiB | {found[1]:.1f} GiB |" in (ROOT / "docs" / "estimates.md").read_text()
