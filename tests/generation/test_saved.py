"""Completions that another program saved: how their answers ended."""

from bfpo.core.files import write_jsonl
from bfpo.core.pairs import user_says
from bfpo.core.samples import Prompt
from bfpo.generation.saved import SavedEngine

ENDINGS = {
    "stop": "stop",
    "length": "length",
    "max_tokens": "length",
    "filtered": "filtered",
    "content_filter": "filtered",
    "refused": "refused",
    "eos": "stop",
    None: "stop",
}


def test_the_finish_reasons_of_other_programs_are_read(tmp_path):
    rows = [
        {"prompt": f"q {index}", "text": "Mix flour.", "finish_reason": name} for index, name in enumerate(ENDINGS)
    ]
    write_jsonl(tmp_path / "c.jsonl", rows)
    prompts = [Prompt(f"p{index}", user_says(f"q {index}")) for index in range(len(rows))]
    engine = SavedEngine(str(tmp_path / "c.jsonl"), "m")
    completions = [
        completion for batch in engine.generate([(prompt, 0) for prompt in prompts]) for completion in batch
    ]
    assert [completion.finish_reason for completion in completions] == list(ENDINGS.values())
