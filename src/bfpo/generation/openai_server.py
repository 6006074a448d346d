"""The `openai` engine: a model on any server of the OpenAI chat protocol (vLLM, `transformers serve`, hosted ones).

Responses aren't trusted: one that is late, truncated, empty or of another schema is counted as a fault and retried a
limited number of times. An answer that the server's filter removed, or a refusal that it reports, is a completion
with its own finish reason; reasoning without an answer and tool calls are completions, too. `transformers serve`
(5.23) samples only if the checkpoint's generation config sets `do_sample`, and uses one seed for all concurrent
requests: identical samples stop a run.
"""

import asyncio
import json
import os
import random
import time
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from itertools import islice
from threading import Event, Lock, Thread
from typing import Any

import httpx2 as httpx

from bfpo.core.files import content_hash
from bfpo.core.samples import Completion, Key, Prompt, Sampling
from bfpo.core.terminal import say, warn
from bfpo.errors import ModelError, Unanswered
from bfpo.generation.identical_samples import IdenticalSamples
from bfpo.generation.model_text import read_parts_in_text
from bfpo.generation.server_replies import MalformedReply, Reply, ServerError, read_error, read_reply
from bfpo.generation.server_requests import OPTIONAL_KEYS, make_body

KEY_VARIABLE = "OPENAI_API_KEY"
# A longer response isn't a completion.
_MAX_BYTES = 8_000_000
_RETRIED = (408, 409, 425, 429)
# With this many failures, and more than half of all requests, the rest isn't sent.
_MAX_FAILURES = 20
# With this many refusals of one reason before any answer, the rest isn't sent: it isn't about the prompts.
_MAX_EQUAL_REFUSALS = 5
# Longest pause that a server's Retry-After can request, in seconds.
_MAX_PAUSE = 300.0
# Time to wait for the list of a server's models, in seconds.
_LIST_TIMEOUT = 5.0
# Shortest pause that is announced, in seconds.
_ANNOUNCED_PAUSE = 5.0


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """Address of a server, and how it is queried.

    Args:
        url: Address up to and including `/v1`, such as `http://localhost:8000/v1`.
        model: Name of the model on the server.
        concurrency: Maximum number of concurrent requests.
        timeout: Maximum time for one completion, in seconds.
        tries: Maximum number of requests for one completion.
        backoff: Delay before the second try, in seconds; doubled for each further try, with jitter, at most 60.
        key_variable: Environment variable that holds the server's key; a server without keys needs none.

    Raises:
        ModelError: If the address isn't http(s) or contains a key, or a number is out of its range.
    """

    url: str
    model: str
    concurrency: int = 8
    timeout: float = 120.0
    tries: int = 6
    backoff: float = 1.0
    key_variable: str = KEY_VARIABLE

    def __post_init__(self) -> None:
        try:
            url = httpx.URL(self.url)
        except httpx.InvalidURL:
            raise ModelError("server: not an address; expected http://host:port/v1") from None
        if url.userinfo or url.query:
            # The address isn't shown, because it may contain a secret.
            raise ModelError(f"server: the address contains a key; remove it and set {self.key_variable}")
        if url.scheme not in ("http", "https") or not url.host:
            raise ModelError(f"server is '{self.url}'; expected http://host:port/v1")
        for name, is_valid, allowed in (
            ("concurrency", self.concurrency >= 1, "at least 1"),
            ("timeout", self.timeout > 0, "more than 0"),
            ("tries", self.tries >= 1, "at least 1"),
            ("backoff", self.backoff >= 0, "at least 0"),
        ):
            if not is_valid:
                raise ModelError(f"{name} is {getattr(self, name)}; expected {allowed}")


@dataclass(slots=True)
class _SharedState:
    """State that all threads share.

    Args:
        not_before: When the next request may be sent.
        faults: Faults so far.
        has_answered: Whether the server has answered any request.
        refused_parameters: Parameters and keys of messages that the server doesn't accept.
        unread: Fields of its replies that aren't read.
    """

    not_before: float = 0.0
    faults: Counter[str] = field(default_factory=Counter)
    has_answered: bool = False
    refused_parameters: set[str] = field(default_factory=set)
    unread: set[str] = field(default_factory=set)
    lock: Lock = field(default_factory=Lock)
    stopped: Event = field(default_factory=Event)


