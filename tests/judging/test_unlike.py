"""Answers unlike those that a linear judge was fitted on, its file without text, and several sources."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest

from bfpo.commands import judge as commands
from bfpo.core.conversation import prompt_key
from bfpo.core.files import write_jsonl
from bfpo.errors import DataError, RecipeError
from bfpo.judging.features import VIEWS, Texts
from bfpo.judging.fit import FittingSet, fit_head, measure_transfer
from bfpo.judging.labeled import read_labeled
from bfpo.judging.likeness import MAX_REFERENCES, UNLIKE_BAND, choose_references, find_limits, is_unlike
from bfpo.judging.linear import load_judge, save_judge
from bfpo.judging.ngrams import hash_ngrams, hash_terms

from .test_linear import TOPICS, completion

INGREDIENTS = ["flour", "milk", "salt", "sugar", "butter", "pepper", "honey", "oil"]
PLANTS = ["moss", "fern", "ivy", "oak", "reed", "rose", "lily", "palm", "pine", "elm", "yew", "ash"]


def kitchen_rows(rng, prompts=24):
    """Return answers to kitchen questions; those that heat are unsafe."""
    rows = []
    for number in range(prompts):
        prompt = f"how do I make {TOPICS[number % 12]} number {number} at home?"
        for sample in range(4):
            words = " and then ".join(f"mix the {word}" for word in rng.choice(INGREDIENTS, 3))
            heats = sample % 2 == 1
            text = f"To do that, {words}, {'heat it up in the oven' if heats else 'let it rest in the bowl'}."
            rows.append({"prompt": prompt, "text": text, "safe": not heats, "refusal": sample == 0})
    return rows


def garden_rows(rng):
    """Return answers in other words to other questions."""
    rows = []
    for number in range(24):
        plant = PLANTS[number % 12]
        for burns in (True, False):
            verb = "burn" if burns else "water"
            text = f"Gardeners usually {verb} their {plant} every {rng.choice(PLANTS)} season, patch {number}."
            rows.append({"prompt": f"which care suits {plant} {number}?", "text": text, "safe": not burns})
    return rows


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("labeled"), np.random.default_rng(0)
    write_jsonl(folder / "kitchen.jsonl", kitchen_rows(rng))
    write_jsonl(folder / "garden.jsonl", garden_rows(rng))
    return folder


@pytest.fixture(scope="module")
def kitchen(files):
    """Return a judge that was fitted on the kitchen only, and its file."""
    answers = FittingSet(read_labeled(str(files / "kitchen.jsonl")), "kitchen")
    fitted, path = answers.fit(answers.rows), files / "kitchen.npz"
    prompts = {answer.prompt_key for answer in answers.answers}
    return save_judge(fitted.heads, path, likeness=fitted.likeness, fitted_prompts=prompts), path


SURE = "To do that, mix the flour and then mix the milk and then mix the salt, let it rest in the bowl."
KITCHEN_PROMPT = "how do I make bread number 3 at home?"


def test_an_unlike_answer_is_undecided_and_says_so(kitchen):
    judge, _ = kitchen
    like, other = judge.judge([completion(text, KITCHEN_PROMPT) for text in (SURE, "Let ivy rest upon old walls.")])
    assert (like.safe, like.reason) == (True, None)
    assert other.safe is None
    assert other.p_safe is not None
    assert re.search(
        r"the answer is unlike .*: similarity 0\.\d+ to the nearest, at least 0\.\d+ for 95 %", other.reason
    )
    assert (is_unlike(like), is_unlike(other)) == (False, True)


def test_an_unlike_prompt_widens_the_band_to_002_and_098(kitchen):
    judge, _ = kitchen
    # Less sure than it is, and all answers are alike for it.
    heads = {"safe": replace(judge.heads["safe"], scale=judge.heads["safe"].scale / 5)}
    judge = replace(judge, heads=heads, likeness=replace(judge.likeness, min_similarity=0.0))
    texts = [SURE, SURE.replace("let it rest", "heat it up"), SURE.replace("To do that", "let it rest")]
    usual, other = (
        list(judge.judge([completion(text, prompt) for text in texts]))
        for prompt in (KITCHEN_PROMPT, "whither wander weary wolves?")
    )
    low, high = UNLIKE_BAND
    for verdict in other:
        assert re.search(r"the prompt is unlike .*: \d+% of its words are new, at most \d+%", verdict.reason)
        assert verdict.safe is (True if verdict.p_safe >= high else False if verdict.p_safe < low else None)
    # Decided for a usual prompt, and between the wide limits for this one.
    pairs = zip(usual, other, strict=True)
    changed = [verdict for before, verdict in pairs if before.safe is not None and verdict.safe is None]
    assert changed
    assert all("is between 0.02 and 0.98" in verdict.reason for verdict in changed)


def test_a_threshold_decides_unlike_answers_too_and_still_says_so(kitchen):
    _, path = kitchen
    (verdict,) = load_judge(path, threshold=0.5).judge([completion("Let ivy rest upon old walls.", KITCHEN_PROMPT)])
    assert verdict.safe is not None
    assert is_unlike(verdict)


def test_a_threshold_and_a_stored_band_of_the_same_numbers_are_two_revisions(kitchen, tmp_path):
    judge = kitchen[0]
    path = tmp_path / "decided.npz"
    stored = save_judge(judge.heads, path, abstain_threshold=0.5, likeness=judge.likeness)
    with_threshold = load_judge(path, threshold=0.5)
    unlike = completion("Let ivy rest upon old walls.", KITCHEN_PROMPT)
    labels = [next(iter(opened.judge([unlike]))).safe for opened in (stored, with_threshold)]
    assert (stored.band, labels[0]) == (with_threshold.band, None)
    assert labels[1] is not None
    assert stored.revision != with_threshold.revision


def test_about_a_twentieth_of_held_out_answers_is_beyond_each_limit():
    rng = np.random.default_rng(0)
    similarity, unknown = rng.random(1000), rng.random(1000)
    least, most = find_limits(type("Held", (), {"similarity": similarity, "unknown": unknown}))
    assert (similarity < least).mean() == pytest.approx(0.05, abs=0.002)
    assert (unknown > most).mean() == pytest.approx(0.05, abs=0.002)


def test_the_limits_come_from_held_out_prompts(files, kitchen):
    """By hand: with the folds of the calibration, the nearest answer among those to other prompts."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.model_selection import GroupKFold

    from bfpo.judging.features import mask_prompt_words

    rows = [json.loads(line) for line in (files / "kitchen.jsonl").read_text().splitlines()]
    prompts = [row["prompt"] for row in rows]
    texts = [mask_prompt_words(row["prompt"], row["text"]) for row in rows]
    nearest = np.zeros(len(rows))
    for train, test in GroupKFold(5).split(texts, groups=np.unique(prompts, return_inverse=True)[1]):
        vectorizer = TfidfVectorizer(ngram_range=(1, 2), token_pattern=r"\w+|[^\w\s]", sublinear_tf=True, min_df=2)
        fitted = vectorizer.fit_transform([texts[row] for row in train])
        nearest[test] = (vectorizer.transform([texts[row] for row in test]) @ fitted.T).toarray().max(axis=1)
    assert kitchen[0].likeness.min_similarity == pytest.approx(np.quantile(nearest, 0.05))


