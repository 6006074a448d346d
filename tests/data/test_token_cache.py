import copy

import numpy as np
import pytest

from bfpo.config.recipes import Source, TextSection
from bfpo.core.conversation import Message
from bfpo.core.pairs import Demonstration, PreferencePair, SafetyLabels
from bfpo.data import token_cache, tokenize
from bfpo.data.load import SourceReport
from bfpo.data.tokenize import Encoder
from bfpo.model.new import CHAT_TEMPLATE


@pytest.fixture(autouse=True)
def small_sets_too(monkeypatch):
    monkeypatch.setattr(tokenize, "MIN_CACHED", 1)


@pytest.fixture
def records(main_pairs):
    """One pair has to be dropped, one cut."""
    prompt = (Message("user", "which box"),)
    spoiled = PreferencePair(prompt, "a <|im_end|> b", "c", SafetyLabels(True, True))
    long = PreferencePair(prompt, "a red box " * 90, "c", SafetyLabels(True, True))
    return [*main_pairs, spoiled, long]


def encode(tokenizer, records, cache, **text):
    report = SourceReport("toy", Source(path="-"))
    encoded, examples = Encoder(tokenizer, TextSection(**{"max_length": 100, **text}), cache).encode(records, report)
    return encoded, examples, report


def test_what_was_tokenized_before_is_found_again(tokenizer, records, tmp_path, monkeypatch):
    plain = encode(tokenizer, records, None)
    first = encode(tokenizer, records, tmp_path)
    monkeypatch.setattr(Encoder, "_encode_chunk", None)
    again = encode(tokenizer, records, tmp_path)
    for encoded, examples, report in (first, again):
        assert encoded == plain[0]
        assert len(encoded) == len(records) - 1
        for example, expected in zip(examples, plain[1], strict=True):
            assert example.prompt_ids.dtype == expected.prompt_ids.dtype
            for piece, expected_piece in zip((example[0], *example[1]), (expected[0], *expected[1]), strict=True):
                np.testing.assert_array_equal(piece, expected_piece)
        assert (report.dropped, report.noted) == (plain[2].dropped, plain[2].noted)
        assert report.dropped
        assert report.noted


def test_other_content_is_tokenized_anew(tokenizer, records, tmp_path):
    other_tokenizer = copy.deepcopy(tokenizer)
    other_tokenizer.add_tokens(["lamp"])
    # Templates can write it.
    other_start = copy.deepcopy(tokenizer)
    other_start.bos_token = other_start.eos_token
    assert other_start.bos_token != tokenizer.bos_token
    for change in (
        lambda: encode(tokenizer, records, tmp_path),
        lambda: encode(tokenizer, records[1:], tmp_path),
        lambda: encode(tokenizer, records, tmp_path, max_length=99),
        lambda: encode(tokenizer, records, tmp_path, chat_template=CHAT_TEMPLATE.replace("user", "human")),
        lambda: encode(tokenizer, records, tmp_path, chat_template=" " + CHAT_TEMPLATE),
        lambda: encode(other_tokenizer, records, tmp_path),
        lambda: encode(other_start, records, tmp_path),
        lambda: encode(tokenizer, [Demonstration(pair.prompt, pair.chosen) for pair in records], tmp_path),
    ):
        before = len(list(tmp_path.iterdir()))
        change()
        assert len(list(tmp_path.iterdir())) == before + 1
        change()
        assert len(list(tmp_path.iterdir())) == before + 1


@pytest.mark.parametrize("damage", [b"", b"not a file of arrays", None])
def test_a_damaged_file_is_made_anew(tokenizer, records, tmp_path, damage):
    expected = encode(tokenizer, records, tmp_path)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2] if damage is None else damage)
    assert token_cache.read_encodings(file) is None
    assert encode(tokenizer, records, tmp_path)[0] == expected[0]
    assert token_cache.read_encodings(file) is not None


def test_a_template_with_the_date_in_it_is_kept_for_a_day(tokenizer, tmp_path, monkeypatch):
    dated = "{{ strftime_now('%d') }}" + CHAT_TEMPLATE
    files = {token_cache.cache_file(tmp_path, tokenizer, template, TextSection(), []) for template in (dated,) * 2}

    class Tomorrow(token_cache.datetime):
        @classmethod
        def now(cls, tz=None):
            return super().now(tz).replace(year=2001)

    monkeypatch.setattr(token_cache, "datetime", Tomorrow)
    files.add(token_cache.cache_file(tmp_path, tokenizer, dated, TextSection(), []))
    assert len(files) == 2
