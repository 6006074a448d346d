"""A model behind a guard that answers requests of several threads, and counts what the guard did."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from threading import Lock
from typing import Any, Literal

from bfpo.core.conversation import user_says
from bfpo.core.guarding import GuardCounts
from bfpo.core.samples import Completion, Engine, Judge, Prompt, Sampling
from bfpo.core.terminal import say, warn
from bfpo.data.stages import show_faults
from bfpo.deployment.chat_requests import ChatRequest, RefusedRequest
from bfpo.errors import ModelError, Unanswered
from bfpo.generation.guards.screen import Screen, Screening
from bfpo.generation.in_process import TransformersEngine, load_engine
from bfpo.generation.openai_server import ServerEngine, ServerOptions, warn_of_missing_model
from bfpo.judging.guarded_engine import FirstSafeSection, Guard, guard_engine, open_guard_judge
from bfpo.judging.spec import parse_judge

Outcome = Literal["passed", "cut", "fallback"]
"""`passed`: the answer as the guard lets it through. `cut`: its beginning, because no next sentence passed.
`fallback`: the guard's refusal in place of an answer."""


class _SharedScreen(Screen):
    """Screen for requests of several threads: the judge reads for one at a time, because judges need not allow more.

    Of a judge's error only the class is printed: its message may contain the text that was judged.
    """

    def __init__(self, judge: Judge) -> None:
        super().__init__(judge)
        self._lock = Lock()

    def screen(self, completions: Sequence[Completion]) -> list[Screening]:
        """Return whether each completion passes; see `Screen`."""
        with self._lock:
            return super().screen(completions)

    def _describe(self, error: Exception) -> str:
        return type(error).__name__


@dataclass(frozen=True, slots=True)
class GuardedAnswer:
    """An answer, or its beginning up to the end of a sentence that has passed.

    Args:
        text: Its text, with calls of tools in words.
        reasoning: Thought in front of it that the guard's judge has read; None without.
        completion: The completion.
        outcome: What the guard did.
    """

    text: str
    reasoning: str | None
    completion: Completion
    outcome: Outcome


