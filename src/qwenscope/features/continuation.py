"""A language model writes on, under several steerings at once: one row of a batch each, so that the controls of a push
cost little more than the push.

Legend: C rows of a batch, T positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import TopPLogitsWarper
from transformers.cache_utils import DynamicLayer

from qwenscope.corpus.anything import Messages
from qwenscope.corpus.chat import on_one_day
from qwenscope.corpus.repair import Dropped, clean
from qwenscope.errors import FormatError, ModelError, reason
from qwenscope.features.steering import Steering, controls, steer_rows
from qwenscope.lm.forward import site_rows
from qwenscope.lm.model import LanguageModel, config_number
from qwenscope.lm.sites import Site
from qwenscope.seeds import generator


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. Raises FormatError for values out of range."""

    temperature: float = 0.0
    """0 takes the likeliest token."""
    top_p: float = 1.0
    """Of the likeliest tokens those that hold this share of the probability."""
    seed: int = 0
    """Every run draws the same random numbers."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 10 or not 0 < self.top_p <= 1:
            raise FormatError("sampling takes a temperature between 0 and 10, and a top_p above 0 and up to 1")

    def draw(self, logits_V: Tensor, random: torch.Generator) -> int:
        """One token."""
        if not self.temperature:
            return int(logits_V.argmax())
        scores_V = logits_V / self.temperature
        if self.top_p < 1:
            scores_V = TopPLogitsWarper(self.top_p)(None, scores_V[None])[0]
        return int(torch.multinomial(scores_V.softmax(0), 1, generator=random))


@dataclass(frozen=True)
class Step:
    """One token of one run."""

    run: int
    token: int
    text: str
    """What it adds; empty while a character is not whole, and of a token that ends the text."""
    ends: bool
    logits_V: Tensor
    """float32, of which it was drawn."""
    clean_V: Tensor | None
    """The unsteered model's after the same text, where they were asked for."""


@torch.no_grad()
def write_on(
    lm: LanguageModel,
    prompt_ids: Sequence[int],
    runs: Sequence[Sequence[Steering]],
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    *,
    shadows: bool = False,
) -> Iterator[Step]:
    """Stream continuations of one prompt, each run under its own steerings, all in one batch: step by step, by run.

    The model is steered only inside each pass, so that a caller may do other things with it between steps.

    Args:
        lm: whole model with its LM head.
        prompt_ids: see `prompt_tokens`.
        runs: the steerings of each run.
        max_new_tokens: per run.
        sampling: see there.
        shadows: let an unsteered row read along with each run, for `Step.clean_V`.
    """
    randoms = [generator(sampling.seed, "steering sampling") for _ in runs]
    texts = [_Text(lm.tokenizer) for _ in runs]
    read = torch.tensor([list(prompt_ids)] * (len(runs) * (1 + shadows)), device=lm.device)
    begun, cached = _read_once(lm, read, runs)
    ids, stops, ended = read[:, begun:], _stop_ids(lm), set[int]()
    for _ in range(max_new_tokens):
        with steer_rows(lm, enumerate(runs)):
            output: Any = lm.model(input_ids=ids, use_cache=True, **cached)
        cached, logits_CV = _cache_of(output), output.logits[:, -1].float().cpu()
        tokens = []
        for run, random in enumerate(randoms):
            token = sampling.draw(logits_CV[run], random)
            tokens.append(token)
            if run in ended:
                continue
            if token in stops:
                ended.add(run)
            clean_V = logits_CV[len(runs) + run] if shadows else None
            text = "" if run in ended else texts[run].add(token)
            yield Step(run, token, text, run in ended, logits_CV[run], clean_V)
        if len(ended) == len(runs):
            return
        new = torch.tensor(tokens * (1 + shadows), device=lm.device).unsqueeze(1)
        read = torch.cat([read, new], dim=1)
        ids = new if cached else read  # without a cache every pass reads all anew