class _Retry(Exception):
    """The request failed and may succeed later.

    Args:
        reason: Kind of the fault.
        after: Delay that the server requests, in seconds.
        message: Message of the server.
    """

    def __init__(self, reason: str, after: float | None = None, message: str = "") -> None:
        super().__init__(reason)
        self.after, self.message = after, message


class _Refused(Exception):
    """The server refuses the prompt, and would refuse it again."""


class _RefusedParameter(Exception):
    """The server doesn't accept a parameter that isn't needed: the request is sent without it."""


@dataclass(frozen=True, slots=True)
class _Connection:
    """HTTP client, and the event loop that it runs in; only an event loop can limit the time of a whole response."""

    client: httpx.AsyncClient
    loop: asyncio.AbstractEventLoop
    api_key: str


class ServerEngine:
    """Engine that queries a server, several requests at a time; see `Engine`.

    Args:
        options: Address of the server, and how it is queried.
        sampling: Sampling of the completions; the server applies its own template and settings too.
        transport: Transport of the HTTP client; None is the network.
    """

    name = "openai"

    def __init__(
        self, options: ServerOptions, sampling: Sampling, *, transport: httpx.AsyncBaseTransport | None = None
    ) -> None:
        self.options, self.sampling, self._transport = options, sampling, transport
        self._state = _SharedState()

    @property
    def settings_hash(self) -> str:
        """Hash of address, model name and sampling; it doesn't cover the weights behind that name."""
        sampling = self.sampling
        settings = (sampling.temperature, sampling.top_p, sampling.max_new_tokens, sampling.seed)
        return content_hash(self.name, self.options.url.rstrip("/"), self.options.model, settings)

    @property
    def faults(self) -> Counter[str]:
        """Number of faults by kind; see `Engine`."""
        return self._state.faults

    def with_sampling(self, sampling: Sampling) -> "ServerEngine":
        """Return an engine of the same server that samples differently; the two may run at the same time.

        What is known of the server is shared: its faults, and what it doesn't accept.
        """
        resampled = ServerEngine(self.options, sampling, transport=self._transport)
        resampled._state = replace(self._state, stopped=Event())
        return resampled

    def generate(self, requests: Sequence[tuple[Prompt, int]]) -> Iterator[list[Completion]]:
        """Answer prompts, in batches as responses arrive; see `Engine`.

        Raises:
            ModelError: If the server can't be reached, refuses the key or the model, or returns identical samples.
            Unanswered: At the end, if some completions are missing; the others were yielded.
        """
        identical = IdenticalSamples(self.sampling, requests)
        failed: dict[Key, str] = {}
        refused: dict[Key, str] = {}
        answered: set[Key] = set()
        rest = "not requested, because most requests failed"
        # Closed on any exit, also when the caller stops: no thread waits for a retry that isn't needed any more.
        with closing(self._run(requests)) as finished:
            for done in finished:
                batch = []
                for key, future in done:
                    try:
                        batch.append(future.result())
                        answered.add(key)
                    except (_Retry, _Refused) as error:
                        failed[key] = str(error)
                        if isinstance(error, _Refused):
                            refused[key] = str(error)
                if batch:
                    self._state.has_answered = True
                    yield batch
                    identical.add(batch)
                if not self._state.has_answered and any(
                    count >= _MAX_EQUAL_REFUSALS for count in Counter(refused.values()).values()
                ):
                    rest = "not requested, because the server refused the first requests for one reason"
                    break
                if len(failed) >= _MAX_FAILURES and len(failed) > len(requests) // 2:
                    break
        identical.warn()
        if failed:
            keys = [(prompt.prompt_id, sample) for prompt, sample in requests]
            not_requested = [key for key in keys if key not in answered and key not in failed]
            failed |= dict.fromkeys(not_requested, rest)
            raise Unanswered(failed, len(requests), refused=refused, not_requested=not_requested)

    def _run(
        self, requests: Sequence[tuple[Prompt, int]]
    ) -> Generator[list[tuple[Key, Future[Completion]]], None, None]:
        """Send the requests from a pool of threads; yield those that are done."""
        self._state.stopped.clear()
        with self._connect() as connection, ThreadPoolExecutor(self.options.concurrency) as pool:
            waiting = iter(requests)
            running: dict[Future[Completion], Key] = {}
            try:
                while True:
                    for prompt, sample in islice(waiting, 2 * self.options.concurrency - len(running)):
                        running[pool.submit(self._answer, connection, prompt, sample)] = (prompt.prompt_id, sample)
                    if not running:
                        break
                    done, _ = wait(running, return_when=FIRST_COMPLETED)
                    yield [(running.pop(future), future) for future in done]
            finally:
                self._state.stopped.set()
                pool.shutdown(cancel_futures=True)

    @contextmanager
    def _connect(self) -> Iterator[_Connection]:
        """Yield a client in an event loop of its own, which runs in a thread."""
        api_key = _read_api_key(self.options.key_variable)
        client = httpx.AsyncClient(
            transport=self._transport,
            timeout=None,  # `_post` limits the whole response.
            headers=_headers(api_key),
            limits=httpx.Limits(max_connections=self.options.concurrency),
        )
        loop = asyncio.new_event_loop()
        thread = Thread(target=loop.run_forever, daemon=True)
        thread.start()
        try:
            yield _Connection(client, loop, api_key)
        finally:
            asyncio.run_coroutine_threadsafe(client.aclose(), loop).result()
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()

    def _answer(self, connection: _Connection, prompt: Prompt, sample: int) -> Completion:
        number = 1
        while True:
            self._wait_until(self._state.not_before)
            try:
                return self._make_completion(prompt, sample, self._send(connection, prompt, sample))
            except _RefusedParameter:
                # Not a failed try: the next request is another one.
                continue
            except _Retry as error:
                with self._state.lock:
                    self._state.faults[str(error)] += 1
                if number == self.options.tries:
                    reason = f"{error}: {error.message}" if error.message else str(error)
                    raise _Retry(f"{reason} ({number} tries)") from None
                # Jitter spreads requests that failed together.
                delay = min(60.0, self.options.backoff * 2 ** (number - 1)) * random.uniform(0.5, 1.0)
                if error.after is not None:
                    self._pause(error.after, str(error))
                self._wait_until(time.monotonic() + delay)
                number += 1

    def _pause(self, seconds: float, reason: str) -> None:
        """Delay all requests, and print a line about a long delay."""
        moment = time.monotonic() + min(seconds, _MAX_PAUSE)
        with self._state.lock:
            # Concurrent requests get the same pause: one line is enough.
            is_longer = moment - max(self._state.not_before, time.monotonic()) >= _ANNOUNCED_PAUSE
            self._state.not_before = max(self._state.not_before, moment)
        if is_longer:
            limit = "" if seconds <= _MAX_PAUSE else f", of the {seconds:,.0f} s that it asks for"
            say(f"{reason}: the server asks for a pause; waiting {min(seconds, _MAX_PAUSE):,.0f} s{limit}")

    def _wait_until(self, moment: float) -> None:
        if (seconds := moment - time.monotonic()) > 0:
            self._state.stopped.wait(seconds)
        if self._state.stopped.is_set():
            raise _Retry("stopped")

    def _send(self, connection: _Connection, prompt: Prompt, sample: int) -> Reply:
        """Send a request, and return the server's answer."""
        without = frozenset(self._state.refused_parameters)
        body = make_body(self.options.model, prompt, sample, self.sampling, without)
        post = asyncio.run_coroutine_threadsafe(self._post(connection.client, body), connection.loop)
        try:
            response, content = post.result()
        except (TimeoutError, httpx.TimeoutException):
            raise _Retry("too slow") from None
        except httpx.HTTPError as error:
            raise _Retry(f"connection: {type(error).__name__}") from None
        if response.status_code != 200:
            return self._read_failure(response, read_error(content, connection.api_key), body)
        try:
            parsed = json.loads(content)
        except (ValueError, RecursionError):
            raise _Retry("not JSON" if content.strip() else "nothing") from None
        try:
            return read_reply(parsed)
        except MalformedReply as error:
            raise _Retry(str(error), message=read_error(content, connection.api_key).message) from None

    async def _post(self, client: httpx.AsyncClient, body: dict[str, Any]) -> tuple[httpx.Response, bytes]:
        url, content = f"{self.options.url.rstrip('/')}/chat/completions", b""
        async with asyncio.timeout(self.options.timeout), client.stream("POST", url, json=body) as response:
            async for piece in response.aiter_bytes():
                content += piece
                if len(content) > _MAX_BYTES:
                    raise _Retry("too long")
        return response, content

    def _read_failure(self, response: httpx.Response, error: ServerError, body: dict[str, Any]) -> Reply:
        """Return the answer that a status other than 200 stands for, if a filter blocked it; otherwise raise."""
        status = response.status_code
        if 400 <= status < 500 and error.is_filter:
            return Reply("", "filtered")
        where = f"{self.options.url} (model {self.options.model})"
        if status in (401, 403):
            # Servers repeat parts of a wrong key here.
            raise ModelError(f"{where}: HTTP {status}; is the key in {self.options.key_variable} right?")
        message = f": {error.message}" if error.message else ""
        if status in (404, 405) or 300 <= status < 400:
            raise ModelError(
                f"{where}: HTTP {status}{message}; is the address right, with /v1, and the model's name?"
            )
        if status in _RETRIED or status >= 500:
            raise _Retry(f"HTTP {status}", _retry_after(response.headers.get("retry-after")), error.message)
        sent = body.keys() | {key for message in body["messages"] for key in message}
        for name in OPTIONAL_KEYS:
            if name in sent and error.refuses(name, sent):
                self._omit(name)
                raise _RefusedParameter
        raise _Refused(f"HTTP {status}{message or '; is the prompt too long for the model?'}")

    def _omit(self, parameter: str) -> None:
        """Send further requests without a parameter, and print a line about it once."""
        with self._state.lock:
            is_new = parameter not in self._state.refused_parameters
            self._state.refused_parameters.add(parameter)
        if is_new:
            say(f"note: the server doesn't accept `{parameter}`; {OPTIONAL_KEYS[parameter]}")

    def _make_completion(self, prompt: Prompt, sample: int, reply: Reply) -> Completion:
        # The server would return the same texts again.
        repaired = reply.without_lone_surrogates()
        with self._state.lock:
            if repaired != reply:
                self._state.faults["lone surrogate, replaced"] += 1
            unread = set(reply.unread) - self._state.unread
            self._state.unread |= unread
        if unread:
            say(f"note: fields of the server's replies that aren't read: {', '.join(sorted(unread))}")
        completion = Completion.on(
            prompt,
            sample,
            text=repaired.text,
            finish_reason=reply.finish_reason,
            prompt_tokens=reply.prompt_tokens,
            completion_tokens=reply.completion_tokens,
            model=self.options.model,
            engine=self.name,
            settings_hash=self.settings_hash,
            reasoning=repaired.reasoning,
            tool_calls=repaired.tool_calls,
        )
        return read_parts_in_text(completion)


