"""`isthmus serve` through OpenAI's own client, with a real tiny model; batching and limits with a stand-in."""

import asyncio
import base64
import contextlib
import io
import os
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import openai
import pytest
from aiohttp import ClientSession, web
from PIL import Image

from isthmus.cluster.captioner import Captioner
from isthmus.cluster.serving import Server
from isthmus.model.decoding import Decoding
from isthmus.model.formats.native import export_bridge
from isthmus.model.generate import QUESTION
from tests.ranks import free_port
from tests.stage2_parts import QFORMER, stage2_parts

pytestmark = pytest.mark.unit

TOKEN = "secret-token"


def png(colour: tuple[int, int, int]) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (30, 20), colour).save(file, "png")
    return file.getvalue()


def asked(image: bytes, text: str = "what colour?") -> list[Any]:
    url = f"data:image/png;base64,{base64.b64encode(image).decode()}"
    return [
        {"role": "user", "content": [{"type": "text", "text": text}, {"type": "image_url", "image_url": {"url": url}}]}
    ]


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    root = tmp_path_factory.mktemp("serve")
    parts = stage2_parts(root, "opt")
    export_bridge(root / "own", parts.model.trainable_parameters(), QFORMER, parts.vision, parts.language)
    return root / "own"


def test_openai_client_gets_the_models_own_answer(export):
    port = free_port()
    command = [sys.executable, "-m", "isthmus.cluster.cli.main", "serve", str(export), "--port", str(port)]
    process = subprocess.Popen(command, env=os.environ | {"ISTHMUS_SERVE_TOKEN": TOKEN})
    try:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=TOKEN, max_retries=0)
        deadline = time.monotonic() + 90
        while True:
            with contextlib.suppress(openai.APIConnectionError):
                assert [model.id for model in client.models.list()] == ["own"]
                break
            assert time.monotonic() < deadline
            time.sleep(0.2)
        image = png((200, 30, 30))
        answer = client.chat.completions.create(model="own", messages=asked(image), max_tokens=6)
        expected = Captioner(export).write([image], [QUESTION.format("what colour?")], Decoding(max_new_tokens=6))
        assert answer.choices[0].message.content == expected[0]
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=client.base_url, api_key="wrong", max_retries=0).models.list()
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(30)


class StandIn:
    """Answers with its prompt; the first batch waits until it is released; pictures that are `bad` fail."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.go = threading.Event()

    def write(self, images: list[bytes], prompts: list[str | None], _decoding: Decoding) -> list[str]:
        self.batches.append(len(images))
        assert self.go.wait(20)
        if b"bad" in images:
            raise ValueError("undecodable")
        return [str(prompt) for prompt in prompts]


async def served(writer: Any, use: Any, **limits: Any) -> Any:
    runner = web.AppRunner(Server(writer, "m", token=TOKEN, **limits).app())
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    try:
        async with ClientSession(f"http://127.0.0.1:{port}", headers={"Authorization": f"Bearer {TOKEN}"}) as session:
            return await use(session)
    finally:
        await runner.cleanup()


async def post(session: ClientSession, image: bytes = b"x", text: str = "q", **fields: Any) -> tuple[int, Any]:
    body = {"model": "m", "messages": asked(image, text), **fields}
    async with session.post("/v1/chat/completions", json=body) as response:
        content = await response.json()
        if response.status != 200:
            return response.status, content["error"]["message"]
        return 200, content["choices"][0]["message"]["content"]


def test_requests_that_wait_together_run_as_one_batch_and_a_bad_one_fails_alone():
    writer = StandIn()

    async def use(session: ClientSession) -> list[tuple[int, Any]]:
        first = asyncio.create_task(post(session, text="first"))
        while not writer.batches:
            await asyncio.sleep(0.01)
        others = [asyncio.create_task(post(session, b"bad" if i == 2 else b"x", f"q{i}")) for i in range(4)]
        while True:  # all four are in the queue
            async with session.get("/health") as response:
                if (await response.json())["waiting"] == 4:
                    break
        writer.go.set()
        return [await first, *[await other for other in others]]

    answers = asyncio.run(served(writer, use, max_batch=4))
    assert writer.batches[:2] == [1, 4]
    assert [status for status, _ in answers] == [200, 200, 200, 500, 200]
    assert answers[1] == (200, QUESTION.format("q0"))


@pytest.mark.parametrize("header", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer \u00fc"}])
def test_every_path_but_health_wants_the_token(header):
    async def use(session: ClientSession) -> Any:
        async with ClientSession(session._base_url, headers=header) as stranger:
            paths = [("GET", "/v1/models"), ("POST", "/v1/chat/completions"), ("GET", "/other"), ("GET", "/health")]
            return [(await stranger.request(method, path)).status for method, path in paths]

    assert asyncio.run(served(StandIn(), use)) == [401, 401, 401, 200]


def test_more_than_may_wait_are_told_to_come_back_and_nobody_waits_endlessly():
    writer = StandIn()

    async def use(session: ClientSession) -> Any:
        tasks = [asyncio.create_task(post(session, temperature=0.0)) for _ in range(1)]
        while not writer.batches:
            await asyncio.sleep(0.01)
        tasks += [asyncio.create_task(post(session)) for _ in range(3)]
        answers = [await task for task in tasks]
        writer.go.set()
        return answers

    answers = asyncio.run(served(writer, use, max_waiting=2, timeout_seconds=1.0))
    assert sorted(status for status, _ in answers) == [429, 504, 504, 504]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stream": True}, "stream"),
        ({"max_tokens": 100_000}, "max_tokens"),
        ({"n": 2}, "n: "),
        ({"messages": [{"role": "user", "content": "no picture"}]}, "needs a picture"),
        ({"messages": []}, "messages"),
        (
            {"messages": [{"role": "user", "content": [
                {"type": "image_url", "image_url": {"url": "http://169.254.169.254/latest"}}]}]},
            "nothing is fetched",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_answered_is_one_line(fields, message):
    async def use(session: ClientSession) -> Any:
        return await post(session, **fields)

    status, text = asyncio.run(served(StandIn(), use))
    assert status == 400
    assert message in text
