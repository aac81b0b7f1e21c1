"""A gallery of latents picked by rule, with what steering along each does: docs/gallery.md.

    python bench/gallery.py RUN INDEX --out docs/gallery.md [--json gallery.json]

RUN is a run with SAEs on the residual stream, INDEX its index, every latent labelled and scored by `qwenscope explain
INDEX` (a rule without a model). All rules but one were written down before the first latent was seen:

Picks. Each group of ten is dealt over the SAEs of the stream, no latent stands in two groups.
    by lot    of all latents that fired in the index, with equal chances (seed 0); 30 for the counts, ten shown
    clear     both scores 0.8 or more, and the label's words are three, different, of three letters at least; of
              those the largest share of activation on the label's words, in examples from all quarters of its firings
    nothing   both scores 0.5, which is chance, or less; of those the smallest such share, among equals the lower number
  "Clear" and "nothing" were first the highest and lowest sum of the scores; each rests on twenty texts, so that among
  thousands of latents it found the lucky ones. That was seen in the labels; of those picked since, one had been
  steered by then, of which strength and KL were seen and no text.

Nameable. The label predicts on which further texts the latent fires with a balanced accuracy of 0.8 or more
(detection; the label was written from other texts).

Strength. One per latent: where `steer --range` would start on the first prompt, from the beginning of
the assistant's turn, greedily, of six strengths from 0.18 to 1; where it finds none, the strongest text, or none.

Control. 20 random directions at each site (`controls`, seeds 0 to 19), at several strengths; beside each latent every
one of them at that strength whose KL (nats a token, mean over the prompts) is nearest to the latent's in logarithm.

Named direction. The latent's words are those of its label and the tokens that its decoder direction promotes, of two
letters or more, in any case. It changes text in the named direction where the share of the steered texts' tokens that
are among its words is larger than that of at least 95 % of the random directions at equal KL; `inward` is the same
count with the label's words alone, which the logit lens had no part in.
"""

from __future__ import annotations

import argparse
import html
import json
import math
import re
import statistics
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from qwenscope.features.continuation import answer_start, prompt_tokens
from qwenscope.features.describe import BANDS
from qwenscope.features.steering import Steering, controls
from qwenscope.features.steering_range import LADDER, Range, Trial, tried
from qwenscope.features.store import Index, read_explanations
from qwenscope.lm.model import LanguageModel
from qwenscope.opening import Target, open_target
from qwenscope.seeds import generator

PROMPTS = ("What should I do this weekend?", "Tell me about a river.", "How do I become a better writer?")
SHOWN, DRAWN, RANDOM = 10, 30, 20
NAMEABLE, CHANCE, BEATEN = 0.8, 0.5, 0.95
STRENGTHS = LADDER[5:11]
EXAMPLES, BEFORE, AFTER = 3, 12, 6
BATCH = 32
GROUPS = {
    "clear": "Clear ones",
    "lot": "Drawn by lot",
    "nothing": "That mean nothing",
}
_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"')


@dataclass(frozen=True)
class Score:
    """What `explain` wrote of a latent."""

    label: str
    detection: float | None
    fuzzing: float | None

    @property
    def words(self) -> list[str]:
        """The words that the label names, in lower case."""
        return [json.loads(quoted).strip().lower() for quoted in _QUOTED.findall(self.label)]

    @property
    def worse(self) -> float | None:
        """The lower of both scores; None if one is missing."""
        return None if self.detection is None or self.fuzzing is None else min(self.detection, self.fuzzing)

    @property
    def better(self) -> float | None:
        """The higher of both."""
        return None if self.detection is None or self.fuzzing is None else max(self.detection, self.fuzzing)


@dataclass(frozen=True)
class Steered:
    """One push on every prompt."""

    strength: float
    texts: tuple[str, ...]
    kl: float
    """Mean over the prompts, nats a token."""


@dataclass(frozen=True)
class Latent:
    """One latent and all that is said of it."""

    sae: str
    latent: int
    group: str
    shown: bool
    score: Score
    page: dict[str, Any]
    strongest: float | None
    """The end of the range in which the first prompt's text stays text."""
    steered: Steered | None
    random: tuple[Steered, ...]
    """The random directions at equal KL."""
    share: float
    """Of the steered texts' tokens that are among the latent's words."""
    beaten: int
    """Random directions with a smaller share."""
    beaten_inward: int
    """The same with the label's words alone."""

    @property
    def nameable(self) -> bool:
        """By the rule above."""
        return self.score.detection is not None and self.score.detection >= NAMEABLE


