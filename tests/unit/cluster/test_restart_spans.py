"""A restart arrives at an OpenTelemetry collector as one span with a child for each phase, end to end."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from isthmus.cluster.status import Restart
from isthmus.cluster.supervision.restart_spans import ENDPOINT_VARIABLES, RestartSpans

pytestmark = pytest.mark.unit
RESTART = Restart(
    at=1000.0,
    kind="lost process",
    cause="train-1 died",
    stage="stage1",
    step=17,
    world_size=2,
    lost_steps=2,
    recovery_seconds=2.5,
    phases={"clear": 0.25, "place": 0.25, "weights": 2.0},
    processes={"kept": 1, "spare": 1, "new": 0},
)


@pytest.fixture
def collector(monkeypatch):
    """A collector on loopback; yields the spans that it has received."""
    received = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            request = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["Content-Length"])))
            assert self.path == "/v1/traces"
            received.extend(s for r in request.resource_spans for scope in r.scope_spans for s in scope.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv(ENDPOINT_VARIABLES[0], f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "none")
    yield received
    server.shutdown()
    server.server_close()


def test_phases_are_children_that_follow_one_another(collector):
    spans = RestartSpans("demo")
    spans.send(RESTART)
    spans.close()
    whole = next(span for span in collector if span.name == "restart")
    phases = sorted((span for span in collector if span is not whole), key=lambda span: span.start_time_unix_nano)
    assert [span.name for span in phases] == ["clear", "place", "weights"]
    assert {span.parent_span_id for span in phases} == {whole.span_id}
    edges = [1000.0, 1000.25, 1000.5, 1002.5]
    assert [span.start_time_unix_nano / 1e9 for span in phases] == edges[:-1]
    assert [span.end_time_unix_nano / 1e9 for span in phases] == edges[1:]
    assert (whole.start_time_unix_nano / 1e9, whole.end_time_unix_nano / 1e9) == (1000.0, 1002.5)
    attributes = {item.key: item.value.string_value or item.value.int_value for item in whole.attributes}
    assert attributes["isthmus.run"] == "demo"
    assert attributes["isthmus.kind"] == "lost process"
    assert attributes["isthmus.processes.spare"] == 1


def test_a_collector_that_is_away_costs_the_run_nothing(monkeypatch):
    monkeypatch.setenv(ENDPOINT_VARIABLES[0], "http://127.0.0.1:1")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    spans = RestartSpans("demo")
    spans.send(RESTART)
    spans.close()


def test_without_an_endpoint_nothing_is_loaded(monkeypatch):
    for name in ENDPOINT_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    spans = RestartSpans("demo")
    spans.send(RESTART)
    spans.close()
    assert spans._provider is None
