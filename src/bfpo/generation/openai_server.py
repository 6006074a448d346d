"""The `openai` engine: a model on any server of the OpenAI chat protocol (vLLM, `transformers serve`, hosted ones).

Responses aren't trusted: one that is late, truncated, empty or of another schema is counted as a fault and retried a
limited number of times. `transformers serve` (5.23) samples only if the checkpoint's generation config sets
`do_sample`, and uses one seed for all concurrent requests: identical samples stop a run.
"""

import json
import os
import random
import time
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from threading import Event, Lock
from typing import Any

import httpx2 as httpx

from bfpo.core.files import content_hash, replace_lone_surrogates
from bfpo.core.samples import Completion, Key, Prompt, Sampling, sample_seed
from bfpo.errors import ModelError, Unanswered
from bfpo.generation.identical_samples import IdenticalSamples

KEY_VARIABLE = "OPENAI_API_KEY"
# A longer response isn't a completion.
_MAX_BYTES = 8_000_000
_RETRIED = (408, 409, 425, 429)
# With this many failures, and more than half of all requests, the rest isn't sent.
_MAX_FAILURES = 20


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
    """State that all threads share: when the next request may be sent, and the faults so far."""

    not_before: float = 0.0
    faults: Counter[str] = field(default_factory=Counter)
    lock: Lock = field(default_factory=Lock)
    stopped: Event = field(default_factory=Event)


class _Retry(Exception):
    """The request failed and may succeed later.

    Args:
        reason: Kind of the fault.
        after: Delay that the server requests, in seconds.
    """

    def __init__(self, reason: str, after: float | None = None) -> None:
        super().__init__(reason)
        self.after = after


class _Refused(Exception):
    """The server refuses the prompt, and would refuse it again."""


