"""A small valid configuration for the tests of this package."""

from typing import Any

from isthmus.cluster.config import JobConfig


def job_config(url: str = "s3://bucket/runs", name: str = "demo", **sections: Any) -> JobConfig:
    """Return a configuration of stage 1 with the given sections replaced."""
    content: dict[str, Any] = {
        "run": {"name": name, "url": url, "export": False},
        "data": {"sources": [{"manifest": "s3://bucket/manifest.json"}], "lanes": 8},
        "model": {"vision": {"path": "s3://bucket/vision"}},
        "stage1": {"steps": 40, "global_batch_size": 8, "micro_batch_size": 4, "deepspeed": "zero1"},
    }
    return JobConfig.model_validate(content | sections)
