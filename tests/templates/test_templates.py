"""The templates of this folder render conversations as published (sources: README.md), through transformers."""

import hashlib
import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from jinja2 import TemplateError, UndefinedError
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

FOLDER = Path(__file__).parent
TEMPLATES = sorted(path.stem for path in FOLDER.glob("*.jinja"))
# First and last token of a text, where the template writes them.
SPECIAL = {
    "llama3": {"bos_token": "<|begin_of_text|>"},
    "hermes": {"bos_token": "<|begin_of_text|>"},
    "gemma3": {"bos_token": "<bos>"},
    "mistral": {"bos_token": "<s>", "eos_token": "</s>"},
    "magistral": {"bos_token": "<s>", "eos_token": "</s>"},
    "deepseek_r1_distill": {"bos_token": "<｜begin▁of▁sentence｜>"},
}
# Copies of published templates that TRL has.
IN_TRL = {"llama3": "llama3_1", **{name: name for name in ("qwen3", "gemma3", "deepseek_r1_distill", "gptoss")}}

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Return the temperature.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Name of the city."}},
            "required": ["city"],
        },
    },
}
TOOL_LINE = json.dumps(TOOL)
PARAMETERS_LINE = json.dumps(TOOL["function"]["parameters"])
CALL = {"id": "call00001", "type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
CALL_TEXT = '{"name": "weather", "arguments": {"city": "Oslo"}}'


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **fields}


RESULT = {"role": "tool", "tool_call_id": "call00001", "name": "weather", "content": "21"}
# Conversations with the arguments of `apply_chat_template`.
CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "plain": ([user("Hello.")], {"add_generation_prompt": True}),
    "system": ([system("Be brief."), user("Hello.")], {"add_generation_prompt": True}),
    "turns": ([system("Be brief."), user("Hello."), assistant("Hi."), user("Bye.")], {"add_generation_prompt": True}),
    "answered": ([system("Be brief."), user("Hello."), assistant("Hi.")], {}),
    "tool": (
        [user("How warm is Oslo?"), assistant("", tool_calls=[CALL]), RESULT, assistant("It is 21 degrees.")],
        {"tools": [TOOL]},
    ),
    "pending": (
        [user("How warm is Oslo?"), assistant("", reasoning_content="Look it up.", tool_calls=[CALL]), RESULT],
        {"tools": [TOOL], "add_generation_prompt": True},
    ),
    "thoughts": (
        [
            user("2 + 2?"),
            assistant("4", reasoning_content="Two and two."),
            user("3 + 3?"),
            assistant("6", reasoning_content="Three and three."),
        ],
        {},
    ),
    "inline": (
        [
            user("2 + 2?"),
            assistant("<think>\nTwo and two.\n</think>\n\n4"),
            user("3 + 3?"),
            assistant("<think>\nThree and three.\n</think>\n\n6"),
        ],
        {},
    ),
}

