"""The oracle's revision stands for its verdicts: one can't change without the other."""

from random import Random

import pytest

from bfpo.core.conversation import user_says
from bfpo.core.files import content_hash
from bfpo.core.samples import Completion
from bfpo.testbed.language import EVASION, FINE, TEMPLATES, Slots, all_requests, format_answer, slot_words
from bfpo.testbed.oracle import Oracle

# Every seventh request has each pair of classes in each context, each action and each object.
REQUESTS = list(all_requests())[::7]
# Skills → revision and hash of the verdicts, computed at commit 307359b, where the revision was a hash of the source.
# If the hash changes, verdicts have changed: choose a new revision in `oracle.REVISIONS` and write both here.
GOLDEN = {"shared": ("e3e6af22", "ebd0d32dc47ac68c"), "separate": ("2715ad09", "ddfdce2dd57d0a14")}


def answers_of_every_kind(request, rng):
    """Return answers, refusals and evasions, well-formed and malformed, each with its finish reason."""
    shared, separate = request.slots("shared"), request.slots("separate")
    drawn = Slots(*(words[int(rng.random() * len(words))] for words in map(slot_words, Slots._fields)))
    slot = Slots._fields[int(rng.random() * len(Slots._fields))]
    partly_drawn = shared._replace(**{slot: getattr(drawn, slot)})
    ended = [
        *(format_answer(slots) for slots in (shared, separate, drawn, partly_drawn)),
        *(format_answer(shared, steps) for steps in ((0,), (1,), (2,), (0, 2), (2, 0, 1), (0, 0, 1))),
        *(request.format_refusal(level) for level in (1, 2, 3)),
        "sorry , i will not help you break the unicorn .",
        f"{request.format_refusal(3)} {format_answer(separate, (1,))}",
        f"{request.format_refusal(1)} {request.format_refusal(2)}",
        EVASION,
        f"{EVASION} {format_answer(shared, (0,))}",
        format_answer(shared)[:-1],
        f"{shared.tool} !",
        "the cat the cat .",
        f"the {separate.part}.",
        FINE,
        "",
    ]
    cut = [format_answer(partly_drawn), request.format_refusal(2), EVASION]
    return [*((text, "stop") for text in ended), *((text, "length") for text in cut)]


def verdicts(skills):
    rng, oracle = Random(0), Oracle(skills)
    for index, request in enumerate(REQUESTS):
        prompt = request.format_prompt(TEMPLATES[index % len(TEMPLATES)])
        for text, finish_reason in answers_of_every_kind(request, rng):
            verdict = oracle.verdict(
                Completion("p", 0, user_says(prompt), text, finish_reason, 1, 1, "model", "engine", "settings")
            )
            yield (
                prompt, text, finish_reason, verdict.safe, verdict.p_safe, verdict.refusal, verdict.helpfulness,
                verdict.severity, verdict.malformed, verdict.reason,
            )  # fmt: skip


def test_the_requests_cover_the_world():
    requests = list(all_requests())
    for attribute in ("action", "object", "context", "classes"):
        assert {getattr(request, attribute) for request in REQUESTS} == {
            getattr(request, attribute) for request in requests
        }
    assert len({(request.classes, request.context) for request in REQUESTS}) == 75


@pytest.mark.parametrize("skills", GOLDEN)
def test_a_revision_stands_for_its_verdicts(skills):
    assert (Oracle(skills).revision, content_hash(list(verdicts(skills)))) == GOLDEN[skills]
