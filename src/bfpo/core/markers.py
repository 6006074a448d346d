"""Markers of the chat templates in use: in a text, a tokenizer may read them as control tokens."""

import re

MARKERS_BY_FAMILY: dict[str, tuple[str, ...]] = {
    "ChatML (Qwen, Yi, SmolLM)": ("<|im_start|>", "<|im_end|>", "<|im_sep|>", "<|endoftext|>"),
    "Llama 2": ("<s>", "</s>", "[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"),
    "Llama 3": (
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|python_tag|>",
    ),
    "Llama 4": ("<|header_start|>", "<|header_end|>", "<|eot|>", "<|eom|>"),
    "Gemma": ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
    "Mistral": (
        "[SYSTEM_PROMPT]",
        "[/SYSTEM_PROMPT]",
        "[AVAILABLE_TOOLS]",
        "[/AVAILABLE_TOOLS]",
        "[TOOL_CALLS]",
        "[TOOL_RESULTS]",
        "[/TOOL_RESULTS]",
    ),
    "Phi, Zephyr": ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endofprompt|>"),
    "Granite": ("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"),
    "DeepSeek": (
        "<\uff5cbegin\u2581of\u2581sentence\uff5c>",
        "<\uff5cend\u2581of\u2581sentence\uff5c>",
        "<\uff5cUser\uff5c>",
        "<\uff5cAssistant\uff5c>",
    ),
    "Command R": (
        "<BOS_TOKEN>",
        "<|START_OF_TURN_TOKEN|>",
        "<|END_OF_TURN_TOKEN|>",
        "<|SYSTEM_TOKEN|>",
        "<|USER_TOKEN|>",
        "<|CHATBOT_TOKEN|>",
    ),
    "gpt-oss": ("<|start|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>", "<|constrain|>"),
    "GLM": ("[gMASK]", "<sop>", "<eop>", "<|observation|>"),
}
"""Markers that delimit turns, by the family of models that uses them."""

MARKERS: tuple[str, ...] = tuple(
    dict.fromkeys(marker for markers in MARKERS_BY_FAMILY.values() for marker in markers)
)
"""Markers of all families."""

_ANY_MARKER = re.compile("|".join(map(re.escape, sorted(MARKERS, key=len, reverse=True))))


def find_markers(text: str) -> set[str]:
    """Return the markers of any family that a text contains."""
    # Markers can overlap, so the pattern only tells which texts have any.
    return {marker for marker in MARKERS if marker in text} if _ANY_MARKER.search(text) else set()
