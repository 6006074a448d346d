import copy
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from bfpo.config.recipes import Source, TextSection
from bfpo.core.conversation import Message
from bfpo.core.pairs import CutAnswers, Demonstration, PairSignals, PreferencePair, Provenance, SafetyLabels
from bfpo.data.decode import decoded_sample
from bfpo.data.load import SourceReport
from bfpo.data.table import pair_table, token_table
from bfpo.data.tokenize import Encoder, check_special_tokens
from bfpo.errors import ModelError
from bfpo.model.new import CHAT_TEMPLATE, TURN_END, TURN_START, new_tokenizer

TURN = "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
ANSWER = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def template(behind_turn, *, before="", generation=ANSWER):
    """Return a ChatML template with texts before the turns and after each turn."""
    return before + "{% for message in messages %}" + TURN + behind_turn + "{% endfor %}" + generation


def pair(chosen="a red box", rejected="a ball", prompt="which thing", labels=(True, False), history=()):
    return PreferencePair((*history, Message("user", prompt)), chosen, rejected, SafetyLabels(*labels))


def encode(tokenizer, *records, **text):
    """Return the encoded pairs, their token ids and the report."""
    report = SourceReport("toy", Source(path="toy.jsonl"))
    encoded, examples = Encoder(tokenizer, TextSection(**text)).encode(records, report)
    return encoded, examples, report


def seen(tokenizer, example):
    """Return what the model sees: the prompt and each completion, decoded."""
    return tuple(tokenizer.decode(ids) for ids in (example.prompt_ids, *example.completions))


def reasons(counts):
    return {(reason.text, reason.cell): count for reason, count in counts.items()}


@pytest.fixture
def changed(tokenizer):
    """Return a function that copies the tokenizer and changes attributes of the copy."""

    def copied(**attributes):
        other = copy.deepcopy(tokenizer)
        for name, value in attributes.items():
            setattr(other, name, value)
        return other

    return copied


@pytest.mark.parametrize("behind_turn", ["<|im_end|>\n", "<|im_end|> \n\n", "\n"])
def test_no_end_of_sequence_is_scored_after_a_cut_answer(behind_turn, tokenizer):
    cut = replace(pair(), cut=CutAnswers(chosen=True))
    _, (example,), report = encode(tokenizer, cut, chat_template=template(behind_turn))
    _, chosen, rejected = seen(tokenizer, example)
    assert chosen == "a red box"
    assert rejected.endswith("a ball<|im_end|>") or rejected == "a ball\n<|im_end|>"
    assert reasons(report.noted) == {("cut answer, its end not scored", "su"): 1}


def test_answers_that_differ_in_their_ends_only_are_dropped(tokenizer):
    cut = replace(pair("a ball of", "a ball of"), cut=CutAnswers(rejected=True))
    _, examples, report = encode(tokenizer, cut)
    assert not examples
    assert reasons(report.dropped) == {("identical answers after the chat template", "su"): 1}


@pytest.mark.parametrize(
    ("behind_turn", "separator"),
    [
        ("<|im_end|>\n", "<|im_end|>\n"),
        ("<|im_end|>", "<|im_end|>"),
        ("<|im_end|> \n\n", "<|im_end|> \n\n"),
        ("<|im_end|><|im_end|>\n", "<|im_end|><|im_end|>\n"),
        ("\n", "\n"),
    ],
    ids=["a line break behind it", "nothing behind it", "white space behind it", "twice", "not at all"],
)
def test_each_completion_ends_with_exactly_one_end_of_sequence(behind_turn, separator, tokenizer):
    _, (example,), _ = encode(tokenizer, pair(), chat_template=template(behind_turn))
    prompt, chosen, rejected = seen(tokenizer, example)
    assert prompt == f"<|im_start|>user\nwhich thing{separator}<|im_start|>assistant\n"
    # A template without an end of turn leaves its line break in the answer: it is what generation will see.
    rest = "\n" if "im_end" not in behind_turn else ""
    assert (chosen, rejected) == (f"a red box{rest}<|im_end|>", f"a ball{rest}<|im_end|>")
    for ids in example.completions:
        assert list(ids).count(tokenizer.eos_token_id) == 1
        assert ids[-1] == tokenizer.eos_token_id