class GuardedModel:
    """A model behind a guard.

    Args:
        engine: Engine of the model, in this process or on a server.
        guard: The guard.
        name: Name of the model for clients.

    Raises:
        RecipeError: If the guard isn't possible with this engine.
        DataError: If the file of the judge or the head is missing or malformed.
        ModelError: If the model of the judge can't be loaded.
    """

    def __init__(self, engine: TransformersEngine | ServerEngine, guard: Guard, *, name: str) -> None:
        self.name, self._guard = name, guard
        self._outcomes: Counter[str] = Counter()
        self._counts, self._lock = GuardCounts(), Lock()
        self._screen: Screen | None = None
        # Reasoning that the judge hasn't read isn't shown.
        self._shows_reasoning = True
        if isinstance(guard, FirstSafeSection):
            self._shows_reasoning = parse_judge(guard.judge).reads == "both"
            self._screen = _SharedScreen(open_guard_judge(guard))
        # Shows whether the guard is possible. One without a judge is the same for all requests.
        guarded = guard_engine(engine, Sampling(), guard, screen=self._screen)
        self._engine = guarded if isinstance(guarded, TransformersEngine) else engine

    def answer(self, request: ChatRequest, show: Callable[[GuardedAnswer], None]) -> GuardedAnswer:
        """Answer a request; engines in this process must be asked by one thread at a time.

        Args:
            request: The request.
            show: Function that gets the answer up to the end of each sentence once it has passed, where the guard
                judges sentences and the request streams.

        Raises:
            RefusedRequest: If the model can't be asked, with a message that is for the client.
        """
        engine = self._behind(request, lambda completion: show(self._read(completion, "passed")))
        try:
            batches = list(engine.generate([(request.prompt, 0)]))
        except Unanswered as error:
            self._count("unanswered")
            reason = next(iter(error.failed.values()))
            if error.refused:
                too_long = "too long" in reason
                code, param = ("context_length_exceeded", "messages") if too_long else (None, None)
                raise RefusedRequest(reason, param=param, code=code) from None
            raise RefusedRequest(f"the model gave no answer: {reason}", status=502, code="no_answer") from None
        except ModelError as error:
            self._count("unanswered")
            # For the operator: the message names the server.
            warn(str(error))
            raise RefusedRequest("the model can't be asked", status=502, code="no_answer") from None
        ((completion,),) = batches
        outcome = _outcome(completion)
        self._count(outcome, completion.guard)
        return self._read(completion, outcome)

    def _behind(self, request: ChatRequest, show: Callable[[Completion], None]) -> Engine:
        engine = self._engine.with_sampling(request.sampling)
        if not isinstance(self._guard, FirstSafeSection):
            return engine
        # At temperature 0 all samples are equal: the first decides.
        guard = self._guard if request.sampling.temperature else self._guard.model_copy(update={"samples": 1})
        return guard_engine(
            engine, request.sampling, guard, show=show if request.streams else None, screen=self._screen
        )

    def _read(self, completion: Completion, outcome: Outcome) -> GuardedAnswer:
        reasoning = completion.reasoning if self._shows_reasoning else None
        return GuardedAnswer(completion.message.in_words(), reasoning, completion, outcome)

    def _count(self, outcome: str, counts: GuardCounts | None = None) -> None:
        with self._lock:
            self._outcomes[outcome] += 1
            self._counts += counts or GuardCounts()

    def health(self) -> dict[str, Any]:
        """Return the numbers of answers by outcome, and what they took."""
        with self._lock:
            answers = {outcome: self._outcomes[outcome] for outcome in ("passed", "cut", "fallback", "unanswered")}
            counts = {key: value for key, value in asdict(self._counts).items() if key not in ("cut", "seconds")}
        guard = {"kind": self._guard.kind, **({} if self._screen is None else {"judge": self._screen.judge.name})}
        return {"model": self.name, "guard": guard, "answers": answers, "drawn": counts}

    def show_summary(self) -> None:
        """Print the numbers of `health`, and the faults of the server that was asked."""
        health = self.health()
        say(", ".join(f"{count:,} {outcome}" for outcome, count in health["answers"].items()) + " of the answers")
        if self._screen is not None:
            drawn = health["drawn"]
            say(
                f"{drawn['samples']:,} samples: {drawn['unsafe']:,} unsafe, {drawn['undecided']:,} undecided, "
                f"and {drawn['failed']:,} on which the judge failed"
            )
        show_faults(self._engine.faults)


def _outcome(completion: Completion) -> Outcome:
    if completion.finish_reason == "guarded":
        return "fallback"
    return "cut" if completion.guard is not None and completion.guard.cut else "passed"


def open_local(checkpoint: str, *, dtype: str) -> TransformersEngine:
    """Load a checkpoint, and let it write a token: what a model isn't able to do shows before the first request.

    Args:
        checkpoint: Folder or hub id of a model or an adapter, or a GGUF file.
        dtype: Data type of the weights.

    Raises:
        RecipeError: If `dtype` is unknown.
        ModelError: If the checkpoint can't be loaded, or its tokenizer has no chat template.
    """
    engine = load_engine(checkpoint, Sampling(temperature=0.0, max_new_tokens=1), dtype=dtype)
    try:
        list(engine.generate([(Prompt("first", user_says("Hello")), 0)]))
    except Unanswered as error:
        raise ModelError(f"{checkpoint}: {next(iter(error.failed.values()))}") from None
    return engine


def open_served(options: ServerOptions) -> ServerEngine:
    """Return the engine of a model on a server, which is warned of if it isn't there yet."""
    warn_of_missing_model(options)
    return ServerEngine(options, Sampling())