def test_a_judge_s_file_has_no_text_of_its_answers_and_prompts(files, kitchen):
    _, path = kitchen
    with np.load(path) as file:
        content = b"".join(file[name].tobytes() for name in file.files)
    rows = [json.loads(line) for line in (files / "kitchen.jsonl").read_text().splitlines()]
    # Shorter words occur in any bytes by chance.
    words = {word for row in rows for word in re.findall(r"\w{5,}", f"{row['prompt']} {row['text']}".lower())}
    assert {"flour", "butter", "bread", "number"} <= words
    for text in (content, path.read_bytes()):
        for encoding in ("utf-8", "utf-16-le", "utf-32-le"):
            assert not [word for word in words if word.encode(encoding) in text.lower()]


def test_the_file_gives_the_same_verdicts_and_knows_its_prompts(files, kitchen):
    judge, path = kitchen
    completions = [
        answer.completion for name in ("kitchen", "garden") for answer in read_labeled(f"{files}/{name}.jsonl")
    ]
    loaded = load_judge(path)
    assert list(loaded.judge(completions)) == list(judge.judge(completions))
    assert prompt_key("How do I make bread number 0  at home?") in loaded.fitted_prompts
    assert prompt_key("how do I make bread?") not in loaded.fitted_prompts


def test_damaged_references_are_refused(kitchen, tmp_path):
    _, path = kitchen
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    for name, value in (
        ("like.columns", arrays["like.columns"] + 10**6),
        ("like.counts", arrays["like.counts"][:-1]),
        ("like.counts", arrays["like.counts"] * 0),
        ("like.limits", arrays["like.limits"][:2]),
        ("fitted.prompts", arrays["fitted.prompts"].astype(float)),
        ("safe.0.in", np.frombuffer(b"safe.7", dtype=np.uint8)),
    ):
        np.savez(tmp_path / "damaged.npz", **(arrays | {name: value}))
        with pytest.raises(DataError, match="not the file of a judge"):
            load_judge(tmp_path / "damaged.npz")


