"""The one way to open SAEs for use: a run, a release, a foreign suite or a Hub repository becomes a `Target`.

    target = open_target("runs/demo")
    lm = target.language_model()                                    # loaded here, at the revision of the SAEs
    with target.conversations(lm.tokenizer) as held_out: ...        # that no SAE was trained on

A suite that holds no recipe (weights of another library, a repository in the published layout) gets one: its
SAEs' configurations name language model and layer, or it is the published suite.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from qwenscope.checksums import CHECKSUMS_FILE, verify_folder
from qwenscope.corpus.chat import with_template
from qwenscope.corpus.conversation import Conversation
from qwenscope.corpus.stream import CorpusStream
from qwenscope.errors import CorpusError, FormatError, HubError, ModelError
from qwenscope.files import read_object
from qwenscope.hub import check_repo_id, download
from qwenscope.lm.load import check_hook_points, load_language_model
from qwenscope.lm.model import LanguageModel
from qwenscope.lm.sites import Site, hooked_sites, target_sites
from qwenscope.recipe import HookPoint, LMRecipe, Recipe, SourceRecipe, load_recipe
from qwenscope.sae.files import CONFIG_FILE, WEIGHTS_FILE
from qwenscope.sae.loading import iterate_suite
from qwenscope.sae.sae import SAE

SPLITS = ("chat", "tool_use", "text")
PUBLISHED = "qwen3.5-35b-a3b"
PATIENCE = 10  # times a split's tokens that are read of an endless stream before what is rare there is given up
_RECIPE, _RUN, _EVALUATION = "recipe.yaml", "run.json", "evaluation.json"
_FETCHED = (CONFIG_FILE, WEIGHTS_FILE, CHECKSUMS_FILE, _RECIPE, _RUN, _EVALUATION)


@dataclass(frozen=True)
class Target:
    """SAEs, and what they were made with."""

    name: str
    """What was opened, as it was given."""
    folder: Path
    """Where it lies; for a repository, in the Hub's cache, which is not to be written to."""
    recipe: Recipe
    saes: dict[str, SAE]
    revisions: Mapping[str, Any]
    """Of language model and corpus, where a run resolved them."""
    own_recipe: bool = True
    """The recipe is the one that the SAEs were trained by."""
    on_hub: bool = False

    @property
    def sites(self) -> dict[str, Site]:
        """Where each SAE reads."""
        return hooked_sites(self.recipe.hook_points)

    @property
    def targets(self) -> dict[str, Site]:
        """Where the rows are that each SAE reconstructs: where it reads, but for a transcoder."""
        return target_sites(self.recipe.hook_points)

    def language_model(self, *, truncated: bool = False) -> LanguageModel:
        """Load the language model that the SAEs were made for, with its LM head; the SAEs move to its device.

        Args:
            truncated: only as far as the last hooked layer.

        Raises:
            ModelError: it cannot be loaded, or does not have the hook points.
            FormatError: an SAE does not fit its width.
        """
        recipe = self.recipe.lm.pinned(self.revisions)
        lm = load_language_model(recipe, last_layer=self.recipe.last_layer if truncated else None, lm_head=True)
        lm.tokenizer = with_template(lm.tokenizer, self.recipe.corpus.chat_template)
        check_hook_points(lm, self.recipe.hook_points)
        check_widths(self.saes, self.sites, lm, None if truncated else self.targets)
        for sae in self.saes.values():
            sae.to(lm.device).eval()
        return lm

    @contextmanager
    def conversations(self, tokenizer: PreTrainedTokenizerBase, data: Path | None = None) -> Iterator[CorpusStream]:
        """The conversations of `data`, or those held out from training; the recipe's privacy filter applies to both.

        Args:
            tokenizer: of the language model.
            data: .parquet, .jsonl or .jsonl.gz file, or a folder of them.

        Raises:
            CorpusError: a source is missing or damaged, or nobody knows what was held out.
        """
        corpus, revisions = self.recipe.corpus, self.revisions.get("corpus")
        if data is not None:
            # All of the file: a conversation counts as held out if its hash falls in the held-out share.
            sources = (SourceRecipe(name="files", weight=1.0, path=data),)
            corpus, revisions = corpus.model_copy(update={"sources": sources, "held_out_share": 1.0}), None
        elif not self.own_recipe:
            raise CorpusError(f"{self.name} does not say what its SAEs were trained on; name conversations with --data")
        stream = CorpusStream(corpus, tokenizer, seed=self.recipe.seed, held_out=True, revisions=revisions)
        try:
            yield stream
        finally:
            stream.close()

    def splits(
        self, tokenizer: PreTrainedTokenizerBase, tokens: int, data: Path | None = None
    ) -> dict[str, list[Conversation]]:
        """`conversations` of each split that has any, `tokens` tokens at most (the last one is cut to fit).

        Raises:
            CorpusError: as `conversations`, or there are none.
        """
        with self.conversations(tokenizer, data) as stream:
            splits = fill_splits(stream, tokens, stream.splits, PATIENCE * tokens if data is None else None)
        if not splits:
            raise self.nothing_to_read(data)
        return splits

    def nothing_to_read(self, data: Path | None) -> CorpusError:
        """The error to raise where `conversations` gives none."""
        origin = data if data is not None else "the recipe's held-out conversations"
        return CorpusError(f"{origin}: no conversation to read; give --data, or raise corpus.held_out_share")


