"""README and docs say what is true: their code runs, and their lists are those of the code."""

import json
import re
import runpy
from importlib import import_module
from operator import attrgetter
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bfpo import bfpo_loss
from bfpo.commands.app import app
from bfpo.config import recipes as recipe
from bfpo.config.loading import check_recipe, parse_yaml
from bfpo.config.recipes import NewModel, Source, TrainRecipe
from bfpo.core.pairs import COLUMNS
from bfpo.data.adapters import ADAPTERS, DEMONSTRATIONS
from bfpo.data.prompt_sets import PROMPT_SETS
from bfpo.evaluation import differences as comparing
from bfpo.evaluation import scoring
from bfpo.experiments.methods import METHODS
from bfpo.losses.build import LOSSES, make_loss
from bfpo.losses.labeling import TABLES
from bfpo.losses.pairwise import BFPO
from bfpo.model.new import new_model
from bfpo.stats.intervals import MIN_PROMPTS, score_interval, t_interval
from bfpo.stats.length_control import MIN_LENGTH_RATIO
from bfpo.training.arguments import training_arguments

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def block(language: str, text: str) -> str:
    """Return the block of the README in a language that contains a text."""
    found = re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)
    (match,) = (code for code in found if text in code)
    return match


def test_the_loss_in_the_readme_is_the_loss():
    names = {}
    exec(block("python", "def loss"), names)
    generator = torch.Generator().manual_seed(0)
    logps = [torch.randn(16, dtype=torch.float64, generator=generator) * 9 for _ in range(4)]
    bits = [torch.randint(0, 2, (16,), generator=generator) for _ in range(2)]
    torch.testing.assert_close(names["loss"](*logps, *bits), bfpo_loss(*logps, *bits))


def test_the_first_lines_of_python_in_the_readme_train_a_model(tmp_path, monkeypatch, tokenizer):
    monkeypatch.chdir(tmp_path)
    model = new_model(NewModel(shape="nano"), tokenizer)
    model.save_pretrained("model")
    tokenizer.save_pretrained("model")
    code = block("python", "BFPOTrainer(")
    # Without a hub another model stands in; nothing else changes.
    names = {}
    exec(code.replace("HuggingFaceTB/SmolLM2-135M-Instruct", "model"), names)
    folder = Path(names["trainer"].args.output_dir)
    assert AutoModelForCausalLM.from_pretrained(folder).config.vocab_size == model.config.vocab_size
    assert AutoTokenizer.from_pretrained(folder).chat_template == tokenizer.chat_template


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 130


def test_the_recipe_in_the_readme_is_one():
    check_recipe(parse_yaml(block("yaml", "train_only"), "README"), TrainRecipe, "README")


def test_the_results_in_the_readme_are_those_of_sixteen_seeds():
    comparison = json.loads((ROOT / "benchmarks/results/testbed/sixteen/comparison.json").read_text())
    lines = {(line["world"], line["variant"], line["metric"]): line for line in comparison["lines"]}
    variants = {"base": "base model", "dpo_h": "DPO on helpfulness", "dpo_mix": "DPO on a naive mix", "bfpo": "BFPO"}
    metrics = ("harmful/safety", "benign/helpfulness", "all/harmonic_mean")
    for world in ("shared", "separate"):
        for variant, title in variants.items():
            means = ["{:.2f} [{:.2f}, {:.2f}]".format(*lines[world, variant, metric]["mean"]) for metric in metrics]
            first = f"{world} skills" if variant == "base" else ""
            assert f"| {first} | {title} | {' | '.join(means)} |".replace("|  |", "| |") in README
        assert len(lines[world, "bfpo", metrics[0]]["values"]) == 16
    mix = [lines[world, "dpo_mix", "all/harmonic_mean"] for world in ("shared", "separate")]
    assert [line["verdict"] for line in mix] == ["not distinguishable", "worse"]
    assert mix[0]["difference"][0] > 0
    tested = {variant for world, variant, _ in lines if world == "shared"} - {"bfpo"}
    assert f"Holm-adjusted over {len(tested)} variants" in " ".join(README.split())


