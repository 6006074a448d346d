"""Requests of the chat protocol: what is honored, and that nothing else is ignored."""

import json
from pathlib import Path

import pytest

from bfpo.core.conversation import user_says
from bfpo.core.samples import prompt_id
from bfpo.deployment.chat_requests import HONORED, WITHOUT_EFFECT, RefusedRequest, read_request


def read(**fields):
    content = {"model": "m", "messages": [{"role": "user", "content": "near"}], **fields}
    return read_request(json.dumps(content).encode(), model="m", max_new_tokens=9)


def test_honored_fields_reach_the_sampling():
    request = read(temperature=0.5, top_p=0.9, max_completion_tokens=4, seed=3, stream=True, user="someone", n=1)
    assert (request.sampling.temperature, request.sampling.top_p) == (0.5, 0.9)
    assert (request.sampling.max_new_tokens, request.sampling.seed, request.streams) == (4, 3, True)


def test_the_prompt_has_the_id_that_files_of_prompts_give_it():
    # So the noise of a seed is that of `bfpo generate`.
    assert read().prompt.prompt_id == prompt_id(user_says("near"))


def test_defaults_are_openais_with_a_seed_of_its_own():
    first, second = read(seed=None, tools=None), read()
    assert (first.sampling.temperature, first.sampling.top_p, first.sampling.max_new_tokens) == (1.0, 1.0, 9)
    assert first.sampling.seed != second.sampling.seed


def test_arguments_of_the_template_are_honored():
    assert read(chat_template_kwargs={"enable_thinking": False}).prompt.inputs.kwargs.value == {
        "enable_thinking": False
    }


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"n": 2}, "n", "n is 2"),
        ({"logprobs": True}, "logprobs", "supported"),
        ({"tools": [{"type": "function"}]}, "tools", "supported"),
        ({"stop": ["red"]}, "stop", "supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "supported"),
        ({"presence_penalty": 0.5}, "presence_penalty", "supported"),
        ({"top_k": 5}, "top_k", "unknown field"),
        ({"temperature": "hot"}, "temperature", "from 0 to 2"),
        ({"temperature": True}, "temperature", "from 0 to 2"),
        ({"temperature": 10**400}, "temperature", "from 0 to 2"),
        ({"top_p": 0}, "top_p", "above 0"),
        ({"max_tokens": 0}, "max_tokens", "at least 1"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_completion_tokens", "differ"),
        ({"seed": 1.5}, "seed", "integer"),
        ({"stream": "yes"}, "stream", "true or false"),
        ({"stream_options": {"every": 1}}, "stream_options", "include_usage"),
        ({"model": "other"}, "model", "'m' only"),
        ({"messages": []}, "messages", "a list of messages"),
        ({"messages": "near"}, "messages", "a list of messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "only text"),
        ({"messages": [{"role": "user", "content": "a", "mood": "b"}]}, "messages", "unknown key 'mood'"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "messages", "user turn"),
        ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs", "tools"),
    ],
)
def test_what_is_not_honored_is_refused(fields, param, words):
    with pytest.raises(RefusedRequest) as error:
        read(**fields)
    row = error.value.to_row()["error"]
    assert (row["param"], row["type"]) == (param, "invalid_request_error")
    assert words in row["message"]
    assert "ignore_message_keys" not in row["message"]


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{", b"\xff", b'{"model": "\\ud800"}', b"[" * 100_000, b'{"model": 1e999}']
)
def test_a_body_that_is_no_request_is_refused(content):
    with pytest.raises(RefusedRequest):
        read_request(content, model="m", max_new_tokens=9)


def test_the_page_lists_the_fields():
    page = (Path(__file__).parents[2] / "docs" / "deployment.md").read_text()
    for name in (*HONORED, *WITHOUT_EFFECT):
        assert f"`{name}`" in page
