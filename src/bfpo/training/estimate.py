"""Memory of a run, estimated before any weights are loaded."""

import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase, TrainingArguments

from bfpo.config.recipes import LayoutSection, LoraSection, ModelSection, ReferenceKind
from bfpo.data.table import TokenTable
from bfpo.model.load import empty_model
from bfpo.model.logps import CHUNK, MAX_KEPT_LOGITS
from bfpo.model.lora import CausalLM, add_adapter, is_adapter, lora_config
from bfpo.model.reference_cache import prefers_cache
from bfpo.model.score_heads import add_score_heads
from bfpo.model.selective import Selection, select_parameters

_BYTES_PER_WEIGHT = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0}
# Python with torch, transformers and their libraries, without a model; measured on Linux (docs/performance.md).
_CPU_PROCESS = 0.6 * 2**30
# CUDA context with the kernels of its libraries: a usual size, not measured by us.
_GPU_PROCESS = 1.0 * 2**30

Strategy = Literal["none", "ddp", "fsdp2", "zero3"]


class Arithmetic(NamedTuple):
    """How a run computes, as far as its memory depends on it.

    Args:
        bf16: Whether the forward pass runs under bfloat16 autocast (`trainer.bf16`).
        checkpointing: Whether activations of a layer are recomputed in the backward pass.
        gpu: Whether it runs on a GPU.
    """

    bf16: bool = False
    checkpointing: bool = False
    gpu: bool = False

    @classmethod
    def of(cls, args: TrainingArguments) -> "Arithmetic":
        """Return how a run with these arguments computes on this machine."""
        return cls(args.bf16, bool(args.activation_checkpointing), args.device.type != "cpu")


PLAIN = Arithmetic()


class Estimate(NamedTuple):
    """Memory of one process in bytes, without offloading.

    Args:
        selection: Number of trained parameters.
        weights: All weights; where they are sharded, a share and the gathered layers.
        casts: Copies of the weights in bfloat16 under autocast.
        gradients: Gradients of the trained parameters.
        optimizer: The two moments of Adam.
        reference: Copies for the reference.
        activations: What a pack keeps for its backward pass.
        logits: Logits and their gradient.
        process: The process itself.
    """

    selection: Selection
    weights: float
    casts: float
    gradients: float
    optimizer: float
    reference: float
    activations: float
    logits: float
    process: float

    @property
    def total(self) -> float:
        """Sum of all parts, in bytes."""
        return sum(self[1:])

    def __str__(self) -> str:
        parts = " + ".join(
            f"{name} {value / 2**30:.2f}" for name, value in self._asdict().items() if name != "selection" and value
        )
        return f"trains {self.selection}; memory of one process about {self.total / 2**30:.2f} GiB ({parts})"


class Footprint(NamedTuple):
    """What the memory of a run is computed from.

    Args:
        selection: Number of trained parameters.
        weights: Bytes of all weights, adapters included.
        casts: Bytes of the copies of the weights under autocast.
        trained: Bytes of the trained parameters.
        copies: Bytes of the copies for the reference.
        gathered: Bytes of what a process gathers at a time where weights are sharded: embeddings, head, two layers.
        token: Bytes that a token keeps for the backward pass.
        freed: Bytes of a token that adapters free between those, which the allocator of a CPU keeps.
        vocab_size: Size of the vocabulary; 0 without a language-model head.
        process: Bytes of the process itself.
        operations: Operations of a forward and a backward pass for each token in the body.
        head_operations: The same for each scored token in the head.
        forward_operations: Operations of a forward pass for each token in the body.
        each_step: Whether the reference is computed in every step, and not once a run for the cache.
    """

    selection: Selection
    weights: float
    casts: float
    trained: float
    copies: float
    gathered: float
    token: float
    freed: float
    vocab_size: int
    process: float
    operations: float
    head_operations: float
    forward_operations: float
    each_step: bool

    @property
    def per_token(self) -> float:
        """Bytes that a token of a pack takes."""
        return self.token + self.freed

    def estimate(self, tokens: int, strategy: Strategy = "none", processes: int = 1) -> Estimate:
        """Return the memory of one process; docs/scaling.md has the table.

        Args:
            tokens: Maximum number of tokens fed at a time, padding included.
            strategy: How the processes share the work: `none` for one process, `ddp` for whole weights on each,
                `fsdp2` or `zero3` for sharded ones.
            processes: Number of processes.
        """
        shards = processes if strategy in ("fsdp2", "zero3") else 1
        # All logits of a pack up to a limit, or else a chunk of them: probabilities, and their gradient.
        logits = 2 * 4 * min(tokens * self.vocab_size, max(CHUNK * self.vocab_size, MAX_KEPT_LOGITS))
        return Estimate(
            selection=self.selection,
            weights=self.weights / shards + (self.gathered if shards > 1 else 0.0),
            casts=0.0 if shards > 1 else self.casts,
            # DDP keeps buckets for the exchange, of the size of the gradients (torch: gradient_as_bucket_view).
            gradients=self.trained / shards * (2 if strategy == "ddp" else 1),
            optimizer=2 * self.trained / shards,
            reference=0.0 if shards > 1 else self.copies,
            activations=tokens * self.per_token,
            logits=logits,
            process=self.process,
        )