def test_the_speed_in_the_readme_is_that_of_its_benchmark():
    groups = json.loads((ROOT / "benchmarks/results/step_speed.json").read_text())["groups"]
    seconds = [group["seconds"] for name, group in groups.items() if "system malloc" not in name]
    assert len(seconds) >= 4
    ranges = []
    for other in ("TRL", "TRL, completion-only head"):
        medians = [np.median(np.array(each[other]) / np.array(each["bfpo"])) for each in seconds]
        ranges.append(f"{min(medians):.1f} to {max(medians):.1f} times")
    whole, completions_only = ranges
    text = f"{whole} as fast as TRL's, {completions_only} if TRL scores completion tokens only"
    assert text in " ".join(README.split())


def test_the_figure_of_the_readme_is_what_its_script_draws():
    drawn = runpy.run_path(str(ROOT / "docs/make_readme_figure.py"))["figure"]()
    assert (ROOT / "docs/readme.svg").read_text() == drawn, "run python docs/make_readme_figure.py"


def test_the_file_tree_names_what_is_there():
    page = (ROOT / "docs/design.md").read_text()
    tree = re.search(r"```text\nsrc/bfpo/\n(.*?)```", page, flags=re.DOTALL)[1]
    named = {name.strip() for name in re.findall(r"(?:\w+\.py|^  \w+/)", tree, flags=re.MULTILINE)}
    modules = {path.name for path in (ROOT / "src/bfpo").glob("*.py") if not path.name.startswith("__")}
    packages = {f"{path.name}/" for path in (ROOT / "src/bfpo").iterdir() if (path / "__init__.py").exists()}
    assert named == modules | packages


def test_the_hops_of_the_two_walks_exist():
    page = (ROOT / "docs/design.md").read_text()
    hops = re.findall(r"^\| \d+ \| `(.+?):(.+?)` \|", page, flags=re.MULTILINE)
    assert len(hops) == 20
    for path, name in hops:
        module = import_module("bfpo." + path.removesuffix(".py").replace("/", "."))
        assert attrgetter(name)(module), (path, name)


def test_the_index_lists_every_page_and_every_command():
    index = (ROOT / "docs/index.md").read_text()
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"index.md"}
    assert [name for name in sorted(pages) if f"]({name})" not in index] == []
    names = {command.name or command.callback.__name__ for command in app.registered_commands if not command.hidden}
    assert [name for name in sorted(names) if f"`bfpo {name}" not in index] == []


def test_every_local_link_leads_somewhere():
    for file in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", file.read_text()):
            assert (file.parent / target).exists(), f"{file.name}: {target}"


def test_method_tells_every_loss():
    method = (ROOT / "docs/method.md").read_text()
    assert [name for name in LOSSES if f"`{name}`" not in method] == []


def test_the_testbed_page_tells_every_method():
    page = (ROOT / "docs/testbed.md").read_text()
    rows = [f"| `{name}` | {method.title} |" for name, method in METHODS.items()]
    assert "\n".join(rows) in page


def test_data_page_tells_every_column_and_adapter():
    page = (ROOT / "docs/data.md").read_text()
    assert [name for name in (*COLUMNS, *ADAPTERS, *DEMONSTRATIONS) if f"`{name}`" not in page] == []


def test_recipe_page_is_what_its_script_makes():
    made = runpy.run_path(str(ROOT / "docs/make_recipes_page.py"))["page"]()
    committed = (ROOT / "docs/recipes.md").read_text()
    assert committed == made, "the page is behind the code: run python docs/make_recipes_page.py"
    # The script finds sections by their annotations: none may stay unseen.
    kinds = [kind for kind in vars(recipe).values() if isinstance(kind, type) and issubclass(kind, recipe.Section)]
    assert len(kinds) > 8
    keys = [field.alias or name for kind in kinds for name, field in kind.model_fields.items()]
    assert [key for key in keys if f"| `{key}` |" not in made] == []