def test_hashes_are_those_of_n_grams_as_scikit_learn_makes_them():
    from sklearn.feature_extraction.text import CountVectorizer

    texts = ["a bb ccc , dddd eeeee", "x", "bb ccc ccc \U0001f600 naïve 茶", ""]
    for unit, min_n, max_n in (("word", 1, 3), ("char_wb", 2, 5)):
        pattern = {"token_pattern": r"\w+|[^\w\s]"} if unit == "word" else {}
        vectorizer = CountVectorizer(analyzer=unit, ngram_range=(min_n, max_n), **pattern)
        counts = vectorizer.fit_transform(texts)
        hashes = hash_terms(vectorizer.get_feature_names_out().tolist(), unit)
        assert len(set(hashes.tolist())) == counts.shape[1]
        ngrams = hash_ngrams([text.split() for text in texts], unit, min_n, max_n)
        ours = {}
        for row, value in zip(ngrams.rows.tolist(), ngrams.hashes.tolist(), strict=True):
            ours[row, value] = ours.get((row, value), 0) + 1
        rows, columns = counts.nonzero()
        expected = {
            (row, int(hashes[column])): counts[row, column]
            for row, column in zip(rows.tolist(), columns.tolist(), strict=True)
        }
        assert ours == expected


def test_features_do_not_depend_on_the_batch(kitchen):
    head = kitchen[0].heads["safe"]
    texts = [SURE, "x", "", "Let ivy rest."]
    together = head.probability([KITCHEN_PROMPT] * 4, texts)
    apart = [head.probability([KITCHEN_PROMPT], [text])[0] for text in texts]
    assert together.tolist() == apart
    features = Texts([KITCHEN_PROMPT], [""], VIEWS["safe"]).features(head.vocabularies)
    assert features.unknown[VIEWS["safe"][0]].tolist() == [0]


def test_references_are_at_most_two_thousand():
    assert choose_references(3).tolist() == [0, 1, 2]
    many = choose_references(MAX_REFERENCES * 2)
    assert len(set(many.tolist())) == MAX_REFERENCES
    assert many.tolist() == choose_references(MAX_REFERENCES * 2).tolist()


def test_a_judge_fitted_on_several_sources_reports_transfer_first(files, tmp_path, capsys):
    paths = [f"{files}/kitchen.jsonl", f"{files}/garden.jsonl"]
    commands.fit_judge(paths, tmp_path / "judge.npz")
    card = json.loads((tmp_path / "judge.card.json").read_text())
    assert list(card["fitted_on"]["sources"]) == paths
    assert set(card["fitted_on"]["files"]) == {"kitchen.jsonl", "garden.jsonl"}
    assert card["fitted_on"]["answers"] == 96 + 48
    kitchen, garden = (card["transfer"][path] for path in paths)
    assert kitchen["safe"]["n"] == 96
    # The garden has no labels of refusals, so no judge of them can be fitted without the kitchen.
    assert "no other source" in kitchen["refusal"]["reason"]
    assert "refusal" not in garden
    # The same as a judge that is fitted on the kitchen's file only.
    answers = FittingSet(read_labeled(paths[0]), "kitchen")
    alone = answers.fit(answers.rows, ["safe"]).judge((0.3, 0.7))
    verdicts = list(alone.judge([answer.completion for answer in read_labeled(paths[1])]))
    assert garden["unlike"] == sum(map(is_unlike, verdicts)) > 40
    assert garden["safe"]["undecided"] == sum(verdict.safe is None for verdict in verdicts)
    false_safe = [verdict.safe is True for verdict in verdicts[::2]]
    assert garden["safe"]["false_yes"][0] == sum(false_safe) / len(false_safe)
    output = capsys.readouterr().out
    assert output.index("TRANSFER") < output.index("on held-out prompts")
    assert "false-safe rate" in output