def _read_once(lm: LanguageModel, read: Tensor, runs: Sequence[Sequence[Steering]]) -> tuple[int, dict[str, Any]]:
    """The beginning of the prompt that no run steers, read once for all rows: its length, and a cache that holds it.

    (0, no cache) where there is none, and where a layer keeps more than keys and values: states are for one next token.
    """
    wheres = [steering.where for run in runs for steering in run]
    starts = [where.start or 0 if isinstance(where, slice) and where.step is None else 0 for where in wheres]
    begun = min([read.shape[1] - 1, *starts])
    if begun <= 0 or len(read) == 1:
        return 0, {}
    cached = _cache_of(lm.model(input_ids=read[:1, :begun], use_cache=True))
    for cache in cached.values():
        if any(type(layer) is not DynamicLayer for layer in getattr(cache, "layers", [None])):
            return 0, {}
        cache.batch_repeat_interleave(len(read))
    return (begun, cached) if cached else (0, {})


class _Text:
    """Tokens as text, whole characters at a time."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self._written, self._shown = tokenizer, list[int](), ""

    def add(self, token: int) -> str:
        self._written.append(token)
        text = str(self._tokenizer.decode(self._written))
        if text.endswith("\ufffd"):  # a character's last bytes are still to come
            return ""
        new, self._shown = text[len(self._shown) :], text
        return new


def generate(
    lm: LanguageModel,
    prompt_ids: Sequence[int],
    steerings: Sequence[Steering],
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> Iterator[str]:
    """Stream one continuation under `steerings`, text piece by text piece."""
    sampling = Sampling(temperature, seed=seed)
    for step in write_on(lm, prompt_ids, [steerings], max_new_tokens, sampling):
        if step.text:
            yield step.text


def divergence(logits_V: Tensor, clean_V: Tensor) -> float:
    """KL divergence in nats of one next-token distribution from another."""
    spread_V, clean_V = logits_V.double().log_softmax(0), clean_V.double().log_softmax(0)
    return float((spread_V.exp() * (spread_V - clean_V)).nan_to_num(0.0).sum())


@dataclass(frozen=True)
class Piece:
    """A bit of a run's text as it appears."""

    run: str
    """steered, or the name of a control."""
    text: str
    effect: float | None = None
    """With a run's first piece: KL divergence (nats) of its first next-token distribution from the unsteered one."""
    note: str | None = None
    """At the end, of ablations that took nothing away: why."""


def side_by_side(
    lm: LanguageModel,
    prompt_ids: Sequence[int],
    steerings: Sequence[Steering],
    *,
    alive: Sequence[Sequence[int]] | None = None,
    max_new_tokens: int = 64,
    sampling: Sampling = Sampling(),
) -> Iterator[Piece]:
    """Stream the steered continuation of a prompt and those of all `controls`, written in one batch.

    Args:
        lm: whole model with its LM head.
        prompt_ids: see `prompt_tokens`.
        steerings: what is done together.
        alive: per steering, the latents that the random one is chosen from.
        max_new_tokens: per run.
        sampling: how tokens are drawn; its seed is that of the controls, too.

    Raises:
        ModelError: the model was loaded truncated or without LM head.
        FormatError: the prompt is empty.
    """
    if not len(prompt_ids):
        raise FormatError("the prompt is empty")
    if lm.truncated:
        raise ModelError(f"{lm.name} was loaded up to layer {len(lm.layers) - 1}; steering needs all layers")
    runs = {"steered": list(steerings), **controls(steerings, sampling.seed, alive)}
    names, first = list(runs), list[Step]()
    written = list[int]()
    for step in write_on(lm, prompt_ids, list(runs.values()), max_new_tokens, sampling):
        if len(first) < len(runs):  # the first step of each run: the unsteered one's is known with the last
            first.append(step)
            if len(first) == len(runs):
                clean_V = first[names.index("unsteered")].logits_V
                yield from (Piece(names[s.run], s.text, divergence(s.logits_V, clean_V)) for s in first)
        elif step.text:
            yield Piece(names[step.run], step.text)
        if step.run == 0 and not step.ends:
            written.append(step.token)
    for steering in steerings:
        if steering.mode == "ablate" and (why := _idle(lm, prompt_ids, written, steering)):
            yield Piece("steered", "", note=why)