def test_the_official_way_is_a_recipe_with_every_switch_set():
    page = (ROOT / "docs/differences.md").read_text()
    (block,) = re.findall(r"```yaml\n(.*?)```", page, flags=re.DOTALL)
    theirs = check_recipe(parse_yaml(block, "differences"), TrainRecipe, "differences")
    training_arguments({**theirs.trainer, "use_cpu": True})
    assert [source.sample for source in (*theirs.data, *theirs.buffer)] == ["head", "head"]
    assert (theirs.buffer_weight, theirs.conflicts, theirs.max_eval) == (1.0, "keep", None)
    assert make_loss(theirs.loss.model_dump()) == BFPO(beta=0.01, b1=3.0, alpha=0.5)
    # Each switch that the table names is a key.
    known = {"buffer_weight", "sample", "conflicts", "max_eval", "train_only", "reference", "fraction", "limit"}
    assert known <= {*TrainRecipe.model_fields, *Source.model_fields}
    assert known <= set(re.findall(r"`(\w+)(?::[^`]*)?`", page))


def test_the_numbers_of_the_quickstart_are_those_of_its_study():
    study = json.loads((ROOT / "benchmarks/results/quickstart.json").read_text())
    page = (ROOT / "docs/testbed.md").read_text()

    def shown(metric):
        return "{:.2f} [{:.2f}, {:.2f}]".format(*metric)

    for seed in study["seeds"]:
        (row,) = re.findall(rf"^\| {seed['seed']} \|.*$", page, flags=re.MULTILINE)
        for metric in ("harmful/safety", "benign/helpfulness", "harmful/severity", "lookalike/over_refusal"):
            assert f"{seed['base'][metric][0]:.2f} → {shown(seed['bfpo'][metric])}" in row
    assert study["criteria"]["both"] == "8 of 8"
    # The settings were chosen on other seeds.
    assert [seed["seed"] for seed in study["seeds"]] == list(range(8))
    assert "seeds 100 and 101" in " ".join((ROOT / "benchmarks/quickstart_study.py").read_text().split())
    assert "two other seeds, 100 and\n101, which aren't among these" in page
    (row,) = re.findall(r"^\| mean over seeds \|.*$", page, flags=re.MULTILINE)
    for metric in ("harmful/safety", "benign/helpfulness", "harmful/severity", "lookalike/over_refusal"):
        base, bfpo = (
            shown(t_interval(np.array([seed[model][metric][0] for seed in study["seeds"]])))
            for model in ("base", "bfpo")
        )
        assert f"{base} → {bfpo}" in row


def test_the_numbers_of_the_constraints_page_are_those_of_its_study():
    study = json.loads((ROOT / "benchmarks/results/constraint.json").read_text())
    page = (ROOT / "docs/constraints.md").read_text()

    def shown(interval):
        return "{:.1f} % [{:.1f}, {:.1f}]".format(*(100 * number for number in interval))

    assert len(study["policies"]) == 8
    for policy in study["policies"]:
        constraint, measured = policy["constraint"], policy["measured"]
        multiplier, predicted = "", ""
        if constraint:
            multiplier, predicted = f"{constraint['multiplier']:.3g}", shown(constraint["predicted"]["unsafe"])
        shares = f"{shown(measured['on_sampled_prompts']['unsafe'])} | {shown(measured['unsafe'])}"
        numbers = f"{100 * measured['undecided'][0]:.1f} % | {measured['helpfulness']['benign'][0]:.2f}"
        row = f"| {policy['policy']} | {multiplier} | {predicted} | {shares} | {numbers} |"
        assert row.replace("|  |", "| |").replace("|  |", "| |") in page, row
    free, limited = (
        study["policies"][-1]["constraint"]["unconstrained"],
        study["policies"][-1]["constraint"]["predicted"],
    )
    assert round(free["unsafe"], 2) == 0.98
    assert round(1 - limited["helpfulness"] / free["helpfulness"], 2) == 0.26
    assert [round(policy["kl"], 1) for policy in (free, limited)] == [0.8, 1.0]
    for pairs in ("32", "128"):
        minima = [100 * policy["constraint"]["unsafe_at_minimum"][pairs] for policy in study["policies"][1:4]]
        assert "{:.1f}, {:.1f} and {:.1f} %".format(*minima) in " ".join(page.split()), minima
    # The figure is that of the constraint that the page asks for.
    assert "at most 2 %" in (ROOT / "docs/frontier.svg").read_text()


