"""A key-value cache of rows that start and end independently of each other."""

from collections.abc import Sequence
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from bfpo.model.hidden_states import concatenated_states, needs_hidden_states
from bfpo.model.lora import CausalLM, unwrap_adapter

# Columns are added in multiples of this number, so that the cache isn't copied for each longer prompt.
_COLUMNS = 64


LayerStates = list[tuple[Tensor, Tensor]]
"""Keys and values of each layer, (rows, heads, columns, width)."""


class UnsupportedModel(Exception):
    """The model can't be decoded with this cache; the message says why."""


class PromptStates(NamedTuple):
    """Encoded prompts of equal length.

    Args:
        logits: Logits of the first token of the answers, (prompts, vocabulary).
        layers: Keys and values of each layer, (prompts, heads, tokens, width).
    """

    logits: Tensor
    layers: LayerStates

    @property
    def num_tokens(self) -> int:
        """Length of the prompts."""
        return self.layers[0][0].shape[2]

    def select(self, prompt: int) -> LayerStates:
        """Return the keys and values of one prompt."""
        return [(keys[prompt, None], values[prompt, None]) for keys, values in self.layers]


class SlotLayer(CacheLayerMixin):
    """Keys and values of one layer, (slots, heads, columns, width); a row's tokens start at column 0.

    Args:
        cache: Cache that the layer belongs to; it says where new keys go.
    """

    is_sliding = False
    keys: Tensor
    values: Tensor

    def __init__(self, cache: "SlotCache") -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._cache = cache
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: slots are allocated by the cache."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store the keys and values of one new token of each row, and return those of all tokens."""
        rows, positions, columns = self._cache.rows, self._cache.positions, self._cache.columns
        self.keys[rows, :, positions] = key_states[:, :, 0]
        self.values[rows, :, positions] = value_states[:, :, 0]
        return self.keys[: len(rows), :, :columns], self.values[: len(rows), :, :columns]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of columns, and the first one."""
        return self._cache.columns, 0

    def get_seq_length(self) -> int:
        """Return the number of tokens of the longest row."""
        return self._cache.columns - 1

    def get_max_length(self) -> int:
        """Return -1: rows can always get longer."""
        return -1


class SlotCache(Cache):
    """Key-value cache whose rows are filled and replaced one by one.

    Attributes:
        rows: Numbers of the slots in use, 0 to n - 1.
        positions: Position of the new token of each row.
        columns: Number of columns that the longest row uses.
    """

    rows: Tensor
    positions: Tensor
    columns: int

    def __init__(self) -> None:
        super().__init__(layers=[])
        self._slots: list[SlotLayer] = []

    def reserve(self, states: PromptStates, slots: int, tokens: int, *, used: int) -> None:
        """Make room for one more row, keeping the rows that exist.

        Args:
            states: Encoded prompts, whose shapes the slots get.
            slots: Number of slots to allocate if more room is needed.
            tokens: Number of tokens of the longest row.
            used: Number of rows that exist.
        """
        if not self._slots:
            self._slots = [SlotLayer(self) for _ in states.layers]
            self.layers = [*self._slots]
        columns = -(-tokens // _COLUMNS) * _COLUMNS
        for layer, prompt in zip(self._slots, states.layers, strict=True):
            for name, new in zip(("keys", "values"), prompt, strict=True):
                old = getattr(layer, name)
                if old is not None and len(old) > used and old.shape[2] >= columns:
                    continue
                # Zeros rather than any content: a masked column still enters a product, where NaN would survive.
                grown = new.new_zeros(max(slots, used + 1), new.shape[1], columns, new.shape[3])
                if old is not None:
                    grown[:used, :, : old.shape[2]] = old[:used, :, :columns]
                setattr(layer, name, grown)

    def put(self, slot: int, states: PromptStates, prompt: int) -> None:
        """Copy an encoded prompt into a slot.

        Args:
            slot: Number of the slot.
            states: Encoded prompts.
            prompt: Which of them.
        """
        for layer, (keys, values) in zip(self._slots, states.layers, strict=True):
            layer.keys[slot, :, : states.num_tokens] = keys[prompt]
            layer.values[slot, :, : states.num_tokens] = values[prompt]

    def move(self, source: int, target: int, tokens: int) -> None:
        """Copy the first tokens of a slot to another slot."""
        for layer in self._slots:
            layer.keys[target, :, :tokens] = layer.keys[source, :, :tokens]
            layer.values[target, :, :tokens] = layer.values[source, :, :tokens]

    def set_positions(self, positions: Sequence[int], device: torch.device) -> None:
        """Set the position of the next token of each row, before the model's forward pass."""
        self.rows = torch.arange(len(positions), device=device)
        self.positions = torch.tensor(positions, device=device)
        self.columns = max(positions) + 1

    def states(self, rows: int) -> LayerStates:
        """Return the keys and values of the first rows, up to the last column in use."""
        return [
            (layer.keys[:rows, :, : self.columns], layer.values[:rows, :, : self.columns]) for layer in self._slots
        ]


