"""Labels for the latents of an index, with scores: chosen, asked for several at a time, stored as they come.

    index = Index("runs/demo-index")
    for record in explain(index, OfflineClient(), chosen(index, "top:100")):
        print(record["label"], record["detection"])

What is asked and how it is scored stands in `questions.py`. Whoever is killed goes on where they stopped: answers are
kept in `.explain` inside the index, a file for each client, until all are done.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from qwenscope.errors import FormatError
from qwenscope.features.clients import Client, OfflineClient, Remembering, Stopping
from qwenscope.features.questions import ask_about
from qwenscope.features.store import Index, explained_by, explaining
from qwenscope.files import disk_errors_named
from qwenscope.training.lock import run_lock

WORK = ".explain"
SAMPLED = 32
"""Latents whose questions are written to foresee what all of them cost."""
CHARACTERS_PER_TOKEN = 4
_RANGE = re.compile(r"(\d+)(?:-(\d+))?")
_TOP = re.compile(r"top:(\d+)")

Place = tuple[str, int]
"""(SAE id, latent)."""
Result = TypeVar("Result")


def chosen(index: Index, latents: str = "all", saes: Sequence[str] = ()) -> list[Place]:
    """The latents that `all`, `0-99,120` or `top:500` (those that fire most often) names, of each SAE.

    Those that never fired are left out: there is nothing to label.

    Args:
        index: an index.
        latents: which; a number beyond an SAE's last is an error.
        saes: of which SAEs; none means all.

    Raises:
        FormatError: not such words, or no such SAE or latent.
    """
    found: list[Place] = []
    for sae_id in dict.fromkeys(saes) or index.saes:
        index.check(sae_id, 0)
        density = index.table(sae_id)["density"]
        alive = [latent for latent, share in enumerate(density) if share > 0]
        if top := _TOP.fullmatch(latents):
            numbers = sorted(sorted(alive, key=lambda latent: (-density[latent], latent))[: int(top[1])])
        elif latents == "all":
            numbers = alive
        else:
            numbers = [latent for latent in _numbers(latents, index, sae_id) if density[latent] > 0]
        found += [(sae_id, latent) for latent in numbers]
    return found


def _numbers(text: str, index: Index, sae_id: str) -> list[int]:
    numbers = dict[int, None]()
    for part in text.split(","):
        if not (match := _RANGE.fullmatch(part.strip())):
            raise FormatError(f"--latents {text}: write all, numbers and ranges such as 0-99,120, or top:500")
        first, last = int(match[1]), int(match[2] or match[1])
        index.check(sae_id, first)
        index.check(sae_id, last)
        if last < first:
            raise FormatError(f"--latents {text}: {part.strip()} is no range, its end comes first")
        numbers |= dict.fromkeys(range(first, last + 1))
    return list(numbers)


@dataclass(frozen=True)
class Cost:
    """What labels will take, as far as it can be said before."""

    latents: int
    requests: int
    tokens_in: int
    """About: characters over CHARACTERS_PER_TOKEN."""
    tokens_out: int
    """At most."""


def waiting(index: Index, client: Client, latents: Iterable[Place]) -> list[Place]:
    """Those of `latents` that `client` has not labelled and scored already; the rule replaces no one's labels."""
    done = explained_by(index, None if client.name == OfflineClient.name else client.name)
    return [place for place in latents if place not in done]


def foresee(index: Index, latents: Sequence[Place]) -> Cost:
    """What labels for `latents` will cost, from the questions about some of them."""
    step = max(1, len(latents) // SAMPLED)
    sample, counter = latents[::step][:SAMPLED], _Counter()
    for sae_id, latent in sample:
        ask_about(counter, index.latent(sae_id, latent))
    each = len(latents) / max(1, len(sample))
    figures = (counter.requests, counter.characters / CHARACTERS_PER_TOKEN, counter.longest)
    return Cost(len(latents), *(round(figure * each) for figure in figures))


class _Counter:
    """A client that only counts what it is asked."""

    name = "nobody"

    def __init__(self) -> None:
        self.requests = self.characters = self.longest = 0

    def complete(self, system: str, user: str, max_tokens: int) -> str:
        self.requests += 1
        self.characters += len(system) + len(user)
        self.longest += max_tokens
        return "names of cities in questions about travel"  # as long as labels are


def explain(
    index: Index,
    client: Client,
    latents: Iterable[Place],
    *,
    concurrency: int = 1,
    on_progress: Callable[[str, int, int], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[dict[str, Any]]:
    """Label latents, score the labels, and store both in the index, where search finds them; each as it is done.

    What `client` has labelled already is passed over. After a stop or a kill the same call goes on, and asks nothing
    again that was answered: whatever ends it early, answers under way are awaited and kept. Only a SIGKILL loses those,
    at most `concurrency`.

    Args:
        index: an index.
        client: who writes.
        latents: see `chosen`.
        concurrency: latents that are asked about at the same time; above 1 only for clients that threads may share.
        on_progress: called with (phase, done, total).
        stop: looked at before each question; once true, the records end early.

    Yields:
        Records {"sae", "latent", "label", "client", "detection", "fuzzing", "unparsed", "samples"}, in the order in
        which they are done. A score is None where the index has too few examples or the answer could not be parsed;
        `unparsed` names the answers that could not: a record whose `label` is among them is not stored. `samples` are
        delphi's: {"str_tokens", "activations", "distance", "activating", "prediction", "probability", "correct"}, the
        last three None where there was no answer to parse.

    Raises:
        FormatError: no such SAE or latent.
        HubError: the client's endpoint fails, in spite of further tries.
        LockError: another process explains this index.
    """
    places = waiting(index, client, latents)
    for sae_id, latent in places:
        index.check(sae_id, latent)
    with _remembering(index, client, stop) as asked, explaining(index) as add:

        def ask(place: Place) -> dict[str, Any]:
            found = index.latent(*place)
            return {"sae": place[0], "latent": place[1], **ask_about(asked, found)}

        for done, record in enumerate(_concurrently(ask, places, concurrency, asked.end), start=1):
            if "label" not in record["unparsed"]:
                add(record["sae"], record["latent"], {k: v for k, v in record.items() if k not in ("sae", "latent")})
            if on_progress is not None:
                on_progress("explaining", done, len(places))
            yield record


@contextmanager
def _remembering(index: Index, client: Client, stop: Callable[[], bool]) -> Iterator[Remembering]:
    """`client` with what it answered before, in a file of its own until the block ends by itself; `Stopping` ends it
    early."""
    work = index.folder / WORK
    answers = work / f"{hashlib.sha256(client.name.encode()).hexdigest()[:16]}.jsonl"
    with disk_errors_named(index.folder):
        work.mkdir(exist_ok=True)
        with run_lock(work), closing(Remembering(client, answers, stop)) as asked, suppress(Stopping):
            yield asked
            answers.unlink()
            if not list(work.glob("*.jsonl")):
                shutil.rmtree(work)


def _concurrently(
    work: Callable[[Place], Result], places: Iterable[Place], limit: int, end: Callable[[], None]
) -> Iterator[Result]:
    """`work` on each of `places`, `limit` at a time, in the order in which they end; `end` ends what is under way."""
    pool = ThreadPoolExecutor(limit, "explain")
    running: set[Future[Result]] = set()
    try:
        for place in places:
            if len(running) >= 2 * limit:  # enough that none waits for the next one to be handed out
                done, running = wait(running, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
            running.add(pool.submit(work, place))
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in done)
    except BaseException:
        end()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
