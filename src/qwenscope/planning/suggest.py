"""A recipe for any language model: reads its config and tokenizer, writes commented YAML that `train` runs as it is.

Learning rates lie on a line through two recipes: 2.5e-4 for 16,384 latents and 48,828 steps, 6e-3 for 512 and 1,172
(docs/language-models.md). They are where a sweep begins, not where it ends.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from transformers import AutoModel, PretrainedConfig
from transformers import PreTrainedTokenizerBase as Tokenizer

from qwenscope.corpus.stream import CorpusStream
from qwenscope.costs import GPUS
from qwenscope.errors import CorpusError, RecipeError
from qwenscope.lm.load import layer_kinds, load_config, load_tokenizer
from qwenscope.lm.model import Kind, as_language_model, config_number, cut_config
from qwenscope.lm.sites import Site, module_at
from qwenscope.planning.memory import GIB, fitting
from qwenscope.planning.plan import model_size
from qwenscope.recipe import CorpusRecipe, LMRecipe, Recipe, SourceRecipe

_DEPTHS = (0.25, 0.5, 0.75)  # of the layers, unless sites are given
_TOKENS_PER_LATENT = 12_000  # the published suite: 200M for 16,384
_MARGIN = 0.95  # of a file's tokens, for rows that are left out
_HELD_OUT = 0.05  # of local rows
_CARD = "h100"


def suggest(
    model: str, *, sites: Sequence[str] = (), dict_size: int | None = None, data: Path | None = None, seed: int = 42
) -> str:
    """A recipe for `model` as commented YAML.

    Args:
        model: Hub id or folder.
        sites: where to read, such as layers.6.mlp or 6; by default the residual stream at three depths, after a layer
            of each kind where there are several.
        dict_size: latents of each SAE; by default eight per dimension.
        data: file or folder of documents or conversations, whose tokens are counted; by default a Hub dataset.
        seed: of the recipe.

    Raises:
        ModelError: no such model, or it has no such site; CorpusError: the data cannot be read, or hold too little.
        RecipeError: `dict_size` is impossible.
    """
    lm = LMRecipe(model=model)
    config, tokenizer = load_config(lm), load_tokenizer(lm)
    kinds = layer_kinds(config)
    chosen = [Site.of(int(s) if s.isdecimal() else s) for s in sites] if sites else _by_depth(kinds)
    _check_sites(model, config, chosen)
    width = dict_size or 8 * int(config.hidden_size)
    if width < 4:
        raise RecipeError(f"--dict-size {width} is too few for any SAE; take eight per dimension")
    longest = config_number(config, "max_position_embeddings", default=2048)
    chat = bool(tokenizer.chat_template)
    length = min(2048 if chat else 1024, longest)
    tokens = _two_digits(min(max(_TOKENS_PER_LATENT * width, 1_000_000), 500_000_000))
    if data is not None:
        tokens = min(tokens, _count(data, tokenizer, length, seed, tokens))
    sizes = _Sizes.of(tokens, width, int(config.hidden_size), length)
    size = model_size(config, max(site.layer for site in chosen) + 1)
    for batch_tokens, overlap in ((32_768, True), (8192, True), (8192, False)):
        body = _body(lm, _hook_points(chosen, kinds, sizes), data, chat, sizes, batch_tokens, overlap, seed)
        recipe = Recipe.model_validate(yaml.safe_load(body))
        needs = fitting(recipe, config, size.parameters, 1, GPUS[_CARD], None, fused_mixer=True)
        if needs["fits"]:
            break
    return _header(model, config, kinds, chat, needs) + body


@dataclass(frozen=True)
class _Sizes:
    """Numbers of a recipe that follow from one another."""

    tokens: int
    dict_size: int
    k: int
    length: int
    batch: int
    steps: int
    window: int
    lr: float

    @classmethod
    def of(cls, tokens: int, dict_size: int, hidden: int, length: int) -> _Sizes:
        batch = min(4096, max(64, _power_below(tokens / 2000)))
        steps = max(1, tokens // batch)
        window = min(131_072, max(4 * batch, 2048, _power_below(tokens / 8)))
        k = min(dict_size // 4, max(4, _power_below(math.sqrt(2 * hidden))))
        lr = 2.5e-4 * math.sqrt(16_384 / dict_size) * (48_828 / steps) ** 0.4
        return cls(tokens, dict_size, k, length, batch, steps, window, _two_digits(min(max(lr, 2e-5), 1e-2)))


def _by_depth(kinds: Sequence[Kind]) -> list[Site]:
    """The residual stream at three depths; at each after the nearest layer of every kind, where there are several."""
    named = sorted({kind for kind in kinds if kind})
    found = []
    for depth in _DEPTHS:
        middle = depth * len(kinds)
        for kind in named if len(named) > 1 else [None]:
            layers = [layer for layer, own in enumerate(kinds) if kind in (None, own)]
            found.append(min(layers, key=lambda layer: abs(layer - middle)))
    return [Site.of(layer) for layer in sorted(set(found))]


def _check_sites(model: str, config: PretrainedConfig, sites: Sequence[Site]) -> None:
    """ModelError unless the model has each of `sites`; looks at a model without weights."""
    with torch.device("meta"):
        depth = min(config.num_hidden_layers, max(site.layer for site in sites) + 1)
        shapes: Any = AutoModel.from_config(cut_config(config, depth))  # type: ignore[no-untyped-call]
    shapes.name_or_path = model
    lm = as_language_model(shapes)
    for site in sites:
        module_at(lm, site)


def _count(data: Path, tokenizer: Tokenizer, length: int, seed: int, most: int) -> int:
    """Tokens of `data` that a run can train on: first ones of rows left out, some to spare, no more than `most`."""
    source = SourceRecipe(name="files", path=data, weight=1.0)
    long = _long_documents(bool(tokenizer.chat_template))
    corpus = CorpusRecipe(sources=(source,), max_length=length, held_out_share=_HELD_OUT, long_documents=long)
    found = 0
    stream = CorpusStream(corpus, tokenizer, seed=seed)
    for row in stream:
        found += len(row.token_ids) - 1
        if found * _MARGIN >= most:
            break
    stream.close()
    if found < 2048:
        raise CorpusError(f"{data} holds {found:,} tokens to train on; a run needs some thousands at least")
    return int(found * _MARGIN) // 64 * 64


def _hook_points(sites: Sequence[Site], kinds: Sequence[Kind], sizes: _Sizes) -> str:
    lines = []
    several = len(set(kinds)) > 1
    for site in sites:
        kind = kinds[site.layer] if several else None
        name = f"{(site.within or kind or 'layer').replace('.', '_')}_{site.layer}"
        where = f"site: {site}" if site.within else f"layer: {site.layer}"
        where += f", kind: {kind}" if kind else ""
        lines.append(f"  {name}: {{{where}, dict_size: {sizes.dict_size}, k: {sizes.k}, lr: {sizes.lr:.1e}}}\n")
    return "".join(lines)


def _long_documents(chat: bool) -> Literal["truncate", "split"]:
    return "truncate" if chat else "split"


def _sources(data: Path | None, chat: bool) -> str:
    if data is not None:
        path = json.dumps(str(data), ensure_ascii=False)
        return f"    - {{name: files, path: {path}, weight: 1.0}}\n"
    if chat:
        return (
            "    - {name: ultrachat, weight: 1.0}\n"
            "    # - {name: tool_use, weight: 0.4}   # generated, for templates that know tools\n"
        )
    return (
        "    - {name: files, repo: HuggingFaceFW/fineweb-edu, config: sample-10BT, text: text, weight: 1.0}\n"
        "    # - {name: files, path: texts/, text: text, weight: 1.0}   # your own: parquet, jsonl or jsonl.gz\n"
    )


def _body(
    lm: LMRecipe, points: str, data: Path | None, chat: bool, sizes: _Sizes, batch_tokens: int, overlap: bool, seed: int
) -> str:
    model = json.dumps(lm.model, ensure_ascii=False)
    held_out = f"  held_out_share: {_HELD_OUT}          # by hash, for evaluation\n" if data is not None else ""
    return f"""seed: {seed}
