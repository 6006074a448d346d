"""Chats of which every answer is imitated: what is scored, and that it is scored as each answer by itself is."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from bfpo.config.recipes import Source, TextSection
from bfpo.core.conversation import Message
from bfpo.core.pairs import Demonstration
from bfpo.data.decode import decoded_sample
from bfpo.data.load import SourceReport
from bfpo.data.table import Example, token_ids, token_table
from bfpo.data.tokenize import Encoder
from bfpo.model.layout import packed_layout, padded_layout
from bfpo.model.logps import add_layout_forward

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_END = CHATML.replace("<|im_end|>\n{% endfor %}", "\n{% endfor %}")
ASKED = ("near which things", "under", "and behind")
ANSWERED = ("a round red box", "the small lamp", "green door")


def chat(turns=3, answers=ANSWERED, every_turn=True):
    history = []
    for number in range(turns):
        history += [Message("user", ASKED[number]), Message("assistant", answers[number])]
    return Demonstration(tuple(history[:-1]), history[-1].content, every_turn=every_turn)


def encode(tokenizer, *records, cache=None, **text):
    report = SourceReport("toy", Source(path="toy.jsonl"))
    _, examples = Encoder(tokenizer, TextSection(**text), cache).encode(records, report)
    counts = {reason.text: count for table in (report.dropped, report.noted) for reason, count in table.items()}
    return examples, counts


def scored_turns(tokenizer, example):
    """Return the runs of scored tokens of the completion, decoded."""
    (marked,) = example.completions
    runs = np.split(marked, np.flatnonzero(np.diff(marked < 0)) + 1)
    return [tokenizer.decode(run) for run in runs if run[0] >= 0]


@pytest.mark.parametrize("template", [None, CHATML], ids=["the tokenizer's", "ChatML"])
@pytest.mark.parametrize("turns", [1, 2, 3])
def test_every_answer_is_scored_with_its_end_and_nothing_else(tokenizer, template, turns):
    (example,), counts = encode(tokenizer, chat(turns), chat_template=template)
    assert scored_turns(tokenizer, example) == [f"{text}{tokenizer.eos_token}" for text in ANSWERED[:turns]]
    assert counts == {}
    # What is fed is the whole conversation, up to the end of the last answer.
    record = chat(turns)
    conversation = [message.to_row() for message in (*record.prompt, Message("assistant", record.completion))]
    whole = tokenizer.apply_chat_template(conversation, chat_template=template, tokenize=False)
    fed = tokenizer.decode([*example.prompt_ids, *token_ids(example.completions[0])])
    assert whole.startswith(fed)
    assert not whole[len(fed) :].strip()


def test_only_the_answer_of_a_prompt_and_completion_is_scored(tokenizer):
    (example,), _ = encode(tokenizer, chat(every_turn=False))
    assert scored_turns(tokenizer, example) == [f"{ANSWERED[2]}{tokenizer.eos_token}"]


@pytest.mark.parametrize("layout", [packed_layout, padded_layout])
def test_a_chat_has_the_log_probability_of_its_answers_each_by_itself(tokenizer, make_model, layout):
    """Other chats stand beside it in the row, and must not be seen."""
    model = make_model()
    add_layout_forward(model)
    chats, _ = encode(tokenizer, chat(3), chat(1), chat(2))
    singles, _ = encode(tokenizer, *(chat(turns, every_turn=False) for turns in (1, 2, 3)))
    with torch.no_grad():
        together, alone = model(layout=layout(chats)), model(layout=layout(singles))
    expected = torch.stack([alone.sum(), alone[0], alone[:2].sum()])
    torch.testing.assert_close(together, expected, rtol=1e-5, atol=1e-5)
    assert layout(chats).lengths == tuple(token_table(chats, ["a", "b", "c"]).scored[:, 0])


def test_a_chat_is_cut_at_its_end_and_never_ends_with_what_is_not_scored(tokenizer):
    (whole,), _ = encode(tokenizer, chat())
    size = len(whole.prompt_ids) + len(whole.completions[0])
    for room in range(len(whole.prompt_ids) + 1, size):
        (example,), counts = encode(tokenizer, chat(), max_length=room)
        assert len(example.prompt_ids) + len(example.completions[0]) <= room
        assert example.completions[0][-1] >= 0
        assert counts == {"completion truncated": 1}
    _, counts = encode(tokenizer, chat(), max_length=max(8, len(whole.prompt_ids)))
    assert counts == {"no room for the answers": 1}


def test_where_the_beginning_is_cut_the_last_answer_is_kept(tokenizer):
    (whole,), _ = encode(tokenizer, chat())
    size = len(whole.prompt_ids) + len(whole.completions[0])
    (example,), counts = encode(tokenizer, chat(), max_length=size - 1, truncation="keep_end")
    assert scored_turns(tokenizer, example) == [f"{ANSWERED[2]}{tokenizer.eos_token}"]
    assert counts == {"prompt truncated": 1, "only the last answer of a chat is imitated": 1}


def test_a_template_that_ends_no_turn_leaves_the_last_answer_and_says_so(tokenizer):
    (example,), counts = encode(tokenizer, chat(), chat_template=NO_END)
    assert len(scored_turns(tokenizer, example)) == 1
    assert counts == {"only the last answer of a chat is imitated": 1}


def test_a_template_that_requires_a_system_turn_renders_chats_with_one(tokenizer):
    requires_system = "{% if messages[0]['role'] != 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    with_system = replace(chat(), prompt=(Message("system", "Be brief."), *chat().prompt))
    examples, counts = encode(tokenizer, with_system, chat(), chat_template=requires_system + CHATML)
    assert [len(scored_turns(tokenizer, example)) for example in examples] == [3]
    assert counts == {"the chat template refuses the conversation (no system turn)": 1}


def test_an_end_of_sequence_inside_an_earlier_answer_drops_the_chat(tokenizer):
    answers = (f"a box{tokenizer.eos_token}and more", *ANSWERED[1:])
    examples, counts = encode(tokenizer, chat(answers=answers))
    assert (examples, counts) == ([], {"end-of-sequence token inside an answer": 1})


def test_a_person_sees_what_is_imitated(tokenizer):
    (example,), _ = encode(tokenizer, chat(2), chat_template=CHATML)
    assert decoded_sample(example, tokenizer) == {
        "prompt": f"<|im_start|>user\n{ASKED[0]}<|im_end|>\n<|im_start|>assistant\n",
        "completion": f"{ANSWERED[0]}<|im_end|>[not scored: \n<|im_start|>user\n{ASKED[1]}<|im_end|>\n"
        f"<|im_start|>assistant\n]{ANSWERED[1]}<|im_end|>",
    }


def test_kept_encodings_have_their_marks(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("bfpo.data.tokenize.MIN_CACHED", 1)
    (first,), _ = encode(tokenizer, chat(), cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    (again,), _ = encode(tokenizer, chat(), cache=tmp_path)
    assert [list(ids) for ids in (again.prompt_ids, *again.completions)] == [
        list(ids) for ids in (first.prompt_ids, *first.completions)
    ]
    # The same texts, of which one answer is imitated, are another encoding.
    encode(tokenizer, chat(every_turn=False), cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_scored_tokens_are_counted():
    examples = [
        Example(np.array([1, 2], np.int32), (np.array([3, ~4, ~5, 6], np.int32),)),
        Example(np.array([1], np.int32), (np.array([7, 8], np.int32),)),
    ]
    table = token_table(examples, ["a", "b"])
    assert table.scored.tolist() == [[2], [2]]
    assert table.lengths.tolist() == [[2, 4], [1, 2]]
