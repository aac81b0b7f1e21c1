"""A loaded language model, and what harvest and training ask of whoever computes rows."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from qwenscope.errors import ModelError
from qwenscope.lm.fused import fuse
from qwenscope.lm.hooks import capture
from qwenscope.lm.kernels import follow_device
from qwenscope.lm.sites import Site, width_at

Kind = str | None
"""Of a decoder layer: deltanet, attention, or None for whatever else mixes positions."""
_OTHER_MIXERS = ("Mamba", "Mixer", "Lightning", "DeltaAttention", "RecurrentBlock", "Rwkv", "LSTM", "ShortConv")

_NOT_THE_MODEL = ("_name_or_path", "architectures", "transformers_version", "use_cache")  # of a config
_PIECE = 64 << 20  # bytes of a tensor that are hashed at once


class RowSource(Protocol):
    """What harvest and training ask of a language model: a `LanguageModel`, or an engine of another kind."""

    tokenizer: Tokenizer
    layer_kinds: tuple[Kind, ...]
    hidden_dim: int
    device: torch.device
    dtype: torch.dtype
    name: str
    revision: str | None

    def streams(self, input_ids_CT: Tensor, lengths_C: Sequence[int], sites: Sequence[Site]) -> dict[Site, Tensor]:
        """Rows at each of `sites`, of right-padded conversations of `lengths_C` tokens.

        Returns:
            {site: x_CTD} in `dtype`, on `device`; what stands at the padding means nothing.
        """

    def width(self, site: Site) -> int:
        """Values of a row at `site`: `hidden_dim` but for what a mixer hands to its projection."""

    def digest(self, last_layer: int) -> str:
        """Hex digits that tell models whose rows differ apart: weights up to `last_layer`, and who computes."""


@dataclass(eq=False)
class LanguageModel:
    """A loaded model and what the other rooms ask about it."""

    model: PreTrainedModel
    """Transformers model in eval mode whose parameters need no gradient; without LM head unless it was asked for."""
    tokenizer: Tokenizer
    layers: list[nn.Module]
    """The decoder layers that were built, 0 .. last."""
    layer_kinds: tuple[Kind, ...]
    """Kind of every layer of the config, built or not."""
    hidden_dim: int
    device: torch.device
    """Where token ids go in and rows come out; the first of several."""
    dtype: torch.dtype
    name: str
    """Hub id or folder, as the recipe gave it."""
    revision: str | None
    """Commit of a Hub model; None for a folder."""
    second: LanguageModel | None = None
    """The recipe's `model_b`, from whose rows those of this one are subtracted at sites of differences."""

    def __post_init__(self) -> None:
        follow_device(self.model)
        fuse(self.model)

    @property
    def decoder(self) -> nn.Module:
        """Embedding, layers and final norm, in all families the same call: input_ids -> last_hidden_state."""
        return find_decoder(self.model, len(self.layers))[0]

    @property
    def truncated(self) -> bool:
        """Whether layers of the config were left unbuilt, so that there are no logits."""
        return len(self.layers) < len(self.layer_kinds)

    @torch.no_grad()
    def streams(self, input_ids_CT: Tensor, lengths_C: Sequence[int], sites: Sequence[Site]) -> dict[Site, Tensor]:
        """Rows at each of `sites`, from one pass that stops at the last of them.

        Rows are right-padded conversations. No attention mask is passed: all layers look back only, so padding cannot
        reach the tokens before it (whence `lengths_C` does not matter here), and its own outputs are for the caller to
        drop. Values are bit-identical to what the full model computes for the same rows.

        Args:
            input_ids_CT: int64 [C, T] token ids.
            lengths_C: tokens of each conversation.
            sites: in any order; the model must be built as far.

        Returns:
            {site: x_CTD} in the model's dtype, on `device`.
        """
        own = self._caught(input_ids_CT, [site.place for site in sites])
        differences = [site for site in sites if site.is_difference]
        if not differences:
            return own
        if self.second is None:
            raise ModelError(f"{differences[0]} takes two models; name the other in lm.model_b")
        other = self.second.streams(input_ids_CT, lengths_C, [site.place for site in differences])
        found = {}
        for site in sites:
            found[site] = x_CTD = own[site.place]
            if site.is_difference:
                found[site] = (other[site.place].to(x_CTD.device).float() - x_CTD.float()).to(x_CTD.dtype)
        return found

    def _caught(self, input_ids_CT: Tensor, sites: Sequence[Site]) -> dict[Site, Tensor]:
        if int(input_ids_CT.max()) >= (known := self.known_tokens):
            raise ModelError(f"token {int(input_ids_CT.max())} is beyond the {known} that {self.name} knows")
        if (positions := self.known_positions) is not None and input_ids_CT.shape[1] > positions:
            raise ModelError(
                f"{self.name} knows {positions} positions, and a row has {input_ids_CT.shape[1]} tokens; set "
                f"corpus.max_length to {positions}"
            )
        with capture(self, sites, stop=True) as rows:
            self.decoder(input_ids=input_ids_CT.to(self.device, non_blocking=True), use_cache=False)
        for site, x_CTD in rows.items():
            if x_CTD.shape[1] != input_ids_CT.shape[1]:
                raise ModelError(
                    f"{site} of {self.name} gives {x_CTD.shape[1]} of {input_ids_CT.shape[1]} positions: it reads long "
                    "texts in parts; set corpus.max_length to no more than one of them"
                )
        return {site: rows[site] for site in sites}

    def width(self, site: Site) -> int:
        """Values of a row at `site`.

        Raises:
            ModelError: the layer was not built, or has no such part, or more than one.
        """
        return width_at(self, site)

    @property
    def known_tokens(self) -> int:
        """Rows of the embedding."""
        weight: Tensor = self.model.get_input_embeddings().weight  # type: ignore[assignment]
        return len(weight)

    @property
    def known_positions(self) -> int | None:
        """Positions of a learned embedding, beyond which there is nothing; None for models that compute them."""
        longest = getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        words = self.model.get_input_embeddings()
        tables = (child for child in self.decoder.children() if isinstance(child, nn.Embedding) and child is not words)
        learned = any(longest is not None and 0 <= len(table.weight) - longest <= 2 for table in tables)
        return longest if learned else None

    def digest(self, last_layer: int | None = None) -> str:
        """16 hex digits that tell models apart: every byte of the weights up to `last_layer`, and the config.

        A gigabyte takes about a second of one core.
        """
        config = self.model.config.get_text_config(decoder=True)
        parts: list[nn.Module] = [self.model]
        if last_layer is not None:
            config = cut_config(config, last_layer + 1)
            parts = [self.model.get_input_embeddings(), *self.layers[: last_layer + 1]]
        tensors = [named for part in parts for named in part.state_dict().items() if isinstance(named[1], Tensor)]
        if self.second is not None:
            tensors.append(("second model", torch.tensor([int(self.second.digest(last_layer), 16) >> 1])))
        described = {key: value for key, value in config.to_dict().items() if key not in _NOT_THE_MODEL}
        digest = hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode())
        with ThreadPoolExecutor() as pool:
            for found in pool.map(_tensor_digest, tensors):
                digest.update(found)
        return digest.hexdigest()[:16]