lm: {{model: {model}, dtype: auto, device: auto}}
hook_points:
{points}corpus:
  max_length: {sizes.length}
  batch_tokens: {max(batch_tokens, sizes.length)}          # of one language-model batch, at most
{held_out}  long_documents: {_long_documents(chat)}
  sources:
{_sources(data, chat)}activations:
  window_tokens: {sizes.window}        # harvested, shuffled and consumed together
  skip_first_position: true     # an attention sink in many models, with a norm of its own
  overlap: {str(overlap).lower()}
training:
  tokens: {sizes.tokens}
  batch_size: {sizes.batch}            # {sizes.steps:,} steps
  warmup_steps: {min(1000, max(1, sizes.steps // 50))}
  decay_share: 0.4
  normalise: true               # one learning rate for all depths
  calibration_tokens: {min(50_000, sizes.window)}
  aux_k: {sizes.k}
  betas: [0.9, 0.95]
checkpoint: {{every_tokens: {max(1, sizes.tokens // 4)}, every_minutes: 10, keep: 2}}
evaluation: {{tokens: {min(200_000, max(2000, sizes.tokens // 50))}}}   # of each split, at most
"""


def _header(model: str, config: PretrainedConfig, kinds: Sequence[Kind], chat: bool, needs: dict[str, Any]) -> str:
    named = {kind for kind in kinds if kind}
    layers = " and ".join(f"{kinds.count(kind)} {kind}" for kind in sorted(named)) if len(named) > 1 else ""
    corpus = "conversations, by its chat template" if chat else "documents: its tokenizer has no chat template"
    room = f"{needs['memory_total_bytes'] / GIB:.1f} GiB on a GPU"
    room += "" if needs["fits"] else ", more than a card of 80 GB has; several share the layers: device: cuda:0,cuda:1"
    depth = f"{len(kinds)} layers{f' ({layers})' if layers else ''}"
    lines = (
        f"{model}: {config.model_type}, {depth}, width {config.hidden_size}",
        f"Trains on {corpus}.",
        f"Needs about {room}. `qwenscope plan` says more.",
        "The learning rate is where a sweep begins. Every other key has its default: `qwenscope recipe FILE` writes "
        "them out.",
    )
    return "".join(f"# {line}\n" for line in lines)


def _power_below(value: float) -> int:
    return 1 << max(0, math.floor(math.log2(max(value, 1))))


def _two_digits(value: float) -> Any:
    rounded = float(f"{value:.1e}")
    return int(rounded) if isinstance(value, int) else rounded
