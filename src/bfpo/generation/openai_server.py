"""The `openai` engine: asks any server of the OpenAI chat protocol (vLLM, `transformers serve`, hosted ones).

What a server says isn't trusted: an answer that is late, cut, empty or of another schema is asked for again, a few
times, and counted. `transformers serve` (5.23) samples only where the checkpoint's generation config says
`do_sample`, and sets one seed for all requests under way: identical samples stop a run.
"""

import json
import os
import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import islice
from threading import Event, Lock
from typing import Any

import httpx2 as httpx

from bfpo.core.files import content_hash, replace_lone_surrogates
from bfpo.core.samples import Completion, Key, Prompt, Sampling, sample_seed
from bfpo.errors import ModelError, Unanswered
from bfpo.generation.sameness import Sameness

KEY_VARIABLE = "OPENAI_API_KEY"
# An answer of more bytes isn't one.
_MOST_BYTES = 8_000_000
_RETRIED = (408, 409, 425, 429)


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """How a server is asked.

    Args:
        url: Up to and with `/v1`, such as `http://localhost:8000/v1`.
        model: The name that the server knows it by.
        concurrency: Requests under way at a time.
        timeout: Longest time for a whole answer, in seconds.
        tries: Requests for one completion at most.
        backoff: Seconds before the second try; doubled for every further one, with jitter, 60 at most.
        key_variable: Name of the environment variable with the key; a server without keys needs none.

    Raises:
        ModelError: If the address isn't http(s), holds a key, or a number is out of its range.
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
            raise ModelError("--server: not an address; expected http://host:port/v1") from None
        if url.userinfo or url.query:
            # The address itself isn't repeated: it holds what may be a secret.
            raise ModelError(f"--server: the address holds a key; leave it out and set {self.key_variable}")
        if url.scheme not in ("http", "https") or not url.host:
            raise ModelError(f"--server {self.url}: expected http://host:port/v1")
        for name, fine, allowed in (
            ("concurrency", self.concurrency >= 1, "at least 1"),
            ("timeout", self.timeout > 0, "more than 0"),
            ("tries", self.tries >= 1, "at least 1"),
            ("backoff", self.backoff >= 0, "at least 0"),
        ):
            if not fine:
                raise ModelError(f"{name} is {getattr(self, name)}; expected {allowed}")


@dataclass(slots=True)
class _Pace:
    """What all threads share: when the server may be asked again, and what went wrong."""

    not_before: float = 0.0
    faults: Counter[str] = field(default_factory=Counter)
    lock: Lock = field(default_factory=Lock)
    stopped: Event = field(default_factory=Event)


class _Retry(Exception):
    def __init__(self, why: str, after: float | None = None) -> None:
        super().__init__(why)
        self.after = after


class _Refused(Exception):
    """The server won't answer this prompt, however often it is asked."""