class ServerEngine:
    """Engine that queries a server, several requests at a time; see `Engine`.

    Args:
        options: Address of the server, and how it is queried.
        sampling: Sampling of the completions; the server applies its own template and settings too.
        transport: Transport of the HTTP client; None is the network.
    """

    name = "openai"

    def __init__(
        self, options: ServerOptions, sampling: Sampling, *, transport: httpx.BaseTransport | None = None
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

    def generate(self, requests: Sequence[tuple[Prompt, int]]) -> Iterator[list[Completion]]:
        """Answer prompts, in batches as responses arrive; see `Engine`.

        Raises:
            ModelError: If the server can't be reached, refuses the key or the model, or returns identical samples.
            Unanswered: At the end, if some completions are missing; the others were yielded.
        """
        identical = IdenticalSamples(self.sampling, requests)
        failed: dict[Key, str] = {}
        refused: set[Key] = set()
        answered: set[Key] = set()
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
                            refused.add(key)
                if batch:
                    yield batch
                    identical.add(batch)
                if len(failed) >= _MAX_FAILURES and len(failed) > len(requests) // 2:
                    break
        identical.warn()
        if failed:
            for prompt, sample in requests:
                if (key := (prompt.prompt_id, sample)) not in answered:
                    failed.setdefault(key, "not requested, because most requests failed")
            raise Unanswered(failed, len(requests), refused=refused)

    def _run(
        self, requests: Sequence[tuple[Prompt, int]]
    ) -> Generator[list[tuple[Key, Future[Completion]]], None, None]:
        """Send the requests from a pool of threads; yield those that are done."""
        api_key = _read_api_key(self.options.key_variable)
        self._state.stopped.clear()
        with (
            httpx.Client(
                transport=self._transport,
                timeout=self.options.timeout,
                headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
                limits=httpx.Limits(max_connections=self.options.concurrency),
            ) as client,
            ThreadPoolExecutor(self.options.concurrency) as pool,
        ):
            waiting = iter(requests)
            running: dict[Future[Completion], Key] = {}
            try:
                while True:
                    for prompt, sample in islice(waiting, 2 * self.options.concurrency - len(running)):
                        running[pool.submit(self._answer, client, prompt, sample)] = (prompt.prompt_id, sample)
                    if not running:
                        break
                    done, _ = wait(running, return_when=FIRST_COMPLETED)
                    yield [(running.pop(future), future) for future in done]
            finally:
                self._state.stopped.set()
                pool.shutdown(cancel_futures=True)

    def _answer(self, client: httpx.Client, prompt: Prompt, sample: int) -> Completion:
        for number in range(1, self.options.tries + 1):
            self._wait_until(self._state.not_before)
            try:
                return self._parse_completion(prompt, sample, self._send(client, prompt, sample))
            except _Retry as error:
                with self._state.lock:
                    self._state.faults[str(error)] += 1
                if number == self.options.tries:
                    raise _Retry(f"{error} ({number} tries)") from None
                # Jitter spreads requests that failed together.
                delay = min(60.0, self.options.backoff * 2 ** (number - 1)) * random.uniform(0.5, 1.0)
                if error.after is not None:
                    with self._state.lock:
                        self._state.not_before = max(self._state.not_before, time.monotonic() + error.after)
                self._wait_until(time.monotonic() + delay)
        raise AssertionError("unreachable")

    def _wait_until(self, moment: float) -> None:
        if (seconds := moment - time.monotonic()) > 0:
            self._state.stopped.wait(seconds)
        if self._state.stopped.is_set():
            raise _Retry("stopped")

    def _send(self, client: httpx.Client, prompt: Prompt, sample: int) -> Any:
        """Return the JSON content of the server's response."""
        sampling, started = self.sampling, time.monotonic()
        body = {
            "model": self.options.model,
            "messages": [message._asdict() for message in prompt.prompt],
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_new_tokens,
            # 31 bits: servers store it in a signed int.
            "seed": sample_seed(sampling.seed, prompt.prompt_id, sample) % 2**31,
        }
        content = b""
        try:
            with client.stream("POST", f"{self.options.url.rstrip('/')}/chat/completions", json=body) as response:
                for piece in response.iter_bytes():
                    content += piece
                    # The client's timeout applies between two pieces: a slow server could send small ones forever.
                    if time.monotonic() - started > self.options.timeout:
                        raise _Retry("too slow")
                    if len(content) > _MAX_BYTES:
                        raise _Retry("too long")
        except httpx.TimeoutException:
            raise _Retry("too slow") from None
        except httpx.HTTPError as error:
            raise _Retry(f"connection: {type(error).__name__}") from None
        self._check_status(response)
        try:
            return json.loads(content)
        except (ValueError, RecursionError):
            raise _Retry("not JSON" if content.strip() else "nothing") from None

    def _check_status(self, response: httpx.Response) -> None:
        status = response.status_code
        if status == 200:
            return
        where = f"{self.options.url} (model {self.options.model})"
        # The body of an error may repeat the request and its headers, so only the status is shown.
        if status in (401, 403):
            raise ModelError(f"{where}: HTTP {status}; is the key in {self.options.key_variable} right?")
        if status in (404, 405) or 300 <= status < 400:
            raise ModelError(f"{where}: HTTP {status}; is the address right, with /v1, and the model's name?")
        if status in _RETRIED or status >= 500:
            raise _Retry(f"HTTP {status}", _retry_after(response.headers.get("retry-after")))
        raise _Refused(f"HTTP {status}; is the prompt too long for the model?")

    def _parse_completion(self, prompt: Prompt, sample: int, content: Any) -> Completion:
        try:
            choice = content["choices"][0]
            text, reason = choice["message"]["content"], choice["finish_reason"]
            usage = content.get("usage") or {}
            prompt_tokens = int(usage.get("prompt_tokens") or 0)
            completion_tokens = int(usage.get("completion_tokens") or 0)
        except (TypeError, LookupError, ValueError, OverflowError, AttributeError):
            raise _Retry("wrong schema") from None
        if not isinstance(text, str) or reason not in ("stop", "length"):
            raise _Retry("wrong schema")
        # A lone surrogate can't be written to a file. The server would return the same text again.
        repaired = replace_lone_surrogates(text)
        if repaired != text:
            with self._state.lock:
                self._state.faults["lone surrogate, replaced"] += 1
        return Completion(
            prompt_id=prompt.prompt_id,
            sample=sample,
            prompt=prompt.prompt,
            text=repaired,
            finish_reason=reason,
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            model=self.options.model,
            engine=self.name,
            settings_hash=self.settings_hash,
        )


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
    """Return the seconds of a Retry-After header; None for a date or a malformed value."""
    try:
        seconds = float(value or "")
    except ValueError:
        return None
    return min(max(seconds, 0.0), 300.0) if seconds == seconds else None
