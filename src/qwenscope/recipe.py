"""The recipe: one frozen tree of everything a run depends on, read from YAML, strict about every key.

The string under each field is its documentation and what `qwenscope recipe --help-keys` prints. An unknown key (with
what was probably meant), an impossible value or a missing file is a RecipeError of one line that names the key.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from qwenscope.errors import RecipeError, reason
from qwenscope.files import read_at_most
from qwenscope.recipe_keys import first_problem, keys_of
from qwenscope.recipe_nodes import MOST, Count, Node, Positive, Role, Share, file_systems, schemes_of
from qwenscope.recipe_nodes import HookPoint as HookPoint
from qwenscope.recipe_nodes import LMRecipe as LMRecipe
from qwenscope.strict_yaml import YamlError, read_yaml, set_value

_SAE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_RELEASE_NAMES = (
    *("readme.md", "config.json", "evaluation.json", "evaluation.parquet", "metrics.parquet", "recipe.yaml"),
    *("run.json", "privacy_report.json", "notebook.ipynb", "quality.svg", "sha256sums", "saelens", "license"),
)
"""What else stands in a release beside the SAEs' folders; no id may be one of them, upper or lower case."""


class SourceRecipe(Node):
    """One source of conversations."""

    name: Literal["ultrachat", "wildchat", "tool_use", "chat", "files"]
    """Which schema: ultrachat_200k, WildChat-1M, tool-use or plain conversations (generated unless a path or a repo is
    given), or files (of a path or a Hub dataset) with rows of `messages` or `text`."""
    weight: Annotated[float, Field(ge=1e-9, le=1e9)]
    """Share of tokens, relative to the other sources' weights."""
    path: Path | None = None
    """Local .parquet, .jsonl or .jsonl.gz file, or a folder of them, instead of the Hub."""
    repo: str | None = None
    """Hub dataset instead of the source's own."""
    revision: str | None = None
    """Commit or tag of the Hub dataset; resolved once and recorded in the run."""
    config: str | None = None
    """Configuration of the Hub dataset, as sample-10BT of fineweb; null takes its default."""
    text: str | None = None
    """Column that holds documents; with neither this nor messages, rows have `messages` or else `text`."""
    messages: str | None = None
    """Column that holds conversations."""
    tools: str | None = None
    """Column that holds the tools of conversations; null is `tools`."""

    @property
    def generated(self) -> bool:
        """Whether the built-in generator writes its conversations."""
        return self.name in ("tool_use", "chat") and self.path is None and self.repo is None

    @property
    def splits(self) -> tuple[str, ...]:
        """What its rows may be: of `text`, `chat` and `tool_use`."""
        if self.generated or self.name == "wildchat":
            return (self.name,) if self.generated else ("chat",)
        documents = self.name == "files" and (self.text is not None or self.messages is None)
        conversations = self.text is None or self.messages is not None
        return ("text",) * documents + ("chat", "tool_use") * conversations

    @model_validator(mode="after")
    def _files_need_a_path(self) -> SourceRecipe:
        if self.name == "files" and self.path is None and self.repo is None:
            raise ValueError("a source named files needs a path or a repo")
        if self.path is not None and (self.repo or self.revision or self.config):
            raise ValueError("path and repo/revision/config exclude each other")
        if self.name != "files" and (self.text or self.messages or self.tools):
            raise ValueError("text, messages and tools name the columns of a source named files")
        if self.generated and (self.revision or self.config):
            raise ValueError("revision and config belong to a Hub dataset; name it with repo")
        return self


class PrivacyRecipe(Node):
    """The GDPR-minded filter; every rule is on unless switched off. It makes no legal claim."""

    drop_countries: bool = True
    """Drop WildChat rows in which the row or any turn comes from the EU, EEA, UK or Switzerland."""
    drop_unknown_country: bool = True
    """Drop WildChat rows without a country."""
    drop_redacted: bool = True
    """Drop WildChat rows that were redacted upstream."""
    drop_toxic: bool = True
    """Drop WildChat rows flagged as toxic."""
    scrub: bool = True
    """Replace structured identifiers in WildChat (docs/corpus.md lists their kinds) by typed placeholders."""


