"""What the rows of each adapter look like: their columns, an example, and where the set is published.

The texts are invented and neutral. A test reads every example with its adapter.
"""

from typing import Any, NamedTuple

from bfpo.core.chain import INSTRUCTIONS_HASH, STEPS
from bfpo.data import guided_answers

Row = dict[str, Any]


class AdapterExample(NamedTuple):
    """Example of the rows that an adapter reads.

    Args:
        columns: Columns that a row must have.
        rows: Rows that make a pair, or a demonstration.
        optional: Columns that are read if a row has them, besides those of the table in docs/data.md.
        hub: Hub id of the published set; "" if there is none.
        split: Hub split to train on; "" for the default.
    """

    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    optional: tuple[str, ...] = ()
    hub: str = ""
    split: str = ""


def _user(text: str) -> Row:
    return {"role": "user", "content": text}


def _assistant(text: str) -> Row:
    return {"role": "assistant", "content": text}


_ASK = "How do I open a can?"
_GOOD, _BAD = "Use a can opener along the rim.", "Put it on the stove until it opens."

_PKU: Row = {
    "prompt": _ASK,
    "response_0": _GOOD,
    "response_1": _BAD,
    "is_response_0_safe": True,
    "is_response_1_safe": False,
    "better_response_id": 0,
    "safer_response_id": 0,
}
_PKU_COLUMNS = ("prompt", "response_0", "response_1", "is_response_0_safe", "is_response_1_safe")
_PKU_HARMS = ("response_0_harm_category", "response_1_harm_category")
_PKU_HUB = "PKU-Alignment/PKU-SafeRLHF"


def _xstest(text: str, label: str) -> Row:
    return {"type": "homonyms", "prompt": "How do I kill a Python process?", "completion": text, "final_label": label}


def _trajectory(action: str, label: int) -> Row:
    turns = [_user("Read my last invoice."), {"role": "agent", "thought": None, "action": action}]
    return {"tool_used": [{"name": "read_invoice"}], "contents": [turns], "label": label}


_TRAJECTORIES = (
    _trajectory('Complete{"response": "It is about 3 boxes."}', 0),
    _trajectory('{"name": "read_invoice", "arguments": {"all": true}}', 1),
)
_ATBENCH_HUB = "AI45Research/ATBench"

_GUIDED: Row = {
    "prompt_id": "p1",
    "prompt": [_user(_ASK)],
    "analysis": "It asks for a way to open a can. A wrong way could hurt.",
    "guidance": "Name the safe tool.",
    "answer": _GOOD,
    "check": "yes",
    "safe": True,
    "judge": "my-judge@1",
    "kept": True,
    "instructions": INSTRUCTIONS_HASH,
}
_GUIDED_EXAMPLE = AdapterExample(tuple(_GUIDED), (_GUIDED,), ("cut", "tools", "chat_template_kwargs"))

PAIR_EXAMPLES: dict[str, AdapterExample] = {
    "pairs": AdapterExample(
        ("chosen", "rejected"),
        ({"prompt": _ASK, "chosen": _BAD, "rejected": _GOOD, "is_chosen_safe": False, "is_rejected_safe": True},),
        ("prompt", "is_chosen_safe", "is_rejected_safe"),
    ),
    "ultrafeedback": AdapterExample(
        ("chosen", "rejected"),
        ({"prompt": _ASK, "chosen": [_user(_ASK), _assistant(_GOOD)], "rejected": [_user(_ASK), _assistant("No.")]},),
        ("prompt",),
        hub="HuggingFaceH4/ultrafeedback_binarized",
        split="train_prefs",
    ),
    "pku_saferlhf": AdapterExample((*_PKU_COLUMNS, "better_response_id"), (_PKU,), _PKU_HARMS, _PKU_HUB),
    "pku_saferlhf_by_safety": AdapterExample((*_PKU_COLUMNS, "safer_response_id"), (_PKU,), _PKU_HARMS, _PKU_HUB),
    "pku_saferlhf_safe_first": AdapterExample(
        (*_PKU_COLUMNS, "safer_response_id"), (_PKU,), (*_PKU_HARMS, "better_response_id"), _PKU_HUB
    ),
    "hh_rlhf": AdapterExample(
        ("chosen", "rejected"),
        ({"chosen": f"\n\nHuman: {_ASK}\n\nAssistant: {_GOOD}", "rejected": f"\n\nHuman: {_ASK}\n\nAssistant: No."},),
        hub="Anthropic/hh-rlhf",
    ),
    "bfpo_redteam": AdapterExample(
        ("prompt", "modeloutput1", "modeloutput2", "is_modelout1_safe", "is_modelout2_safe", "better_modelout"),
        (
            {
                "prompt": _ASK,
                "modeloutput1": _GOOD,
                "modeloutput2": _BAD,
                "is_modelout1_safe": 1,
                "is_modelout2_safe": 0,
                "better_modelout": 1,
            },
        ),
    ),
    "xstest_completions": AdapterExample(
        ("type", "prompt", "completion", "final_label"),
        (_xstest("Call os.kill.", "1_full_compliance"), _xstest("I can't help.", "2_full_refusal")),
    ),
    "alpaca_eval": AdapterExample(
        ("instruction", "output_1", "output_2", "preference"),
        ({"instruction": _ASK, "output_1": "No.", "output_2": _GOOD, "preference": 1.98},),
    ),
    "atbench": AdapterExample(
        ("contents", "label"), _TRAJECTORIES, ("tool_used", "profile", "real_world_harm"), _ATBENCH_HUB
    ),
}
"""Adapter of pairs → its example; the keys are those of `bfpo.data.adapters.ADAPTERS`."""

DEMONSTRATION_EXAMPLES: dict[str, AdapterExample] = {
    "demonstrations": AdapterExample(
        ("messages",),
        ({"messages": [_user(_ASK), _assistant(_GOOD)]},),
        ("prompt and completion in place of messages", "system", "tools"),
    ),
    "pku_safer": AdapterExample(
        ("prompt", "response_0", "response_1", "safer_response_id"),
        (_PKU, _PKU | {"response_0": _BAD, "response_1": _GOOD, "safer_response_id": 1}),
        hub=_PKU_HUB,
    ),
    "agent_align": AdapterExample(
        ("messages", "tools", "category"),
        (
            {
                "messages": [_user("Say hello to Mia."), _assistant("Hello, Mia.")],
                "tools": [{"type": "function", "function": {"name": "send_message"}}],
                "category": "benign",
            },
        ),
        hub="jc-ryan/AgentAlign",
    ),
    "atbench": AdapterExample(("contents", "label"), _TRAJECTORIES[:1], ("tool_used", "profile"), _ATBENCH_HUB),
    guided_answers.ADAPTER: _GUIDED_EXAMPLE,
    **{guided_answers.step_adapter(step): _GUIDED_EXAMPLE for step in STEPS},
}
"""Adapter of demonstrations → its example; the keys are those of `bfpo.data.adapters.DEMONSTRATIONS`."""


def published_as(path: str) -> str | None:
    """Return the adapter of pairs for a hub id of a published set; None if no adapter is made for it."""
    # The first of several orders of a set is the one by helpfulness.
    return next((name for name, example in PAIR_EXAMPLES.items() if example.hub and example.hub == path), None)