def _idle(lm: LanguageModel, prompt_ids: Sequence[int], written: Sequence[int], steering: Steering) -> str | None:
    """Why an ablation took nothing away from a text; None if it took something."""
    assert steering.sae is not None
    site, sae = Site.of(steering.site), steering.sae  # type: ignore[arg-type] # it is one by now
    read = written[:-1]  # the last token was written and never read
    rows_TD = site_rows(lm, torch.tensor([[*prompt_ids, *read]]), [site])[site][0]
    with torch.no_grad():
        codes = sae.encode(rows_TD.to(sae.pre_bias.device))
    active_T = ((codes.indices == steering.latent) & (codes.values > 0)).any(-1).cpu()
    parts = [(0, len(prompt_ids)), (len(prompt_ids), len(read))]
    masks = [steering.mask(*part) for part in parts]
    steered_T = torch.cat(
        [torch.ones(n, dtype=torch.bool) if mask is None else mask for (_, n), mask in zip(parts, masks, strict=True)]
    )
    if bool((active_T & steered_T).any()):
        return None
    elsewhere = int(active_T.sum())
    at = f"; it is on {elsewhere} that are not steered" if elsewhere else ""
    count = int(steered_T.sum())
    return f"latent {steering.latent} is active on none of the {count} steered tokens, so nothing is taken away{at}"


def prompt_tokens(lm: LanguageModel, prompt: str | Messages, tools: list[dict[str, Any]] | None = None) -> list[int]:
    """A prompt by the model's chat template, ready for the answer; plain text without template.

    A text is the user's turn. Messages may have every role; a last one of the assistant is written on.

    Raises:
        FormatError: the prompt is no text, the template refuses it, there is none for messages, or it has more tokens
            than the model positions.
    """
    return _prompt(lm, prompt, tools)[0]


def answer_start(lm: LanguageModel, prompt: str | Messages, tools: list[dict[str, Any]] | None = None) -> int:
    """The position in `prompt_tokens` at which the assistant's turn begins; of plain text, its last token."""
    return _prompt(lm, prompt, tools)[1]


def _prompt(lm: LanguageModel, prompt: str | Messages, tools: list[dict[str, Any]] | None) -> tuple[list[int], int]:
    """`prompt_tokens` and `answer_start`."""
    try:
        if isinstance(prompt, str):
            prompt.encode()
        if getattr(lm.tokenizer, "chat_template", None):
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(m) for m in prompt]
            asked, ids = _turns(on_one_day(lm.tokenizer), *clean(messages, tools))
        elif isinstance(prompt, str):
            asked, ids = [], list(lm.tokenizer(prompt).input_ids)
        else:
            raise FormatError(f"the tokenizer of {lm.name} has no chat template, which messages need; give a text")
    except UnicodeEncodeError:
        raise FormatError("the prompt holds bytes that are no UTF-8, or half a surrogate pair; take them out") from None
    except Dropped as dropped:
        raise FormatError(f"the messages cannot be rendered: {dropped}") from None
    except FormatError:
        raise
    except Exception as error:  # a template is a program, and may fail like one
        raise FormatError(f"the chat template of {lm.name} refuses the prompt: {reason(error)}") from error
    positions = config_number(lm.model.config.get_text_config(), "max_position_embeddings")
    if 0 < positions < len(ids):
        raise FormatError(f"the prompt has {len(ids):,} tokens, {lm.name} has {positions:,} positions; shorten it")
    begins = ids[: len(asked)] == asked and 0 < len(asked) < len(ids)
    return ids, len(asked) if begins else max(0, len(ids) - 1)


def _turns(
    tokenizer: Any, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None
) -> tuple[list[int], list[int]]:
    """Token ids up to the answer, and with its beginning: the template's, and what of it is written already."""

    def render(part: list[dict[str, Any]], **options: bool) -> list[int]:
        return list(tokenizer.apply_chat_template(part, tools=tools, return_dict=False, **options)) if part else []

    if messages[-1]["role"] == "assistant":
        return render(messages[:-1]), render(messages, continue_final_message=True)
    return render(messages), render(messages, add_generation_prompt=True)


def _cache_of(output: Any) -> dict[str, Any]:
    """A pass's cache, under the name that its model takes it by; empty where there is none that says its length."""
    for name in ("cache", "past_key_values"):
        if hasattr(cache := getattr(output, name, None), "get_seq_length"):
            return {name: cache}
    return {}


def _stop_ids(lm: LanguageModel) -> set[int]:
    stops = getattr(lm.model.generation_config, "eos_token_id", None)
    ids = {stops} if isinstance(stops, int) else set(stops or ())
    return ids | ({lm.tokenizer.eos_token_id} if lm.tokenizer.eos_token_id is not None else set())
