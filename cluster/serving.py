"""`isthmus serve`: an exported model behind the chat interface of OpenAI's clients, pictures included.

One process, one model. Requests that arrive together and want the same decoding run as one batch. Pictures come inside
the request (`data:` URLs): nothing is fetched, so a request cannot make the server open an address.
"""

import asyncio
import base64
import binascii
import hmac
import logging
import time
import uuid
from dataclasses import dataclass
from typing import Any, Protocol

from aiohttp import web
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from isthmus.data_pipeline.errors import BadSample
from isthmus.model.decoding import Decoding
from isthmus.model.errors import ModelError
from isthmus.model.generate import QUESTION

logger = logging.getLogger(__name__)
MAX_BODY_BYTES = 32 << 20
MAX_NEW_TOKENS = 256


class ImageUrl(BaseModel):
    """A picture as a `data:` URL."""

    url: str


class Content(BaseModel):
    """One part of a message."""

    type: str
    text: str | None = None
    image_url: ImageUrl | None = None


class Message(BaseModel):
    """One message of the conversation; only the last one of the user is read."""

    role: str
    content: str | list[Content]


class ChatRequest(BaseModel):
    """The fields of a chat completion request that are used; clients may send others."""

    model_config = ConfigDict(extra="ignore")
    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1, le=MAX_NEW_TOKENS)
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_NEW_TOKENS)
    temperature: float = Field(0.0, ge=0.0, le=2.0)
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    seed: int = 0
    n: int = Field(1, ge=1, le=1)
    stream: bool = False

    def decoding(self) -> Decoding:
        """Return how text is chosen: beams at temperature 0, else sampling."""
        tokens = self.max_completion_tokens or self.max_tokens or Decoding.max_new_tokens
        if self.temperature == 0:
            return Decoding(max_new_tokens=tokens)
        return Decoding(tokens, 1, sample=True, temperature=self.temperature, top_p=self.top_p, seed=self.seed)


class Writer(Protocol):
    """What answers: `cluster.captioner.Captioner`."""

    def write(self, images: list[bytes], prompts: list[str | None], decoding: Decoding) -> list[str]:
        """Return one text per picture."""
        ...


@dataclass
class _Job:
    image: bytes
    prompt: str | None
    decoding: Decoding
    answer: asyncio.Future[str]