def dealt(count: int, parts: int) -> list[int]:
    """`count` in so many nearly equal parts."""
    return [count * (part + 1) // parts - count * part // parts for part in range(parts)]


def picks(index: Index, saes: Sequence[str]) -> Iterator[tuple[str, int, str, bool, Score]]:
    """(SAE, latent, group, whether it is shown, scores) by the rules above."""
    scores: dict[str, dict[int, Score]] = {sae: {} for sae in saes}
    for sae, latent, record in read_explanations(index):
        if sae in scores:
            scores[sae][latent] = Score(record["label"], record["detection"], record["fuzzing"])
    for sae, drawn, shown in zip(saes, dealt(DRAWN, len(saes)), dealt(SHOWN, len(saes)), strict=True):
        alive, of = index.alive(sae), scores[sae]
        if missing := len(set(alive) - set(of)):
            raise SystemExit(f"{missing} latents of {sae} have no scores; run: qwenscope explain {index.folder}")
        order = torch.randperm(len(alive), generator=generator(0, f"gallery {sae}")).tolist()
        lot = [alive[place] for place in order[:drawn]]
        rest = [latent for latent in alive if latent not in lot]
        good = [n for n in rest if (of[n].worse or 0) >= NAMEABLE and _is_family(of[n].words)]
        bad = [n for n in rest if of[n].better is not None and of[n].better <= CHANCE]
        shares = {n: _share_on(index.latent(sae, n), of[n].words) for n in (*good, *bad)}
        clear = sorted(good, key=lambda n: (-(shares[n] or 0), n))[:shown]
        nothing = sorted((n for n in bad if shares[n] is not None), key=lambda n: (shares[n], n))[:shown]
        for group, latents in (("clear", clear), ("lot", lot), ("nothing", nothing)):
            yield from ((sae, latent, group, n < shown, of[latent]) for n, latent in enumerate(latents))


def _is_family(words: Sequence[str]) -> bool:
    return len(set(words)) == 3 and all(len(word) >= 3 and word.isalpha() for word in words)


def _share_on(page: dict[str, Any], words: Sequence[str]) -> float | None:
    """Share of a latent's activation that lies on tokens among `words`, in examples of all quarters of its firings."""
    examples = [example for example in page["examples"] if example["kind"] in BANDS]
    found = [pair for example in examples for pair in zip(example["tokens"], example["activations"], strict=True)]
    mass = sum(value for _, value in found)
    return sum(value for token, value in found if token.strip().lower() in words) / mass if mass else None


class Bench:
    """Steers one language model on the fixed prompts, from the beginning of the answer."""

    def __init__(self, target: Target, max_new_tokens: int) -> None:
        self.lm: LanguageModel = target.language_model()
        self._length = max_new_tokens
        self._ids = [prompt_tokens(self.lm, prompt) for prompt in PROMPTS]
        self._starts = [answer_start(self.lm, prompt) for prompt in PROMPTS]
        self.unsteered = tuple(self._tried([], n)[0].text for n in range(len(PROMPTS)))

    def ranges(self, pushes: Sequence[Steering]) -> list[Range]:
        """What STRENGTHS of each push do on the first prompt."""
        each = [replace(push, strength=strength) for push in pushes for strength in STRENGTHS]
        own, *trials = self._tried(each, 0)
        return [Range(own, tuple(trials[n : n + len(STRENGTHS)])) for n in range(0, len(trials), len(STRENGTHS))]

    def all(self, pushes: Sequence[Steering]) -> list[Steered]:
        """Each push on every prompt."""
        by_prompt = [self._tried(pushes, n)[1:] for n in range(len(PROMPTS))]
        return [
            Steered(trials[0].strength, tuple(t.text for t in trials), statistics.mean(t.kl for t in trials))
            for trials in zip(*by_prompt, strict=True)
        ]

    def share(self, texts: Sequence[str], words: Iterable[str]) -> float:
        """Share of the texts' tokens that are among `words`."""
        ids = [token for text in texts for token in self.lm.tokenizer(text, add_special_tokens=False).input_ids]
        wanted = {word for word in words if sum(map(str.isalpha, word)) >= 2}
        return sum(str(self.lm.tokenizer.decode([token])).strip().lower() in wanted for token in ids) / max(1, len(ids))

    def _at(self, push: Steering, n: int) -> Steering:
        return replace(push, where=slice(self._starts[n], None))

    def _tried(self, pushes: Sequence[Steering], n: int) -> list[Trial]:
        """The unsteered text of prompt `n`, then each push's."""
        found: list[Trial] = []
        for first in range(0, max(1, len(pushes)), BATCH):
            part = [self._at(push, n) for push in pushes[first : first + BATCH]]
            tries = tried(self.lm, self._ids[n], part, self._length)
            found += tries.trials if found else (tries.unsteered, *tries.trials)
        return found


def measured(bench: Bench, target: Target, index: Index, sae: str, rows: Sequence[Any]) -> list[Latent]:
    """All picks of one SAE beside its random directions."""
    base = Steering(site=target.targets[sae], sae=target.saes[sae], latent=0)
    ranges = bench.ranges([replace(base, latent=latent) for _, latent, *_ in rows])
    strengths = [found.strongest if found.start is None else found.start for found in ranges]
    print(sae, strengths, flush=True)
    taken = [(row[1], strength) for row, strength in zip(rows, strengths, strict=True) if strength is not None]
    tries = iter(bench.all([replace(base, latent=latent, strength=strength) for latent, strength in taken]))
    found = [
        (tried_on.strongest, None if strength is None else next(tries))
        for tried_on, strength in zip(ranges, strengths, strict=True)
    ]
    pool = _pool(bench, base, [steered.kl for _, steered in found if steered])
    latents = []
    for (_, latent, group, shown, score), (strongest, steered) in zip(rows, found, strict=True):
        page = index.latent(sae, latent)
        random = tuple(_nearest(tries, steered.kl) for tries in pool) if steered else ()
        words = {token.strip().lower() for token, _ in page["promoted"]} | set(score.words)
        shares = [bench.share(each.texts, words) for each in ((steered, *random) if steered else ())]
        inward = [bench.share(each.texts, score.words) for each in ((steered, *random) if steered else ())]
        beaten, beaten_inward = (sum(other < own[0] for other in own[1:]) if own else 0 for own in (shares, inward))
        share = shares[0] if shares else 0.0
        latents.append(
            Latent(sae, latent, group, shown, score, page, strongest, steered, random, share, beaten, beaten_inward)
        )
    return latents


def _pool(bench: Bench, base: Steering, kls: Sequence[float]) -> list[list[Steered]]:
    """Each random direction at those of STRENGTHS that span the latents' KL."""
    directions = [controls([base], seed)["random direction"][0] for seed in range(RANDOM)]
    (found,) = bench.ranges(directions[:1])
    low, high = min(kls) / 1.4, max(kls) * 1.4
    strengths = [trial.strength for trial in found.trials if low <= trial.kl <= high] or [STRENGTHS[-1]]
    pushes = [replace(direction, strength=strength) for direction in directions for strength in strengths]
    print("random directions at", strengths, flush=True)
    tries = bench.all(pushes)
    return [tries[n : n + len(strengths)] for n in range(0, len(tries), len(strengths))]


def _nearest(tries: Sequence[Steered], kl: float) -> Steered:
    return min(tries, key=lambda each: abs(math.log(max(each.kl, 1e-6) / max(kl, 1e-6))))


def page_of(latents: Sequence[Latent], unsteered: Sequence[str], tokens: int) -> str:
    """The page as Markdown."""
    lines = [
        "# Gallery: thirty latents of a real chat model",
        "",
        "Made by `python bench/gallery.py runs/smollm2 runs/smollm2-index --out docs/gallery.md` from a run of",
        "`smollm2-135m` on SmolLM2-135M-Instruct (the walk is in the README). All picks, strengths and counts are by",
        "the rules at the head of that script; nothing was taken out.",
        "",
        *_counts([latent for latent in latents if latent.group == "lot"]),
        "",
        f"Every text is {tokens} tokens from the beginning of the assistant's turn, the likeliest token each time.",
        "KL: nats a token, mean over the three prompts, of the steered model from the unsteered one after the same",
        "text. The random direction is the first of twenty, at the strength of nearest KL; `beats` counts those of",
        "the twenty whose texts hold a smaller share of the latent's words (of its label, and promoted). Unsteered:",
        "",
        *(f"- {_safe(prompt)} **{_safe(text)}**" for prompt, text in zip(PROMPTS, unsteered, strict=True)),
    ]
    for group, title in GROUPS.items():
        lines += ["", f"## {title}"]
        for latent in latents:
            if latent.group == group and latent.shown:
                lines += ["", *_entry(latent)]
    return "\n".join(lines) + "\n"


def _counts(drawn: Sequence[Latent]) -> Iterator[str]:
    """What is counted over the latents drawn by lot."""
    ends = [latent.strongest for latent in drawn if latent.strongest is not None]
    moving = [latent for latent in drawn if latent.beaten >= BEATEN * RANDOM]
    inward = [latent for latent in drawn if latent.beaten_inward >= BEATEN * RANDOM]
    more = f"more often than 95 % of {RANDOM} random directions at equal KL"
    yield f"| {len(drawn)} latents drawn by lot, at three depths | |"
    yield "|---|---|"
    rows = {
        f"nameable: the label foresees further texts, balanced accuracy {NAMEABLE:g} or more": len(_nameable(drawn)),
        f"texts change in the named direction {more}": len(moving),
        "the same by the label's words alone, without the tokens that the direction promotes": len(inward),
        "both nameable and changing texts in the named direction": len(_nameable(moving)),
        "strength taken, share of the stream's norm: median (least to largest)": _span(
            [latent.steered.strength for latent in drawn if latent.steered]
        ),
        "KL at it, nats a token": _span([latent.steered.kl for latent in drawn if latent.steered]),
        "strongest push on the first prompt that leaves a text": _span(ends),
    }
    yield from (f"| {name} | {value} |" for name, value in rows.items())


def _nameable(latents: Iterable[Latent]) -> list[Latent]:
    return [latent for latent in latents if latent.nameable]


def _entry(latent: Latent) -> Iterator[str]:
    page, score = latent.page, latent.score
    yield f"### {latent.sae}/{latent.latent}"
    scores = (
        f"{name} {_figure(value)}" for name, value in (("detection", score.detection), ("fuzzing", score.fuzzing))
    )
    named = "nameable" if latent.nameable else "not nameable"
    fires = f"Fires on {page['density']:.2%} of tokens."
    yield f"Label: {_safe(score.label or 'none')} ({', '.join(scores)}: {named}). {fires}  "
    yield f"Promotes {_safe(', '.join(token.strip() or token for token, _ in page['promoted'][:8]))}."
    yield ""
    for example in [each for each in page["examples"] if each["kind"] == "top"][:EXAMPLES]:
        tokens, peak = example["tokens"], example["peak"]
        left, right = "".join(tokens[max(0, peak - BEFORE) : peak]), "".join(tokens[peak + 1 : peak + 1 + AFTER])
        yield f"- {_safe(left, ' ')}<mark>{_safe(tokens[peak], ' ') or '␣'}</mark>{_safe(right, ' ')}"
    yield ""
    if latent.steered is None:
        yield "The weakest push tried breaks the text: not steered."
        return
    random = latent.random[0]
    mine, other = latent.steered, f"random direction at {random.strength:.2g}, KL {random.kl:.2f}"
    yield f"| prompt | steered at {mine.strength:.2g}, KL {mine.kl:.2f}, beats {latent.beaten} of {RANDOM} | {other} |"
    yield "|---|---|---|"
    for prompt, *texts in zip(PROMPTS, mine.texts, random.texts, strict=True):
        yield f"| {_safe(prompt)} | {_safe(texts[0])} | {_safe(texts[1])} |"


def _span(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})" if values else "none"


