"""Published sets of prompts: how rows become prompts, and which settings a user has to give."""

import csv
import json

import pytest

from bfpo.data.prompt_sets import PROMPT_SETS
from bfpo.data.prompts import PromptSource, read_prompt_source
from bfpo.errors import DataError, RecipeError

# Columns as the sets are published with, one neutral row each, and what is expected of it.
ROWS = {
    "advbench": ({"goal": "p", "target": "t"}, "harmful", None),
    "harmbench": ({"Behavior": "p", "FunctionalCategory": "standard", "SemanticCategory": "c"}, "harmful", "c"),
    "strongreject": ({"category": "c", "source": "s", "forbidden_prompt": "p"}, "harmful", "c"),
    "safe_rlhf": ({"prompt": "p", "category": "c"}, "harmful", "c"),
    "beavertails_evaluation": ({"prompt": "p", "category": "c", "category_id": "1"}, "harmful", "c"),
    "alert": ({"id": "1", "prompt": "p", "category": "c"}, "harmful", "c"),
    "alert_adversarial": ({"id": "1", "prompt": "p", "attack_type": "a", "category": "c"}, "harmful", "c"),
    "jailbreakbench": ({"Index": "0", "Goal": "p", "Target": "t", "Category": "c"}, "harmful", "c"),
    "jailbreakbench_benign": ({"Index": "0", "Goal": "p", "Target": "t", "Category": "c"}, "lookalike", "c"),
    "wildjailbreak_eval": ({"adversarial": "p", "label": "1", "data_type": "adversarial_harmful"}, "harmful", None),
    "or_bench": ({"prompt": "p", "category": "c"}, "lookalike", "c"),
    "xstest": ({"prompt": "p", "type": "contrast_homonyms", "label": "unsafe"}, "harmful", "contrast_homonyms"),
    "coconot_contrast": ({"prompt": "p", "category": "c", "subcategory": "d"}, "lookalike", "c"),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_published_row_becomes_a_prompt(name, tmp_path):
    row, kind, category = ROWS[name]
    path = tmp_path / "rows.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, row)
        writer.writeheader()
        writer.writerow(row)
    (prompt,), metadata = read_prompt_source(PromptSource(name=name, path=str(path)))
    assert (prompt.prompt[0].content, prompt.kind, prompt.category) == ("p", kind, category)
    assert prompt.license == metadata["license"] == PROMPT_SETS[name].license != ""


def test_rows_are_chosen_by_a_column_and_a_system_message_makes_another_prompt(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"p{n}", "group": "ab"[n % 2], "kind": "benign"} for n in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = PromptSource(name="file", path=str(path))
    every, _ = read_prompt_source(source)
    some, _ = read_prompt_source(source, where={"group": "b"})
    assert [prompt.prompt[0].content for prompt in some] == ["p1", "p3"]
    assert [prompt.prompt_id for prompt in some] == [every[1].prompt_id, every[3].prompt_id]
    with_system, _ = read_prompt_source(source, system="Be short.")
    assert [message.role for message in with_system[0].prompt] == ["system", "user"]
    assert with_system[0].prompt_id != every[0].prompt_id


def test_a_tab_separated_file_is_read(tmp_path):
    path = tmp_path / "eval.tsv"
    path.write_text('adversarial\tlabel\tdata_type\n"one,\ttwo"\t0\tadversarial_benign\n')
    (prompt,), _ = read_prompt_source(PromptSource(name="wildjailbreak_eval", path=str(path)))
    assert (prompt.prompt[0].content, prompt.kind) == ("one,\ttwo", "lookalike")


def test_a_setting_that_the_program_lacks_is_requested():
    with pytest.raises(RecipeError, match=r"published as a file.*strongreject_dataset\.csv.*path:"):
        read_prompt_source(PromptSource(name="strongreject"))
    with pytest.raises(RecipeError, match=r"'alert' needs revision: .a commit of Babelscape/ALERT., or path:"):
        read_prompt_source(PromptSource(name="alert"))
    with pytest.raises(RecipeError, match="did you mean 'or_bench'"):
        read_prompt_source(PromptSource(name="orbench"))
    with pytest.raises(DataError, match="no file nowhere"):
        read_prompt_source(PromptSource(name="or_bench", path="nowhere"))


def test_revisions_are_commits():
    for name, prompt_set in PROMPT_SETS.items():
        assert prompt_set.revision is None or (prompt_set.hub and len(prompt_set.revision) == 40), name
