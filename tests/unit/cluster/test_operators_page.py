"""The operators' page: its policy allows exactly what the S3 client calls; its messages and metrics exist."""

import json
import re
from pathlib import Path

import pytest

from isthmus.cluster.metrics import DRIVER_METRICS, WORKER_GAUGES

pytestmark = pytest.mark.unit
ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "operators.md").read_text()
ACTIONS = {
    "head_object": "s3:GetObject",
    "get_object": "s3:GetObject",
    "list_objects_v2": "s3:ListBucket",
    "put_object": "s3:PutObject",
    "create_multipart_upload": "s3:PutObject",
    "upload_part": "s3:PutObject",
    "complete_multipart_upload": "s3:PutObject",
    "abort_multipart_upload": "s3:AbortMultipartUpload",
    "list_multipart_uploads": "s3:ListBucketMultipartUploads",
    "delete_object": "s3:DeleteObject",
}

LOCAL_SERVER_ONLY = {"create_bucket", "head_bucket"}


def test_the_policy_allows_what_is_called_and_no_more():
    (block,) = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)
    allowed = set()
    for statement in json.loads(block)["Statement"]:
        actions = statement["Action"]
        allowed |= {actions} if isinstance(actions, str) else set(actions)
    sources = [path.read_text() for path in (ROOT / "data_pipeline" / "store").glob("s3*.py")]
    called = set(re.findall(r"\bclient(?:\(\))?\s*\.(\w+)\(", "\n".join(sources))) - LOCAL_SERVER_ONLY
    assert called <= ACTIONS.keys(), "an S3 call that the policy does not know of"
    assert allowed == {ACTIONS[call] for call in called}


def names_in(section: str) -> set[str]:
    """Return the code spans in the first column of a section's table."""
    rows = PAGE.split(f"\n## {section}\n")[1].split("\n## ")[0].splitlines()
    return {name for row in rows if row.startswith("| `") for name in re.findall(r"`([^`]+)`", row.split("|")[1])}


def test_the_messages_exist():
    sources = [path for package in ("cluster", "trainer", "data_pipeline") for path in (ROOT / package).rglob("*.py")]
    source = "\n".join(path.read_text() for path in sources)
    messages = names_in("Error messages")
    assert len(messages) > 5
    assert [message for message in messages if message not in source] == []


def test_the_metrics_exist():
    metrics = names_in("Monitoring") - {"ray_isthmus_..."}
    assert len(metrics) > 5
    assert metrics <= {name for name, _ in WORKER_GAUGES.values()} | DRIVER_METRICS.keys()


def test_the_files_of_a_run_are_named_in_the_code():
    sources = [path for package in ("cluster", "trainer") for path in (ROOT / package).rglob("*.py")]
    source = "\n".join(path.read_text() for path in sources)
    places = {place.removeprefix("<stage>/").partition("/")[0] for place in names_in("The run's folder")}
    assert len(places) > 12
    assert [place for place in sorted(places) if f'"{place}"' not in source and f'"{place}/' not in source] == []