def test_prompt_and_completion_are_the_ids_of_the_whole_conversation(tokenizer):
    _, (example,), _ = encode(tokenizer, pair("ball under door", "no"))
    turns = [{"role": "user", "content": "which thing"}, {"role": "assistant", "content": "ball under door"}]
    whole = tokenizer.apply_chat_template(turns, return_dict=False)
    ours = [*example.prompt_ids, *example.completions[0]]
    assert ours == whole[: len(ours)]
    assert tokenizer.decode(whole[len(ours) :]) == "\n"


def test_a_default_system_prompt_is_seen_as_generation_sees_it(tokenizer):
    default = "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe brief.<|im_end|>\n{% endif %}"
    own = template("<|im_end|>\n", before=default)
    spoken = pair(history=(Message("system", "Be loud."),))
    _, examples, _ = encode(tokenizer, pair(), spoken, chat_template=own)
    for record, example in zip((pair(), spoken), examples, strict=True):
        turns = [message.to_row() for message in record.prompt]
        generated = tokenizer.apply_chat_template(
            turns, chat_template=own, add_generation_prompt=True, return_dict=False
        )
        assert list(example.prompt_ids) == generated
    prompts = [seen(tokenizer, example)[0] for example in examples]
    assert [prompt.count("<|im_start|>system") for prompt in prompts] == [1, 1]
    assert ["Be brief." in prompt for prompt in prompts] == [True, False]


def test_a_conversation_of_several_turns_is_prompt_up_to_the_last_answer(tokenizer):
    history = (Message("user", "a box"), Message("assistant", "which one"))
    _, (example,), _ = encode(tokenizer, pair(history=history))
    prompt, chosen, _ = seen(tokenizer, example)
    assert prompt.count("<|im_start|>") == 4
    assert "which one<|im_end|>" in prompt
    assert chosen == "a red box<|im_end|>"


def test_the_tokenizers_own_template_is_used_unless_the_recipe_names_one(changed, tmp_path):
    tokenizer = changed(chat_template=template("<|im_end|>", before="first "))
    (tmp_path / "template.jinja").write_text(template("<|im_end|>", before="second "))
    firsts = [
        seen(tokenizer, encode(tokenizer, pair(), chat_template=text)[1][0])[0].split()[0].partition("<")[0]
        for text in (None, str(tmp_path / "template.jinja"), template("<|im_end|>", before="third "))
    ]
    assert firsts == ["first", "second", "third"]


def test_a_template_file_that_is_not_there_is_named(tokenizer):
    with pytest.raises(ModelError, match=r"text.chat_template: nothing.jinja: No such file or directory; expected a"):
        encode(tokenizer, pair(), chat_template="nothing.jinja")


def test_where_a_template_renders_the_prompt_differently_the_common_part_is_the_prompt(tokenizer):
    # Generation opens a thought that a finished answer doesn't have.
    opened = "{% if add_generation_prompt %}<|im_start|>assistant\nhmm{% endif %}"
    _, (example,), report = encode(tokenizer, pair(), chat_template=template("<|im_end|>", generation=opened))
    prompt, chosen, rejected = seen(tokenizer, example)
    assert prompt == "<|im_start|>user\nwhich thing<|im_end|><|im_start|>assistant\n"
    assert (chosen, rejected) == ("a red box<|im_end|>", "a ball<|im_end|>")
    assert reasons(report.noted) == {("prompt is not a prefix of the conversation", "su"): 1}


def test_both_answers_follow_the_same_prompt_when_one_merges_with_it():
    # This tokenizer joins line breaks: "assistant\n" followed by "\n\nred" is other ids than "assistant\n" alone.
    joining = new_tokenizer(["box\n\n\nball"] * 50, vocab_size=300)
    record = pair("\n\nred", "blue")
    _, (example,), report = encode(joining, record)
    prompt, chosen, rejected = seen(joining, example)
    assert prompt == "<|im_start|>user\nwhich thing<|im_end|>\n<|im_start|>assistant"
    assert (chosen, rejected) == ("\n\n\nred<|im_end|>", "\nblue<|im_end|>")
    assert reasons(report.noted) == {("prompt is not a prefix of the conversation", "su"): 1}