def footprint(
    section: ModelSection,
    tokenizer: PreTrainedTokenizerBase,
    *,
    train_only: list[str] | None,
    lora: LoraSection | None,
    reference: ReferenceKind | None,
    arithmetic: Arithmetic = PLAIN,
    heads: int | None = None,
) -> Footprint | None:
    """Return what the memory of a run is computed from, by the model's configuration alone.

    Args:
        section: Recipe section of the model.
        tokenizer: Tokenizer of the model.
        train_only: Patterns of the parameters to train.
        lora: New adapter to train instead.
        reference: Kind of reference of the recipe; None for supervised fine-tuning.
        arithmetic: How the run computes.
        heads: Number of score heads in place of the language-model head; None for a language model.

    Returns:
        The footprint; None if the model is an adapter.

    Raises:
        ModelError: If the configuration can't be loaded, or a pattern matches no parameter.
    """
    if section.path is not None and is_adapter(section.path, section.revision):
        return None
    model = empty_model(section, vocab_size=len(tokenizer))
    if heads is not None:
        model = add_score_heads(model, heads, pad_id=None, seed=0)
    config = model.config.get_text_config()
    weights = _weight_bytes(model, section)
    body, head, layer = _count_weights(model)
    if lora is not None:
        with torch.device("meta"):
            task_type: Literal["CAUSAL_LM", "SEQ_CLS"] = "CAUSAL_LM" if heads is None else "SEQ_CLS"
            model = add_adapter(model, lora_config(lora, task_type=task_type), seed=0)
    selection = select_parameters(model, train_only)
    copies = reference == "shared" or (reference == "auto" and lora is None and not prefers_cache(model))
    per_weight = _BYTES_PER_WEIGHT[section.dtype]
    # peft keeps a new adapter in float32, whatever the type of the weights.
    per_trained = per_weight if lora is None else 4.0
    trained = selection.trained * per_trained
    is_cast = arithmetic.bf16 and per_weight == 4 and not section.load_in_4bit
    trained_share = min(1.0, selection.trained / selection.total)
    return Footprint(
        selection=selection,
        weights=weights + (trained if lora is not None else 0.0),
        casts=2.0 * (body + head) if is_cast else 0.0,
        trained=trained,
        copies=trained if copies else 0.0,
        gathered=(2.0 if arithmetic.bf16 else per_weight) * (selection.total - body + 2 * layer),
        token=token_bytes(
            config,
            names=[name for name, parameter in model.named_parameters() if parameter.requires_grad],
            lora=lora,
            per_weight=per_weight,
            arithmetic=arithmetic,
            norms=_count_norms(model, config.hidden_size),
        ),
        freed=0.0 if lora is None or arithmetic.gpu else _freed_bytes(config, arithmetic),
        vocab_size=0 if heads is not None else config.vocab_size,
        process=_GPU_PROCESS if arithmetic.gpu else _CPU_PROCESS,
        # 2 a weight forward, 2 for the gradients of what it gets, 2 for its own if it is trained.
        operations=body * (4 + 2 * trained_share),
        head_operations=head * (4 + 2 * trained_share),
        forward_operations=2.0 * body,
        each_step=copies or lora is not None or reference == "adapter",
    )


