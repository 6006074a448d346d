"""The Modelfile beside a GGUF file: its template is the chat template, or is left out."""

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from bfpo.deployment.ollama import make_modelfile, translate_template
from bfpo.model.new import TURN_END


def test_the_modelfile_of_a_chat_template(tokenizer):
    text, reason = make_modelfile("a.gguf", tokenizer, [tokenizer.eos_token_id])
    assert reason is None
    assert text == (
        'FROM ./a.gguf\nTEMPLATE """{{ range .Messages }}'
        '{{ if eq .Role "system" }}<|im_start|>system\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "assistant" }}<|im_start|>assistant\n{{ .Content }}<|im_end|>\n'
        '{{ end }}{{ end }}<|im_start|>assistant\n"""\n'
        f'PARAMETER stop """{TURN_END}"""\n'
    )


TEMPLATES = Path(__file__).parents[1] / "templates"


def test_templates_that_put_fixed_texts_around_messages_are_translated(tokenizer):
    own = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, bos_token="<|im_start|>")
    own.chat_template = (TEMPLATES / "smollm2.jinja").read_text()
    turns = translate_template(own)
    assert turns.start.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert turns.go_template().startswith('{{ if ne (index .Messages 0).Role "system" }}<|im_start|>system\nYou are')
    own.chat_template = "{{ '{{' }}" + tokenizer.chat_template
    assert (
        translate_template(own)
        .go_template()
        .startswith('{{ if ne (index .Messages 0).Role "system" }}{{ "{{" }}{{ end }}')
    )


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ tools }}{{ messages[0].content }}", "it depends on tools"),
        ("{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}{% endfor %}", "it changes messages"),
        ("{% for m in messages %}{{ loop.index }}{{ m.role }} {{ m.content }};{% endfor %}", "depends on the others"),
        ("{{ messages[-1].content }}", "depends on the others"),
        (
            "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
            "{{ m.content }};{% endfor %}",
            "no system",
        ),
    ],
)
def test_other_templates_are_left_out_with_a_comment(tokenizer, template, reason):
    own = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token=TURN_END)
    own.chat_template = template
    text, told = make_modelfile("a.gguf", own, [own.eos_token_id])
    assert reason in told
    assert 'TEMPLATE "' not in text
    assert text.splitlines()[1].startswith("# No TEMPLATE: the chat template can't be translated exactly (")
    own.chat_template = None
    assert 'TEMPLATE """{{ .Prompt }}"""' in make_modelfile("a.gguf", own, [own.eos_token_id])[0]


def test_a_brace_before_a_message_is_no_part_of_an_action(tokenizer):
    own = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, bos_token="<|im_start|>")
    own.chat_template = (
        "{% for m in messages %}{{ '{' + m.role + ': {' + m.content + '}}' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '{assistant: {' }}{% endif %}"
    )
    template = translate_template(own).go_template()
    assert '{user: {{ "{" }}{{ .Content }}}}' in template
    # Go takes the leftmost two braces for the start of an action.
    assert "{{{" not in template