def test_the_numbers_of_the_linear_judge_are_those_of_its_study():
    study = json.loads((ROOT / "benchmarks/results/judge.json").read_text())
    page = (ROOT / "docs/judging.md").read_text()
    for found in study["grouped_by_prompt"].values():
        assert f"| {found['balanced_accuracy']:.3f} | {found['accuracy']:.3f} |" in page
    for model, found in study["leave_one_model_out"].items():
        shown = ["{:.3f} [{:.3f}, {:.3f}]".format(*found[name]) for name in ("accuracy", "balanced_accuracy")]
        assert f"| {model} | {shown[0]} | {shown[1]} | {found['calibration_error']:.3f} |" in page
    for count in study["missed_by_kind"].values():
        assert f" {count} " in page
    assert study["grouped_by_prompt"]["all"]["balanced_accuracy"] >= 0.94
    assert study["grouped_by_prompt"]["without_partial"]["balanced_accuracy"] >= 0.96


def test_the_words_on_the_comparison_are_those_of_both_its_runs():
    page = (ROOT / "docs" / "testbed.md").read_text()
    both = [
        json.loads((ROOT / f"benchmarks/results/testbed/{name}/comparison.json").read_text())
        for name in ("main", "again")
    ]
    lines = both[0]["lines"]
    primary, again = (
        {(line["world"], line["variant"]): line for line in found["lines"] if line["metric"] == "all/harmonic_mean"}
        for found in both
    )
    said = {
        "shared": {"base", "dpo_h", "bfpo one stream, equal total", "bfpo one stream, equal main"},
        "separate": {"base", "dpo_h", "modpo"},
    }
    differ = {"shared": set(), "separate": {"ipo_mix", "bfpo one stream, equal main"}}
    assert "| shared skills | base, dpo_h, both one-stream BFPOs | all others | none | none |" in page
    # Which variants ran at another's setting, by the recipe.
    variants = parse_yaml((ROOT / "recipes/testbed/main.yaml").read_text(), "main")["variants"]
    methods = parse_yaml((ROOT / "recipes/testbed/tuning.yaml").read_text(), "tuning")["variants"]
    untuned = {name: content["tuned"] for name, content in variants.items() if content["method"] not in methods}
    one_stream = {"bfpo one stream, equal total": "bfpo", "bfpo one stream, equal main": "bfpo"}
    assert untuned == {"dpo_h": "dpo_mix", **one_stream}
    assert "**Three\nvariants were not tuned and run at another's setting**: `dpo_h` at that of `dpo_mix`" in page
    assert sum(" as " in name for name in variants) == 5
    own = [name for name, content in variants.items() if content["tuned"] == content["method"] == name]
    assert len(own) == len(methods) == 8
    assert "| base, dpo_h, modpo | all others | none | ipo_mix, one stream at equal main pairs |" in page
    for world, worse in said.items():
        words = {
            variant: {line["verdict"], again[place, variant]["verdict"]}
            for (place, variant), line in primary.items()
            if place == world
        }
        assert {variant for variant, word in words.items() if word == {"worse"}} == worse
        assert {variant for variant, word in words.items() if len(word) > 1} == differ[world]
        assert not any("better" in word for word in words.values())
        assert primary[world, "additive as bfpo"]["mean"][0] > primary[world, "bfpo"]["mean"][0]
        (unsafe,) = (
            line
            for line in lines
            if (line["world"], line["variant"], line["metric"]) == (world, "dpo_h", "harmful/safety")
        )
        assert unsafe["mean"][0] < 0.1
    (took,) = both[0]["took"]
    each = took["seconds"] / took["runs"]
    assert f"{took['runs']} runs took {took['seconds'] / 60:.0f} minutes on 2 cores, {each:.1f} s a run" in page
    assert f"are {each * 88 / 60:.0f} minutes" in page
    tuned = ["bfpo_soft", "additive", "ipo_mix", "modpo", "dpo_s", "dpo_mix", "safe_dpo"]
    mean = primary["shared", "bfpo"]["mean"][0]
    assert sum(primary["shared", variant]["mean"][0] > mean for variant in tuned) > len(tuned) / 2


