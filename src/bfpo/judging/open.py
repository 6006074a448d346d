"""From the words of a command line to a judge."""

import re
from pathlib import Path

from bfpo.core.samples import Judge
from bfpo.errors import RecipeError, did_you_mean
from bfpo.judging.open_models import MODEL_KINDS, open_guard

KINDS = ("linear", "oracle", "people", "rubric", *MODEL_KINDS)
_MAJORITY = "majority:"
# A plus sign that no kind follows belongs to a path.
_BETWEEN_JUDGES = re.compile(rf"\+(?=(?:{'|'.join(KINDS)})(?:[:+]|$))")


def open_judge(spec: str, *, threshold: float | None = None) -> Judge:
    """Return the judge of a spec `KIND` or `KIND:PATH`; several, joined by `+`, are an ensemble.

    Args:
        spec: Such as `linear:judge.npz`, `oracle`, `linear:judge.npz+oracle`, `majority:A+B+C`. A `+` joins judges
            only where a kind follows it; any other is part of a path.
        threshold: Of the judges that give a probability: safe from it on, in [0, 1]. None is 0.5, and for `linear`
            the undecided band that its file holds.

    Raises:
        RecipeError: If the kind is unknown, or a path is missing or too much.
        DataError: If the judge's file is missing or malformed.
    """
    specs = _BETWEEN_JUDGES.split(spec.removeprefix(_MAJORITY))
    if len(specs) > 1 or spec.startswith(_MAJORITY):
        from bfpo.judging.ensemble import Ensemble

        judges = tuple(open_judge(one, threshold=threshold) for one in specs)
        return Ensemble(judges, "majority" if spec.startswith(_MAJORITY) else "unanimous")
    kind, _, path = spec.partition(":")
    if kind not in KINDS:
        raise RecipeError(f"judge '{spec}': '{kind}' is not a kind of judge; {did_you_mean(kind, list(KINDS))}")
    if kind == "oracle":
        from bfpo.testbed.oracle import Oracle

        if path not in ("", "shared", "separate"):
            raise RecipeError(f"judge '{spec}': expected oracle, oracle:shared or oracle:separate")
        return Oracle(path or "shared")  # type: ignore[arg-type]
    if not path:
        raise RecipeError(f"judge '{spec}': expected {kind}:PATH")
    if kind == "rubric":
        return _open_rubric(path)
    if kind == "people":
        from bfpo.judging.people import PeopleJudge

        return PeopleJudge(path)
    if "+" in path and not Path(path).exists():
        raise RecipeError(
            f"judge '{spec}': there is no '{path}'; a + joins judges only where a kind follows it; "
            f"{did_you_mean(path.rpartition('+')[2].partition(':')[0], list(KINDS))}"
        )
    if kind in MODEL_KINDS:
        return open_guard(kind, path, threshold=0.5 if threshold is None else threshold)
    from bfpo.judging.linear import load_judge

    return load_judge(Path(path), threshold=threshold)


def _open_rubric(path: str) -> Judge:
    from bfpo.core.samples import Sampling
    from bfpo.judging.rubric import RubricJudge

    # A judge is asked for its likeliest answer; a verdict is a short line.
    sampling = Sampling(temperature=0.0, max_new_tokens=128)
    name, at, url = path.partition("@http")
    if at:
        from bfpo.generation.openai_server import ServerEngine, ServerOptions

        return RubricJudge(ServerEngine(ServerOptions(url=f"http{url}", model=name), sampling), name)
    from bfpo.generation.in_process import load_engine

    return RubricJudge(load_engine(path, sampling), path)