class CorpusRecipe(Node):
    """Conversations and documents: sources, filter, length, batches."""

    texts = ("chat_template",)

    sources: Annotated[tuple[SourceRecipe, ...], Field(min_length=1)]
    """Where conversations and documents come from; weights are shares of tokens."""
    privacy: PrivacyRecipe = PrivacyRecipe()
    """The filter's rules."""
    max_length: Annotated[int, Field(ge=2, le=MOST)] = 2048
    """Tokens per conversation or document; longer conversations are truncated and counted."""
    long_documents: Literal["truncate", "split"] = "truncate"
    """What becomes of longer documents: truncated and counted, or split into rows."""
    chat_template: str | None = None
    """File with the Jinja template that renders conversations, instead of the tokenizer's own; a resolved recipe holds
    its text."""
    batch_tokens: Positive = 32_768
    """Token budget of one language-model batch, padding included."""
    held_out_share: Annotated[float, Field(gt=0, lt=1)] = 0.01
    """Share of conversations kept for evaluation (by hash) where a source has no test split."""
    workers: Count = 0
    """Processes that render and tokenise ahead of the model; 0 does it in the main process."""

    @field_validator("chat_template")
    @classmethod
    def _the_templates_text(cls, given: str | None) -> str | None:
        if given is None or ("{" in given and given.encode()):
            return given
        try:
            text = read_at_most(Path(given), 1 << 20).decode("utf-8-sig")
        except (OSError, ValueError) as error:
            raise ValueError(f"the file cannot be read: {reason(error)}") from None
        if "{" not in text:
            raise ValueError("the file is no Jinja template: it holds no {")
        return text

    @model_validator(mode="after")
    def _a_conversation_fits_a_batch(self) -> CorpusRecipe:
        if self.batch_tokens < self.max_length:
            raise ValueError(f"batch_tokens {self.batch_tokens} is below max_length {self.max_length}")
        return self


class ActivationsRecipe(Node):
    """Windows of residual-stream rows, and which rows are left out."""

    window_tokens: Positive = 131_072
    """Tokens harvested, shuffled and consumed together."""
    outlier_factor: Annotated[float, Field(gt=1)] | None = 10.0
    """Leave out rows whose norm exceeds this multiple of the window's median norm; null keeps all."""
    skip_first_position: bool = False
    """Leave out each conversation's first token."""
    skip_roles: Annotated[tuple[Role, ...], Field(max_length=len(get_args(Role)) - 1)] = ()
    """Leave out tokens of these roles; template is what the chat template writes around the turns, and turns of its
    own."""
    skip_repeated: bool = False
    """Leave out tokens up to which all is as in an earlier conversation of the window: a shared system turn, say."""
    cache: str | None = None
    """Folder, or fsspec address such as s3://bucket/path, that keeps harvested windows; null harvests afresh."""
    overlap: bool = True
    """Harvest the next window while SAEs train on the current one; false holds one window in memory instead of two."""

    @field_validator("cache")
    @classmethod
    def _a_known_place(cls, cache: str | None) -> str | None:
        if cache is None:
            return None
        if not cache.strip(" /"):
            raise ValueError("names no folder; null keeps no windows")
        for scheme in schemes_of(cache):
            if scheme not in file_systems().available_protocols():
                raise ValueError(
                    f"{scheme}:// is no scheme that fsspec knows; use a folder, or s3://, gs://, az:// ..."
                )
        return cache


