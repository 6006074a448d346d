"""Chat templates that are broken or hostile: one ModelError at loading, or a TemplateError for a conversation."""

import copy
import pickle
import resource
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
from jinja2.exceptions import TemplateError
from transformers import AutoTokenizer, ProcessorMixin

from bfpo.config.recipes import ModelSection, NewModel, TextSection
from bfpo.core.conversation import Message
from bfpo.core.pairs import PreferencePair
from bfpo.data.tokenize import Encoder
from bfpo.errors import ModelError
from bfpo.model import templates
from bfpo.model.load import load_tokenizer
from bfpo.model.new import CHAT_TEMPLATE
from bfpo.model.templates import TemplateLimit
from bfpo.training.start import load_start_tokenizer

CONVERSATION = [{"role": "user", "content": "red box"}]
LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}BODY{% endfor %}{% endfor %}"
LONG = "{{ messages[0]['content'] * 5000000 }}"
# Only for other conversations than those of the check.
LATER = "{% if 'red' in messages[0]['content'] %}WRONG{% else %}{{ messages[0]['content'] }}{% endif %}"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(templates, "MAX_SECONDS", 0.2)
    monkeypatch.setattr(templates, "MAX_MEMORY", 1 << 28)


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("saved") / "model"
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def load(saved):
    """Return a function that loads a tokenizer with a chat template."""

    def load(template):
        shutil.copytree(saved, "model", dirs_exist_ok=True)
        Path("model/chat_template.jinja").write_text(template)
        return load_tokenizer(ModelSection(path="model"))

    return load


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for %}", "line 1: "),
        ("\n{{ messages", "line 2: "),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ cycler.__init__.__globals__.os.system('touch EXECUTED') }}", "unsafe"),
        (LOOPS.replace("BODY", ""), "it takes more than 0.2 seconds"),
        (LOOPS.replace("BODY", "text"), "it takes more than 0.2 seconds"),
        # Python checks for signals only now and then while it computes this number.
        pytest.param("{{ 9 ** (9 ** 9) }}", "more than 0.2 seconds|too much memory", marks=pytest.mark.slow),
        ("{{ 'x' * 10 ** 10 }}", "too much memory"),
        ("{{ [0] * 10 ** 10 }}", "too much memory"),
        (
            "{% set t = namespace(x='x') %}{% for a in range(99) %}{% set t.x = t.x * 9 %}{% endfor %}",
            "too much memory|more than 0.2 seconds",
        ),
        (LONG, "it writes 25,000,000 characters, more than 20,000,000"),
        ("{% for a in range(10 ** 9) %}x{% endfor %}", "fails on every conversation .OverflowError"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "fails on every conversation .RecursionError"),
        ("{{ 1 / 0 }}", "fails on every conversation .ZeroDivisionError: division by zero"),
        ("{{ 1 + 'a' }}", "fails on every conversation .TypeError"),
        ("{% include '/etc/passwd' %}", "fails on every conversation .TypeError: no loader"),
    ],
)
def test_a_broken_or_hostile_template_is_a_model_error(load, template, message):
    start = time.process_time()
    with pytest.raises(ModelError, match=rf"^chat template of 'model': .*({message})"):
        load(template)
    assert time.process_time() - start < 10
    assert not Path("EXECUTED").exists()


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('never') }}",
        "{{ guideline.text.more }}",
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHAT_TEMPLATE,
        "{% for part in messages[0]['content'] %}{{ part['text'] + part['type'] }}{% endfor %}",
        "{{ messages[0]['content'][0]['text'] + 'text' }}",
    ],
)
def test_a_template_that_only_refuses_these_conversations_is_loaded(load, template):
    assert load(template).chat_template == template


def test_a_good_template_renders_as_before(load, tokenizer):
    options = {"tokenize": False, "add_generation_prompt": True}
    assert load(CHAT_TEMPLATE).apply_chat_template(CONVERSATION, **options) == tokenizer.apply_chat_template(
        CONVERSATION, **options
    )
    assert load(CHAT_TEMPLATE).apply_chat_template(CONVERSATION)["input_ids"]


