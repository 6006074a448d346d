"""The requests that lm-eval makes for a task: their number, their tokens, and an estimate of their time."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from itertools import accumulate
from typing import Any, NamedTuple

from bfpo.evaluation.lm_eval.run import prepare_task
from bfpo.evaluation.lm_eval.tasks import sample_rows
from bfpo.model.vocabulary import check_token_ids

# Rows of each task whose requests are made; the counts of a longer task are those of a sample, scaled up.
MAX_ROWS = 500
# Requests that the model really gets, to estimate the time; as many as `run_lm_eval_tasks` puts in a batch on a CPU.
_PROBE = 8


class PlannedRequests(NamedTuple):
    """Requests of one kind that a task makes of the model.

    Args:
        kind: `forward passes` for likelihoods, or `generated texts`.
        total: Number of rows that the model reads. Answers of one token to the same prompt share a forward pass.
        tokens_read: Tokens of these rows, as the model's tokenizer counts them.
        tokens_written: Maximum number of generated tokens; 0 for likelihoods.
        seconds: Estimated time, from a few requests of the task; None if it wasn't measured.
    """

    kind: str
    total: int
    tokens_read: int
    tokens_written: int
    seconds: float | None


class _Request(NamedTuple):
    """One request as the model gets it.

    Args:
        method: Method of lm-eval's model that is called.
        instance: lm-eval's request.
        rows: Token ids of the rows that the model reads for it.
        tokens_written: Maximum number of generated tokens.
    """

    method: str
    instance: Any
    rows: list[tuple[int, ...]]
    tokens_written: int = 0

    @property
    def tokens_read(self) -> int:
        """Number of tokens of the rows."""
        return sum(map(len, self.rows))

    @property
    def counts(self) -> tuple[int, int, int]:
        """Number of rows, of tokens read and of tokens written."""
        return len(self.rows), self.tokens_read, self.tokens_written


def plan_requests(lm: Any, loaded: Any, *, limit: int | None, timed: bool = True) -> list[PlannedRequests]:
    """Count the requests that `run_task` would make, and estimate their time.

    Args:
        lm: Output of `open_lm`.
        loaded: Output of `load_task`.
        limit: Maximum number of rows of a task, and of each task of a group.
        timed: Whether the model gets a few of the requests, to measure the time.
    """
    requests: dict[str, list[tuple[_Request, float]]] = {"forward passes": [], "generated texts": []}
    for request, weight in _make_requests(lm, loaded, limit):
        kind = "generated texts" if request.method == "generate_until" else "forward passes"
        requests[kind].append((request, weight))
    planned = []
    for kind, weighted in requests.items():
        if not weighted:
            continue

        rows, tokens_read, tokens_written = (
            round(sum(weight * count for (_, weight), count in zip(weighted, counts, strict=True)))
            for counts in zip(*(request.counts for request, _ in weighted), strict=True)
        )
        seconds = None
        if timed:
            seconds = _seconds_per_token(lm, [request for request, _ in weighted]) * tokens_read
        planned.append(PlannedRequests(kind, rows, tokens_read, tokens_written, seconds))
    return planned


def check_requests(lm: Any, loaded: Any, path: str, *, limit: int | None) -> None:
    """Check that the model has an embedding for each token that it reads for a task.

    Args:
        lm: Output of `open_lm`.
        loaded: Output of `load_task`.
        path: Name of the model, for the error.
        limit: Maximum number of rows of a task, and of each task of a group.

    Raises:
        ModelError: If a token has none.
    """
    # The requests of most models needn't be made twice.
    if len(lm.tokenizer) > lm.model.config.get_text_config().vocab_size:
        requests = _make_requests(lm, loaded, limit, max_rows=None)
        check_token_ids(lm.model.config, (row for request, _ in requests for row in request.rows), path)


def _make_requests(
    lm: Any, loaded: Any, limit: int | None, *, max_rows: int | None = MAX_ROWS
) -> Iterator[tuple[_Request, float]]:
    """Yield the requests of a task, or of a sample of its rows, and how many requests each stands for."""
    options = prepare_task(lm, loaded)
    if options["apply_chat_template"]:
        options |= {"chat_template": lm.apply_chat_template, "tokenizer_name": lm.tokenizer_name}
    for task in loaded["tasks"].values():
        rows = sample_rows(len(task.eval_docs), limit)
        sample = rows if max_rows is None else sample_rows(len(task.eval_docs), min(len(rows), max_rows))
        # lm-eval shows a progress bar of each task.
        with redirect_stderr(StringIO()):
            task.build_all_requests(samples=sample, **options)
        seen: set[tuple[int, ...]] = set()
        for instance in task.instances:
            request = _make_request(lm, instance)
            if request.method == "loglikelihood":
                # lm-eval reads the likelihoods of answers that differ in their last token from one forward pass.
                new = [row for row in request.rows if row not in seen]
                seen.update(new)
                request = request._replace(rows=new)
            repeats = instance.repeats if request.method == "generate_until" else 1
            if request.rows:
                yield request, repeats * len(rows) / len(sample)


def _make_request(lm: Any, instance: Any) -> _Request:
    """Return a request with the token ids of its rows, as lm-eval's model for transformers makes them."""
    longest, method = lm.max_length, instance.request_type
    if method == "generate_until":
        context, options = instance.args[:2]
        tokens_written = _max_generated(lm, options)
        ids = lm.tok_encode(context)[-max(longest - tokens_written, 1) :]
        return _Request(method, instance, [tuple(ids)], tokens_written)
    if method == "loglikelihood_rolling":
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        windows = get_rolling_token_windows(lm.tok_encode(instance.args[0]), lm.prefix_token_id, longest, 1)
        parts = [make_disjoint_window(window) for window in windows]
        return _Request(method, instance, [tuple([*context, *rest][:-1]) for context, rest in parts])
    context, continuation = instance.args[:2]
    if context == "":
        ids = [lm.prefix_token_id, *lm.tok_encode(continuation, add_special_tokens=False)]
    else:
        ids = lm.tok_encode(context + continuation)
    # The last token is only predicted.
    return _Request(method, instance, [tuple(ids[-(longest + 1) :][:-1])])


def _max_generated(lm: Any, options: dict[str, Any]) -> int:
    names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
    return int(next((options[name] for name in names if options.get(name) is not None), lm.max_gen_toks))


def _seconds_per_token(lm: Any, requests: Sequence[_Request]) -> float:
    """Return the seconds per token read, measured on a few requests of the length that most tokens are in."""
    by_length = sorted(requests, key=lambda request: request.tokens_read)
    sums = list(accumulate(request.tokens_read for request in by_length))
    middle = next(index for index, tokens in enumerate(sums) if 2 * tokens >= sums[-1])
    start = max(0, min(middle - _PROBE // 2, len(by_length) - _PROBE))
    probe = by_length[start : start + _PROBE]
    method = getattr(lm, probe[0].method)
    # The first call of a process takes longer.
    _call(method, [probe[0]])
    started = time.monotonic()
    _call(method, probe)
    return (time.monotonic() - started) / sum(request.tokens_read for request in probe)


def _call(method: Callable[..., object], requests: Sequence[_Request]) -> None:
    with redirect_stderr(StringIO()), redirect_stdout(StringIO()):
        method([request.instance for request in requests], disable_tqdm=True)