def open_target(target: Path | str, *, revision: str | None = None, like: Target | None = None) -> Target:
    """Open a folder or repository of SAEs; everything in it is verified first.

    Args:
        target: folder of a complete run, of a release, or of imported SAEs; `org/name` on the Hub.
        revision: commit, branch or tag on the Hub; meaningless for a folder.
        like: whose language model and held-out conversations a suite takes that holds no recipe.

    Raises:
        FormatError: it is none of these, a run that is not complete, or an SAE is missing, damaged, does not fit its
            recipe or does not say where it belongs.
        HubError: there is no such folder or repository, or the Hub stays out of reach.
    """
    folder = Path(target)
    on_hub = not folder.is_dir()
    if on_hub:
        folder = _fetch(str(target), revision)
    elif revision is not None:
        raise FormatError(f"{target} is a local folder, which has no revision {revision!r}; leave it out")
    elif (folder / CHECKSUMS_FILE).is_file():
        verify_folder(folder)
    is_run = (folder / "status.json").is_file() or (folder / "saes").is_dir()
    if is_run and not (folder / "saes").is_dir():
        raise FormatError(f"{target} is a run without saes/: it is not complete; finish it with `train --resume`")
    root = folder / "saes" if is_run else folder
    if not (folder / _RECIPE).is_file():
        if is_run:
            raise FormatError(f"{target} holds no {_RECIPE}; give a run or a release made by qwenscope")
        saes = dict(iterate_suite(root))
        recipe, published = _recipe_of(saes, str(target), like)
        return Target(str(target), folder, recipe, saes, like.revisions if like else {}, published, on_hub)
    recipe = load_recipe(folder / _RECIPE)
    saes = {sae_id: SAE.from_pretrained(root, sae_id) for sae_id in recipe.hook_points}
    for sae_id, point in recipe.hook_points.items():
        check_size(root / sae_id, saes[sae_id], point)
    revisions = read_object(folder / _RUN).get("revisions") if (folder / _RUN).is_file() else None
    return Target(str(target), folder, recipe, saes, revisions or {}, on_hub=on_hub)


def as_target(target: Path | str | Target) -> Target:
    """What is open already, or what `open_target` opens under this name."""
    return target if isinstance(target, Target) else open_target(target)


def check_size(where: Path, sae: SAE, point: HookPoint) -> None:
    """FormatError unless the SAE at `where` has the size and the activation that its recipe gives it."""
    found = {"dict_size": sae.dict_size, "k": sae.k, "activation": sae.activation.name}
    for key, value in found.items():
        if value != getattr(point, key):
            raise FormatError(f"{where} has {key} {value}; recipe.yaml says {getattr(point, key)}")


def check_widths(
    saes: Mapping[str, SAE], sites: Mapping[str, Site], lm: LanguageModel, targets: Mapping[str, Site] | None = None
) -> None:
    """FormatError naming the first SAE that is not as wide as the rows at its site, or at its target."""
    for sae_id, sae in ((sae_id, saes[sae_id]) for sae_id in sites if sae_id in saes):
        if sae.hidden_dim != (width := lm.width(sites[sae_id])):
            raise FormatError(f"{sae_id} has hidden_dim {sae.hidden_dim}; {lm.name} has {width} at {sites[sae_id]}")
        if targets is not None and sae.target_dim != (width := lm.width(targets[sae_id])):
            raise FormatError(f"{sae_id} has target_dim {sae.target_dim}; {lm.name} has {width} at {targets[sae_id]}")