@pytest.mark.parametrize("wrong", ["{{ 1 / 0 }}", "{{ 'a' + 1 }}", "{{ messages[5].x.y }}", LOOPS, LONG])
def test_what_goes_wrong_later_is_a_template_error(load, wrong):
    tokenizer = load(LATER.replace("WRONG", wrong))
    with pytest.raises(TemplateError):
        tokenizer.apply_chat_template(CONVERSATION, tokenize=False)
    (encoding,) = Encoder(tokenizer, TextSection())._encode_chunk([pair_of("red box")])
    assert encoding.fault.startswith("the chat template refuses the conversation")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "blue"}], tokenize=False) == "blue"


def pair_of(text):
    return PreferencePair((Message("user", text),), "yes", "no")


def test_limits_are_removed_after_each_rendering(load):
    before = signal.getsignal(signal.SIGVTALRM), resource.getrlimit(resource.RLIMIT_AS)
    tokenizer = load(LATER.replace("WRONG", LOOPS))
    with pytest.raises(TemplateLimit):
        tokenizer.apply_chat_template(CONVERSATION, tokenize=False)
    assert (signal.getsignal(signal.SIGVTALRM), resource.getrlimit(resource.RLIMIT_AS)) == before
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0, 0)


def test_templates_are_rendered_in_other_threads_too(load):
    tokenizer, texts = load(CHAT_TEMPLATE), []
    thread = threading.Thread(
        target=lambda: texts.append(tokenizer.apply_chat_template(CONVERSATION, tokenize=False))
    )
    thread.start()
    thread.join()
    assert "red box" in texts[0]


def test_the_template_of_a_recipe_is_checked(saved):
    text = TextSection(chat_template="{{ 1 / 0 }}")
    for section in (ModelSection(new=NewModel(vocab_size=300)), ModelSection(path=str(saved))):
        with pytest.raises(ModelError, match="fails on every conversation"):
            load_start_tokenizer(section, text, lambda: ["red box"])


class TextProcessor(ProcessorMixin):
    """A processor without images, which copies what it contains."""

    def __init__(self, tokenizer):
        super().__init__(tokenizer)


COPIES = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda tokenizer: pickle.loads(pickle.dumps(tokenizer)),
    "processor": lambda tokenizer: copy.deepcopy(TextProcessor(tokenizer)).tokenizer,
}


@pytest.mark.parametrize("make_copy", COPIES.values(), ids=COPIES)
def test_a_copy_of_the_tokenizer_has_its_own_template_and_the_limits(load, make_copy):
    tokenizer = load(CHAT_TEMPLATE)
    copied = make_copy(tokenizer)
    assert copied is not tokenizer
    copied.chat_template = LATER.replace("WRONG", LOOPS)
    assert "red box" in tokenizer.apply_chat_template(CONVERSATION, tokenize=False)
    assert copied.apply_chat_template([{"role": "user", "content": "blue"}], tokenize=False) == "blue"
    with pytest.raises(TemplateLimit, match=r"more than 0\.2 seconds"):
        copied.apply_chat_template(CONVERSATION, tokenize=False)
    assert copied("red box")["input_ids"] == tokenizer("red box")["input_ids"]
    # A copy of a copy, too.
    with pytest.raises(TemplateLimit):
        make_copy(copied).apply_chat_template(CONVERSATION, tokenize=False)


def test_a_limited_tokenizer_is_saved_and_loaded_as_any_other(load, saved, tmp_path):
    tokenizer = load(CHAT_TEMPLATE)
    tokenizer.save_pretrained(tmp_path / "again")
    names = sorted(path.name for path in saved.iterdir())
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == names
    for name in names:
        if name != "tokenizer_config.json":
            assert (tmp_path / "again" / name).read_bytes() == (saved / name).read_bytes()
    assert isinstance(tokenizer, type(AutoTokenizer.from_pretrained(tmp_path / "again")))
    templates.limit_template(tokenizer)
    assert type(tokenizer) is type(load(CHAT_TEMPLATE)), "limits are not added twice"