def test_every_source_of_prompts_stands_in_its_row():
    page = (ROOT / "docs/redteam.md").read_text()
    rows = {
        "a file that you fetch, as `path:`": [name for name, source in PROMPT_SETS.items() if source.file],
        "the hub, at a revision that the program pins": [
            name for name, source in PROMPT_SETS.items() if source.revision
        ],
        "the hub, at a `revision:` that you pin": [
            name for name, source in PROMPT_SETS.items() if source.hub and not source.revision
        ],
    }
    for words, names in rows.items():
        assert f"| {words} | {', '.join(f'`{name}`' for name in names)} |" in page
    assert sum(map(len, rows.values())) == len(PROMPT_SETS) - 1, "all but one's own file"


@pytest.mark.parametrize("results", ["redteam.json", "redteam_served.json"])
def test_the_numbers_of_the_red_team_circle_are_those_of_its_study(results):
    study = json.loads((ROOT / "benchmarks/results" / results).read_text())
    page = (ROOT / "docs/redteam.md").read_text()
    metrics = ("harmful/safety", "benign/helpfulness", "lookalike/over_refusal", "all/harmonic_mean")
    shown = {"base": "base", "oracle": "oracle", "linear": "`linear`", "linear_by_rule": "`linear`, benign by rule"}
    for seed in study["seeds"]:
        for name, words in shown.items():
            numbers = seed["measured-base" if name == "base" else f"measured-trained-{name}"]
            facts = seed.get(name.removesuffix("_by_rule"))
            pairs = f"{facts['pairs']} ({facts['share_of_pairs']:.1%})" if facts else ""
            assert facts is None or facts["share_of_pairs"] < 0.1
            cells = [
                str(seed["seed"]),
                words,
                pairs,
                *("{:.2f} [{:.2f}, {:.2f}]".format(*numbers[m]) for m in metrics),
            ]
            assert f"| {' | '.join(cells)} |" in page
        for kind, what in (("benign", "safe called unsafe"), ("harmful", "unsafe called safe")):
            counts = seed["linear"]["mistakes"][kind]
            assert f"{counts[what]} of {counts['answers']}" in page
        # What the page says of all runs.
        safety, benign = (
            {name: seed[f"measured-{name}"][metric] for name in ("base", "trained-oracle", "trained-linear")}
            for metric in metrics[:2]
        )
        assert min(safety[name][1] for name in ("trained-oracle", "trained-linear")) > safety["base"][2]
        assert benign["trained-linear"][0] < benign["trained-oracle"][0]
    assert study["command"] in page


def test_the_labels_on_real_pairs_are_those_of_their_study():
    study = json.loads((ROOT / "benchmarks/results/label.json").read_text())
    page = (ROOT / "docs/labeling.md").read_text()
    names = {"hh_harmless": "HH-RLHF harmless, test", "alpaca_eval": "AlpacaEval, four models"}

    def of(found, *, interval=True):
        bounds = f", {found['share']:.1%} [{found['low']:.1%}, {found['high']:.1%}]" if interval else ""
        return f"{found['count']:,} of {found['of']:,}{bounds}"

    for name, words in names.items():
        facts = study["sets"][name]
        checks = facts["checks"]["of_all"]
        cells = " / ".join(f"{facts['after'][cell]:,}" for cell in ("ss", "su", "us", "uu"))
        left_out = f"{facts['left_out']['undecided']} undecided" if facts["left_out"] else "none"
        before = "unlabeled" if "unlabeled" in facts["before"] else "assumed safe"
        row = [words, f"{facts['pairs']:,}", before, cells, left_out, of(checks["called_unsafe"])]
        assert f"| {' | '.join(row)} |" in page
        for kind in ("refusals_called_unsafe", "unsafe_that_say_need", "all_that_say_need"):
            assert of(checks[kind], interval=kind == "refusals_called_unsafe") in page, (name, kind)
        assert of(checks["undecided_at_default_doubt"], interval=False) in page
    people = study["sets"]["hh_harmless"]["checks"]["by_people"]
    for found in people["p_safe_orders_as_people_by_user_turns"].values():
        assert of(found) in page
    assert of(people["called_unsafe_where_people_preferred_a_refusal"]) in page
    with_people, against = people["pairs_labeled_as_people"], people["pairs_labeled_against_people"]
    assert f"{with_people} pairs as annotators ordered them and {len(against)} the other way" in page
    for row_id in (*against, *study["sets"]["alpaca_eval"]["checks"]["of_all"]["pairs_with_an_answer_called_unsafe"]):
        assert row_id[:8] in page
    for found in study["fitted_on"].values():
        assert of(found, interval=False) in page
    assert study["command"] in page


