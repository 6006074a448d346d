"""Opening a judge by its spec."""

from collections.abc import Mapping
from pathlib import Path

from bfpo.core.imports import import_object
from bfpo.core.samples import Judge, Kind, Sampling
from bfpo.core.terminal import warn
from bfpo.errors import RecipeError, did_you_mean
from bfpo.generation.open import EngineSection, JudgeServerSection, open_engine
from bfpo.judging.formats import GUARDS
from bfpo.judging.open_models import open_guard
from bfpo.judging.spec import JUDGES, SCORERS, JudgePart, JudgeSpec, parse_judge

# The testbed registers its oracle here by name only: the package doesn't import the testbed.
_ORACLE = "bfpo.testbed.oracle:Oracle"


def open_judge(
    spec: str | JudgeSpec,
    *,
    threshold: float | None = None,
    server: JudgeServerSection | None = None,
    kinds: Mapping[str, Kind | None] | None = None,
) -> Judge:
    """Open the judge of a spec; several judges are an ensemble.

    Args:
        spec: Text as `parse_judge` reads it, or what it returns.
        threshold: Probability from which an answer counts as safe, in [0, 1], for judges that give one. None is 0.5,
            and for `linear` the undecided band stored in its file.
        server: How rubric judges are queried; None is the defaults.
        kinds: Kinds of the prompts for `refusal-rule`, as its `kinds_of` returns them; None if they aren't known.

    Raises:
        RecipeError: If the kind is unknown, or a path is missing or superfluous.
        DataError: If the file of a judge is missing or malformed.
        ModelError: If the model of a judge can't be loaded.
    """
    parsed = parse_judge(spec) if isinstance(spec, str) else spec
    judges = tuple(_open_part(part, threshold, server or JudgeServerSection(), kinds) for part in parsed.parts)
    judge = judges[0]
    if parsed.policy != "single":
        from bfpo.judging.ensemble import Ensemble

        judge = Ensemble(judges, parsed.policy)
    if parsed.reads == "answer":
        return judge
    from bfpo.judging.readings import ReadingJudge

    return ReadingJudge(judge, parsed.reads)


def _open_part(
    part: JudgePart,
    threshold: float | None,
    server: JudgeServerSection,
    kinds: Mapping[str, Kind | None] | None,
) -> Judge:
    kind, path = part.kind, part.path
    if part.is_custom:
        make_judge = import_object(kind, f"judge '{part.text}'")
        try:
            judge: Judge = make_judge(*([path] if path else []))
        except TypeError as error:
            raise RecipeError(f"judge '{part.text}': it can't be made ({error})") from error
        return judge
    if kind == "oracle":
        if path not in ("", "shared", "separate"):
            raise RecipeError(f"judge '{part.text}': expected oracle, oracle:shared or oracle:separate")
        oracle: Judge = import_object(_ORACLE, "judge")(path or "shared")
        return oracle
    if kind == "rubric":
        return _open_rubric(part, server)
    if kind == "refusal-rule":
        from bfpo.judging.refusal_rule import open_refusal_rule

        return open_refusal_rule(path, kinds)
    if kind == "people":
        from bfpo.judging.people import PeopleJudge

        return PeopleJudge(path)
    if "+" in path and not Path(path).exists():
        raise RecipeError(
            f"judge '{part.text}': no file '{path}'; a + joins judges only where a kind follows it; "
            f"{did_you_mean(path.rpartition('+')[2].partition(':')[0], list(JUDGES))}"
        )
    if kind in GUARDS or kind in SCORERS:
        return open_guard(kind, path, threshold=0.5 if threshold is None else threshold)
    from bfpo.judging.languages import guard_languages
    from bfpo.judging.linear import load_judge

    judge = load_judge(Path(path), threshold=threshold)
    if judge.likeness is None and "safe" in judge.heads:
        warn(
            f"{path} was fitted by an earlier version: it can't say which answers are unlike those that it was "
            "fitted on; fit it again"
        )
    return guard_languages(judge, Path(path))


def _open_rubric(part: JudgePart, server: JudgeServerSection) -> Judge:
    from bfpo.judging.markers import special_tokens
    from bfpo.judging.rubric import RubricJudge

    # The likeliest verdict, which is a short line.
    sampling = Sampling(temperature=0.0, max_new_tokens=server.max_new_tokens)
    connection = server.model_dump(exclude={"max_new_tokens"})
    section = EngineSection(path=part.model, server=part.server, **connection)
    engine = open_engine(section, sampling)
    if part.is_remote:
        # Its tokenizer isn't known.
        return RubricJudge(engine, part.model)
    from bfpo.generation.in_process import TransformersEngine

    assert isinstance(engine, TransformersEngine)
    return RubricJudge(engine, part.model, special_tokens(engine.tokenizer))
