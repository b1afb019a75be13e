"""One HTML file about a run: no script, no network, everything inside."""

import os
import shlex
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from isthmus.cluster.report import sections
from isthmus.cluster.report.folder import RunFacts, read_folder
from isthmus.cluster.report.markup import Html, document, h, join, table
from isthmus.cluster.report.summary import summary
from isthmus.data_pipeline.store.local_store import is_local
from isthmus.data_pipeline.store.object_store import ObjectStore
from isthmus.trainer.runs.store import export_folder


@dataclass(frozen=True)
class ReportExtras:
    """What the caller knows beyond the run's folder."""

    sections: Mapping[str, Html] = field(default_factory=dict)
    """Further sections, title -> content."""
    warning: str | None = None
    """Shown above everything."""


def write_report(url: str, store: ObjectStore, out: Path, extra: ReportExtras | None = None) -> Path:
    """Write the report of a run's folder, local or remote, to a file, replacing it.

    Raises:
        TrainerError: the folder is not a run's.
        DataError: the object store refuses access.
    """
    page = render(read_folder(url, store), extra or ReportExtras())
    ObjectStore().put(str(out), page.encode())
    return out


def render(facts: RunFacts, extra: ReportExtras) -> str:
    """Return the page."""
    parts: dict[str, Html] = {
        "Results": sections.results(facts),
        "Losses": sections.curves(facts),
        "Retrieval": sections.retrieval_examples(facts),
        "Captions": sections.gallery(facts),
        "Attention": join(h("p", ATTENTION, class_="note"), sections.drawings(facts, "attention")),
        "Similarity": join(h("p", SIMILARITY, class_="note"), sections.drawings(facts, "similarity")),
        "Goodput": sections.goodput(facts),
        "Restarts": sections.restarts(facts),
        "Memory": sections.memory(facts),
        **extra.sections,
        "Next steps": h("pre", commands(facts)),
        "Identity": identity(facts),
    }
    name = str(facts.record.get("name", facts.url.rpartition("/")[2]))
    warning = h("p", extra.warning, class_="warning") if extra.warning else None
    return document(f"{name}: isthmus run", join(warning, heading(facts, name), summary(facts)), parts)


ATTENTION = (
    "Where the queries of the Q-Former attend, in its last cross-attention, on the image on which they differ most: "
    "all queries together, then, where they differ, those with the most concentrated attention."
)
SIMILARITY = "Cosine of each image's best query with each caption, for the first samples; true pairs: the diagonal."


def heading(facts: RunFacts, name: str) -> Html:
    """Return the title, the run's state, and what could not be read."""
    status = facts.status
    state = h("span", str(status.state), class_=f"state {status.state}") if status else None
    lead = [facts.url, f"written {time.strftime('%Y-%m-%d %H:%M', time.gmtime())} UTC"]
    if status and status.world_size:
        lead.append(f"{status.world_size} ranks")
    message = h("p", status.message) if status and status.message else None
    problems = (h("p", problem, class_="missing") for problem in facts.problems)
    title = h("h1", name, " ", state)
    return h("header", title, h("p", " · ".join(lead), class_="lead"), message, *problems)


def identity(facts: RunFacts) -> Html:
    """Return what was trained on what with which versions, as the newest checkpoints say."""
    attempts = [attempt for attempt in facts.record.get("attempts") or [] if isinstance(attempt, dict)]
    rows = [["created", str(facts.record.get("created", "unknown"))], ["attempts", str(len(attempts))]]
    rows.append(["configuration", str(attempts[-1].get("config_hash", "unknown")) if attempts else "unknown"])
    for name, stage in facts.stages.items():
        if stage.checkpoint is None:
            rows.append([name, "no checkpoint"])
            continue
        state = stage.checkpoint.state
        rows.append([name, f"newest checkpoint at step {stage.checkpoint.step}"])
        rows.append([f"{name}: sample order", state.data_identity])
        rows += [[f"{name}: frozen {part}", digest] for part, digest in state.frozen_identity.items()]
        rows.append([f"{name}: versions", ", ".join(f"{what} {version}" for what, version in state.versions.items())])
        rows.append([f"{name}: bad samples left out", str(stage.quarantined)])
    return table(["fact", "value"], [[row[0], h("code", row[1])] for row in rows])


def commands(facts: RunFacts) -> str:
    """Return what to type next."""
    url, exported = shlex.quote(facts.url), shlex.quote(export_folder(facts.record))
    manifest = facts.setting("evaluation.manifest") or "MANIFEST"
    endpoint = facts.setting("store.endpoint_url")
    lines = [f"export AWS_ENDPOINT_URL={shlex.quote(str(endpoint))}   # and credentials"] if endpoint else []
    if not is_local(facts.url):
        lines.append(f"aws s3 cp --recursive {url}/{exported} export")
        export, curves = "export", "tensorboard"
        lines += [f"aws s3 cp --recursive {url}/{s}/tensorboard {curves}/{s}" for s in facts.stages]
    else:
        export, curves = f"{url}/{exported}", url
    lines += [
        f"isthmus caption {export} PICTURE.jpg",
        f'isthmus ask {export} PICTURE.jpg "what is this?"',
        f"isthmus eval {url} {shlex.quote(str(manifest))}",
        f"isthmus resume {url}",
        f"isthmus report {url} --out report.html",
        f"tensorboard --logdir {curves}",
    ]
    return os.linesep.join(lines)
