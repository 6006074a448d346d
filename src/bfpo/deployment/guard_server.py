"""A server of the OpenAI chat protocol for a model behind a guard: nothing is sent before the guard lets it pass."""

import asyncio
import signal
import socket
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

from bfpo.core.terminal import say, warn
from bfpo.deployment.chat_replies import END, OUTCOME_HEADER, Replies, event, message_of
from bfpo.deployment.chat_requests import ChatRequest, RefusedRequest, read_request
from bfpo.deployment.guarded_model import GuardedAnswer, GuardedModel

if TYPE_CHECKING:
    from fastapi import FastAPI

# A longer request isn't a conversation.
_MAX_BYTES = 8_000_000
# Time after which a client may ask a busy server again, in seconds.
_RETRY_AFTER = "2"


class _Desk:
    """Where requests wait until the model is free.

    Args:
        model: The model.
        concurrency: Maximum number of requests that are answered at the same time.
        max_waiting: Maximum number of further requests that wait.
    """

    def __init__(self, model: GuardedModel, *, concurrency: int, max_waiting: int) -> None:
        self._model, self._limit = model, concurrency + max_waiting
        self._free = asyncio.Semaphore(concurrency)
        self.pending = 0

    async def answer(
        self, request: ChatRequest, has_left: Callable[[], Awaitable[bool]]
    ) -> AsyncIterator[GuardedAnswer | RefusedRequest]:
        """Yield what passes of an answer, the whole answer last; an error comes in its place.

        The model works in a thread, which nobody can interrupt: its place is free when it has ended, also if the
        client leaves meanwhile. A client that leaves before is not answered.
        """
        if self.pending >= self._limit:
            yield RefusedRequest(
                f"{self.pending} requests are waiting; ask again later", status=503, code="too_many_requests"
            )
            return
        self.pending += 1
        try:
            await self._free.acquire()
        except asyncio.CancelledError:
            self.pending -= 1
            raise
        if await has_left():
            self._leave()
            yield RefusedRequest("the client has left", status=499)
            return
        loop = asyncio.get_running_loop()
        parts: asyncio.Queue[GuardedAnswer | RefusedRequest | None] = asyncio.Queue()

        def put(part: GuardedAnswer | RefusedRequest | None) -> None:
            # After the end of the loop nobody waits for it.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(parts.put_nowait, part)

        def work() -> None:
            try:
                put(self._model.answer(request, put))
            except RefusedRequest as error:
                put(error)
            # Not narrower: whatever fails, the client gets an answer, and the server goes on.
            except Exception as error:
                _report(error)
                put(RefusedRequest("internal error", status=500, code="internal_error"))
            finally:
                put(None)
                with suppress(RuntimeError):
                    loop.call_soon_threadsafe(self._leave)

        Thread(target=work, daemon=True).start()
        while (part := await parts.get()) is not None:
            yield part

    def _leave(self) -> None:
        self.pending -= 1
        self._free.release()


def _report(error: Exception) -> None:
    """Print where an unexpected error was raised, without its message, which may contain texts of requests."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    warn(f"a request failed: {type(error).__name__} in {Path(frame.filename).name}, line {frame.lineno}")


def build_app(model: GuardedModel, *, concurrency: int, max_waiting: int, max_new_tokens: int) -> "FastAPI":
    """Return the web application.

    Args:
        model: The model.
        concurrency: Maximum number of requests that are answered at the same time.
        max_waiting: Maximum number of further requests that wait; others get HTTP 503.
        max_new_tokens: Maximum length of an answer if the request has none, in tokens.
    """
    from fastapi import FastAPI, Request, Response
    from fastapi.responses import JSONResponse, StreamingResponse
    from starlette.exceptions import HTTPException

    app = FastAPI(openapi_url=None)
    desk = _Desk(model, concurrency=concurrency, max_waiting=max_waiting)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", **model.health(), "pending": desk.pending}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        entry = {"id": model.name, "object": "model", "created": 0, "owned_by": "bfpo"}
        return {"object": "list", "data": [entry]}

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        content = b""
        async for piece in request.stream():
            content += piece
            if len(content) > _MAX_BYTES:
                raise RefusedRequest(f"the body has more than {_MAX_BYTES:,} bytes", status=413)
        asked = read_request(content, model=model.name, max_new_tokens=max_new_tokens)
        parts = desk.answer(asked, request.is_disconnected)
        # The first part decides about the status, so it is waited for.
        first = await anext(parts)
        if isinstance(first, RefusedRequest):
            raise first
        replies = Replies(model.name)
        if asked.streams:
            return StreamingResponse(_stream(first, parts, asked, replies), media_type="text/event-stream")
        return JSONResponse(replies.whole(first), headers={OUTCOME_HEADER: first.outcome})

    @app.exception_handler(RefusedRequest)
    async def refuse(request: Request, error: RefusedRequest) -> Response:
        headers = {"Retry-After": _RETRY_AFTER} if error.status == 503 else None
        return JSONResponse(error.to_row(), status_code=error.status, headers=headers)

    @app.exception_handler(HTTPException)
    async def not_found(request: Request, error: HTTPException) -> Response:
        row = RefusedRequest(
            f"{error.detail}: {request.method} {request.url.path}", status=error.status_code
        ).to_row()
        return JSONResponse(row, status_code=error.status_code)

    return app


async def _stream(
    first: GuardedAnswer, parts: AsyncIterator[GuardedAnswer | RefusedRequest], asked: ChatRequest, replies: Replies
) -> AsyncIterator[str]:
    """Yield the events of an answer: what is new in each part, and at last how it ended."""
    yield replies.chunk(message_of(first))
    shown, answer = first.text, first
    async for part in parts:
        if isinstance(part, RefusedRequest):
            yield event(part.to_row())
            return
        if not part.text.startswith(shown):
            # What was sent can't be taken back.
            yield event(RefusedRequest("the answer changed while it was sent", status=500).to_row())
            return
        if new := part.text.removeprefix(shown):
            yield replies.chunk({"content": new})
        shown, answer = part.text, part
    yield replies.chunk({}, answer)
    if asked.includes_usage:
        yield replies.usage(answer)
    yield END


def serve_guarded(
    model: GuardedModel, listening: socket.socket, *, concurrency: int, max_waiting: int, max_new_tokens: int
) -> None:
    """Serve a model behind a guard until SIGINT or SIGTERM, and print what the guard did.

    Args:
        model: The model.
        listening: Socket that listens; it is closed.
        concurrency: Maximum number of requests that are answered at the same time, for a model on a server.
        max_waiting: Maximum number of further requests that wait.
        max_new_tokens: Maximum length of an answer if the request has none, in tokens.
    """
    import uvicorn

    app = build_app(model, concurrency=concurrency, max_waiting=max_waiting, max_new_tokens=max_new_tokens)
    host, port = listening.getsockname()[:2]
    # uvicorn raises the signal again when it has ended: SIGTERM would end this process before the summary.
    former = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        say(f"{model.name} at http://{host}:{port}/v1 behind a guard; Ctrl-C stops")
        uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False)).run(sockets=[listening])
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGTERM, former)
        listening.close()
        model.show_summary()
