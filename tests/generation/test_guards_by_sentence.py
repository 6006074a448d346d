"""The guard that judges sentence by sentence: what is drawn again, where an answer is cut, what is counted."""

from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch

from bfpo.commands import chat
from bfpo.core.conversation import user_says
from bfpo.core.samples import Completion, Prompt, Sampling, Verdict
from bfpo.core.tools import as_tools
from bfpo.data.guard_summary import describe_guard, summarize_guard
from bfpo.errors import RecipeError
from bfpo.generation.guards.first_safe import ATTEMPT
from bfpo.generation.guards.sentences import SafeSentences, sentence_ends
from bfpo.generation.in_process import TokenAnswer, TransformersEngine
from bfpo.generation.scripted import ScriptedEngine
from bfpo.judging import guarded_engine
from bfpo.judging.guarded_engine import FirstSafeSection, guard_engine

PROMPT = Prompt("p", user_says("near"))
END = "<end>"


class PieceEngine:
    """Engine whose tokens are pieces of text; the k-th draw of an answer continues it with the k-th text."""

    def __init__(self, *texts, max_new_tokens=50):
        self._texts, self._pieces, self.asked = texts, [], []
        self.tokenizer = SimpleNamespace(decode=self._decode)
        self.settings_hash, self.faults, self._max = "pieces", {}, max_new_tokens

    def _decode(self, token_ids):
        return "".join(self._pieces[token] for token in token_ids)

    def begin_answer(self, prompt, sample):
        return TokenAnswer(prompt, sample)

    def continue_answers(self, beginnings, goes_on=None):
        for beginning in beginnings:
            self.asked.append((beginning.sample // ATTEMPT, self._decode(beginning.token_ids)))
            pieces = self._texts[beginning.sample // ATTEMPT].split("|")
            new = range(len(self._pieces), len(self._pieces) + len(pieces))
            self._pieces += pieces
            answer = beginning._replace(token_ids=(*beginning.token_ids, *new)[: self._max], prompt_tokens=3)
            # The end of an answer isn't asked about.
            for length in range(len(beginning.token_ids) + 1, len(answer.token_ids)):
                so_far = answer._replace(token_ids=answer.token_ids[:length])
                if goes_on is not None and not goes_on(so_far):
                    answer = so_far
                    break
            yield [answer]

    def completion_of(self, answer):
        text = self._decode(answer.token_ids)
        ending = {"finish_reason": "stop" if text.endswith(END) else "length", "prompt_tokens": 3}
        names = {"model": "m", "engine": "e", "settings_hash": self.settings_hash}
        count = len(answer.token_ids)
        text = text.removesuffix(END)
        return Completion.on(answer.prompt, answer.sample, text=text, completion_tokens=count, **ending, **names)


class WordJudge:
    """Judge that calls a text with `bad` unsafe, and fails on one with `broken`."""

    name, revision = "words", "1"

    def __init__(self):
        self.read = []

    def judge(self, completions):
        for completion in completions:
            self.read.append(completion.text)
            if "broken" in completion.text:
                raise RuntimeError("no reply")
            yield Verdict.on(completion, self, safe="bad" not in completion.text)


def run(*texts, samples=2, prompt=PROMPT, **options):
    """Return the answer, what the engine was asked, and what the judge read."""
    engine, judge = PieceEngine(*texts, **options), WordJudge()
    ((completion,),) = SafeSentences(engine, judge, samples=samples, refusal="no").generate([(prompt, 0)])
    return completion, engine.asked, judge.read


def counts(completion):
    return {name: value for name, value in asdict(completion.guard).items() if value and name != "seconds"}


def test_an_answer_that_passes_is_the_models_own():
    completion, asked, read = run(f"red| box|.| Blue| door|.|{END}")
    assert (completion.text, completion.finish_reason, completion.sample) == ("red box. Blue door.", "stop", 0)
    assert (completion.completion_tokens, asked) == (7, [(0, "")])
    # The last sentence is judged with the whole answer.
    assert read == ["red box.", "red box. Blue door."]
    assert counts(completion) == {"samples": 1, "tokens": 7, "judge_calls": 2, "sentences": 2}


def test_a_sentence_that_does_not_pass_is_drawn_again_from_where_it_began():
    completion, asked, read = run(
        f"red.| bad| a.| never| read.|{END}", f" bad| b.|{END}", f" lamp.| ball.|{END}", samples=3
    )
    assert (completion.text, completion.finish_reason) == ("red. lamp. ball.", "stop")
    assert asked == [(0, ""), (1, "red."), (2, "red.")]
    assert read == ["red.", "red. bad a.", "red. bad b.", "red. lamp.", "red. lamp. ball."]
    assert counts(completion) == {"samples": 3, "tokens": 12, "judge_calls": 5, "unsafe": 2, "sentences": 3}


def test_each_sentence_has_its_own_number_of_samples():
    texts = (f"bad a.| x.|{END}", f"red.| bad a.| y.|{END}", f" lamp.| bad b.| z.|{END}", f" ball.|{END}")
    completion, asked, _ = run(*texts, samples=2)
    assert completion.text == "red. lamp. ball."
    assert asked == [(0, ""), (1, ""), (2, "red."), (3, "red. lamp.")]


def test_without_a_further_sentence_the_answer_is_cut():
    completion, _, read = run(f"red.| bad a.| x|{END}", f" bad b.| y|{END}")
    assert (completion.text, completion.finish_reason, completion.completion_tokens) == ("red.", "length", 1)
    assert not completion.is_blocked
    assert read == ["red.", "red. bad a.", "red. bad b."]
    assert counts(completion) == {
        **{"samples": 2, "tokens": 7, "judge_calls": 3, "unsafe": 2},
        **{"sentences": 1, "cut": 1},
    }
    summary = summarize_guard([completion])
    assert (summary.refusals, summary.cut, summary.drawn) == (0, 1, ())
    assert "1 sentences passed, and 1 answers were cut" in describe_guard(summary)


def test_without_a_first_sentence_the_answer_is_the_refusal():
    completion, _, _ = run(f"bad a.| x|{END}", f"broken.| y|{END}")
    assert (completion.text, completion.finish_reason) == ("no", "guarded")
    assert counts(completion) == {"samples": 2, "tokens": 6, "judge_calls": 2, "unsafe": 1, "failed": 1}


def test_a_repeated_sentence_is_rejected_unread():
    completion, _, read = run(f"red.| bad a.| x|{END}", f" bad a.| y|{END}", f" lamp.|{END}", samples=3)
    assert completion.text == "red. lamp."
    assert read == ["red.", "red. bad a.", "red. lamp."]
    assert counts(completion)["repeats"] == 1


def test_a_thought_is_judged_with_the_first_sentence_and_a_call_as_a_whole():
    _, _, read = run(f"<think>|one.| two.|</think>| red.| lamp.|{END}")
    assert [text.strip() for text in read] == ["red.", "red. lamp."]
    tools = as_tools([{"type": "function", "function": {"name": "pay", "parameters": {}}}])
    _, _, read = run(f"red.| lamp.|{END}", prompt=replace(PROMPT, tools=tools))
    assert read == ["red. lamp."]


def test_an_answer_of_the_maximum_length_ends_there():
    completion, asked, _ = run(f"red.| lamp| ball|{END}", max_new_tokens=3)
    assert (completion.text, completion.finish_reason, len(asked)) == ("red. lamp ball", "length", 1)


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        ("a|.| b|.", ["a.", "a. b."]),
        ("3|.|5| m|.| b", ["3.5 m."]),
        ('he| said| "a|."|\n|b', ['he said "a."', 'he said "a."\n']),
        ("a|!?| b", ["a!?"]),
        ("a|\n|b|\n\n|c", ["a\n", "a\nb\n\n"]),
        ("你好|。|再见|！|x", ["你好。", "你好。再见！"]),
        ("no| end", []),
    ],
)
def test_ends_of_sentences(pieces, expected):
    pieces = [*pieces.split("|"), " "]
    ends = sentence_ends(lambda ids: "".join(pieces[i] for i in ids), range(len(pieces)))
    assert ["".join(pieces[:end]) for end in ends] == expected


def test_answers_do_not_depend_on_the_batch(make_model, tokenizer):
    class Even(WordJudge):
        def judge(self, completions):
            for completion in completions:
                yield Verdict.on(completion, self, safe=len(completion.text) % 2 == 0)

    model = make_model().double()
    with torch.no_grad():
        # Line breaks are frequent, so that there are sentences.
        newline = tokenizer("\n", add_special_tokens=False)["input_ids"][-1]
        model.lm_head.weight[newline] *= 3
    requests = [(Prompt(f"p{number}", user_says(f"near {number}")), 0) for number in range(5)]

    def made(requests, judge, max_batch_tokens=4096, seed=0):
        sampling = Sampling(max_new_tokens=12, temperature=1.0, seed=seed)
        options = {"name": "m", "identity": "i", "max_batch_tokens": max_batch_tokens}
        engine = TransformersEngine(model, tokenizer, sampling, **options)
        if judge is None:
            return {c.prompt_id: c for batch in engine.generate(requests) for c in batch}
        guard = SafeSentences(engine, judge, samples=2, refusal="no")
        made = (completion for batch in guard.generate(requests) for completion in batch)
        return {c.prompt_id: (c.text, c.finish_reason, replace(c.guard, seconds=0.0)) for c in made}

    together = made(requests, Even())
    assert made(requests[::-1], Even(), max_batch_tokens=1) == together
    assert {name: answer for request in requests for name, answer in made([request], Even()).items()} == together
    assert made(requests, Even(), seed=1) != together
    assert sum(of_guard.sentences for _, _, of_guard in together.values()) > 2
    shown = {}
    options = {"name": "m", "identity": "i"}
    engine = TransformersEngine(model, tokenizer, Sampling(max_new_tokens=12, temperature=1.0), **options)
    guard = SafeSentences(
        engine, Even(), samples=2, refusal="no", show=lambda part: shown.setdefault(part.prompt_id, []).append(part)
    )
    for batch in guard.generate(requests):
        for c in batch:
            drawn = replace(c.guard, seconds=0.0, tokens=together[c.prompt_id][2].tokens)
            assert (c.text, c.finish_reason, drawn) == together[c.prompt_id]
            assert len(shown.get(c.prompt_id, [])) == c.guard.sentences
            assert c.finish_reason == "guarded" or shown[c.prompt_id][-1].text == c.text
    # A judge that passes everything changes nothing.
    bare = made(requests, None)
    assert {name: text for name, (text, _, _) in made(requests, WordJudge()).items()} == {
        name: completion.text for name, completion in bare.items()
    }


STREAMED = [
    ((f"red| box|.| Blue| door.|{END}",), ["red box.", "red box. Blue door."]),
    ((f"red.| bad| a.| never| read.|{END}", f" bad| b.|{END}", f" lamp.| ball.|{END}"), ["red.", "red. lamp.",
        "red. lamp. ball."]),
    ((f"red.| bad a.| x|{END}", f" bad a.| y|{END}", f" bad b.| y|{END}"), ["red."]),
    ((f"bad a.| x|{END}", f"broken.| y|{END}", f"bad c.|{END}"), []),
    ((f"<think>|one.| two.|</think>| red.| lamp.|{END}",), ["red.", "red. lamp."]),
    ((f"red|.|\n|bad.| x|{END}", f"lamp|.|\n|{END}"), ["red.", "red.\n", "red.\nlamp.\n"]),
    ((f"red|.|\n|{END}",), ["red.\n"]),
]  # fmt: skip


@pytest.mark.parametrize(("texts", "expected"), STREAMED)
def test_only_what_has_passed_is_shown_and_as_soon_as_the_next_sentence_begins(texts, expected):
    events = []

    class Judge(WordJudge):
        def judge(self, completions):
            events.extend(("read", completion.text) for completion in completions)
            yield from super().judge(completions)

    engine, whole = PieceEngine(*texts), run(*texts, samples=3)[0]
    guard = SafeSentences(
        engine, Judge(), samples=3, refusal="no", show=lambda part: events.append(("shown", part.text))
    )
    ((completion,),) = guard.generate([(PROMPT, 0)])
    # The same answer as without showing; a sample that is rejected isn't drawn to its end.
    assert replace(completion, guard=None) == replace(whole, guard=None)
    streamed, plain = ({**counts(answer), "tokens": 0} for answer in (completion, whole))
    assert streamed == plain
    assert completion.guard.tokens <= whole.guard.tokens
    shown = [text for kind, text in events if kind == "shown"]
    assert shown == expected
    for index, event in enumerate(events):
        if event[0] == "shown":
            assert events[index - 1] == ("read", event[1])


def test_the_rest_of_a_rejected_sample_is_not_drawn():
    texts = (f"red.| bad a.| never| read|{END}", f" lamp.|{END}")
    engine = PieceEngine(*texts)
    guard = SafeSentences(engine, WordJudge(), samples=2, refusal="no", show=lambda part: None)
    ((completion,),) = guard.generate([(PROMPT, 0)])
    # "never" shows that the sentence before has ended.
    assert (completion.text, completion.guard.tokens) == ("red. lamp.", 3 + 2)


def test_chat_shows_sentences_as_they_pass(monkeypatch, capsys):
    texts = (f"red.| bad a.| x|{END}", f" lamp| \x1b[2J.| ball.|{END}")
    on_screen = []

    class Judge(WordJudge):
        def judge(self, completions):
            on_screen.append(capsys.readouterr().out)
            yield from super().judge(completions)

    def guarded(engine, sampling, guard, *, show):
        return SafeSentences(PieceEngine(*texts), Judge(), samples=2, refusal="no", show=show)

    monkeypatch.setattr(chat, "guard_engine", guarded)
    section = FirstSafeSection(kind="first_safe", judge="oracle", by="sentence")
    answer = chat._Whole(None, Sampling(), section)
    assert answer(user_says("near")).content == "red. lamp \x1b[2J. ball."
    # Read: "red.", "red. bad a.", "red. lamp .", and the whole answer.
    assert [*on_screen, capsys.readouterr().out] == ["", "red.", "", " lamp \\x1b[2J.", " ball.\n"]


def test_it_needs_a_model_in_this_process(monkeypatch):
    monkeypatch.setattr(guarded_engine, "open_judge", lambda spec, **_: WordJudge())
    section = FirstSafeSection(kind="first_safe", judge="oracle", by="sentence")
    with pytest.raises(
        RecipeError, match=r"guard.by is 'sentence', which needs a model in this process.*by to answer"
    ):
        guard_engine(ScriptedEngine(lambda *_: ""), Sampling(), section)


def test_every_setting_is_in_the_hash():
    def make(engine="pieces", samples=2, refusal="no", revision="1"):
        inner, judge = PieceEngine(), WordJudge()
        inner.settings_hash, judge.revision = engine, revision
        return SafeSentences(inner, judge, samples=samples, refusal=refusal).settings_hash

    assert len({make(), make("b"), make(samples=3), make(refusal="nein"), make(revision="2")}) == 5