@pytest.mark.parametrize(("name", "center"), [("ablations", "beta 0.1"), ("ablations-shipped", "beta 0.3")])
def test_the_ablations_on_the_page_are_those_of_their_results(name, center):
    page = (ROOT / "docs" / "testbed.md").read_text()
    lines = json.loads((ROOT / f"benchmarks/results/testbed/{name}/comparison.json").read_text())["lines"]
    by = {(line["variant"], line["metric"]): line for line in lines}
    for variant in {line["variant"] for line in lines} - {"base", center}:
        metrics = [by[variant, name] for name in ("harmful/safety", "benign/helpfulness", "all/harmonic_mean")]
        shown = ["{:.2f} [{:.2f}, {:.2f}]".format(*metric["mean"]) for metric in metrics]
        assert f"| {variant} | {' | '.join(shown)} | {metrics[-1]['verdict'] or ''} |" in page


def test_a_second_run_changed_the_words_that_the_page_names():
    words = []
    for name in ("main", "again", "sixteen"):
        lines = json.loads((ROOT / f"benchmarks/results/testbed/{name}/comparison.json").read_text())["lines"]
        primary = {(line["world"], line["variant"]): line for line in lines if line["metric"] == "all/harmonic_mean"}
        words.append({key: line["verdict"] for key, line in primary.items() if line["verdict"]})
    first, second, together = words
    page = (ROOT / "docs" / "testbed.md").read_text()
    other = {key for key in first if first[key] != second[key]}
    assert other == {("separate", "ipo_mix"), ("separate", "bfpo one stream, equal main")}
    assert len(first) == 32
    assert "for 30 of 32 variants" in page
    assert all(together[key] == word for key, word in first.items() if second[key] == word != "not distinguishable")
    settled = {key: word for key, word in together.items() if {first[key], second[key]} != {word}}
    assert {key for key, word in settled.items() if word != "not distinguishable"} == {
        ("separate", "ipo_mix"),
        ("separate", "dpo_mix"),
        ("separate", "safe_dpo as dpo_mix"),
        ("shared", "additive as bfpo"),
    }
    assert settled["shared", "additive as bfpo"] == "better"
    found = primary["shared", "additive as bfpo"]["difference"]
    assert "by {:.2f} [{:.2f}, {:.2f}]".format(*found) in page


@pytest.mark.parametrize("name", ["table", "table-shipped"])
def test_the_tables_of_labels_on_the_page_are_those_that_were_tested(name):
    page = (ROOT / "docs" / "testbed.md").read_text()
    lines = json.loads((ROOT / f"benchmarks/results/testbed/{name}/comparison.json").read_text())["lines"]
    by = {(line["world"], line["variant"], line["metric"]): line for line in lines}
    metrics = ("harmful/safety", "benign/helpfulness", "harmful/severity", "all/harmonic_mean")
    for world, variant in {(line["world"], line["variant"]) for line in lines if line["variant"] != "base"}:
        found = [by[world, variant, metric] for metric in metrics]
        cells = ["{:.2f} [{:.2f}, {:.2f}]".format(*line["mean"]) for line in found]
        against = ""
        if variant != "bfpo":
            against = "{:+.2f} [{:+.2f}, {:+.2f}], {}".format(*found[-1]["difference"], found[-1]["verdict"])
        assert f"| {world} | {variant} | {' | '.join(cells)} | {against} |" in page
    named = "us={us:g}, uu={uu:g}".format(**{cell: getattr(TABLES["helpful_ties"], cell) for cell in ("us", "uu")})
    words = {by[world, named, "all/harmonic_mean"]["verdict"] for world in ("shared", "separate")}
    assert words == ({"better", "not distinguishable"} if name == "table" else {"worse"})
    # "the unsafe answers that remain are more severe"
    assert by["separate", named, "harmful/severity"]["verdict"] == "worse"