class TrainingRecipe(Node):
    """The SAE trainers' common settings; sizes and learning rates stand with the hook points."""

    tokens: Positive
    """Residual-stream rows each SAE is trained on, each used once."""
    batch_size: Positive = 4096
    """Rows per optimiser step."""
    warmup_steps: Count = 1000
    """Steps of linear warmup."""
    decay_share: Share = 0.2
    """Last share of the run in which the learning rate falls linearly to zero."""
    kl_share: Share = 0.0
    """Last share of the tokens, seen inside the model, where KL to its own predictions is trained too; 0 never."""
    normalise: bool = False
    """Centre and scale rows by constants measured once; folded into the saved weights."""
    calibration_tokens: Positive = 50_000
    """First rows from which mean, scale and the encoder's initial scale are measured."""
    initial_decoder: Literal["random", "rows", "residuals"] = "random"
    """Where latents first point: at random, at calibration rows less their mean, or at what earlier ones leave."""
    aux_coefficient: Annotated[float, Field(ge=0, le=1e6)] = 1 / 32
    """Weight of the auxiliary dead-latent loss; 0 turns it off."""
    aux_k: Positive | None = None
    """Dead latents that reconstruct the residual; null is half the hidden dimension."""
    dead_after_tokens: Positive | None = None
    """Tokens without a positive activation after which a latent is dead; null is 2 % of the run."""
    resample_every_steps: Count = 0
    """Steps between resamplings of dead latents; 0 never resamples."""
    precision: Literal["auto", "exact", "fp32", "bf16"] = "auto"
    """Arithmetic of the step: exact selects in bf16 and certifies in fp32; auto decides by device."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """Adam's decay rates."""
    eps: Annotated[float, Field(gt=0, le=1)] = 6.25e-10
    """Adam's epsilon (Gao et al. 2024)."""
    cautious: bool = False
    """Leave out of each step on encoder and decoder what the batch's own gradient contradicts (Liang et al. 2024)."""
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Gradient norm above which the gradient is scaled down; null never clips."""
    moments: Literal["float32", "bfloat16"] = "float32"
    """Storage of Adam's moments."""
    prefixes: tuple[Positive, ...] = ()
    """Latents at which nested dictionaries end whose losses are added to the whole one's (Matryoshka); rising."""
    latents_per_rank: Annotated[int, Field(ge=64, le=MOST)] | None = None
    """Under torchrun, an SAE with more latents is spread over as many ranks as it takes; null never spreads one."""

    @property
    def shuffled_tokens(self) -> int:
        """Those from shuffled windows, before the closing phase of `kl_share`."""
        return self.tokens - round(self.kl_share * self.tokens)

    @property
    def closes(self) -> bool:
        """Whether there is a closing phase."""
        return self.shuffled_tokens < self.tokens


class CheckpointRecipe(Node):
    """When a run is saved, and how much is kept."""

    every_tokens: Positive = 50_000_000
    """Tokens between checkpoints."""
    every_minutes: Annotated[float, Field(gt=0)] | None = 10.0
    """Minutes between checkpoints, whichever comes first; null saves by tokens only."""
    keep: Positive = 3
    """Newest checkpoints kept."""
    snapshot_every_tokens: Positive | None = None
    """Checkpoints at these multiples are kept for good; null keeps none."""


class EvaluationRecipe(Node):
    """How a trained suite is measured."""

    tokens: Positive = 200_000
    """Held-out tokens per split at most."""


