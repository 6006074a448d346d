"""Reading the answers and the verdicts of a finished evaluation."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bfpo.core.samples import Completion, Verdict
from bfpo.data.stages import read_completions, verdicts_by_judge
from bfpo.evaluation.results import Results


def completions_of_evaluation(folder: Path, results: Results) -> list[Completion]:
    """Read the completions that an evaluation rests on.

    The file may hold more: samples of an earlier evaluation with more of them, and those of prompts that a server
    answered in part, which take no part.

    Args:
        folder: Folder of the evaluation.
        results: Its results, which say how many samples each prompt has.

    Raises:
        DataError: If the file is malformed.
    """
    samples = results.sampling.get("samples", 1)
    own = [row for row in read_completions(folder / Completion.file_name) if row.sample < samples]
    of_prompt = Counter(row.prompt_id for row in own)
    return [row for row in own if of_prompt[row.prompt_id] == samples]


def verdicts_of_evaluation(folder: Path, judges: Sequence[Mapping[str, Any]]) -> list[Verdict]:
    """Read the verdicts that an evaluation rests on, in the order of its judges.

    Args:
        folder: Folder of the evaluation. Verdicts of a listed judge by another revision are left out, those of judges
            that aren't listed come last.
        judges: The judges of its results.

    Raises:
        DataError: If a file is malformed.
    """
    names = {judge["name"] for judge in judges}
    # Of two judges with one name the second is listed as NAME@REVISION.
    ranks = {
        (judge["name"].removesuffix(f"@{judge['revision'][:8]}"), judge["revision"]): rank
        for rank, judge in enumerate(judges)
    }
    by_judge = {
        judge: verdicts
        for judge, verdicts in verdicts_by_judge(folder).items()
        if judge in ranks or judge[0] not in names
    }
    ordered = sorted(by_judge, key=lambda judge: ranks.get(judge, len(ranks)))
    return [verdict for judge in ordered for verdict in by_judge[judge]]