def test_a_template_with_nothing_in_common_is_a_fault(tokenizer):
    texts = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    other = f"{{% if add_generation_prompt %}}ask {{% else %}}tell {{% endif %}}{texts}"
    encoded, _, report = encode(tokenizer, pair(), chat_template=other)
    assert encoded == []
    reason = "the chat template renders prompt and conversation differently from the start"
    assert reasons(report.dropped) == {(reason, "su"): 1}


@pytest.mark.parametrize(
    ("refusal", "reason"),
    [("raise_exception('no system turns')", "no system turns"), ("'abc'.index('z')", "substring not found")],
)
def test_a_conversation_that_the_template_refuses_is_a_fault_with_its_reason(tokenizer, refusal, reason):
    refusing = f"{{% if messages[0]['role'] == 'system' %}}{{{{ {refusal} }}}}{{% endif %}}"
    records = pair(history=(Message("system", "Be brief."),)), pair()
    encoded, _, report = encode(tokenizer, *records, chat_template=template("<|im_end|>", before=refusing))
    assert encoded == [records[1]]
    assert reasons(report.dropped) == {(f"the chat template refuses the conversation ({reason})", "su"): 1}


def test_a_template_that_is_not_jinja_is_refused_at_once(tokenizer):
    with pytest.raises(ModelError, match=r"^chat template: line 2: unexpected '}'$"):
        encode(tokenizer, pair(), chat_template="{% for message in messages %}\n{{ message }")


def lengths(tokenizer, record):
    _, (example,), _ = encode(tokenizer, record)
    return len(example.prompt_ids), *map(len, example.completions)


LONG = pair("red box near door " * 6, "a blue ball")


@pytest.mark.parametrize("truncation", ["keep_start", "keep_end"])
def test_what_just_fits_is_not_cut(truncation, tokenizer):
    prompt, chosen, rejected = lengths(tokenizer, LONG)
    _, (whole,), _ = encode(tokenizer, LONG)
    _, (example,), report = encode(tokenizer, LONG, max_length=prompt + max(chosen, rejected), truncation=truncation)
    assert seen(tokenizer, example) == seen(tokenizer, whole)
    assert not report.noted


def test_keep_start_cuts_the_end_of_the_longer_answer_only(tokenizer):
    prompt, chosen, rejected = lengths(tokenizer, LONG)
    _, (whole,), _ = encode(tokenizer, LONG)
    _, (example,), report = encode(tokenizer, LONG, max_length=prompt + chosen - 3)
    assert list(example.prompt_ids) == list(whole.prompt_ids)
    assert list(example.completions[0]) == list(whole.completions[0][:-3])
    assert list(example.completions[1]) == list(whole.completions[1])
    assert len(example.completions[1]) == rejected
    assert reasons(report.noted) == {("completion truncated", "su"): 1}


def test_keep_end_cuts_the_beginning_of_the_prompt_only(tokenizer):
    prompt, chosen, _ = lengths(tokenizer, LONG)
    _, (whole,), _ = encode(tokenizer, LONG)
    _, (example,), report = encode(tokenizer, LONG, max_length=prompt + chosen - 3, truncation="keep_end")
    assert list(example.prompt_ids) == list(whole.prompt_ids[3:])
    assert [list(ids) for ids in example.completions] == [list(ids) for ids in whole.completions]
    assert reasons(report.noted) == {("prompt truncated", "su"): 1}