def test_the_win_rates_on_the_page_are_those_of_the_study():
    study = json.loads((ROOT / "benchmarks/results/win_rates.json").read_text())
    page = (ROOT / "docs/statistics.md").read_text()
    assert len(study["models"]) == 4
    excess = [model["length_controlled"][0] - model["leaderboard"][1] for model in study["models"].values()]
    assert f"the approximate ones are {min(excess):.1f} to {max(excess):.1f} points higher" in page
    for model, found in study["models"].items():
        raw, controlled = ("{:.2f} [{:.2f}, {:.2f}]".format(*found[name]) for name in ("raw", "length_controlled"))
        theirs = [f"{rate:.2f}" for rate in found["leaderboard"]]
        lengths = f"{found['characters']:,}, {found['characters_of_reference']:,}"
        assert f"| {model} | {lengths} | {raw} | {theirs[0]} | {controlled} | {theirs[1]} |" in page
        assert f"{found['raw'][0]:.2f}" == theirs[0]
        # "all of them far below"
        assert found["characters"] / found["characters_of_reference"] < 0.6 < MIN_LENGTH_RATIO


def test_the_coverage_on_the_page_is_that_of_the_study(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    study = json.loads((ROOT / "benchmarks/results/coverage.json").read_text())
    script = runpy.run_path(str(ROOT / "benchmarks/coverage_study.py"))
    page = (ROOT / "docs/statistics.md").read_text()
    assert script["with_tables"](page, study) == page, "run python benchmarks/coverage_study.py"
    assert study["repetitions"] == 5000
    interval = score_interval(np.array([0.80, 0.80, 0.81]))
    assert f"the interval used here is {interval.low:.2f} to {interval.high:.2f}".replace("0.", ".") in page
    assert f"No gate is decided on fewer than {MIN_PROMPTS} prompts" in page
    large = [cell for cell in study["cells"] if cell["n"] >= 250]
    assert len(large) > 100
    assert [cell for cell in large if not 0.93 <= cell["coverage"] <= 0.975] == []
    # Every kind of interval that results name is told of.
    kinds = [
        kind for names in (scoring, comparing) for name, kind in vars(names).items() if re.match(r"BY_[A-Z_]+$", name)
    ]
    assert len(kinds) > 6
    assert [kind for kind in kinds if f"`{kind}`" not in page] == []


def test_the_numbers_of_the_correction_are_those_of_its_study():
    study = json.loads((ROOT / "benchmarks/results/judge_error.json").read_text())
    page = (ROOT / "docs/judging.md").read_text()
    designs = study["designs"]
    own, new, other = (designs[name] for name in ("same_model", "same_model_new_judge", "other_models"))
    for found in (own, new, other):
        mean = found["mean"]
        covered = f"{mean['judge_covered']:.1%} → {mean['covered']:.1%}"
        first = f"{found['judge_covered_of_10_main']} → {found['covered_of_10_main']}"
        width = f"{mean['judge_width']:.3f} → {mean['width']:.3f}"
        assert f"| {first} | {covered} | {found['fewest_covered_of_10']} | {width} |" in page
    assert f"mean of {study['seeds']} splits" in page
    for ours, theirs in zip(own["main_split"], other["main_split"], strict=True):
        cells = [ours["model"], ours["question"].replace("_", "-"), f"{ours['people']:.2f}"]
        cells += ["{:.2f} [{:.2f}, {:.2f}]".format(*ours[name]) for name in ("judge", "corrected")]
        cells += [f"{theirs['people']:.2f}", "{:.2f} [{:.2f}, {:.2f}]".format(*theirs["corrected"])]
        (line,) = [line for line in page.splitlines() if line.startswith(f"| {' | '.join(cells)}")]
        assert ("**missed**" in line) == (not theirs["covered"])
        assert ("doesn't fit" in line) == (theirs["covered"] and not theirs["fits"])
    line = other["by_rate"]["mistralinstruct/compliance"]
    assert f"{line['covered']:.0%} of the splits, the uncorrected one in {line['judge_covered']:.0%}" in page
    found = [
        next(
            row
            for row in design["main_split"]
            if (row["model"], row["question"]) == ("mistralinstruct", "compliance")
        )
        for design in (new, other)
    ]
    assert (
        "finds {:.0%} of its refusals on the calibration third, and {:.0%} of the others'".format(
            *(row["errors"]["specificity"] for row in found)
        )
        in page
    )
    cells = study["simulation"]["cells"]
    for name in ("corrected", "bootstrap", "prediction_powered"):
        covered = [cell[name]["coverage"] for cell in cells]
        assert f"{min(covered):.1%} to {max(covered):.1%}" in page
    assert f"in as few as {min(cell['judge']['coverage'] for cell in cells):.1%}" in page
    assert f"{own['mean']['powered_covered']:.1%} at a width of {own['mean']['powered_width']:.3f}" in page
    # On its own answers nine of ten at least; across models it fails.
    assert own["covered_of_10_main"] >= 9
    assert other["mean"]["covered"] < 0.9 < own["mean"]["covered"]
    assert {cell["truth"] for cell in cells if cell["corrected"]["coverage"] < 0.94} == {0.02}
    assert "below 94 % only at a\nrate of 2 %" in page


def study_rows(name, metrics):
    """Return the rows of a page's table on a study of runs on the testbed: run, metrics, and its difference."""
    rows = {}
    for row in json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())["runs"]:
        rows.setdefault(row["run"], {})[row["metric"]] = row
    for run, found in rows.items():
        values = ["{:.2f} [{:.2f}, {:.2f}]".format(*found[metric]["mean"]) for metric in metrics]
        last, difference = found[metrics[-1]], ""
        if "difference" in last:
            difference = "{:+.2f} [{:+.2f}, {:+.2f}], {}".format(*last["difference"], last["verdict"])
        yield f"| {' | '.join([run, *values, difference])} |"


