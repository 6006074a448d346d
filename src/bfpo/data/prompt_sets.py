"""Published sets of prompts: where each one is, its license, and how its rows become prompts.

No prompt is part of the program. A set is read from the hub at a pinned revision, or from a local file with the
columns of the published set.
"""

from typing import NamedTuple

from bfpo.core.samples import Kind
from bfpo.errors import RecipeError, did_you_mean


class PromptSet(NamedTuple):
    """Published set of prompts.

    Args:
        hub: Hub id; "" for a set that can only be read from a file.
        license: License of the prompts.
        prompt_columns: Columns that may have the prompt; the first one present is read.
        kind: What the prompts test; None if a row says it.
        config: Hub configuration.
        split: Hub split.
        category_column: Column with the kind of harm, or of request.
        revision: Commit on the hub; None if we could not verify one, so that users have to name one.
        file: Where the file is published, for a set that is read from one.
        id_column: Column that identifies a prompt; None if a hash of its text does.
        field: Key of the list of rows, in JSON files that are objects.
        group_column: Column that variants of one prompt share.
        targets_column: Column with the names of the tools that doing what is asked takes.
        has_stub_tools: Whether prompts without a column `tools` get stubs of these tools: names without parameters.
    """

    hub: str
    license: str
    prompt_columns: tuple[str, ...]
    kind: Kind | None
    config: str | None = None
    split: str = "train"
    category_column: str | None = None
    revision: str | None = None
    file: str = ""
    id_column: str | None = None
    field: str | None = None
    group_column: str | None = None
    targets_column: str | None = None
    has_stub_tools: bool = False


def find_prompt_set(name: str) -> PromptSet:
    """Return a set of prompts by its name.

    Raises:
        RecipeError: If the name is unknown.
    """
    if name not in PROMPT_SETS:
        raise RecipeError(f"prompts: name is '{name}'; {did_you_mean(name, list(PROMPT_SETS))}")
    return PROMPT_SETS[name]


def _agentharm(kind: Kind, config: str) -> PromptSet:
    return PromptSet(
        "ai-safety-institute/AgentHarm",
        "MIT with a clause: only for improving the safety and security of AI systems",
        ("prompt",),
        kind,
        config,
        "test_public",
        category_column="category",
        field="behaviors",
        # Four variants of each behavior: with and without details, with and without a hint.
        group_column="id_original",
        targets_column="target_functions",
        # The data name the tools; their schemas are Python functions in another repository.
        has_stub_tools=True,
    )


PROMPT_SETS = {
    "advbench": PromptSet(
        "", "MIT", ("goal", "prompt"), "harmful", file="github.com/llm-attacks/llm-attacks: data/advbench"
    ),
    "harmbench": PromptSet(
        "",
        "MIT",
        ("Behavior", "prompt"),
        "harmful",
        category_column="SemanticCategory",
        file="github.com/centerforaisafety/HarmBench@8e1604d1171fe8a48d8febecd22f600e462bdcdd: "
        "data/behavior_datasets/harmbench_behaviors_text_all.csv",
    ),
    "strongreject": PromptSet(
        "",
        "MIT",
        ("forbidden_prompt", "prompt"),
        "harmful",
        category_column="category",
        file="github.com/alexandrasouly/strongreject@3432b2d696b428f242bd507df96d80f686571d5e: "
        "strongreject_dataset/strongreject_dataset.csv",
    ),
    "safe_rlhf": PromptSet(
        "",
        "Apache-2.0",
        ("prompt",),
        "harmful",
        category_column="category",
        file="github.com/PKU-Alignment/safe-rlhf: problem.json of its GPT-4 evaluation",
    ),
    "beavertails": PromptSet("PKU-Alignment/BeaverTails", "CC-BY-NC-4.0", ("prompt",), "harmful", split="330k_train"),
    "beavertails_evaluation": PromptSet(
        "PKU-Alignment/BeaverTails-Evaluation",
        "CC-BY-NC-4.0",
        ("prompt",),
        "harmful",
        split="test",
        category_column="category",
    ),
    "pku": PromptSet("PKU-Alignment/PKU-SafeRLHF", "CC-BY-NC-4.0", ("prompt",), "harmful"),
    "alert": PromptSet(
        "Babelscape/ALERT", "CC-BY-NC-SA-4.0", ("prompt",), "harmful", "alert", "test", category_column="category"
    ),
    "alert_adversarial": PromptSet(
        "Babelscape/ALERT",
        "CC-BY-NC-SA-4.0",
        ("prompt",),
        "harmful",
        "alert_adversarial",
        "test",
        category_column="category",
    ),
    "jailbreakbench": PromptSet(
        "JailbreakBench/JBB-Behaviors",
        "MIT",
        ("Goal", "prompt"),
        "harmful",
        "behaviors",
        "harmful",
        category_column="Category",
        revision="886acc352a31533ffbcf4ef22c744658688086fc",
    ),
    "jailbreakbench_benign": PromptSet(
        "JailbreakBench/JBB-Behaviors",
        "MIT",
        ("Goal", "prompt"),
        "lookalike",
        "behaviors",
        "benign",
        category_column="Category",
        revision="886acc352a31533ffbcf4ef22c744658688086fc",
    ),
    "wildjailbreak": PromptSet(
        "allenai/wildjailbreak", "ODC-BY", ("adversarial", "vanilla", "prompt"), None, "train"
    ),
    "wildjailbreak_eval": PromptSet("allenai/wildjailbreak", "ODC-BY", ("adversarial", "prompt"), None, "eval"),
    "or_bench": PromptSet(
        "bench-llm/or-bench",
        "CC-BY-4.0",
        ("prompt",),
        "lookalike",
        "or-bench-hard-1k",
        category_column="category",
        revision="e36d8b80e81837c8a8f264bbb2a49f1b32c7e272",
    ),
    "xstest": PromptSet(
        "walledai/XSTest",
        "CC-BY-4.0",
        ("prompt",),
        None,
        split="test",
        category_column="type",
        revision="f1d713187c61b6ae64e602d74f0b3d812cc2e8e8",
    ),
    "coconot_contrast": PromptSet(
        "allenai/coconot",
        "ODC-BY",
        ("prompt",),
        "lookalike",
        "contrast",
        "test",
        category_column="category",
        revision="2cbe16aabf9069f17e48c8daad8aeabc29469eb7",
    ),
    "alpaca_eval": PromptSet(
        "",
        "CC-BY-NC-4.0",
        ("instruction", "prompt"),
        "benign",
        category_column="dataset",
        file="huggingface.co/datasets/tatsu-lab/alpaca_eval: alpaca_eval_gpt4_baseline.json, or any model's "
        "model_outputs.json on its 805 instructions",
    ),
    "testbed": PromptSet(
        "",
        "Apache-2.0",
        ("prompt",),
        None,
        category_column="category",
        file="`bfpo quickstart` writes one",
        id_column="prompt_id",
    ),
    "agentharm": _agentharm("harmful", "harmful"),
    "agentharm_benign": _agentharm("lookalike", "harmless_benign"),
    "file": PromptSet(
        "",
        "",
        ("prompt", "messages", "conversations"),
        None,
        category_column="category",
        group_column="group",
        targets_column="target_functions",
    ),
}

# By keys, because no prompt is part of the program.
PROMPT_ALIASES = {"5f1fc63a9f7a248b": "b6e3b4d80aa53db1"}
"""Key of a published prompt → key of the wording that the published completions of the set answer. In XSTest, the
completions of all five models have another wording of prompt 195 than `prompts.csv`."""
