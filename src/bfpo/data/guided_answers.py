"""Reading `guided.jsonl` of `bfpo redteam` as demonstrations: of each step of the chain, or of the answer alone."""

from bfpo.core.chain import INSTRUCTIONS_HASH, GuidedAnswer, Step
from bfpo.core.pairs import Demonstration
from bfpo.data.pair_formats import SkipRow
from bfpo.data.rows import SourceRow
from bfpo.errors import DataError

ADAPTER = "guided"


def step_adapter(step: Step) -> str:
    """Return the name of the adapter that reads a step."""
    return f"{ADAPTER}_{step}"


def read_guided_answer(row: SourceRow) -> Demonstration:
    """Read the kept answer of a chain as an answer to the request itself, which distills the chain.

    Raises:
        DataError: If the row is malformed.
        SkipRow: If the answer isn't kept, or was cut.
    """
    guided = _read_kept(row)
    if "answer" in guided.cut:
        raise SkipRow("answer cut", fault=False)
    return Demonstration(guided.prompt, (guided.answer,), inputs=guided.inputs)


def read_guided_step(row: SourceRow, step: Step) -> Demonstration:
    """Read the reply to a step as an answer to the conversation that the step was asked in.

    Steps before the check are read of chains whose answer is kept; the check is read where it agrees with the judge,
    of safe and of unsafe answers.

    Args:
        row: Row of `guided.jsonl`.
        step: The step.

    Raises:
        DataError: If the row is malformed, or its instructions have another wording.
        SkipRow: If the reply isn't imitated, or was cut.
    """
    guided = GuidedAnswer.from_row(row.values) if step == "check" else _read_kept(row)
    if guided.instructions != INSTRUCTIONS_HASH:
        raise DataError(
            f"the instructions of the chain have changed (hash {guided.instructions}, now {INSTRUCTIONS_HASH}); run "
            "`bfpo redteam` again into another folder, or train on the answers alone (adapter: guided)"
        )
    if step == "check" and (guided.passes is None or guided.passes is not guided.safe):
        raise SkipRow("check that doesn't agree with the judge", fault=False)
    if step in guided.cut:
        raise SkipRow(f"{step} cut", fault=False)
    reply = guided.reply(step)
    assert reply is not None
    return Demonstration(guided.step_prompt(step), (reply,), inputs=guided.inputs)


def _read_kept(row: SourceRow) -> GuidedAnswer:
    guided = GuidedAnswer.from_row(row.values)
    if not guided.kept:
        raise SkipRow("answer not kept", fault=False)
    return guided