LLAMA_SYSTEM = (
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
    "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
)
LLAMA_TOOL = (
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nEnvironment: ipython\n"
    "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n"
    "Given the following functions, please respond with a JSON for a function call with its proper arguments that "
    'best answers the given prompt.\n\nRespond in the format {"name": function name, "parameters": dictionary of '
    f"argument name and its value}}.Do not use variables.\n\n{json.dumps(TOOL, indent=4)}\n\nHow warm is Oslo?"
    "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    '{"name": "weather", "parameters": {"city": "Oslo"}}<|eot_id|>'
    '<|start_header_id|>ipython<|end_header_id|>\n\n"21"<|eot_id|>'
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
)
QWEN_TOOL = (
    "<|im_start|>system\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    f"You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n{TOOL_LINE}\n</tools>\n\n"
    "For each function call, return a json object with function name and arguments within <tool_call></tool_call> "
    'XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n'
    "<|im_start|>user\nHow warm is Oslo?<|im_end|>\n<|im_start|>assistant\n"
)
QWEN_CALL = (
    f"<tool_call>\n{CALL_TEXT}\n</tool_call><|im_end|>\n"
    "<|im_start|>user\n<tool_response>\n21\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
)
HERMES_TOOL = (
    "<|begin_of_text|><|im_start|>system\nYou are a function calling AI model. You are provided with function "
    "signatures within <tools></tools> XML tags. You may call one or more functions to assist with the user query. "
    "Don't make assumptions about what values to plug into functions. Here are the available tools: <tools> "
    '{"type": "function", "function": {"name": "weather", "description": "weather(city: str) - Return the '
    f'temperature.\n\n    Args:\n        city(str): Name of the city.", "parameters": {PARAMETERS_LINE}}}}} </tools>'
    "Use the following pydantic model json schema for each tool call you will make: "
    '{"properties": {"name": {"title": "Name", "type": "string"}, "arguments": {"title": "Arguments", "type": '
    '"object"}}, "required": ["name", "arguments"], "title": "FunctionCall", "type": "object"}\n'
    "For each function call return a json object with function name and arguments within <tool_call></tool_call> XML "
    'tags as follows:\n<tool_call>\n{"name": <function-name>, "arguments": <args-dict>}\n</tool_call><|im_end|>\n'
    "<|im_start|>user\nHow warm is Oslo?<|im_end|>\n"
    f"<|im_start|>assistant\n<tool_call>\n{CALL_TEXT}\n</tool_call><|im_end|>\n"
)
SMOLLM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
SMOLLM2 = f"<|im_start|>system\n{SMOLLM}<|im_end|>\n"
SMOLLM3 = (
    "<|im_start|>system\n## Metadata\n\nKnowledge Cutoff Date: June 2025\nToday Date: DATE\n"
    "Reasoning Mode: /think\n\n"
)
SMOLLM3_BRIEF = f"{SMOLLM3}## Custom Instructions\n\nBe brief.\n\n"
# The default instructions are long; here their ends are compared, below their digest.
SMOLLM3_PLAIN = f"{SMOLLM3}## Custom Instructions\n\n{SMOLLM}. ... to reach the conclusion.\n\n"
SMOLLM3_TOOL = (
    f"{SMOLLM3_PLAIN}### Tools\n\nYou may call one or more functions to assist with the user query.\n"
    f"You are provided with function signatures within <tools></tools> XML tags:\n\n<tools>\n{TOOL}\n</tools>\n\n"
    "For each function call, return a json object with function name and arguments within <tool_call></tool_call> "
    'XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>\n\n<|im_end|>\n'
    "<|im_start|>user\nHow warm is Oslo?<|im_end|>\n<|im_start|>assistant\n<|im_end|>\n"
    "<|im_start|>user\n21<|im_end|>\n<|im_start|>assistant\n"
)
MISTRAL_TOOLS = f"<s>[AVAILABLE_TOOLS] [{TOOL_LINE}][/AVAILABLE_TOOLS][INST] How warm is Oslo?[/INST]"
MISTRAL_CALL = (
    '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Oslo"}, "id": "call00001"}]</s>'
    '[TOOL_RESULTS] {"content": 21, "call_id": "call00001"}[/TOOL_RESULTS]'
)
MAGISTRAL_TOOLS = f"<s>[AVAILABLE_TOOLS][{TOOL_LINE}][/AVAILABLE_TOOLS][INST]How warm is Oslo?[/INST]"
MAGISTRAL_CALL = '[TOOL_CALLS]weather[ARGS]{"city": "Oslo"}</s>[TOOL_RESULTS]21[/TOOL_RESULTS]'
HARMONY = (
    "<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.\n"
    "Knowledge cutoff: 2024-06\nCurrent date: DATE\n\nReasoning: medium\n\n"
    "# Valid channels: analysis, commentary, final. Channel must be included for every message."
)
HARMONY_BRIEF = f"{HARMONY}<|end|><|start|>developer<|message|># Instructions\n\nBe brief.\n\n<|end|>"
HARMONY_TOOL = (
    f"{HARMONY}\nCalls to these tools must go to the commentary channel: 'functions'.<|end|>"
    "<|start|>developer<|message|># Tools\n\n## functions\n\nnamespace functions {\n\n// Return the temperature.\n"
    "type weather = (_: {\n// Name of the city.\ncity: string,\n}) => any;\n\n} // namespace functions<|end|>"
    "<|start|>user<|message|>How warm is Oslo?<|end|>"
)
HARMONY_CALL = (
    '<|start|>assistant to=functions.weather<|channel|>commentary json<|message|>{"city": "Oslo"}<|call|>'
    '<|start|>functions.weather to=assistant<|channel|>commentary<|message|>"21"<|end|><|start|>assistant'
)
GEMMA_ALTERNATE = TemplateError("must alternate user/assistant")