def as_language_model(model: PreTrainedModel | LanguageModel, tokenizer: Any = None) -> LanguageModel:
    """The view of any Hugging Face causal language model that hooks and forward passes work on.

    Raises:
        ModelError: the decoder layers are not to be found.
    """
    if isinstance(model, LanguageModel):
        return model
    config = model.config.get_text_config(decoder=True)
    layers = decoder_layers(model, config.num_hidden_layers)
    embedding: Tensor = model.get_input_embeddings().weight  # type: ignore[assignment]
    return LanguageModel(
        model=model,
        tokenizer=tokenizer,
        layers=layers,
        layer_kinds=tuple(map(kind_of, layers)),
        hidden_dim=config.hidden_size,
        device=embedding.device,
        dtype=embedding.dtype,
        name=model.name_or_path or type(model).__name__,
        revision=None,
    )


def cut_config(config: PretrainedConfig, layers: int) -> PretrainedConfig:
    """A config of the first `layers` layers: every per-layer list is cut alike."""
    cut = copy.deepcopy(config)
    whole = config.num_hidden_layers
    for key, value in config.to_dict().items():
        if isinstance(value, list) and len(value) == whole and whole > layers:
            setattr(cut, key, value[:layers])
    cut.num_hidden_layers = layers
    return cut


def config_number(config: Any, *names: str, default: int = 0) -> int:
    """The first of `names` that stands in a config as a number above 0, of one per layer the largest; else `default`.

    Families leave keys out that others have, and files say null.
    """
    for name in names:
        value = getattr(config, name, None)
        numbers = [number for number in (value if isinstance(value, list) else [value]) if isinstance(number, int)]
        if max(numbers, default=0) > 0:
            return int(max(numbers))
    return default


def find_decoder(model: nn.Module, count: int) -> tuple[nn.Module, list[nn.Module]]:
    """The decoder of a transformers model of any supported family, and its `count` layers.

    Raises:
        ModelError: no part of it keeps a list of that length.
    """
    get_decoder: Any = getattr(model, "get_decoder", lambda: model)
    decoder: nn.Module = get_decoder()
    modules: Any = getattr(model, "modules", tuple)()  # some families' own answer is the head, or the whole
    for part in chain((decoder,), modules):
        for child in part.children():
            if isinstance(child, nn.ModuleList) and len(child) == count:
                return part, list(child)
    raise ModelError(f"{type(decoder).__name__} has no list of {count} decoder layers; this family is not supported")


def decoder_layers(model: nn.Module, count: int) -> list[nn.Module]:
    """The `count` layers of a transformers model; ModelError where there are none."""
    return find_decoder(model, count)[1]


def kind_of(layer: nn.Module) -> Kind:
    """What mixes positions in a decoder layer, by the modules that are there.

    "deltanet" is a Gated DeltaNet, "attention" softmax attention (sliding, chunked or full); layers with another mixer
    (Mamba, lightning attention, convolutions, RWKV), with two or with none are of no kind.
    """
    names = {type(module).__name__ for module in layer.modules()}
    deltanet = any("GatedDeltaNet" in name for name in names)
    attention = any(name.endswith("Attention") for name in names)
    if any(mixer in name for name in names for mixer in _OTHER_MIXERS) or deltanet == attention:
        return None
    return "deltanet" if deltanet else "attention"


def _tensor_digest(named: tuple[str, Tensor]) -> bytes:
    name, tensor = named
    digest = hashlib.sha256(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    raw = tensor.detach().contiguous().flatten().view(torch.uint8)
    for start in range(0, len(raw), _PIECE):
        digest.update(raw[start : start + _PIECE].cpu().numpy().data)
    return digest.digest()