class TelemetryRecipe(Node):
    """Where metrics go besides metrics.jsonl."""

    log_every_steps: Positive = 10
    """Steps between lines of metrics."""
    sinks: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Optional further loggers, each an extra of the package."""


class Recipe(Node):
    """Everything a run depends on."""

    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] = 42
    """Governs initialisation, order, shuffling and resampling."""
    lm: LMRecipe
    hook_points: Annotated[dict[str, HookPoint], Field(min_length=1)]
    """One SAE each, by id; the id names its folder."""
    corpus: CorpusRecipe
    activations: ActivationsRecipe = ActivationsRecipe()
    training: TrainingRecipe
    checkpoint: CheckpointRecipe = CheckpointRecipe()
    evaluation: EvaluationRecipe = EvaluationRecipe()
    telemetry: TelemetryRecipe = TelemetryRecipe()

    @field_validator("hook_points")
    @classmethod
    def _ids_name_folders(cls, hook_points: dict[str, HookPoint]) -> dict[str, HookPoint]:
        for sae_id in hook_points:
            if not _SAE_ID.fullmatch(sae_id):
                raise ValueError(f"{sae_id!r} is not an SAE id: letters, digits, '_', '-' and '.', at most 64")
            if sae_id.lower() in _RELEASE_NAMES:
                raise ValueError(f"{sae_id} is the name of a release's own file; choose another id")
        return hook_points

    @model_validator(mode="after")
    def _sizes_fit_together(self) -> Recipe:
        training = self.training
        if training.batch_size > self.activations.window_tokens:
            raise ValueError(
                f"training.batch_size {training.batch_size} exceeds "
                f"activations.window_tokens {self.activations.window_tokens}"
            )
        warmup = training.warmup_steps * training.batch_size
        if warmup + training.decay_share * training.tokens > training.tokens:
            fitting = int((1 - training.decay_share) * training.tokens) // training.batch_size
            raise ValueError(
                f"training.warmup_steps {training.warmup_steps} x batch_size {training.batch_size} = {warmup:,} tokens "
                f"and decay_share {training.decay_share} do not fit in training.tokens {training.tokens:,}; set "
                f"training.warmup_steps to {fitting // 4} ({fitting} at most)"
            )
        if list(training.prefixes) != sorted(set(training.prefixes)):
            raise ValueError(f"training.prefixes {list(training.prefixes)} must rise")
        for sae_id, point in self.hook_points.items():
            if training.prefixes and training.prefixes[-1] > point.dict_size:
                raise ValueError(
                    f"training.prefixes {training.prefixes[-1]} exceeds the dict_size {point.dict_size} of {sae_id}"
                )
        if training.prefixes and training.latents_per_rank is not None:
            raise ValueError("training.prefixes needs whole SAEs; leave training.latents_per_rank out")
        return self

    @model_validator(mode="after")
    def _differences_have_two_models(self) -> Recipe:
        differences = [sae_id for sae_id, point in self.hook_points.items() if point.is_difference]
        if differences and self.lm.model_b is None:
            raise ValueError(
                f"hook_points.{differences[0]} reads a difference of two models; name the other: lm.model_b"
            )
        if self.lm.model_b is not None and not differences:
            raise ValueError("no hook point reads lm.model_b; give one a site such as layers.22.diff, or leave it out")
        return self

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the hooked sites, each once, by layer."""
        return tuple(dict.fromkeys(p.site for p in sorted(self.hook_points.values(), key=lambda p: p.layer)))

    @property
    def last_layer(self) -> int:
        """The last layer that any of them needs."""
        return max(point.layer for point in self.hook_points.values())

    def to_yaml(self) -> str:
        """The whole tree with every default written out; `load_recipe` reads it back to an equal recipe."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)

    def published(self) -> Recipe:
        """The recipe without what belongs to this machine: folders and files by their last part, no cache."""
        sources = tuple(
            source if source.path is None else source.model_copy(update={"path": Path(source.path.name)})
            for source in self.corpus.sources
        )
        return self.model_copy(
            update={
                "lm": self.lm.published(),
                "corpus": self.corpus.model_copy(update={"sources": sources}),
                "activations": self.activations.model_copy(update={"cache": None}),
            }
        )

    def fingerprint(self) -> str:
        """16 hex digits that change with every value in the tree."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def packaged_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    folder = files("qwenscope") / "recipes"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_recipe(name_or_path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a packaged recipe by name or a YAML file, and apply `a.b=value` overrides (values are YAML).

    Raises:
        RecipeError: no such recipe, not YAML, an unknown key, an impossible value; the message names the key.
    """
    tree, origin = _read(str(name_or_path))
    for override in overrides:
        try:
            set_value(tree, override)
        except YamlError as error:
            raise RecipeError(f"--set {error}") from None
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise RecipeError(f"{origin}: {first_problem(error, Recipe)}") from None


def _read(name: str) -> tuple[dict[str, Any], str]:
    path = Path(name)
    try:
        if (packaged := name.removesuffix(".yaml")) in packaged_recipes() and (name == packaged or not path.is_file()):
            name, path = packaged, Path(str(files("qwenscope") / "recipes" / f"{packaged}.yaml"))
        elif not path.is_file():
            raise RecipeError(f"{name} is neither a file nor a packaged recipe ({', '.join(packaged_recipes())})")
        tree = read_yaml(path)
    except (YamlError, OSError) as error:
        raise RecipeError(f"{name} is no recipe: {reason(error)}") from None
    if not isinstance(tree, dict):
        raise RecipeError(f"{name} holds no keys; see `qwenscope recipe standin` for a whole one")
    return tree, name


def keys() -> dict[str, str]:
    """Every key of a recipe with its meaning; <id> stands for an SAE's id, <n> for a place in a list."""
    return dict(keys_of(Recipe))