def warn_of_missing_model(options: ServerOptions) -> None:
    """Warn if a server doesn't answer, or lists models without the one that will be asked.

    It isn't an error: the server may start later, or answer to names that it doesn't list.
    """
    headers = _headers(_read_api_key(options.key_variable))
    try:
        response = httpx.get(f"{options.url}/models", headers=headers, timeout=_LIST_TIMEOUT)
        names = [str(model["id"]) for model in response.raise_for_status().json()["data"]]
    except httpx.TransportError as error:
        warn(f"{options.url} doesn't answer ({type(error).__name__}); requests fail until it does")
    except (httpx.HTTPError, ValueError, LookupError, TypeError):
        # It has no such list.
        return
    else:
        if options.model not in names:
            warn(f"{options.url} lists {', '.join(names[:5]) or 'no model'}, and not '{options.model}'")


def _headers(api_key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}


def _read_api_key(variable: str) -> str:
    """Return the server's key from the environment; no message may show it.

    Raises:
        ModelError: If it contains a character that isn't allowed in a header.
    """
    key = os.environ.get(variable, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise ModelError(
            f"the key in {variable} contains a character that isn't allowed in a key; was it copied whole?"
        )
    return key


def _retry_after(value: str | None) -> float | None:
    """Return the seconds of a Retry-After header, which may be a date; None if it is missing or malformed."""
    try:
        seconds = float(value or "")
    except ValueError:
        try:
            moment = parsedate_to_datetime(value or "")
            seconds = (moment.replace(tzinfo=moment.tzinfo or UTC) - datetime.now(UTC)).total_seconds()
        except (ValueError, TypeError, OverflowError):
            return None
    return max(seconds, 0.0) if seconds == seconds else None
