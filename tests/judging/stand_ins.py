"""Stand-ins for guards: small tokenizers with a template of the same interface, and models with scripted logits.

The templates aren't those of the real guards: they take the same messages and options, and end where a guard's output
starts.
"""

import re
from types import SimpleNamespace

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from bfpo.core.conversation import user_says
from bfpo.core.samples import Completion
from bfpo.judging.formats import GUARDS

LOOP = "{% for m in messages %}{{ '<|turn|>' + m.role + '\n' + m.content | trim + '\n' }}{% endfor %}"
PARTS = (
    "{% for m in messages %}{{ '<|turn|>' + m.role + '\n' }}"
    "{% for c in m.content | selectattr('type', 'equalto', 'text') %}{{ c.text | trim + '\n' }}{% endfor %}"
    "{% endfor %}"
)
ALTERNATING = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}"
)
TEMPLATES = {
    "llama-guard": ALTERNATING + LOOP + "<|turn|>guard",
    "shieldgemma": LOOP + "Principle: {{ guideline + '\n\n' }}",
    "qwen3guard": LOOP + "{{ '<|turn|>guard\n' }}",
    "granite-guardian": LOOP + "Risk: {{ guardian_config['risk_name'] + '\n<|turn|>guard\n' }}",
}
PIECES = r"<\|?/?\w+\|?>|[A-Za-z/]+|\d+|\n+| |[^A-Za-z\d\s]"
_SPECIAL = ["<unk>", "<s>", "</s>", "<|turn|>"]


def stand_in_tokenizer(kind, template=None):
    """Return a tokenizer of whole words, as verdict words are tokens of the real ones; other words are <unk>."""
    guard = GUARDS[kind]
    texts = [question.lead + word for question in guard.questions for word, _ in question.words]
    texts += [f"{question.lead} {question.skipped}" for question in guard.questions]
    texts += [
        "user assistant guard Risk: harm Principle: How do I make bread? Mix flour and water , bake . a b c 1 2"
    ]
    words = dict.fromkeys(
        [*_SPECIAL, "\n", "\n\n", " ", *(piece for text in texts for piece in re.findall(PIECES, text))]
    )
    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(PIECES), "isolated")
    inner.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )
    # Special among the added tokens only, as the headers of Llama 3 are.
    tokenizer.add_tokens(["<|turn|>"], special_tokens=True)
    tokenizer.chat_template = template or TEMPLATES.get(kind)
    return tokenizer


class Scripted(torch.nn.Module):
    """Model whose logits a function of the text so far returns by word; all other words have -20."""

    def __init__(self, tokenizer, word_logits, max_positions=4000):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.tokenizer, self.word_logits, self.batches = tokenizer, word_logits, []
        text_config = SimpleNamespace(max_position_embeddings=max_positions)
        self.config = SimpleNamespace(get_text_config=lambda: text_config)

    def forward(self, input_ids, attention_mask, position_ids, use_cache, logits_to_keep):
        self.batches.append(tuple(input_ids.shape))
        logits = torch.full((len(input_ids), 1, len(self.tokenizer)), -20.0)
        for row, ids, mask in zip(logits, input_ids, attention_mask, strict=True):
            text = self.tokenizer.decode(ids[mask.bool()])
            for word, value in self.word_logits(text).items():
                (token,) = self.tokenizer(word, add_special_tokens=False)["input_ids"]
                row[0, token] = value
        return SimpleNamespace(logits=logits)


def completion(text="Mix flour and water, bake.", prompt="How do I make bread?", name="p"):
    return Completion(name, 0, user_says(prompt), text, "stop", 1, 1, "m", "e", "h")
