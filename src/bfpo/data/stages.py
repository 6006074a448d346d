"""The stages of an evaluation, prompts → completions → verdicts; each reads the file of the stage before.

A stage appends to `NAME.unfinished` while it runs. When nothing is missing it writes `NAME` in one step, in the order
of its input. A stage that was killed resumes, and one that is called again reuses what its files have.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from bfpo.config.recipes import Source
from bfpo.core.file_rows import FileRow
from bfpo.core.files import append_jsonl, read_repaired_jsonl, write_jsonl
from bfpo.core.read_messages import as_messages
from bfpo.core.samples import Completion, Engine, Judge, Prompt, Verdict, prompt_id
from bfpo.core.samples import Key as CompletionKey
from bfpo.core.terminal import progress, say, show_table
from bfpo.data.guard_summary import describe_guard, summarize_guard
from bfpo.data.prompts import check_prompt_columns, read_prompt_content
from bfpo.data.readings import judge_readings
from bfpo.data.rows import SourceRow, read_prompts, read_rows, refuse_lone_surrogates
from bfpo.data.unread_answers import UnreadAnswers, describe_missing_answers
from bfpo.data.verdict_files import judge_files
from bfpo.errors import DataError, Unanswered

Row = TypeVar("Row", bound=FileRow)
Key = TypeVar("Key", bound=Hashable)
Name = TypeVar("Name", bound=Hashable)

# Completions that a judge gets at a time; judges that are models sort them by length into batches.
_BATCH = 64
# Ids that are printed for each reason.
_NUM_SHOWN = 5


def read_prompt_file(
    path: str, *, ignore_columns: Sequence[str] = (), ignore_message_keys: Sequence[str] = ()
) -> list[Prompt]:
    """Read prompts from a `prompts.jsonl`, any table with a prompt column, or a text file with a prompt on each line.

    Args:
        path: File.
        ignore_columns: Columns that are left out.
        ignore_message_keys: Keys of messages that are left out.

    Raises:
        DataError: If there are no prompts, one is malformed, a column with text isn't read, or an id is duplicated.
    """
    prompts = []
    if Path(path).suffix == ".txt":
        for line in read_prompts(path):
            messages = as_messages(line)
            prompts.append(Prompt(prompt_id(messages), messages, source=path))
    else:
        for row in read_rows(Source(path=path, ignore_columns=list(ignore_columns)), ignore_message_keys):
            with row.locate_errors():
                messages, inputs, language = read_prompt_content(row)
                default_id = prompt_id(messages, inputs)
                columns = {"prompt": [message.to_row() for message in messages], "language": language}
                # An empty cell of a CSV is a missing value.
                given = {name: value for name, value in row.values.items() if value != ""}
                prompts.append(Prompt.from_row({"prompt_id": default_id, "source": path, **given, **columns}))
                check_prompt_columns(row)
    if not prompts:
        raise DataError(f"{path} has no prompts")
    if (duplicate := _first_duplicate(prompt.prompt_id for prompt in prompts)) is not None:
        raise DataError(f"{path}: duplicate prompt id '{duplicate}'; the id of a prompt must be unique")
    return prompts


def generate_completions(
    engine: Engine, prompts: Sequence[Prompt], path: Path, *, samples: int = 1
) -> list[Completion]:
    """Generate completions of every prompt into a file.

    Args:
        engine: Engine that generates.
        prompts: Prompts with unique ids.
        path: `completions.jsonl`; completions in it or in its unfinished part are reused.
        samples: Number of completions per prompt.

    Returns:
        All completions, prompt by prompt.

    Raises:
        DataError: If the file has completions of another model, of other settings, or of other prompts with these
            ids.
        Unanswered: If some completions are missing.
    """
    requests = {(prompt.prompt_id, sample): (prompt, sample) for prompt in prompts for sample in range(samples)}
    # An engine whose samples changed has the hash of its former ones too: a finished file of them is kept.
    former_hash = getattr(engine, "former_settings_hash", None)
    former: list[Completion] = []

    def check(completion: Completion) -> None:
        request = requests.get(completion.key)
        if request and (completion.prompt, completion.inputs) != (request[0].prompt, request[0].inputs):
            raise DataError(
                f"{path}: {completion.key} answers another prompt with this id; choose another output file"
            )
        if completion.settings_hash == engine.settings_hash:
            return
        if completion.settings_hash == former_hash:
            former.append(completion)
        else:
            raise DataError(
                f"{path} has completions of another model or other settings (hash {completion.settings_hash}, but "
                f"{engine.settings_hash} for this run); choose another output file, or remove this one"
            )

    def generate(missing: Sequence[CompletionKey]) -> Iterator[list[Completion]]:
        if former:
            raise DataError(
                f"{path} was sampled by an earlier version, whose samples are others, and {len(missing)} completions "
                "are missing; finish it with that version, choose another output file, or remove this one"
            )
        for batch in engine.generate([requests[key] for key in missing]):
            yield [_with_prompt_columns(completion, requests[completion.key][0]) for completion in batch]

    return fill(
        path,
        Completion,
        requests,
        lambda completion: completion.key,
        generate,
        check=check,
        what="generating",
    )


def _with_prompt_columns(completion: Completion, prompt: Prompt) -> Completion:
    """Return a completion with the columns of its prompt, whether the engine filled them or not."""
    return replace(
        completion,
        tools=prompt.tools,
        chat_template_kwargs=prompt.chat_template_kwargs,
        language=completion.language or prompt.language,
    )


def generate_most(
    engine: Engine, prompts: Sequence[Prompt], path: Path, *, samples: int = 1, max_unanswered: float
) -> tuple[list[Completion], dict[str, str]]:
    """Generate completions of all prompts that can be answered into a file; see `generate_completions`.

    A prompt is left out with all its samples if it is too long for the model or a server fails on it. Its completions
    that were generated stay in the file, and the same call requests the missing ones again.

    Args:
        engine: Engine that generates.
        prompts: Prompts with unique ids.
        path: `completions.jsonl`.
        samples: Number of completions per prompt.
        max_unanswered: Maximum number of missing completions.

    Returns:
        Completions of the answered prompts, prompt by prompt; and the reason of each prompt that is left out, by id.

    Raises:
        Unanswered: If more completions are missing.
        DataError: As in `generate_completions`.
    """
    try:
        return generate_completions(engine, prompts, path, samples=samples), {}
    except Unanswered as error:
        if len(error.failed) > max_unanswered:
            raise
        reasons = {name: reason for (name, _), reason in error.failed.items()}
    answered = [prompt for prompt in prompts if prompt.prompt_id not in reasons]
    return generate_completions(engine, answered, path, samples=samples), reasons


def show_unanswered(reasons: Mapping[str, str]) -> None:
    """Print a table of the prompts that were left out.

    Args:
        reasons: Reasons by prompt id.
    """
    rows = []
    for reason, count in Counter(reasons.values()).most_common():
        names = [name for name, other in reasons.items() if other == reason]
        rows.append((reason, count, ", ".join(names[:_NUM_SHOWN]) + (", ..." if count > _NUM_SHOWN else "")))
    if rows:
        show_table("Unanswered prompts", ("reason", "prompts", "ids"), rows)


def show_faults(faults: Counter[str]) -> None:
    """Print a table of the faults of a server, if there are any."""
    if faults:
        show_table("Faults of the server, repaired or retried", ("fault", "times"), faults.most_common())


def show_outcomes(completions: Sequence[Completion]) -> None:
    """Print how the answers ended if a server blocked any, how many have no answer, and what a guard did."""
    outcomes = Counter(completion.finish_reason for completion in completions)
    if outcomes["filtered"] or outcomes["refused"]:
        show_table("Outcomes", ("outcome", "completions"), outcomes.most_common())
    for line in describe_missing_answers(completions):
        say(line)
    if (guard := summarize_guard(completions)) is not None:
        say(describe_guard(guard))


def judge_completions(judge: Judge, completions: Sequence[Completion], path: Path) -> list[Verdict]:
    """Judge every completion, and write the verdicts into a file.

    The judge reads the part of each completion that `bfpo.data.readings` makes. Completions without that part get the
    verdict of `UnreadAnswers`.

    Args:
        judge: Judge of the completions.
        completions: Completions to judge.
        path: `verdicts.jsonl`; verdicts in it or in its unfinished part are reused.

    Returns:
        The judge's verdicts, in the order of the completions.

    Raises:
        DataError: If two completions have one key, or the file has verdicts on other texts, or of another judge or
            revision.
    """
    by_key = {completion.key: completion for completion in completions}
    if (duplicate := _first_duplicate(completion.key for completion in completions)) is not None:
        raise DataError(f"two completions are {duplicate}; judge the completions of each model by themselves")
    unread = UnreadAnswers(judge)

    def check(verdict: Verdict) -> None:
        if (verdict.judge, verdict.revision) != (judge.name, judge.revision):
            raise DataError(
                f"{path} has verdicts of {verdict.judge}@{verdict.revision}, this is {judge.name}@{judge.revision}; "
                "choose another output file, or remove this one"
            )
        if verdict.key in by_key and verdict.text_hash != by_key[verdict.key].text_hash:
            raise DataError(f"{path}: the verdict on {verdict.key} is about another text; remove the file")
        if verdict.key in by_key and not unread.is_unread(by_key[verdict.key]):
            unread.add([verdict])

    def judge_missing(missing: Sequence[tuple[str, int]]) -> Iterator[list[Verdict]]:
        unjudged = [by_key[key] for key in missing]
        to_read = [completion for completion in unjudged if not unread.is_unread(completion)]
        for verdicts in _judge_in_batches(judge, to_read):
            unread.add(verdicts)
            yield verdicts
        # Last, because only now it is known what the judge assesses.
        not_read = [completion for completion in unjudged if unread.is_unread(completion)]
        if not_read:
            yield [unread.verdict(completion) for completion in not_read]

    return fill(
        path,
        Verdict,
        by_key,
        lambda verdict: verdict.key,
        judge_missing,
        check=check,
        what="judging",
    )


def find_unjudged(completions: Sequence[Completion], path: Path) -> list[Completion]:
    """Return the completions without a verdict in a file of verdicts or its unfinished part."""
    judged = {verdict.key for verdict in _read_existing(path, Verdict)}
    return [completion for completion in completions if completion.key not in judged]


def read_completions(path: Path) -> list[Completion]:
    """Read a finished file of completions.

    Raises:
        DataError: If it is missing or malformed.
    """
    return _read_finished(path, Completion)


def read_verdicts(path: Path) -> list[Verdict]:
    """Read a finished file of verdicts.

    Raises:
        DataError: If it is missing or malformed.
    """
    return _read_finished(path, Verdict)


def verdicts_on(completions: Sequence[Completion], verdicts: Sequence[Verdict], where: str) -> list[Verdict]:
    """Return the verdict of one judge on each completion.

    Args:
        completions: The completions.
        verdicts: Verdicts on them, in any order.
        where: Name of the verdicts, for errors.

    Raises:
        DataError: If a completion has no verdict, several, or one on another text.
    """
    by_key = {verdict.key: verdict for verdict in verdicts}
    if len(by_key) < len(verdicts):
        raise DataError(f"{where}: several verdicts on the same completion; expected those of one judge")
    for completion in completions:
        verdict = by_key.get(completion.key)
        if verdict is None or verdict.text_hash != completion.text_hash:
            got = "no verdict" if verdict is None else "a verdict about another text"
            raise DataError(f"{where}: {got} on {completion.key}; judge the completions again")
    return [by_key[completion.key] for completion in completions]


def verdicts_by_judge(folder: Path) -> dict[tuple[str, str], list[Verdict]]:
    """Read all verdicts of a folder, by name and revision of the judge.

    Raises:
        DataError: If a file is malformed.
    """
    by_judge: dict[tuple[str, str], list[Verdict]] = {}
    for path in judge_files(folder, "verdicts"):
        for verdict in read_verdicts(path):
            by_judge.setdefault((verdict.judge, verdict.revision), []).append(verdict)
    return by_judge


def fill(
    path: Path,
    kind: type[Row],
    keys: Iterable[Key],
    key_of: Callable[[Row], Key],
    make: Callable[[Sequence[Key]], Iterable[list[Row]]],
    *,
    check: Callable[[Row], None],
    what: str,
) -> list[Row]:
    """Complete a file so that it has a row for every key; see the module docstring.

    Args:
        path: File; rows in it or in its unfinished part are reused.
        kind: Class of the rows.
        keys: Keys of the rows.
        key_of: Function from a row to its key.
        make: Function that makes the rows of missing keys, in batches.
        check: Function that raises if an existing row belongs to another run.
        what: Description of the work, for the progress bar.

    Returns:
        The rows, in the order of the keys.

    Raises:
        DataError: If a row was not made.
    """
    ordered_keys: list[Key] = list(keys)
    unfinished = _unfinished(path)
    rows: dict[Key, Row] = {}
    for row in _read_existing(path, kind):
        check(row)
        rows[key_of(row)] = row
    missing = [key for key in ordered_keys if key not in rows]
    with progress(what, len(missing)) as advance:
        for batch in make(missing) if missing else ():
            append_jsonl(unfinished, (row.to_row() for row in batch))
            rows |= {key_of(row): row for row in batch}
            advance(len(batch))
    if failed := [key for key in ordered_keys if key not in rows]:
        raise DataError(f"{what}: {len(failed)} of {len(ordered_keys)} were not made, the first is {failed[0]}")
    # Rows that are not requested now (more samples, say) took time or money to make: they stay, at the end of the
    # file.
    requested = set(ordered_keys)
    result: list[Row] = [rows[key] for key in ordered_keys]
    others: list[Row] = [row for key, row in rows.items() if key not in requested]
    # A run that requested only some of the keys may have left those first.
    is_reordered = not others and list(rows) != ordered_keys
    if missing or unfinished.exists() or not path.exists() or is_reordered:
        write_jsonl(path, (row.to_row() for row in result + others))
        unfinished.unlink(missing_ok=True)
    return result


def _judge_in_batches(judge: Judge, completions: Sequence[Completion]) -> Iterator[list[Verdict]]:
    """Yield each verdict as soon as the judge returns it, so that a killed run loses at most one batch."""
    for start in range(0, len(completions), _BATCH):
        for verdict in judge_readings(judge, completions[start : start + _BATCH]):
            yield [verdict]


def _read_finished(path: Path, kind: type[Row]) -> list[Row]:
    rows = []
    for row in read_rows(Source(path=str(path))):
        with row.locate_errors():
            refuse_lone_surrogates(row)
            rows.append(kind.from_row(row.values))
    return rows


def _read_existing(path: Path, kind: type[Row]) -> Iterator[Row]:
    """Yield the rows of a file and of its unfinished part."""
    for part in (path, _unfinished(path)):
        for number, row in enumerate(read_repaired_jsonl(part), start=1):
            source_row = SourceRow(row, f"{part} row {number}")
            with source_row.locate_errors():
                refuse_lone_surrogates(source_row)
                value = kind.from_row(row)
            yield value


def _unfinished(path: Path) -> Path:
    return path.with_name(f"{path.name}.unfinished")


def _first_duplicate(names: Iterable[Name]) -> Name | None:
    seen: set[Name] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None