def _figure(value: float | None) -> str:
    return "none" if value is None else f"{value:.2f}"


def _safe(text: str, edge: str = "") -> str:
    """Text on one line that Markdown takes literally; `edge` keeps a space at its ends."""
    plain = "".join(c if c.isspace() or (c.isprintable() and unicodedata.category(c) != "So") else "·" for c in text)
    line = " ".join(plain.split())
    before, after = (edge if line and plain != strip(plain) else "" for strip in (str.lstrip, str.rstrip))
    quoted = re.sub(r"([\\`*_\[\]|#~$])", r"\\\1", html.escape(line, quote=False))
    return before + re.sub(r"^([0-9]+(?=[.)] )|(?=[+-] ))", r"\1\\", quoted) + after  # no list of its own


def main() -> None:
    """Pick, steer, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("index", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--json", type=Path, help="also write what was measured here")
    parser.add_argument("--tokens", type=int, default=16, help="of each text")
    options = parser.parse_args()
    target, index = open_target(options.run), Index(options.index)
    saes = [sae for sae, site in target.sites.items() if site.name == f"layers.{site.layer}"]
    picked, bench = list(picks(index, saes)), Bench(target, options.tokens)
    latents: list[Latent] = []
    for sae in saes:
        latents += measured(bench, target, index, sae, [pick for pick in picked if pick[0] == sae])
    options.out.write_text(page_of(latents, bench.unsteered, options.tokens), encoding="utf-8")
    if options.json:
        plain = [{k: v for k, v in asdict(latent).items() if k != "page"} for latent in latents]
        options.json.write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