@pytest.mark.parametrize(
    ("truncation", "spare", "reason"),
    [
        ("keep_start", 1, None),
        ("keep_start", 0, "no room for the answers"),
        ("keep_start", -2, "no room for the answers"),
        ("keep_end", 1, None),
        ("keep_end", 0, "no room for the prompt"),
        ("keep_end", -2, "no room for the prompt"),
    ],
)
def test_a_pair_without_room_is_dropped_and_counted(truncation, spare, reason, tokenizer):
    prompt, chosen, _ = lengths(tokenizer, LONG)
    needed = prompt if truncation == "keep_start" else chosen
    # With room for one token of the answers, differing first tokens keep the pair a pair.
    encoded, examples, report = encode(tokenizer, LONG, max_length=needed + spare, truncation=truncation)
    if reason is None:
        assert len(encoded) == 1
        assert len(examples[0].prompt_ids) + max(map(len, examples[0].completions)) == needed + 1
    else:
        assert (encoded, examples) == ([], [])
        assert reasons(report.dropped) == {(reason, "su"): 1}


def test_answers_that_differ_only_behind_the_cut_are_dropped(tokenizer):
    record = pair("red box " * 8 + "near", "red box " * 8 + "under")
    prompt, chosen, _ = lengths(tokenizer, record)
    encoded, _, report = encode(tokenizer, record, max_length=prompt + chosen // 2)
    assert encoded == []
    assert reasons(report.dropped) == {("identical answers after truncation", "su"): 1}


@pytest.mark.parametrize("truncation", ["keep_start", "keep_end"])
def test_nothing_is_longer_than_the_limit(truncation, tokenizer, main_pairs):
    for max_length in (8, 12, 16, 24, 40):
        _, examples, _ = encode(tokenizer, *main_pairs, max_length=max_length, truncation=truncation)
        for example in examples:
            assert len(example.prompt_ids) + max(map(len, example.completions)) <= max_length
            assert len(example.prompt_ids) > 0
            assert all(len(ids) > 0 for ids in example.completions)


def test_the_text_of_the_end_token_inside_an_answer_drops_the_pair(tokenizer):
    inside, behind = pair(f"a red {TURN_END} box"), pair(f"a red box{TURN_END}")
    encoded, (example,), report = encode(tokenizer, inside, behind)
    assert encoded == [behind]
    assert reasons(report.dropped) == {("end-of-sequence token inside an answer", "su"): 1}
    assert seen(tokenizer, example)[1] == "a red box<|im_end|>"


def test_counts_are_kept_by_cell(tokenizer):
    broken = f"a {TURN_END} b"
    labels = [(True, True), (True, False), (False, True), (False, False)]
    records = [pair(broken, labels=both) for both in labels for _ in range(2 if both == (False, True) else 1)]
    records.append(PreferencePair((Message("user", "which"),), broken, "b"))
    _, _, report = encode(tokenizer, *records)
    reason = "end-of-sequence token inside an answer"
    assert reasons(report.dropped) == {(reason, cell): 1 + (cell == "us") for cell in ("ss", "su", "us", "uu", None)}


def test_kept_items_and_examples_stay_together_over_chunks(tokenizer):
    records = [
        pair(f"a {TURN_END} b" if number % 7 == 0 else f"box {number}", f"ball {number}") for number in range(600)
    ]
    done = []
    report = SourceReport("toy", Source(path="toy.jsonl"))
    encoded, examples = Encoder(tokenizer, TextSection()).encode(records, report, done.append)
    assert done == [512, 88]
    assert len(encoded) == len(examples) == 600 - report.dropped.total()
    assert [seen(tokenizer, example)[1] for example in examples] == [record.chosen + TURN_END for record in encoded]


def test_demonstrations_have_one_completion(tokenizer):
    record = Demonstration((Message("user", "which thing"),), "a red box")
    encoded, (example,), _ = encode(tokenizer, record)
    assert encoded == [record]
    assert decoded_sample(example, tokenizer) == {
        "prompt": "<|im_start|>user\nwhich thing<|im_end|>\n<|im_start|>assistant\n",
        "completion": "a red box<|im_end|>",
    }
    table = token_table([example, example], ["a", "b"])
    assert seen(tokenizer, table[1]) == seen(tokenizer, example)


def test_a_tokenizer_without_an_end_token_is_refused(changed):
    with pytest.raises(ModelError, match=r"has no end-of-sequence token; set tokenizer.eos_token and save it again"):
        encode(changed(eos_token=None), pair())


def test_a_tokenizer_without_a_template_is_refused_unless_the_recipe_has_one(changed):
    with pytest.raises(ModelError, match=r"has no chat template; set text.chat_template in the recipe to a Jinja"):
        encode(changed(chat_template=None), pair())
    assert encode(changed(chat_template=None), pair(), chat_template=CHAT_TEMPLATE)[0]


def test_a_doubled_beginning_is_refused(changed):
    tokenizer = changed(bos_token=TURN_START)
    _, once, _ = encode(tokenizer, pair())
    _, twice, _ = encode(tokenizer, pair(), chat_template=TURN_START + CHAT_TEMPLATE)
    check_special_tokens(once, tokenizer)
    with pytest.raises(ModelError, match="prompts begin with two beginning-of-sequence tokens"):
        check_special_tokens(twice, tokenizer)


def labeled(number, labels, dataset, **signals):
    return PreferencePair(
        (Message("user", f"which {number}"),),
        "a box",
        "a ball",
        SafetyLabels(*labels),
        PairSignals(**signals),
        provenance=Provenance(dataset, "human", "buffer" if dataset == "b" else "main"),
    )


def test_the_table_holds_each_pair_with_its_labels(tokenizer, main_pairs, buffer_pairs):
    records, examples, _ = encode(tokenizer, *main_pairs, *buffer_pairs)
    table = pair_table(examples, records)
    assert len(table) == 22
    assert [seen(tokenizer, table[index]) for index in range(22)] == [
        seen(tokenizer, example) for example in examples
    ]
    assert Counter(table.cells.tolist()) == {0: 13, 1: 3, 2: 3, 3: 3}
    assert table.chosen_safe.tolist() == [float(record.labels.chosen) for record in records]
    assert table.rejected_safe.tolist() == [float(record.labels.rejected) for record in records]
    assert (list(table.main_rows), list(table.buffer_rows)) == (list(range(12)), list(range(12, 22)))
    assert table.lengths.tolist() == [
        [len(example.prompt_ids), *map(len, example.completions)] for example in examples
    ]


def test_expected_safety_is_the_mean_of_the_data_set_where_no_column_gives_it(tokenizer):
    records = [
        labeled(0, (True, False), "a"),  # labels: mean 1/2
        labeled(1, (True, True), "a", chosen_safety_score=0.5, rejected_safety_score=0.0),  # scores go first: 1/4
        labeled(2, (False, False), "a", expected_safety=0.75),
        labeled(3, (True, True), "b"),
    ]
    _, examples, _ = encode(tokenizer, *records)
    mean_of_a = (1 / 2 + 1 / 4 + 0) / 3
    table = pair_table(examples, records)
    np.testing.assert_allclose(table.signals["expected_safety"], [mean_of_a, mean_of_a, 0.75, 1], rtol=1e-12)
    assert set(table.signals) == {"expected_safety", "judged"}


def test_pairs_without_degrees_have_none_in_a_table_with_graded_ones(tokenizer):
    records = [labeled(0, (True, True), "a", degree_difference=0.25), labeled(1, (True, False), "a")]
    _, examples, _ = encode(tokenizer, *records)
    np.testing.assert_equal(pair_table(examples, records).signals["degree_difference"], [0.25, np.nan])


def test_scores_replace_labels_when_asked_for(tokenizer):
    records = [labeled(0, (True, False), "a", chosen_safety_score=0.9, rejected_safety_score=0.2, reward_margin=-1.5)]
    _, examples, _ = encode(tokenizer, *records)
    table = pair_table(examples, records, use_scores=True)
    assert (table.chosen_safe.tolist(), table.rejected_safe.tolist()) == ([0.9], [0.2])
    assert table.signals["reward_margin"].tolist() == [-1.5]
    assert pair_table(examples, records).chosen_safe.tolist() == [1.0]
