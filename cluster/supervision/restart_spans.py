"""Restarts as OpenTelemetry spans: one for the restart and one for each of its phases, where an endpoint is set.

The exporter reads the standard variables (OTEL_EXPORTER_OTLP_ENDPOINT and related ones) and sends in the background.
"""

import importlib
import logging
import os
from typing import Any

from isthmus.cluster.status import Restart

logger = logging.getLogger(__name__)

ENDPOINT_VARIABLES = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
NANOSECONDS = 1_000_000_000


class RestartSpans:
    """Sends the restarts of one run; without an endpoint it does nothing."""

    def __init__(self, run: str) -> None:
        """Open the exporter. Failures do not affect the run: what cannot be sent is logged and dropped."""
        self._run = run
        self._provider = _provider() if any(map(os.environ.get, ENDPOINT_VARIABLES)) else None

    def send(self, restart: Restart) -> None:
        """Send a restart that is complete."""
        if self._provider is None:
            return
        trace = importlib.import_module("opentelemetry.trace")
        tracer = self._provider.get_tracer("isthmus.restarts")
        began = int(restart.at * NANOSECONDS)
        whole = tracer.start_span("restart", start_time=began, attributes=_attributes(self._run, restart))
        context = trace.set_span_in_context(whole)
        for phase, seconds in restart.phases.items():
            span = tracer.start_span(phase, context=context, start_time=began)
            began += int(seconds * NANOSECONDS)
            span.end(end_time=began)
        whole.end(end_time=began)

    def close(self) -> None:
        """Send what is left, within the exporter's time limit."""
        if self._provider is not None:
            self._provider.shutdown()


def _provider() -> Any:
    try:
        trace = importlib.import_module("opentelemetry.sdk.trace")
        export = importlib.import_module("opentelemetry.sdk.trace.export")
        resources = importlib.import_module("opentelemetry.sdk.resources")
        exporter = importlib.import_module("opentelemetry.exporter.otlp.proto.http.trace_exporter").OTLPSpanExporter
    except ImportError as error:
        logger.warning("no traces: %s is set, but %s; pip install 'isthmus[otel]'", ENDPOINT_VARIABLES[0], error)
        return None
    service = {"service.name": os.environ.get("OTEL_SERVICE_NAME", "isthmus")}
    provider = trace.TracerProvider(resource=resources.Resource.create(service), shutdown_on_exit=False)
    provider.add_span_processor(export.BatchSpanProcessor(exporter()))
    return provider


def _attributes(run: str, restart: Restart) -> dict[str, str | int]:
    found: dict[str, str | int] = {
        "run": run,
        "stage": restart.stage,
        "kind": restart.kind,
        "cause": restart.cause,
        "step": restart.step,
        "lost_steps": restart.lost_steps or 0,
        "world_size": restart.world_size,
    }
    found |= {f"processes.{name}": count for name, count in restart.processes.items()}
    return {f"isthmus.{name}": value for name, value in found.items()}