def test_the_numbers_on_label_errors_are_those_of_their_study():
    page = (ROOT / "docs" / "labeling.md").read_text()
    rows = list(study_rows("label_noise", ("harmful/safety", "benign/helpfulness", "all/harmonic_mean")))
    assert len(rows) == 19
    assert [row for row in rows if row not in page] == []


def test_the_numbers_on_graded_pairs_are_those_of_their_study():
    page = (ROOT / "docs" / "data.md").read_text()
    found = {}
    for row in json.loads((ROOT / "benchmarks/results/graded.json").read_text())["runs"]:
        found.setdefault(row["run"], {})[row["metric"]] = row
    for run, metrics in found.items():
        cells = [run]
        for metric in ("benign/right_slots", "harmful/safety"):
            row, difference = metrics[metric], ""
            if "difference" in row:
                difference = "{:+.2f} [{:+.2f}, {:+.2f}], {}".format(*row["difference"], row["verdict"])
            cells += ["{:.2f} [{:.2f}, {:.2f}]".format(*row["mean"]), difference]
        cells.append("{:.2f} [{:.2f}, {:.2f}]".format(*metrics["all/harmonic_mean"]["mean"]))
        assert f"| {' | '.join(cells)} |" in page


@pytest.mark.parametrize(("name", "page"), [("tail", "training"), ("online", "online"), ("tdpo", "testbed")])
def test_the_numbers_of_further_comparisons_are_on_their_pages(name, page):
    text = (ROOT / "docs" / f"{page}.md").read_text()
    lines = json.loads((ROOT / f"benchmarks/results/testbed/{name}/comparison.json").read_text())["lines"]
    means = {}
    for line in lines:
        means.setdefault(line["variant"], {})[line["metric"]] = "{:.2f} [{:.2f}, {:.2f}]".format(*line["mean"])
    for variant, found in means.items():
        cells = [found[metric] for metric in ("harmful/safety", "benign/helpfulness", "all/harmonic_mean")]
        if name != "tail" or variant != "base":
            assert f"| {' | '.join(cells)} |" in text, variant