# The text of every conversation, or the error where the template refuses it.
EXPECTED: dict[str, dict[str, str | TemplateError]] = {
    "llama3": {
        "plain": LLAMA_SYSTEM + "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHello.<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "system": LLAMA_SYSTEM + "Be brief.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHello.<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "turns": LLAMA_SYSTEM + "Be brief.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHello.<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHi.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nBye.<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "answered": LLAMA_SYSTEM + "Be brief.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHello.<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHi.<|eot_id|>",
        "tool": LLAMA_TOOL + "It is 21 degrees.<|eot_id|>",
        "pending": LLAMA_TOOL,
        "thoughts": LLAMA_SYSTEM + "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n2 + 2?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n4<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n3 + 3?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n6<|eot_id|>",
        "inline": LLAMA_SYSTEM + "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n2 + 2?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n<think>\nTwo and two.\n</think>\n\n4<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n3 + 3?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n<think>\nThree and three.\n</think>\n\n6<|eot_id|>",
    },
    "qwen3": {
        "plain": "<|im_start|>user\nHello.<|im_end|>\n<|im_start|>assistant\n",
        "system": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello.<|im_end|>\n"
        "<|im_start|>assistant\n",
        "turns": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello.<|im_end|>\n"
        "<|im_start|>assistant\nHi.<|im_end|>\n<|im_start|>user\nBye.<|im_end|>\n<|im_start|>assistant\n",
        "answered": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello.<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\nHi.<|im_end|>\n",
        "tool": QWEN_TOOL + QWEN_CALL + "<think>\n\n</think>\n\nIt is 21 degrees.<|im_end|>\n",
        "pending": QWEN_TOOL + "<think>\nLook it up.\n</think>\n\n" + QWEN_CALL,
        "thoughts": "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n"
        "<|im_start|>user\n3 + 3?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\nThree and three.\n</think>\n\n6<|im_end|>\n",
        "inline": "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n"
        "<|im_start|>user\n3 + 3?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\nThree and three.\n</think>\n\n6<|im_end|>\n",
    },
    "hermes": {
        "plain": "<|begin_of_text|><|im_start|>user\nHello.<|im_end|>\n<|im_start|>assistant\n",
        "system": "<|begin_of_text|><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello.<|im_end|>\n"
        "<|im_start|>assistant\n",
        "turns": "<|begin_of_text|><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello.<|im_end|>\n"
        "<|im_start|>assistant\nHi.<|im_end|>\n<|im_start|>user\nBye.<|im_end|>\n<|im_start|>assistant\n",
        "answered": "<|begin_of_text|><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello.<|im_end|>\n"
        "<|im_start|>assistant\nHi.<|im_end|>\n",
        "tool": HERMES_TOOL + "<|im_start|>tool\n<tool_response>\n21\n</tool_response>\n<|im_end|>"
        "<|im_start|>assistant\nIt is 21 degrees.<|im_end|>\n",
        "pending": HERMES_TOOL + "<|im_start|>tool\n<tool_response>\n21\n</tool_response><|im_end|>"
        "<|im_start|>assistant\n",
        "thoughts": "<|begin_of_text|><|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n"
        "<|im_start|>user\n3 + 3?<|im_end|>\n<|im_start|>assistant\n6<|im_end|>\n",
        "inline": "<|begin_of_text|><|im_start|>user\n2 + 2?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\nTwo and two.\n</think>\n\n4<|im_end|>\n<|im_start|>user\n3 + 3?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\nThree and three.\n</think>\n\n6<|im_end|>\n",
    },
    "smollm2": {
        "plain": SMOLLM2 + "<|im_start|>user\nHello.<|im_end|>\n<|im_start|>assistant\n",
        "system": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello.<|im_end|>\n"
        "<|im_start|>assistant\n",
        "turns": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello.<|im_end|>\n"
        "<|im_start|>assistant\nHi.<|im_end|>\n<|im_start|>user\nBye.<|im_end|>\n<|im_start|>assistant\n",
        "answered": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello.<|im_end|>\n"
        "<|im_start|>assistant\nHi.<|im_end|>\n",
        # Neither the tool nor the call is written.
        "tool": SMOLLM2 + "<|im_start|>user\nHow warm is Oslo?<|im_end|>\n<|im_start|>assistant\n<|im_end|>\n"
        "<|im_start|>tool\n21<|im_end|>\n<|im_start|>assistant\nIt is 21 degrees.<|im_end|>\n",
        "pending": SMOLLM2 + "<|im_start|>user\nHow warm is Oslo?<|im_end|>\n<|im_start|>assistant\n<|im_end|>\n"
        "<|im_start|>tool\n21<|im_end|>\n<|im_start|>assistant\n",
        "thoughts": SMOLLM2 + "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n"
        "<|im_start|>user\n3 + 3?<|im_end|>\n<|im_start|>assistant\n6<|im_end|>\n",
        "inline": SMOLLM2 + "<|im_start|>user\n2 + 2?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\nTwo and two.\n</think>\n\n4<|im_end|>\n<|im_start|>user\n3 + 3?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\nThree and three.\n</think>\n\n6<|im_end|>\n",
    },
    # The system turn isn't ended unless there are tools.
    "smollm3": {
        "plain": SMOLLM3_PLAIN + "<|im_start|>user\nHello.<|im_end|>\n<|im_start|>assistant\n",
        "system": SMOLLM3_BRIEF + "<|im_start|>user\nHello.<|im_end|>\n<|im_start|>assistant\n",
        "turns": SMOLLM3_BRIEF + "<|im_start|>user\nHello.<|im_end|>\n<|im_start|>assistant\nHi.<|im_end|>\n"
        "<|im_start|>user\nBye.<|im_end|>\n<|im_start|>assistant\n",
        "answered": SMOLLM3_BRIEF + "<|im_start|>user\nHello.<|im_end|>\n<|im_start|>assistant\nHi.<|im_end|>\n",
        "tool": SMOLLM3_TOOL + "It is 21 degrees.<|im_end|>\n",
        "pending": SMOLLM3_TOOL,
        "thoughts": SMOLLM3_PLAIN + "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n"
        "<|im_start|>user\n3 + 3?<|im_end|>\n<|im_start|>assistant\n6<|im_end|>\n",
        "inline": SMOLLM3_PLAIN + "<|im_start|>user\n2 + 2?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\nTwo and two.\n</think>\n\n4<|im_end|>\n<|im_start|>user\n3 + 3?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\nThree and three.\n</think>\n\n6<|im_end|>\n",
    },
    "gemma3": {
        "plain": "<bos><start_of_turn>user\nHello.<end_of_turn>\n<start_of_turn>model\n",
        "system": "<bos><start_of_turn>user\nBe brief.\n\nHello.<end_of_turn>\n<start_of_turn>model\n",
        "turns": "<bos><start_of_turn>user\nBe brief.\n\nHello.<end_of_turn>\n"
        "<start_of_turn>model\nHi.<end_of_turn>\n<start_of_turn>user\nBye.<end_of_turn>\n<start_of_turn>model\n",
        "answered": "<bos><start_of_turn>user\nBe brief.\n\nHello.<end_of_turn>\n"
        "<start_of_turn>model\nHi.<end_of_turn>\n",
        "tool": GEMMA_ALTERNATE,
        "pending": GEMMA_ALTERNATE,
        "thoughts": "<bos><start_of_turn>user\n2 + 2?<end_of_turn>\n<start_of_turn>model\n4<end_of_turn>\n"
        "<start_of_turn>user\n3 + 3?<end_of_turn>\n<start_of_turn>model\n6<end_of_turn>\n",
        "inline": "<bos><start_of_turn>user\n2 + 2?<end_of_turn>\n"
        "<start_of_turn>model\n<think>\nTwo and two.\n</think>\n\n4<end_of_turn>\n"
        "<start_of_turn>user\n3 + 3?<end_of_turn>\n"
        "<start_of_turn>model\n<think>\nThree and three.\n</think>\n\n6<end_of_turn>\n",
    },
    # The instructions are lost wherever the last message isn't a question.
    "mistral": {
        "plain": "<s>[INST] Hello.[/INST]",
        "system": "<s>[INST] Be brief.\n\nHello.[/INST]",
        "turns": "<s>[INST] Hello.[/INST] Hi.</s>[INST] Be brief.\n\nBye.[/INST]",
        "answered": "<s>[INST] Hello.[/INST] Hi.</s>",
        "tool": MISTRAL_TOOLS + MISTRAL_CALL + " It is 21 degrees.</s>",
        "pending": MISTRAL_TOOLS + MISTRAL_CALL,
        "thoughts": "<s>[INST] 2 + 2?[/INST] 4</s>[INST] 3 + 3?[/INST] 6</s>",
        "inline": "<s>[INST] 2 + 2?[/INST] <think>\nTwo and two.\n</think>\n\n4</s>"
        "[INST] 3 + 3?[/INST] <think>\nThree and three.\n</think>\n\n6</s>",
    },
    "magistral": {
        "plain": "<s>[INST]Hello.[/INST]",
        "system": "<s>[SYSTEM_PROMPT]Be brief.[/SYSTEM_PROMPT][INST]Hello.[/INST]",
        "turns": "<s>[SYSTEM_PROMPT]Be brief.[/SYSTEM_PROMPT][INST]Hello.[/INST]Hi.</s>[INST]Bye.[/INST]",
        "answered": "<s>[SYSTEM_PROMPT]Be brief.[/SYSTEM_PROMPT][INST]Hello.[/INST]Hi.</s>",
        "tool": MAGISTRAL_TOOLS + MAGISTRAL_CALL + "It is 21 degrees.</s>",
        "pending": MAGISTRAL_TOOLS + "[THINK]Look it up.[/THINK]" + MAGISTRAL_CALL,
        "thoughts": "<s>[INST]2 + 2?[/INST][THINK]Two and two.[/THINK]4</s>"
        "[INST]3 + 3?[/INST][THINK]Three and three.[/THINK]6</s>",
        "inline": "<s>[INST]2 + 2?[/INST]<think>\nTwo and two.\n</think>\n\n4</s>"
        "[INST]3 + 3?[/INST]<think>\nThree and three.\n</think>\n\n6</s>",
    },
    "deepseek_r1_distill": {
        "plain": "<｜begin▁of▁sentence｜><｜User｜>Hello.<｜Assistant｜><think>\n",
        "system": "<｜begin▁of▁sentence｜>Be brief.<｜User｜>Hello.<｜Assistant｜><think>\n",
        "turns": "<｜begin▁of▁sentence｜>Be brief.<｜User｜>Hello.<｜Assistant｜>Hi.<｜end▁of▁sentence｜>"
        "<｜User｜>Bye.<｜Assistant｜><think>\n",
        "answered": "<｜begin▁of▁sentence｜>Be brief.<｜User｜>Hello.<｜Assistant｜>Hi.<｜end▁of▁sentence｜>",
        # The tool isn't written, and the call is lost because the content is a text.
        "tool": "<｜begin▁of▁sentence｜><｜User｜>How warm is Oslo?<｜Assistant｜><｜end▁of▁sentence｜>"
        "<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>21<｜tool▁output▁end｜><｜tool▁outputs▁end｜>"
        "It is 21 degrees.<｜end▁of▁sentence｜>",
        "pending": "<｜begin▁of▁sentence｜><｜User｜>How warm is Oslo?<｜Assistant｜><｜end▁of▁sentence｜>"
        "<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>21<｜tool▁output▁end｜><｜tool▁outputs▁end｜>",
        "thoughts": "<｜begin▁of▁sentence｜><｜User｜>2 + 2?<｜Assistant｜>4<｜end▁of▁sentence｜>"
        "<｜User｜>3 + 3?<｜Assistant｜>6<｜end▁of▁sentence｜>",
        "inline": "<｜begin▁of▁sentence｜><｜User｜>2 + 2?<｜Assistant｜>\n\n4<｜end▁of▁sentence｜>"
        "<｜User｜>3 + 3?<｜Assistant｜>\n\n6<｜end▁of▁sentence｜>",
    },
    "gptoss": {
        "plain": HARMONY + "<|end|><|start|>user<|message|>Hello.<|end|><|start|>assistant",
        "system": HARMONY_BRIEF + "<|start|>user<|message|>Hello.<|end|><|start|>assistant",
        "turns": HARMONY_BRIEF + "<|start|>user<|message|>Hello.<|end|>"
        "<|start|>assistant<|channel|>final<|message|>Hi.<|end|><|start|>user<|message|>Bye.<|end|><|start|>assistant",
        "answered": HARMONY_BRIEF + "<|start|>user<|message|>Hello.<|end|>"
        "<|start|>assistant<|channel|>final<|message|>Hi.<|return|>",
        "tool": HARMONY_TOOL + HARMONY_CALL + "<|channel|>final<|message|>It is 21 degrees.<|return|>",
        "pending": HARMONY_TOOL + "<|start|>assistant<|channel|>analysis<|message|>Look it up.<|end|>" + HARMONY_CALL,
        "thoughts": HARMONY + "<|end|><|start|>user<|message|>2 + 2?<|end|>"
        "<|start|>assistant<|channel|>final<|message|>4<|end|><|start|>user<|message|>3 + 3?<|end|>"
        "<|start|>assistant<|channel|>analysis<|message|>Three and three.<|end|>"
        "<|start|>assistant<|channel|>final<|message|>6<|return|>",
        "inline": HARMONY + "<|end|><|start|>user<|message|>2 + 2?<|end|>"
        "<|start|>assistant<|channel|>final<|message|><think>\nTwo and two.\n</think>\n\n4<|end|>"
        "<|start|>user<|message|>3 + 3?<|end|>"
        "<|start|>assistant<|channel|>final<|message|><think>\nThree and three.\n</think>\n\n6<|return|>",
    },
}


