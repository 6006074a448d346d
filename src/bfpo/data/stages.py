"""The stages of an evaluation, prompts → completions → verdicts, each reading the file of the one before.

A stage appends to `NAME.unfinished` while it works, and writes `NAME` at once, in the order of its input, when
nothing is missing. Killed at any moment it goes on where it was; called again it reuses what there is.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from bfpo.config.recipes import Source
from bfpo.core.files import append_jsonl, read_repaired_jsonl, write_jsonl
from bfpo.core.pairs import as_messages
from bfpo.core.samples import Completion, Engine, FileRow, Judge, Prompt, Verdict, prompt_id
from bfpo.core.terminal import progress, show_table
from bfpo.data.rows import read_prompts, read_rows, refuse_lone_surrogates
from bfpo.errors import DataError, Unanswered

Made = TypeVar("Made", bound=FileRow)
Key = TypeVar("Key", bound=Hashable)
Name = TypeVar("Name")

# Completions that a judge gets at a time: those that are models sort them by length and share their batches.
_PIECE = 64
# Ids of a kind that are printed.
_SHOWN = 5


def read_prompt_file(path: str) -> list[Prompt]:
    """Read prompts from a `prompts.jsonl`, any table with a prompt column, or a text file with one on each line.

    Raises:
        DataError: If there are none, they are malformed, or an id stands twice.
    """
    prompts = []
    if Path(path).suffix == ".txt":
        for line in read_prompts(path):
            messages = as_messages(line)
            prompts.append(Prompt(prompt_id(messages), messages, source=path))
    else:
        for row in read_rows(Source(path=path)):
            try:
                refuse_lone_surrogates(row)
                own = prompt_id(as_messages(row.value("prompt")))
                prompts.append(Prompt.from_row({"prompt_id": own, "source": path, **row.values}))
            except DataError as error:
                raise DataError(f"{row.where}: {error}") from None
    if not prompts:
        raise DataError(f"{path} holds no prompts")
    if twice := _first_twice(prompt.prompt_id for prompt in prompts):
        raise DataError(f"{path}: the prompt '{twice}' stands twice; every prompt needs an id of its own")
    return prompts


def generate_completions(
    engine: Engine, prompts: Sequence[Prompt], path: Path, *, samples: int = 1
) -> list[Completion]:
    """Answer every prompt `samples` times, into a file of completions.

    Args:
        engine: What answers.
        prompts: Each with an id of its own.
        path: `completions.jsonl`; completions that it or its unfinished part holds aren't made again.
        samples: Answers per prompt.

    Returns:
        All completions, prompt by prompt.

    Raises:
        DataError: If the file holds completions made by another model or with other settings.
    """
    wanted = {(prompt.prompt_id, sample): (prompt, sample) for prompt in prompts for sample in range(samples)}

    def check(done: Completion) -> None:
        if done.key in wanted and done.prompt != wanted[done.key][0].prompt:
            raise DataError(f"{path}: {done.key} answers another prompt of that id; choose another --out")
        if done.settings_hash != engine.settings_hash:
            raise DataError(
                f"{path} holds completions of another model or other settings (hash {done.settings_hash}, this run's "
                f"is {engine.settings_hash}); choose another --out, or remove it"
            )

    return fill(
        path,
        Completion,
        wanted,
        lambda completion: completion.key,
        lambda missing: engine.generate([wanted[key] for key in missing]),
        check=check,
        what="generating",
    )


def generate_most(
    engine: Engine, prompts: Sequence[Prompt], path: Path, *, samples: int = 1, most_unanswered: float
) -> tuple[list[Completion], dict[str, str]]:
    """Answer every prompt that can be answered, into a file of completions; see `generate_completions`.

    A prompt that is too long for the model, or that a server fails on, is left out with all its samples; those that
    were had stay in the file. The same call asks for the missing ones again.

    Args:
        engine: What answers.
        prompts: Each with an id of its own.
        path: `completions.jsonl`.
        samples: Answers per prompt.
        most_unanswered: Completions that may stay unanswered.

    Returns:
        Completions of the prompts that were answered, prompt by prompt; and prompt's id → why it was left out.

    Raises:
        Unanswered: If it were more.
        DataError: As `generate_completions`.
    """
    try:
        return generate_completions(engine, prompts, path, samples=samples), {}
    except Unanswered as error:
        if len(error.failed) > most_unanswered:
            raise
        lost = {name: why for (name, _), why in error.failed.items()}
    answered = [prompt for prompt in prompts if prompt.prompt_id not in lost]
    return generate_completions(engine, answered, path, samples=samples), lost


def show_unanswered(lost: Mapping[str, str]) -> None:
    """Print which prompts were left out and why, the first few by their ids."""
    reasons = Counter(lost.values())
    rows = []
    for why, count in reasons.most_common():
        names = [name for name, reason in lost.items() if reason == why]
        rows.append((why, count, ", ".join(names[:_SHOWN]) + (", ..." if count > _SHOWN else "")))
    if rows:
        show_table("Prompts left unanswered", ("why", "prompts", "ids"), rows)


def show_faults(faults: Counter[str]) -> None:
    """Print what a server got wrong, if anything."""
    if faults:
        show_table("What the server got wrong; asked again, or mended", ("fault", "times"), faults.most_common())


def judge_completions(judge: Judge, completions: Sequence[Completion], path: Path) -> list[Verdict]:
    """Judge every completion, into a file of verdicts.

    Args:
        judge: What judges.
        completions: What is judged.
        path: `verdicts.jsonl`; verdicts on the same texts by the same revision of the judge aren't made again.

    Returns:
        This judge's verdicts, in the completions' order.

    Raises:
        DataError: If the file holds verdicts on other texts, or of another judge or revision.
    """
    wanted = {completion.key: completion for completion in completions}

    def check(done: Verdict) -> None:
        if (done.judge, done.revision) != (judge.name, judge.revision):
            raise DataError(
                f"{path} holds verdicts of {done.judge}@{done.revision}, this is {judge.name}@{judge.revision}; "
                "choose another --out, or remove it"
            )
        if done.key in wanted and done.text_hash != wanted[done.key].text_hash:
            raise DataError(f"{path}: the verdict on {done.key} is about another text; remove it")

    return fill(
        path,
        Verdict,
        wanted,
        lambda verdict: verdict.key,
        lambda missing: judged_in_pieces(judge, [wanted[key] for key in missing]),
        check=check,
        what="judging",
    )


def without_verdict(completions: Sequence[Completion], path: Path) -> list[Completion]:
    """Return the completions that a file of verdicts and its unfinished part hold no verdict on."""
    done = {verdict.key for verdict in _started(path, Verdict)}
    return [one for one in completions if one.key not in done]


def judged_in_pieces(judge: Judge, completions: Sequence[Completion]) -> Iterator[list[Verdict]]:
    """Judge completions a few at a time, in order; each verdict is handed over as soon as the judge gives it.

    So what is lost when it is killed is the one answer, or the batch, that the judge was at.
    """
    for start in range(0, len(completions), _PIECE):
        for verdict in judge.judge(completions[start : start + _PIECE]):
            yield [verdict]


def read_completions(path: Path) -> list[Completion]:
    """Read a finished file of completions.

    Raises:
        DataError: If it is missing, malformed, or a completion stands twice.
    """
    return _read(path, Completion)


def read_verdicts(path: Path) -> list[Verdict]:
    """Read a finished file of verdicts.

    Raises:
        DataError: If it is missing or malformed.
    """
    return _read(path, Verdict)


def _read(path: Path, kind: type[Made]) -> list[Made]:
    made = []
    for row in read_rows(Source(path=str(path))):
        try:
            refuse_lone_surrogates(row)
            made.append(kind.from_row(row.values))
        except DataError as error:
            raise DataError(f"{row.where}: {error}") from None
    return made


def fill(
    path: Path,
    kind: type[Made],
    every: Iterable[Key],
    key_of: Callable[[Made], Key],
    make: Callable[[Sequence[Key]], Iterable[list[Made]]],
    *,
    check: Callable[[Made], None],
    what: str,
) -> list[Made]:
    """Bring a file to hold everything wanted; see the module.

    Args:
        path: The file; what it or its unfinished part holds isn't made again.
        kind: What its lines are.
        every: Names of what is wanted.
        key_of: Name of what was made.
        make: Makes what is missing, in batches as they are done.
        check: Raises when something that the file holds isn't of this run.
        what: The work in a word, for the progress.

    Returns:
        What is wanted, in the order of its names.

    Raises:
        DataError: If something wanted wasn't made.
    """
    wanted: list[Key] = list(every)
    unfinished = _unfinished(path)
    done: dict[Key, Made] = {}
    for made in _started(path, kind):
        check(made)
        done[key_of(made)] = made
    missing = [key for key in wanted if key not in done]
    with progress(what, len(missing)) as advance:
        for batch in make(missing) if missing else ():
            append_jsonl(unfinished, (one.to_row() for one in batch))
            done |= {key_of(one): one for one in batch}
            advance(len(batch))
    if lost := [key for key in wanted if key not in done]:
        raise DataError(f"{what}: {len(lost)} of {len(wanted)} were not made, the first is {lost[0]}")
    # What the file holds beyond what is wanted now (more samples, say) was paid for: it stays, at the end.
    wanted_now = set(wanted)
    result: list[Made] = [done[key] for key in wanted]
    others: list[Made] = [one for key, one in done.items() if key not in wanted_now]
    # A start that wanted a part alone may have left that part first.
    if missing or unfinished.exists() or not path.exists() or (not others and list(done) != wanted):
        write_jsonl(path, (one.to_row() for one in result + others))
        unfinished.unlink(missing_ok=True)
    return result


def _started(path: Path, kind: type[Made]) -> Iterator[Made]:
    """Yield what a file and its unfinished part hold."""
    for part in (path, _unfinished(path)):
        for number, row in enumerate(read_repaired_jsonl(part), start=1):
            try:
                yield kind.from_row(row)
            except DataError as error:
                raise DataError(f"{part} row {number}: {error}") from None


def _unfinished(path: Path) -> Path:
    return path.with_name(f"{path.name}.unfinished")


def _first_twice(names: Iterable[Name]) -> Name | None:
    seen: set[Name] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None