class ServerEngine:
    """Asks a server, several requests at a time; see `Engine`.

    Args:
        options: How to ask.
        sampling: How to sample; the server's template and its own settings come on top.
        transport: Of the client; default the network.
    """

    name = "openai"

    def __init__(
        self, options: ServerOptions, sampling: Sampling, *, transport: httpx.BaseTransport | None = None
    ) -> None:
        self.options, self.sampling, self._transport = options, sampling, transport
        self._pace = _Pace()

    @property
    def settings_hash(self) -> str:
        """Hash of address, model and sampling; what the server runs behind that name isn't known here."""
        sampling = self.sampling
        settings = (sampling.temperature, sampling.top_p, sampling.max_new_tokens, sampling.seed)
        return content_hash(self.name, self.options.url.rstrip("/"), self.options.model, settings)

    @property
    def faults(self) -> Counter[str]:
        """What went wrong, by kind; see `Engine`."""
        return self._pace.faults

    def generate(self, wanted: Sequence[tuple[Prompt, int]]) -> Iterator[list[Completion]]:
        """Answer prompts, as the answers come; see `Engine`.

        Raises:
            ModelError: If the server can't be reached or refuses the key or the model, or samples are all the same.
            Unanswered: At the end, if some completions could not be had; the others were handed over.
        """
        key = _key(self.options.key_variable)
        had: set[Key] = set()
        failed: dict[Key, str] = {}
        refused: set[Key] = set()
        same = Sameness(self.sampling, wanted)
        self._pace.stopped.clear()
        with (
            httpx.Client(
                transport=self._transport,
                timeout=self.options.timeout,
                headers={"Authorization": f"Bearer {key}"} if key else {},
                limits=httpx.Limits(max_connections=self.options.concurrency),
            ) as client,
            ThreadPoolExecutor(self.options.concurrency) as pool,
        ):
            waiting = iter(wanted)
            under_way: dict[Future[Completion], Key] = {}
            try:
                while True:
                    for prompt, sample in islice(waiting, 2 * self.options.concurrency - len(under_way)):
                        under_way[pool.submit(self._answer, client, prompt, sample)] = (prompt.prompt_id, sample)
                    if not under_way:
                        break
                    done, _ = wait(under_way, return_when=FIRST_COMPLETED)
                    batch = []
                    for future in done:
                        name = under_way.pop(future)
                        try:
                            batch.append(future.result())
                            had.add(name)
                        except (_Retry, _Refused) as error:
                            failed[name] = str(error)
                            if isinstance(error, _Refused):
                                refused.add(name)
                    if batch:
                        yield batch
                        same.advance(batch)
                    if len(failed) >= 20 and len(failed) > len(wanted) // 2:
                        break
            finally:
                # Also when the caller stops: nobody waits for a retry that isn't wanted any more.
                self._pace.stopped.set()
                pool.shutdown(cancel_futures=True)
        same.end()
        if failed:
            for prompt, sample in wanted:
                if (name := (prompt.prompt_id, sample)) not in had:
                    failed.setdefault(name, "not asked for: most had failed")
            raise Unanswered(failed, len(wanted), refused=refused)

    def _answer(self, client: httpx.Client, prompt: Prompt, sample: int) -> Completion:
        for number in range(1, self.options.tries + 1):
            self._wait_until(self._pace.not_before)
            try:
                return self._completion(prompt, sample, self._ask(client, prompt, sample))
            except _Retry as error:
                with self._pace.lock:
                    self._pace.faults[str(error)] += 1
                if number == self.options.tries:
                    raise _Retry(f"{error} ({number} tries)") from None
                # Jitter spreads requests that failed together.
                own = min(60.0, self.options.backoff * 2 ** (number - 1)) * random.uniform(0.5, 1.0)
                if error.after is not None:
                    with self._pace.lock:
                        self._pace.not_before = max(self._pace.not_before, time.monotonic() + error.after)
                self._wait_until(time.monotonic() + own)
        raise AssertionError("unreachable")

    def _wait_until(self, moment: float) -> None:
        if (left := moment - time.monotonic()) > 0:
            self._pace.stopped.wait(left)
        if self._pace.stopped.is_set():
            raise _Retry("stopped")

    def _ask(self, client: httpx.Client, prompt: Prompt, sample: int) -> Any:
        sampling, began = self.sampling, time.monotonic()
        body = {
            "model": self.options.model,
            "messages": [message._asdict() for message in prompt.prompt],
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_new_tokens,
            # 31 bits: servers keep it in a signed int.
            "seed": sample_seed(sampling.seed, prompt.prompt_id, sample) % 2**31,
        }
        content = b""
        try:
            with client.stream("POST", f"{self.options.url.rstrip('/')}/chat/completions", json=body) as response:
                for piece in response.iter_bytes():
                    content += piece
                    # The client's own time-out is between two pieces: a server may drip for ever.
                    if time.monotonic() - began > self.options.timeout:
                        raise _Retry("too slow")
                    if len(content) > _MOST_BYTES:
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
        # What a server says of an error may repeat the request and its headers: only the number is shown.
        if status in (401, 403):
            raise ModelError(f"{where}: HTTP {status}; is the key in {self.options.key_variable} right?")
        if status in (404, 405) or 300 <= status < 400:
            raise ModelError(f"{where}: HTTP {status}; is the address right, with /v1, and the model's name?")
        if status in _RETRIED or status >= 500:
            raise _Retry(f"HTTP {status}", _retry_after(response.headers.get("retry-after")))
        raise _Refused(f"HTTP {status}; is the prompt too long for the model?")

    def _completion(self, prompt: Prompt, sample: int, answer: Any) -> Completion:
        try:
            choice = answer["choices"][0]
            text, reason = choice["message"]["content"], choice["finish_reason"]
            usage = answer.get("usage") or {}
            tokens = int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0)
        except (TypeError, LookupError, ValueError, OverflowError, AttributeError):
            raise _Retry("wrong schema") from None
        if not isinstance(text, str) or reason not in ("stop", "length"):
            raise _Retry("wrong schema")
        # Half a character can't be written into a file. Asked again, the server would say the same.
        whole = replace_lone_surrogates(text)
        if whole != text:
            with self._pace.lock:
                self._pace.faults["half a character, replaced"] += 1
        return Completion(
            prompt_id=prompt.prompt_id,
            sample=sample,
            prompt=prompt.prompt,
            text=whole,
            finish_reason=reason,
            prompt_tokens=tokens[0],
            completion_tokens=tokens[1],
            model=self.options.model,
            engine=self.name,
            settings_hash=self.settings_hash,
        )


def _key(variable: str) -> str:
    """Return the key, which no message may show.

    Raises:
        ModelError: If it holds what can't stand in a header.
    """
    key = os.environ.get(variable, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise ModelError(f"the key in {variable} holds a character that no key has; was it copied whole?")
    return key


def _retry_after(value: str | None) -> float | None:
    """Return seconds from a Retry-After header; a date, or nothing readable, is left to the backoff."""
    try:
        seconds = float(value or "")
    except ValueError:
        return None
    return min(max(seconds, 0.0), 300.0) if seconds == seconds else None