def token_bytes(
    config: PretrainedConfig,
    *,
    names: Sequence[str],
    lora: LoraSection | None,
    per_weight: float,
    arithmetic: Arithmetic,
    norms: int = 2,
) -> float:
    """Return the bytes that a packed token keeps for the backward pass, for a model of Llama's kind.

    Each term is a tensor that autograd saves, found by counting them (`torch.autograd.graph.saved_tensors_hooks`) in
    models of two and four layers; `benchmarks/memory_estimate.py` compares the sum with processes.

    Args:
        config: Configuration of the backbone.
        names: Names of the trained parameters.
        lora: Adapter that is trained; None to train weights.
        per_weight: Bytes of a weight.
        arithmetic: How the run computes.
        norms: Number of norms of a layer.
    """
    hidden, layers = config.hidden_size, config.num_hidden_layers
    query, key, feed_forward = _widths(config)
    trains_norms = any("norm" in name for name in names)
    # Inputs of a linear layer are kept if it is trained, or has an adapter. Those of o_proj and down_proj always are.
    reads_norms = any(not re.search("down_proj|o_proj|norm|embed|lm_head", name) for name in names)
    rank = 0 if lora is None else 7 * lora.r
    # Input and normalized input of each norm, and the output of the two that linear layers read.
    of_norms = hidden * (norms * (1 + trains_norms) + 2 * (reads_norms or lora is not None))
    # Queries and output, keys and values; gate, its activation, up and their product.
    kept = of_norms + 2 * query + 2 * key + 4 * feed_forward + rank
    is_half = per_weight < 4 or arithmetic.bf16
    layer = (2.0 if is_half else 4.0) * kept
    if is_half:
        # Norms compute in float32.
        layer += 4.0 * hidden
    if arithmetic.bf16 and per_weight == 4:
        # Norms return float32, and autocast casts it anew for each layer that reads it.
        layer += hidden * (10.0 if trains_norms else 8.0 if reads_norms else 0.0)
    elif per_weight < 4 and lora is not None:
        # Adapters are float32, and get a copy of their input.
        layer += (2.0 if arithmetic.bf16 else 4.0) * (3 * hidden + feed_forward + rank)
    if not arithmetic.gpu:
        # Spans attend in float32. Keys and values are repeated for each head, and the prompt's for each branch.
        layer += 4.0 * (2 * (query - key) + 2.5 * query + (query if is_half else 0))
    boundary = (2.0 if per_weight < 4 else 4.0) * hidden
    if arithmetic.checkpointing:
        return float(boundary * (layers + 3) + layer)
    # Below the first trained parameter nothing is kept. With `down_proj` that is most of the first layer.
    depth = layers if reads_norms or trains_norms or lora is not None else layers - 1
    # Embeddings and the last norm.
    return float(depth * layer + 3 * boundary)


def _widths(config: PretrainedConfig) -> tuple[int, int, int]:
    """Return the widths of queries, of keys, and of what a token uses of the feed-forward layers."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    width = getattr(config, "head_dim", None) or hidden // heads
    feed_forward = getattr(config, "moe_intermediate_size", None) or getattr(config, "intermediate_size", 4 * hidden)
    experts = getattr(config, "num_experts_per_tok", None) or 1
    return heads * width, (getattr(config, "num_key_value_heads", None) or heads) * width, feed_forward * experts


def _freed_bytes(config: PretrainedConfig, arithmetic: Arithmetic) -> float:
    """Return the bytes of a token that adapters free between tensors that stay, so that a CPU process keeps them.

    Each adapted layer has three outputs: its own, the adapter's, and their sum. That half of them stay resident is
    measured (benchmarks/memory_estimate.py), not derived.
    """
    query, key, feed_forward = _widths(config)
    outputs = query + 2 * key + 2 * feed_forward + 2 * config.hidden_size
    return float(1.5 * 4.0 * outputs * (1 if arithmetic.checkpointing else config.num_hidden_layers))


def _count_norms(model: CausalLM, hidden_size: int) -> int:
    """Return the number of norms of a layer that are as wide as the model."""
    layers = int(model.config.get_text_config().num_hidden_layers)
    wide = [
        name for name, weight in model.named_parameters() if "norm" in name and tuple(weight.shape) == (hidden_size,)
    ]
    return max(1, sum(name.endswith("weight") for name in wide) // layers)


def _count_weights(model: CausalLM) -> tuple[int, int, int]:
    """Return the number of weights in the layers, in the head (also where it is the embedding), and in a layer."""
    head = model.get_output_embeddings()
    layers: list[int] = []
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == model.config.get_text_config().num_hidden_layers:
            layers = [sum(parameter.numel() for parameter in layer.parameters()) for layer in module]
            break
    return sum(layers), 0 if head is None else sum(p.numel() for p in head.parameters()), max(layers, default=0)


def _weight_bytes(model: CausalLM, section: ModelSection) -> float:
    """Return the memory of the weights; all but the linear layers of a quantized model are float32."""
    total = sum(parameter.numel() for parameter in model.parameters())
    if not section.load_in_4bit:
        return total * _BYTES_PER_WEIGHT[section.dtype]
    head = model.get_output_embeddings()
    layers = [module for module in model.modules() if isinstance(module, nn.Linear) and module is not head]
    quantized = sum(layer.weight.numel() for layer in layers)
    return quantized * 0.5 + (total - quantized) * 4.0


def max_micro_batch_tokens(table: TokenTable, examples: int, layout: LayoutSection) -> int:
    """Return the maximum number of tokens fed at a time.

    Args:
        table: Training data.
        examples: Number of examples in a micro-batch.
        layout: How tokens are fed.
    """
    if layout.kind == "padded":
        return examples * table.completions * table.longest
    return min(examples * table.longest_span, max(layout.max_tokens_per_pack, table.longest_span))