class Refused(Exception):
    """A request that cannot be answered, with its HTTP status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Server:
    """The HTTP interface over one model.

    Args:
        writer: The model.
        name: What the interface calls it.
        token: What clients must send as their API key; None means no authentication.
        max_batch: Largest number of requests in a batch.
        max_waiting: Requests that may wait; further ones are rejected (429).
        timeout_seconds: Longest time from request to answer.
    """

    def __init__(
        self,
        writer: Writer,
        name: str,
        *,
        token: str | None = None,
        max_batch: int = 8,
        max_waiting: int = 64,
        timeout_seconds: float = 120.0,
    ) -> None:
        self._writer, self._name, self._token = writer, name, token
        self._max_batch, self._timeout = max_batch, timeout_seconds
        self._waiting: asyncio.Queue[_Job] = asyncio.Queue(max_waiting)

    def app(self) -> web.Application:
        """Return the application, which runs the model in a thread while it serves."""
        app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=[self._guard])
        app.router.add_get("/health", self._health)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/chat/completions", self._chat)
        app.cleanup_ctx.append(self._working)
        return app

    @web.middleware
    async def _guard(self, request: web.Request, handler: Any) -> web.StreamResponse:
        """Check the token and turn every refusal into the interface's error object."""
        try:
            if request.path != "/health" and not self._is_authorised(request):
                raise Refused(401, "the API key is not the server's token")
            response: web.StreamResponse = await handler(request)
        except Refused as error:
            return _error(error.status, str(error))
        except web.HTTPException as error:
            return _error(error.status, error.reason)
        except Exception:
            logger.exception("%s %s", request.method, request.path)
            return _error(500, "the server failed; its log says why")
        return response

    def _is_authorised(self, request: web.Request) -> bool:
        given = request.headers.get("Authorization", "").removeprefix("Bearer ")
        return not self._token or hmac.compare_digest(given.encode(errors="replace"), self._token.encode())

    async def _health(self, _request: web.Request) -> web.Response:
        return web.json_response({"status": "ok", "waiting": self._waiting.qsize()})

    async def _models(self, _request: web.Request) -> web.Response:
        model = {"id": self._name, "object": "model", "created": 0, "owned_by": "isthmus"}
        return web.json_response({"object": "list", "data": [model]})

    async def _chat(self, request: web.Request) -> web.Response:
        try:
            chat = ChatRequest.model_validate_json(await request.read())
        except ValidationError as error:
            first = error.errors()[0]
            raise Refused(400, f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
        if chat.stream:
            raise Refused(400, "stream: answers are sent whole; set it to false")
        text = await self._answer(chat)
        return web.json_response(_completion(self._name, text))

    async def _answer(self, chat: ChatRequest) -> str:
        image, question = _picture_and_question(chat.messages)
        prompt = QUESTION.format(question) if question else None
        job = _Job(image, prompt, chat.decoding(), asyncio.get_running_loop().create_future())
        try:
            self._waiting.put_nowait(job)
        except asyncio.QueueFull as error:
            raise Refused(429, "too many requests are waiting; try again later") from error
        try:
            return await asyncio.wait_for(job.answer, self._timeout)
        except TimeoutError as error:
            raise Refused(504, f"no response within {self._timeout:.0f} s") from error
        except BadSample as error:
            raise Refused(400, f"the picture cannot be used: {error}") from error
        except ModelError as error:
            raise Refused(400, str(error)) from error

    async def _working(self, _app: web.Application) -> Any:
        task = asyncio.create_task(self._work())
        yield
        task.cancel()

    async def _work(self) -> None:
        """Run what waits, a batch at a time, until cancelled."""
        held: list[_Job] = []
        while True:
            held = held or [await self._waiting.get()]
            while not self._waiting.empty():
                held.append(self._waiting.get_nowait())
            batch = [job for job in held if job.decoding == held[0].decoding][: self._max_batch]
            held = [job for job in held if job not in batch]
            await self._run([job for job in batch if not job.answer.done()])

    async def _run(self, jobs: list[_Job]) -> None:
        """Answer the jobs of one batch; where it fails, each alone: a bad picture fails only its own request."""
        if not jobs:
            return
        images, prompts = [job.image for job in jobs], [job.prompt for job in jobs]
        try:
            texts = await asyncio.to_thread(self._writer.write, images, prompts, jobs[0].decoding)
        except Exception as error:  # noqa: BLE001 - every failure is the answer of its request
            if len(jobs) > 1:
                for job in jobs:
                    await self._run([job])
            elif not jobs[0].answer.done():
                jobs[0].answer.set_exception(error)
            return
        for job, text in zip(jobs, texts, strict=True):
            if not job.answer.done():
                job.answer.set_result(text)


def _picture_and_question(messages: list[Message]) -> tuple[bytes, str]:
    """Return the picture and the text of the last message of the user; of several pictures none can be asked about."""
    asked = [message for message in messages if message.role == "user"]
    if not asked or isinstance(asked[-1].content, str):
        raise Refused(400, "messages: the last one of the user needs a picture (type image_url)")
    parts = asked[-1].content
    urls = [part.image_url.url for part in parts if part.type == "image_url" and part.image_url]
    if len(urls) != 1:
        raise Refused(400, f"messages: {len(urls)} pictures; the model answers about exactly one")
    return _decoded(urls[0]), " ".join(part.text for part in parts if part.type == "text" and part.text).strip()


def _decoded(url: str) -> bytes:
    head, separator, data = url.partition(";base64,")
    if not head.startswith("data:image/") or not separator:
        raise Refused(400, "image_url: only data:image/...;base64,... is read; nothing is fetched")
    try:
        return base64.b64decode(data, validate=True)
    except binascii.Error as error:
        raise Refused(400, "image_url: not base64") from error


def _completion(model: str, text: str) -> dict[str, Any]:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [choice],
    }


def _error(status: int, message: str) -> web.Response:
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return web.json_response({"error": {"message": message, "type": kind, "code": status}}, status=status)