class _PeekLayer(CacheLayerMixin):
    """Keys and values of one layer that new ones are read with, and not added to."""

    is_sliding = False

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.keys, self.values = keys, values
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return all keys and values with the new ones behind them."""
        assert self.keys is not None
        assert self.values is not None
        return torch.cat([self.keys, key_states], dim=2), torch.cat([self.values, value_states], dim=2)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of columns, and the first one."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Return the number of columns."""
        assert self.keys is not None
        return self.keys.shape[2]

    def get_max_length(self) -> int:
        """Return -1: there is no maximum."""
        return -1


def arguments_of(model: nn.Module) -> set[str]:
    """Return the names of the arguments of a model's forward."""
    # Training extends a model's forward.
    return set(signature(getattr(model.forward, "extends", model.forward)).parameters)


def cache_argument(forward: set[str]) -> str | None:
    """Return the name by which a forward takes and returns its cache; None if it takes none.

    Args:
        forward: Names of the arguments of the forward.
    """
    # transformers renamed it in 5.24; models with code of their own may keep the old name.
    return next((name for name in ("cache", "past_key_values") if name in forward), None)


class SlotModel:
    """A model's forward passes with a `SlotCache`, and with masks made here.

    Args:
        model: Causal language model, possibly with an adapter.
        forward: Names of the arguments of the model's forward.
        config: Configuration of the decoder.
    """

    def __init__(self, model: CausalLM, forward: set[str], config: Any) -> None:
        self._model, self._config = model, config
        self._device, self._dtype = unwrap_adapter(model).device, unwrap_adapter(model).dtype
        self._cache_name = str(cache_argument(forward))
        decoder = unwrap_adapter(model).get_decoder()
        self._decoder_cache_name = cache_argument(arguments_of(decoder)) or self._cache_name
        self._last_logits = {"logits_to_keep": 1} if "logits_to_keep" in forward else {}
        self._windows = _windows(config)
        # SDPA attends causally without a mask, which saves one of the size of the prompt, squared.
        self._needs_mask = config._attn_implementation != "sdpa" or any(self._windows.values())

    def encode(self, prompts: Sequence[Sequence[int]], prefix: PromptStates | None = None) -> PromptStates:
        """Return the states of prompts of equal length.

        Args:
            prompts: Token ids of the prompts.
            prefix: States of their first tokens, which all have in common.

        Raises:
            UnsupportedModel: If the model's cache has layers that can't be copied into slots.
        """
        length, start, cache = len(prompts[0]), 0, DynamicCache()
        if prefix is not None:
            start = prefix.num_tokens
            for number, states in enumerate(prefix.layers):
                keys, values = (part.expand(len(prompts), -1, -1, -1) for part in states)
                cache.update(keys, values, number)
        positions = torch.arange(start, length, device=self._device)[None]
        needs_mask = self._needs_mask or prefix is not None
        output = self._model(
            input_ids=torch.tensor(prompts, device=self._device)[:, start:],
            attention_mask=self._masks(positions, length) if needs_mask else None,
            position_ids=positions.expand(len(prompts), -1),
            use_cache=True,
            **{self._cache_name: cache},
            **self._last_logits,
        )
        for layer in cache.layers:
            if type(layer) is not DynamicLayer or layer.keys is None or layer.keys.dim() != 4:
                raise UnsupportedModel(f"a layer caches its state as {type(layer).__name__}")
        if getattr(output, self._cache_name) is not cache or not cache.layers or cache.get_seq_length() != length:
            raise UnsupportedModel("it keeps a cache of its own")
        return PromptStates(output.logits[:, -1], [(layer.keys, layer.values) for layer in cache.layers])

    def step(self, cache: SlotCache, tokens: Sequence[int], positions: Sequence[int]) -> Tensor:
        """Return the logits after one more token of each row, (rows, vocabulary).

        Args:
            cache: Cache of the rows.
            tokens: The new tokens.
            positions: Their positions.
        """
        cache.set_positions(positions, self._device)
        output = self._model(
            input_ids=torch.tensor(tokens, device=self._device)[:, None],
            attention_mask=self._masks(cache.positions[:, None], cache.columns),
            position_ids=cache.positions[:, None],
            use_cache=True,
            **{self._cache_name: cache},
        )
        logits: Tensor = output.logits[:, -1]
        return logits

    def peek(self, cached: LayerStates, lengths: Sequence[int], candidates: Tensor, layers: Sequence[int]) -> Tensor:
        """Return hidden states after each of several candidates for the next token of rows, in one forward pass.

        Args:
            cached: Keys and values of the rows' tokens.
            lengths: Number of tokens of each row.
            candidates: Candidates, (rows, candidates).
            layers: Indices into the hidden states that transformers returns.

        Returns:
            Hidden states, (rows, candidates, layers · width).
        """
        count, columns = candidates.shape[1], cached[0][0].shape[2]
        positions = torch.tensor(lengths, device=self._device)[:, None]
        # A candidate attends to the tokens of its row and to itself, not to the other candidates.
        distances = (positions - torch.arange(columns, device=self._device)).masked_fill_(
            torch.arange(columns, device=self._device) >= positions, -1
        )
        own = torch.eye(count, dtype=distances.dtype, device=self._device) - 1
        rows = len(lengths)
        distances = torch.cat([distances[:, None].expand(rows, count, columns), own.expand(rows, -1, -1)], dim=-1)
        output = unwrap_adapter(self._model).get_decoder()(
            input_ids=candidates,
            attention_mask=self._masks_of(distances[:, None]),
            position_ids=positions.expand(rows, count),
            use_cache=True,
            output_hidden_states=needs_hidden_states(layers),
            **{self._decoder_cache_name: Cache(layers=[_PeekLayer(*states) for states in cached])},
        )
        return concatenated_states(output, layers)

    def _masks(self, positions: Tensor, columns: int) -> Any:
        """Return the masks of queries at positions, (rows, queries), as the model's forward takes them."""
        return self._masks_of(positions[:, None, :, None] - torch.arange(columns, device=self._device))

    def _masks_of(self, distances: Tensor) -> Any:
        """Return the masks of queries at distances behind keys, (rows, 1, queries, keys); below 0 is ahead."""
        masks = {name: self._mask(distances, window) for name, window in self._windows.items()}
        return masks if getattr(self._config, "layer_types", None) is not None else masks["full_attention"]

    def _mask(self, distances: Tensor, window: int | None) -> Tensor:
        allowed = distances >= 0
        if window is not None:
            allowed &= distances < window
        mask = torch.zeros(allowed.shape, dtype=self._dtype, device=self._device)
        return mask.masked_fill_(~allowed, torch.finfo(self._dtype).min)


def _windows(config: Any) -> dict[str, int | None]:
    """Return the sliding window of each type of layer; None stands for full attention."""
    window: int | None = getattr(config, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None)
    if layer_types is None:
        return {"full_attention": window}
    if unknown := set(layer_types) - {"full_attention", "sliding_attention"}:
        raise UnsupportedModel(f"it has layers of type {', '.join(sorted(unknown))}")
    return {name: window if name == "sliding_attention" else None for name in set(layer_types)}