def apply_template(name: str, messages: list[dict[str, Any]], source: str | None = None, **options: Any) -> str:
    """Render a conversation with a template of this folder, or with another `source`, as transformers does."""
    words = Tokenizer(WordLevel({"?": 0}, unk_token="?"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?", **SPECIAL.get(name, {}))
    tokenizer.chat_template = source or (FOLDER / f"{name}.jinja").read_text()
    return tokenizer.apply_chat_template(messages, tokenize=False, **options)


def render(name: str, messages: list[dict[str, Any]], **options: Any) -> str:
    """Render a conversation, without the date of today and the middle of SmolLM 3's long instructions."""
    text = apply_template(name, messages, **options)
    if name in ("smollm3", "gptoss"):
        text = re.sub(r"(Today Date|Current date): .+", r"\1: DATE", text)
    return re.sub(r"(Hugging Face\.) Your role .* (to reach the conclusion\.)", r"\1 ... \2", text)


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_conversations_are_rendered_as_published(name, conversation):
    messages, options = CONVERSATIONS[conversation]
    expected = EXPECTED[name][conversation]
    if isinstance(expected, TemplateError):
        with pytest.raises(TemplateError, match=str(expected)):
            render(name, messages, **options)
    else:
        assert render(name, messages, **options) == expected


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", IN_TRL)
def test_the_copies_in_trl_render_the_same(name, conversation):
    path = Path(find_spec("trl").origin).parent / f"chat_templates/{IN_TRL[name]}.jinja"
    if not path.exists():
        pytest.skip(f"this version of TRL has no {path.name}")
    messages, options = CONVERSATIONS[conversation]
    texts = []
    for source in (None, path.read_text()):
        try:
            texts.append(render(name, messages, source=source, **options))
        except TemplateError as error:
            texts.append(type(error).__name__)
    assert texts[0] == texts[1]


# Templates whose prompt isn't the beginning of prompt and answer: it opens a thought, or the instructions move.
NO_PREFIX = {"deepseek_r1_distill", "mistral"}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_prompt_is_the_beginning_of_prompt_and_answer(name):
    messages = [system("Be brief."), user("Hello.")]
    prompt = render(name, messages, add_generation_prompt=True)
    text = render(name, [*messages, assistant("Hi.", reasoning_content="A greeting.")])
    assert text.startswith(prompt) == (name not in NO_PREFIX)


def call_with(arguments: Any, **fields: Any) -> list[dict[str, Any]]:
    """Return a question and a call with arguments."""
    call = CALL | {"function": {"name": "weather", "arguments": arguments}}
    return [user("How warm is Oslo?"), assistant("", tool_calls=[call], **fields)]


@pytest.mark.parametrize("name", ["qwen3", "hermes", "magistral"])
def test_arguments_can_be_json(name):
    texts = [render(name, call_with(arguments), tools=[TOOL]) for arguments in ({"city": "Oslo"}, '{"city": "Oslo"}')]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("name", ["llama3", "mistral", "gptoss"])
def test_arguments_that_are_json_are_encoded_again(name):
    text = render(name, call_with('{"city": "Oslo"}'), tools=[TOOL])
    assert r'"{\"city\": \"Oslo\"}"' in text


@pytest.mark.parametrize(
    ("name", "block"), [("qwen3", "<think>\n\n</think>\n\n"), ("smollm3", "<think>\n\n</think>\n")]
)
def test_thinking_is_turned_off_by_an_empty_thought(name, block):
    messages = [user("Hello.")]
    thinking = render(name, messages, add_generation_prompt=True)
    silent = render(name, messages, add_generation_prompt=True, enable_thinking=False)
    assert "<think>\n" not in thinking
    assert silent.endswith(f"<|im_start|>assistant\n{block}")


def test_null_turns_thinking_off_in_smollm3_only():
    texts = {
        name: render(name, [user("Hello.")], add_generation_prompt=True, enable_thinking=None)
        for name in ("qwen3", "smollm3")
    }
    assert [name for name, text in texts.items() if text.endswith("</think>\n")] == ["smollm3"]


def test_the_long_instructions_of_smollm3_are_the_published_ones():
    text = apply_template("smollm3", [user("Hello.")]).partition("## Custom Instructions\n\n")[2].partition("\n\n")[0]
    digest = "4e4459579a24d87246c936f414c6637393e3ac2278e7939df9b6a3b722e35678"
    assert (len(text), hashlib.sha256(text.encode()).hexdigest()) == (1162, digest)


def test_hermes_without_tools_is_plain_chatml():
    messages = [*call_with({"city": "Oslo"}), RESULT]
    text = "<|begin_of_text|><|im_start|>user\nHow warm is Oslo?<|im_end|>\n<|im_start|>assistant\n<|im_end|>\n"
    assert render("hermes", messages) == f"{text}<|im_start|>tool\n21<|im_end|>\n"


def test_smollm3_reads_switches_in_the_instructions():
    text = render("smollm3", [system("Be brief. /no_think"), user("Hello."), assistant("Hi.")])
    assert "Reasoning Mode: /no_think\n\n## Custom Instructions\n\nBe brief.\n\n" in text
    assert text.endswith("<|im_start|>assistant\n<think>\n\n</think>\nHi.<|im_end|>\n")
    override = render("smollm3", [system("Be brief. /system_override"), user("Hello.")])
    assert override == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello.<|im_end|>\n"


def test_llama_has_exactly_one_call_or_none():
    question, answer = call_with({})
    for calls in ([], [CALL, CALL]):
        with pytest.raises(TemplateError, match="only supports single tool-calls"):
            render("llama3", [question, answer | {"tool_calls": calls}], tools=[TOOL])


def test_llama_writes_no_text_beside_a_call():
    question, answer = call_with({"city": "Oslo"})
    text = render("llama3", [question, answer | {"content": "Let me see."}], tools=[TOOL])
    assert "weather" in text
    assert "Let me see." not in text


def test_llama_takes_a_date_tools_in_the_system_turn_and_built_in_tools():
    text = render("llama3", [user("Hello.")], tools=[TOOL], tools_in_user_message=False, date_string="01 Jan 2030")
    start, end = text.split("<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n")
    assert "Today Date: 01 Jan 2030\n\nYou have access to the following functions." in start
    assert start.endswith(json.dumps(TOOL, indent=4) + "\n\n")
    assert end == "Hello.<|eot_id|>"
    search = {"type": "function", "function": {"name": "brave_search", "arguments": {"query": "Oslo"}}}
    text = render(
        "llama3",
        [user("Hello."), assistant("", tool_calls=[search])],
        builtin_tools=["brave_search", "code_interpreter"],
    )
    assert "Environment: ipython\nTools: brave_search\n\nCutting Knowledge Date" in text
    assert text.endswith('<|python_tag|>brave_search.call(query="Oslo")<|eom_id|>')


def test_mistral_refuses_ids_without_nine_characters():
    question, answer = call_with({})
    for call in (CALL | {"id": "call_1"}, {"type": "function", "function": CALL["function"]}):
        with pytest.raises(TemplateError, match="length 9"):
            render("mistral", [question, answer | {"tool_calls": [call]}], tools=[TOOL])
    with pytest.raises(TemplateError, match="length 9"):
        render("mistral", [question, answer, RESULT | {"tool_call_id": None}], tools=[TOOL])


def test_nulls_within_a_call_reach_the_template():
    question, answer = call_with({})
    with pytest.raises(TypeError, match="no len"):
        render("mistral", [question, answer | {"tool_calls": [CALL | {"id": None}]}], tools=[TOOL])
    text = render("qwen3", call_with({"city": "Oslo", "country": None}), tools=[TOOL])
    assert '"arguments": {"city": "Oslo", "country": null}}' in text


@pytest.mark.parametrize("name", ["mistral", "gemma3"])
@pytest.mark.parametrize("messages", [[user("Hello."), user("Bye.")], [assistant("Hi.")]], ids=["twice", "answer"])
def test_turns_alternate(name, messages):
    with pytest.raises(TemplateError, match="must alternate"):
        render(name, messages)


def test_magistral_joins_questions_and_refuses_results_without_a_call():
    assert render("magistral", [user("Hello."), user("Bye.")]) == "<s>[INST]Hello.\n\nBye.[/INST]"
    with pytest.raises(TemplateError, match="Unexpected role 'tool' after role 'user'"):
        render("magistral", [user("Hello."), RESULT])
    with pytest.raises(TemplateError, match="Unexpected role 'developer'"):
        render("magistral", [{"role": "developer", "content": "Be brief."}])


def test_magistral_reads_thoughts_in_parts_of_the_content():
    content = [{"type": "thinking", "thinking": "Two and two."}, {"type": "text", "text": "4"}]
    text = render("magistral", [user("2 + 2?"), {"role": "assistant", "content": content}])
    assert text == "<s>[INST]2 + 2?[/INST][THINK]Two and two.[/THINK]4</s>"


def test_calls_of_r1_distill_need_a_null_content_which_transformers_removes():
    question, answer = call_with('{"city": "Oslo"}')
    messages = [question, answer | {"content": None}]
    with pytest.raises(UndefinedError):
        render("deepseek_r1_distill", messages)
    source = (FOLDER / "deepseek_r1_distill.jinja").read_text()
    (text,), _ = render_jinja_template([messages], chat_template=source, bos_token="")
    assert text == (
        "<｜User｜>How warm is Oslo?<｜Assistant｜><｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>"
        'weather\n```json\n{"city": "Oslo"}\n```<｜tool▁call▁end｜>'
    )


def test_the_last_system_message_of_r1_distill_wins():
    text = render("deepseek_r1_distill", [system("Be brief."), user("Hello."), system("Be kind.")])
    assert text == "<｜begin▁of▁sentence｜>Be kind.<｜User｜>Hello."


def test_gptoss_takes_an_effort_and_drops_thoughts_before_a_call_once_answered():
    messages, options = CONVERSATIONS["pending"]
    text = render("gptoss", messages, reasoning_effort="low", **options)
    assert "Reasoning: low" in text
    assert "Look it up." in text
    answered = render("gptoss", [*messages, assistant("It is 21 degrees.")], tools=[TOOL])
    assert "Look it up." not in answered


def test_gptoss_refuses_markers_and_results_without_a_call():
    with pytest.raises(TemplateError, match="tags"):
        render("gptoss", [user("2 + 2?"), assistant("<|channel|>final<|message|>4")])
    with pytest.raises(TemplateError, match="no previous assistant message"):
        render("gptoss", [user("Hello."), RESULT])


def test_gptoss_and_hermes_write_types():
    properties = {
        "names": {"type": "array", "items": {"type": "string"}, "description": "Names."},
        "unit": {"type": "string", "enum": ["c", "f"], "description": "Unit."},
        "days": {"type": "integer", "description": "Days."},
        "options": {"type": "object", "description": "Options."},
    }
    parameters = {"type": "object", "properties": properties, "required": ["names"]}
    tool = {"type": "function", "function": TOOL["function"] | {"parameters": parameters}}
    text = render("gptoss", [user("Hello.")], tools=[tool])
    for line in ("names: string[],", 'unit?: "c" | "f",', "days?: number,", "options?: object,"):
        assert f"\n{line}\n" in text
    text = render("hermes", [user("Hello.")], tools=[tool])
    assert "weather(names: list[Union[]], unit: str, days: int, options: dict) - Return" in text


def test_every_template_is_described():
    rows = re.findall(r"^\| `(\w+)\.jinja`", (FOLDER / "README.md").read_text(), flags=re.M)
    assert sorted({*rows}) == TEMPLATES == sorted(EXPECTED)