def sites_of_suite(suite: Mapping[str, SAE]) -> dict[str, Site]:
    """Where each SAE reads: `site` or `layer` in its configuration, or the published suite's layer for its id.

    Raises:
        FormatError: neither says; names the SAE.
    """
    published = load_recipe(PUBLISHED).hook_points
    sites = {}
    for sae_id, sae in suite.items():
        where = sae.config.get("site", sae.config.get("layer"))
        if where is None and sae_id in published:
            where = published[sae_id].site
        if not isinstance(where, int | str) or isinstance(where, bool):
            raise FormatError(f"{sae_id}/config.json does not say its layer; add the key layer")
        try:
            sites[sae_id] = Site.of(where)
        except ModelError as error:
            raise FormatError(f"{sae_id}: {error}") from None
    return sites


def fill_splits(
    stream: Iterable[Conversation], tokens: int, expected: Sequence[str] = SPLITS, limit: int | None = None
) -> dict[str, list[Conversation]]:
    """Deal conversations into splits until each `expected` one has `tokens` tokens, the stream ends, or `limit` tokens
    were read.
    """
    splits: dict[str, list[Conversation]] = {split: [] for split in SPLITS}
    room = dict.fromkeys(expected, tokens)
    read = 0
    for conversation in stream:
        read += len(conversation.token_ids)
        if left := room[conversation.split]:
            length = min(left, len(conversation.token_ids))
            room[conversation.split] -= length
            splits[conversation.split].append(_cut(conversation, length))
        if not any(room.values()) or (limit is not None and read >= limit):
            break
    return {split: conversations for split, conversations in splits.items() if conversations}


def _cut(conversation: Conversation, length: int) -> Conversation:
    if length == len(conversation.token_ids):
        return conversation
    token_ids, roles = conversation.token_ids[:length], conversation.roles[:length]
    return dataclasses.replace(conversation, token_ids=token_ids, roles=roles, truncated=True)


def _fetch(repo: str, revision: str | None) -> Path:
    """The part of a repository that is opened, in the Hub's cache."""
    try:
        return download(check_repo_id(repo), revision, [*_FETCHED, f"*/{CONFIG_FILE}", f"*/{WEIGHTS_FILE}"])
    except HubError as error:
        raise HubError(f"there is no folder {repo}, and on the Hub: {error}") from None


def _hook_point(sae: SAE, site: Site) -> HookPoint:
    """No one trains by it, so that its learning rate is of no account."""
    sizes: dict[str, Any] = {"dict_size": sae.dict_size, "k": sae.k, "activation": sae.activation.name}
    return HookPoint.model_validate({"site": site.name, "target": sae.config.get("target"), **sizes, "lr": 1.0})


def _recipe_of(saes: Mapping[str, SAE], shown: str, like: Target | None) -> tuple[Recipe, bool]:
    """A recipe for a suite that holds none, and whether it tells what the SAEs were trained on."""
    published = load_recipe(PUBLISHED)
    points = published.hook_points
    is_published = all(
        sae_id in points and (sae.dict_size, sae.k) == (points[sae_id].dict_size, points[sae_id].k)
        for sae_id, sae in saes.items()
    )
    hooked = {sae_id: _hook_point(saes[sae_id], site) for sae_id, site in sites_of_suite(saes).items()}
    if like is not None:
        return like.recipe.model_copy(update={"hook_points": hooked}), like.own_recipe
    models = {str(sae.config["model"]) for sae in saes.values() if "model" in sae.config}
    second = {sae.config.get("model_b") for sae in saes.values() if "model" in sae.config} or {None}
    if is_published and not models - {published.lm.model}:
        return published.model_copy(update={"hook_points": {sae_id: points[sae_id] for sae_id in saes}}), True
    if len(second) != 1:
        raise FormatError(f"{shown}: its SAEs' config.json name unlike second models under model_b; open them apart")
    if len(models) != 1:
        named = " and ".join(sorted(models)) or "none"
        raise FormatError(f"{shown}: its SAEs' config.json name no one language model ({named}); add the key model")
    return published.model_copy(
        update={"lm": LMRecipe(model=models.pop(), model_b=second.pop()), "hook_points": hooked}
    ), False