def test_prompts_that_sources_share_are_not_fitted_on(files):
    answers = read_labeled(f"{files}/kitchen.jsonl")
    both = FittingSet([*answers, *answers], "twice")
    first, second = np.split(both.rows, 2)
    (transfer, _) = measure_transfer(both, [first, second], (0.3, 0.7))
    assert transfer.verdicts["safe"] is None
    assert "no other source has answers to other prompts" in transfer.reasons["safe"]


def test_one_source_has_no_transfer_and_says_so(files, tmp_path, capsys):
    commands.fit_judge([f"{files}/kitchen.jsonl"], tmp_path / "judge.npz")
    assert "transfer isn't measured with one source" in capsys.readouterr().out
    for other in ("kitchen.jsonl", "./kitchen.jsonl", "k*.jsonl"):
        with pytest.raises(RecipeError, match="named twice"):
            commands.fit_judge([f"{files}/kitchen.jsonl", f"{files}/{other}"], tmp_path / "judge.npz")


def test_an_evaluation_says_whether_the_judge_was_fitted_on_the_set(files, kitchen, tmp_path, capsys):
    from bfpo.judging.evaluate import evaluate_judges

    def evaluate(*names):
        rows = [line for name in names for line in (files / f"{name}.jsonl").read_text().splitlines()]
        (tmp_path / "set.jsonl").write_text("\n".join(rows))
        out = tmp_path / f"{'-'.join(names)}.json"
        evaluate_judges(
            str(tmp_path / "set.jsonl"), [f"linear:{kitchen[1]}"], threshold=None, max_false_safe=0.1, out=out
        )
        (row,) = json.loads(out.read_text())["judges"].values()
        return row, capsys.readouterr().out

    row, output = evaluate("garden")
    assert row["fitted_on"] == {"answers": 0, "of": 48}
    assert "transfer: this judge was fitted on none of these prompts" in output
    assert row["unlike"] > 40
    assert f"{row['unlike']} of 48 answers, or their prompts, are unlike" in output
    row, output = evaluate("kitchen")
    assert row["fitted_on"] == {"answers": 96, "of": 96}
    assert "fitted on these prompts" in output
    row, output = evaluate("kitchen", "garden")
    assert row["fitted_on"] == {"answers": 96, "of": 144}
    assert row["other_prompts"]["safe"]["all"]["n"] == 48
    assert "safe, prompts that it wasn't fitted on" in output


def test_a_head_of_a_part_is_the_same_as_if_its_answers_were_alone(files):
    """The n-grams of all answers are counted once, and those of the others have no effect on a fit."""
    answers = [answer for name in ("kitchen", "garden") for answer in read_labeled(f"{files}/{name}.jsonl")]
    part = FittingSet(answers, "both").fit(np.arange(96), ["safe"])
    alone = FittingSet(answers[:96], "kitchen").fit(np.arange(96), ["safe"])
    prompts = [answer.completion.prompt[-1].content for answer in answers]
    texts = [answer.completion.text for answer in answers]
    p = part.heads["safe"].probability(prompts, texts)
    assert p.tolist() == alone.heads["safe"].probability(prompts, texts).tolist()
    labels = [bool(answer.safe) for answer in answers[:96]]
    assert p.tolist() == fit_head("safe", prompts[:96], texts[:96], labels).probability(prompts, texts).tolist()
    assert part.likeness.min_similarity == alone.likeness.min_similarity
