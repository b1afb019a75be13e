"""The policy in the operators' page allows exactly what the S3 client calls."""

import json
import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit
ROOT = Path(__file__).parents[3]
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
    page = (ROOT / "docs" / "operators.md").read_text()
    (block,) = re.findall(r"```json\n(.*?)```", page, re.DOTALL)
    allowed = set()
    for statement in json.loads(block)["Statement"]:
        actions = statement["Action"]
        allowed |= {actions} if isinstance(actions, str) else set(actions)
    sources = [path.read_text() for path in (ROOT / "data_pipeline" / "store").glob("s3*.py")]
    called = set(re.findall(r"\bclient(?:\(\))?\s*\.(\w+)\(", "\n".join(sources))) - LOCAL_SERVER_ONLY
    assert called <= ACTIONS.keys(), "an S3 call that the policy does not know of"
    assert allowed == {ACTIONS[call] for call in called}
