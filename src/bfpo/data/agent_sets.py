"""Published sets of agents that call tools: how their rows become demonstrations, labeled answers and pairs.

The columns are those that the data cards and public readers of the files document; no file was read here.

- AgentAlign: huggingface.co/datasets/jc-ryan/AgentAlign, `agent_align_data_v3.json` at
  ddacefcd5f66ef18e814b2f4483c34fdd5eef05c; its code at github.com/jc-ryan/AgentAlign,
  efb728f7211163a39eacdeab77b4d4e0618a5bc7 (arXiv 2505.23020). Harmful instructions with refusals, and benign ones
  with calls: one answer to each, so it has no pairs.
- ATBench: huggingface.co/datasets/AI45Research/ATBench, `ATBench/test.json` at
  4476ef92ed8f85c8d58d8a5b9dfdf55aa7893138; the format is that of github.com/AI45Lab/AgentDoG,
  2d37f4412ce37ee2da38fadb5436d67a2f4d5795, `examples/trajectory_sample.json`, which R-Judge and ASSEBench share.
  Trajectories with one label each: any step may be the unsafe one, so reasoning isn't labeled.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

from bfpo.config.recipes import Source
from bfpo.core.conversation import Conversation, Message
from bfpo.core.files import parse_json
from bfpo.core.pairs import Demonstration, PreferencePair, Provenance, SafetyLabels, TemplateInputs, check_asks
from bfpo.core.samples import Kind
from bfpo.core.tools import ToolCall, as_tools
from bfpo.data.pair_formats import SkipRow, split_trajectories
from bfpo.data.rows import SourceRow
from bfpo.errors import DataError

_AGENT_ALIGN_COLUMNS = {"messages", "tools", "category"}
_ATBENCH_COLUMNS = {"tool_used", "label"}
# Keys of a function's schema; others, such as the platform of a tool, are the set's own notes.
_FUNCTION_KEYS = ("name", "description", "parameters", "strict")
_NO_HARM = ("", "benign", "none")


class AgentAnswer(NamedTuple):
    """A labeled trajectory: what the agent did after a request.

    Args:
        prompt: Conversation up to the first turn of the agent.
        answer: Turns from there on, up to the last one of the agent.
        inputs: Tools of the agent.
        safe: Whether the trajectory is safe.
        refusal: Whether it refuses; None if the set doesn't say.
        kind: Kind of the prompt; None if the set doesn't say.
        harms: Names of the harms involved.
    """

    prompt: Conversation
    answer: Conversation
    inputs: TemplateInputs
    safe: bool
    refusal: bool | None
    kind: Kind | None
    harms: tuple[str, ...] = ()


def read_agent_answer(row: SourceRow) -> AgentAnswer | None:
    """Return the labeled trajectory of a row of AgentAlign, or in the format of ATBench; None for other rows.

    Raises:
        DataError: If the row is malformed.
    """
    columns = row.values.keys()
    if columns >= _AGENT_ALIGN_COLUMNS:
        return _read_agent_align(row)
    if columns >= _ATBENCH_COLUMNS or {"contents", "label"} <= columns:
        return _read_atbench(row)
    return None


def read_agent_align(row: SourceRow) -> Demonstration:
    """Read a row of AgentAlign: a refusal of a harmful instruction, or the calls that a benign one takes."""
    answer = _read_agent_align(row)
    return Demonstration(answer.prompt, answer.answer, inputs=answer.inputs)


def read_safe_trajectory(row: SourceRow) -> Demonstration:
    """Read a safe trajectory in the format of ATBench.

    Raises:
        SkipRow: If it is unsafe.
    """
    answer = _read_atbench(row)
    if not answer.safe:
        raise SkipRow("unsafe trajectory", fault=False)
    return Demonstration(answer.prompt, answer.answer, inputs=answer.inputs)


def pair_trajectories(rows: Iterable[SourceRow], source: Source) -> Iterator[PreferencePair | SkipRow]:
    """Pair each safe trajectory in the format of ATBench with each unsafe one after the same prompt (cell `su`).

    Nothing says which one is more helpful: the safe one is chosen.

    Raises:
        DataError: If a row is malformed.
    """
    groups: dict[tuple[Conversation, TemplateInputs], dict[bool, list[AgentAnswer]]] = defaultdict(
        lambda: {True: [], False: []}
    )
    for row in rows:
        with row.locate_errors():
            answer = _read_atbench(row)
            check_asks(answer.prompt)
        groups[answer.prompt, answer.inputs][answer.safe].append(answer)
    for (prompt, inputs), by_label in groups.items():
        if not all(by_label.values()):
            for _ in (*by_label[True], *by_label[False]):
                yield SkipRow("no trajectory of the other label after the same prompt", fault=False)
        for safe, unsafe in product(by_label[True], by_label[False]):
            # Steps that both have in common belong to the prompt.
            history, chosen, rejected = split_trajectories(prompt + safe.answer, prompt + unsafe.answer)
            yield PreferencePair(
                history,
                chosen,
                rejected,
                SafetyLabels(chosen=True, rejected=False),
                harm_categories=unsafe.harms,
                provenance=Provenance(safety_label_source="dataset"),
                inputs=inputs,
            )


def _read_agent_align(row: SourceRow) -> AgentAnswer:
    category = row.text("category")
    is_harmful = category != "benign"
    prompt, answer = _split(row.messages("messages"), "messages")
    tools = as_tools([_clean_tool(tool) for tool in _list(row, "tools")])
    # What is stored after a harmful instruction is a refusal.
    return AgentAnswer(
        prompt,
        answer,
        TemplateInputs(tools),
        safe=True,
        refusal=is_harmful,
        kind="harmful" if is_harmful else "benign",
        harms=(category,) if is_harmful else (),
    )


def _read_atbench(row: SourceRow) -> AgentAnswer:
    is_safe = row.choice("label", (0, 1)) == 0
    column = "contents" if "contents" in row.values else "content"
    # Several inner lists are rounds of one conversation.
    turns = [turn for inner in _list(row, column) for turn in (inner if isinstance(inner, list) else [inner])]
    profile = row.values.get("profile") or ""
    if not isinstance(profile, str):
        raise DataError(f"column 'profile' is {profile!r}; expected a string")
    messages = [Message("system", profile)] if profile.strip() else []
    prompt, answer = _split((*messages, *_read_turns(turns, column)), column)
    tools = _list(row, "tool_used") if row.values.get("tool_used") is not None else []
    harm = str(row.values.get("real_world_harm") or "")
    return AgentAnswer(
        prompt,
        answer,
        TemplateInputs(as_tools([_clean_tool(tool) for tool in tools])),
        safe=is_safe,
        refusal=None,
        kind=None,
        harms=() if is_safe or harm.lower() in _NO_HARM else (harm,),
    )


def _read_turns(turns: Sequence[object], column: str) -> Iterator[Message]:
    """Yield turns of users, agents and environments as messages; an environment answers the earliest open call."""
    open_calls: list[ToolCall] = []
    num_calls = 0
    for turn in turns:
        if not isinstance(turn, Mapping):
            raise DataError(f"column '{column}': turn {turn!r}; expected an object with a role")
        role = turn.get("role")
        if role == "agent":
            text, call = _read_action(_text(turn, "action", column), num_calls)
            if call is not None:
                num_calls += 1
                open_calls.append(call)
            thought = turn.get("thought")
            if not isinstance(thought, str | None):
                raise DataError(f"column '{column}': thought is {thought!r}; expected a string or null")
            yield Message("assistant", text, thought or None, () if call is None else (call,))
        elif role == "environment":
            answered = open_calls.pop(0) if open_calls else None
            content = _text(turn, "content", column)
            if answered is None:
                yield Message("tool", content)
            else:
                yield Message("tool", content, tool_call_id=answered.id, name=answered.name)
        elif role == "user":
            yield Message("user", _text(turn, "content", column))
        else:
            raise DataError(f"column '{column}': role is {role!r}; expected user, agent or environment")


def _read_action(action: str, number: int) -> tuple[str, ToolCall | None]:
    """Return what an agent says and what it calls: `Complete{"response": ..}`, the JSON of a call, or a text."""
    body = action.strip()
    is_final = body.startswith("Complete")
    try:
        value = parse_json(body.removeprefix("Complete"))
    except ValueError:
        return action, None
    if is_final and isinstance(value, dict) and isinstance(value.get("response"), str):
        return value["response"], None
    if is_final or not isinstance(value, dict) or "name" not in value:
        return action, None
    call = ToolCall.from_row(value)
    return "", ToolCall(call.name, call.arguments, call.id or f"call_{number}")


def _split(messages: Conversation, column: str) -> tuple[Conversation, Conversation]:
    """Return the turns before the first of the agent, and those from it to the last one of the agent."""
    own = [index for index, message in enumerate(messages) if message.role == "assistant"]
    if not own:
        raise DataError(f"column '{column}' has no turn of the agent")
    return messages[: own[0]], messages[own[0] : own[-1] + 1]


def _clean_tool(tool: object) -> dict[str, Any]:
    """Return the schema of a function without the notes of the set, in the form that chat templates read."""
    inner = tool.get("function", tool) if isinstance(tool, Mapping) else None
    if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
        raise DataError(f"tool {tool!r}; expected an object with the name of a function")
    return {"type": "function", "function": {key: inner[key] for key in _FUNCTION_KEYS if inner.get(key) is not None}}


def _list(row: SourceRow, column: str) -> list[Any]:
    value = row.value(column)
    if not isinstance(value, list):
        raise DataError(f"column '{column}' is {value!r}; expected a list")
    return value


def _text(turn: Mapping[str, Any], key: str, column: str) -> str:
    value = turn.get(key)
    if not isinstance(value, str):
        raise DataError(f"column '{column}': {key} is {value!r}; expected a string")
    return value
