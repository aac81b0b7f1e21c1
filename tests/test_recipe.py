"""The recipe: strict, literal, overridable, round-tripping."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from qwenscope.corpus.conversation import ROLES
from qwenscope.errors import RecipeError
from qwenscope.limits import check_cache
from qwenscope.recipe import Recipe, keys, load_recipe, packaged_recipes

# The published card's overview table: layer, kind, dictionary size, k, learning rate.
CARD = {
    "sae_delta_early": (6, "deltanet", 8192, 128, 3e-5),
    "sae_attn_early": (7, "attention", 8192, 128, 3e-5),
    "sae_delta_earlymid": (14, "deltanet", 16384, 96, 2e-5),
    "sae_attn_earlymid": (15, "attention", 16384, 96, 2e-5),
    "sae_delta_mid_pos1": (21, "deltanet", 16384, 64, 1e-5),
    "sae_delta_mid": (22, "deltanet", 16384, 64, 1e-5),
    "sae_attn_mid": (23, "attention", 16384, 64, 1e-5),
    "sae_delta_late": (34, "deltanet", 16384, 64, 8e-6),
    "sae_attn_late": (35, "attention", 16384, 64, 8e-6),
}


def test_the_published_recipe_is_the_card() -> None:
    recipe = load_recipe("qwen3.5-35b-a3b")
    points = {name: (p.layer, p.kind, p.dict_size, p.k, p.lr) for name, p in recipe.hook_points.items()}
    assert points == CARD
    assert list(points) == list(CARD)
    training = recipe.training
    assert (training.tokens, training.batch_size, training.warmup_steps) == (200_000_000, 4096, 1000)
    assert (training.resample_every_steps, recipe.checkpoint.every_tokens) == (5000, 50_000_000)
    assert (recipe.corpus.max_length, recipe.lm.model) == (2048, "Qwen/Qwen3.5-35B-A3B")
    assert [source.name for source in recipe.corpus.sources] == ["ultrachat", "wildchat", "tool_use"]


@pytest.mark.parametrize("name", packaged_recipes())
def test_packaged_recipes_round_trip(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    path = tmp_path / "again.yaml"
    path.write_text(recipe.to_yaml())
    assert load_recipe(path) == recipe
    assert load_recipe(path).fingerprint() == recipe.fingerprint()


@pytest.mark.parametrize("name", [name for name in packaged_recipes() if not name.startswith("smollm2")])
def test_recipes_of_the_published_family_hook_the_nine_places(name: str) -> None:
    recipe = load_recipe(name)
    assert {key: (p.layer, p.kind) for key, p in recipe.hook_points.items()} == {k: v[:2] for k, v in CARD.items()}


def test_the_published_recipe_leaves_out_nothing_for_what_it_is() -> None:
    activations = load_recipe("qwen3.5-35b-a3b").activations
    assert (activations.skip_first_position, activations.skip_roles, activations.skip_repeated) == (False, (), False)


@pytest.mark.parametrize(("roles", "words"), [("[narrator]", "skip_roles.0"), (str(list(ROLES)), "skip_roles")])
def test_skipped_roles_are_roles_and_not_all_of_them(roles: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        load_recipe("standin", [f"activations.skip_roles={roles}"])


def test_override_reaches_keys_lists_and_whole_trees() -> None:
    recipe = load_recipe(
        "standin",
        ["training.tokens=100_000", "corpus.sources.0.weight=2", "checkpoint.every_minutes=null", "training.eps=1e-8"],
    )
    assert recipe.training.tokens == 100_000
    assert recipe.corpus.sources[0].weight == 2
    assert recipe.checkpoint.every_minutes is None
    assert recipe.training.eps == 1e-8
    assert recipe.fingerprint() != load_recipe("standin").fingerprint()
    replaced = load_recipe("standin", ["corpus.sources=[{name: files, path: chats, weight: 1}]"])
    assert replaced.corpus.sources[0].path == Path("chats")


@pytest.mark.parametrize(
    ("override", "culprit"),
    [
        ("training.tokenz=5", "training.tokenz"),
        ("training.tokens=many", "training.tokens"),
        ("training.tokens=0", "training.tokens"),
        ("hook_points.sae_attn_mid.k=100000", "k 100000"),
        ("hook_points.sae_attn_mid.kind=mamba", "hook_points.sae_attn_mid.kind"),
        ("hook_points={}", "hook_points"),
        ("hook_points.../evil={layer: 1, dict_size: 8, k: 1, lr: 1}", "hook_points"),
        ("training.batch_size=10000000", "training.batch_size"),
        ("training.warmup_steps=1000000", "training.warmup_steps"),
        ("corpus.sources=[]", "corpus.sources"),
        ("corpus.sources=[{name: files, weight: 1}]", "files needs a path"),
        ("corpus.sources.7.weight=1", "'7'"),
        ("corpus.max_length=9000", "max_length"),
        ("training.clip_norm=.nan", "training.clip_norm"),
        ("seed.deeper=1", "seed.deeper"),
        ("nonsense", "nonsense"),
        ("training.tokens=[", "training.tokens"),
        ("training.tokens={a: 1, a: 2}", "a is given twice"),
        ("training.tokens=2024-99-99", "training.tokens"),
        ("corpus.sources.²=1", "no item of a list"),
        ("corpus.sources." + "9" * 5000 + "=1", "no item of a list"),
        ("lm.lm.lm=1", "lm.lm"),
        ("seed=\udcff", "seed"),
    ],
)
def test_a_bad_value_is_one_line_that_names_its_key(override: str, culprit: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("standin", [override])
    message = str(caught.value)
    assert culprit in message
    assert "\n" not in message


def standin_tree() -> dict[str, Any]:
    return dict(yaml.safe_load(load_recipe("standin").to_yaml()))


@pytest.mark.parametrize("text", ["", "just a string", "a: [", "- list"])
def test_a_file_that_is_no_recipe_is_named(text: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=r"broken\.yaml"):
        load_recipe(path)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("corpus:", "  sae_attn_mid: {layer: 2}\ncorpus:", "hook_points.sae_attn_mid is given twice"),
        ("seed: 42", "seed: 42\nseed: 43", r"seed is given twice, first in line 1 \(line 2\)"),
        ("seed: 42", "seed: 2024-13-45", r"'2024-13-45' is not a possible timestamp \(line 1\)"),
        ("seed: 42", "seed: 2024-01-01", "seed: Input should be a valid integer"),
        ("seed: 42", "seed: " + "9" * 5000, r"is not a possible int \(line 1\)"),
        ("seed: 42", "seed: 0x" + "f" * 5000, r"is not a possible int \(line 1\)"),
        ("seed: 42", "seed: 1.0e400", "seed: "),
        ("seed: 42", "seed: !!bool perhaps", "'perhaps' is not a possible bool"),
        ("seed: 42", "seed: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
        ("seed: 42", "seed: " + "[" * 40 + "]" * 40, "nested deeper than 32 levels"),
        ("seed: 42", "seed: " + "[" * 5000, "nested too deeply"),
        ("seed: 42", "seed: &x [*x]", "or itself"),
        ("seed: 42", f"seed: &a [{'x,' * 99}]\nx: &b [{'*a,' * 99}]\ny: [{'*b,' * 99}]", "holds more than"),
        ("seed: 42", "seed: 42\x00", "unacceptable character"),
        ("seed: 42", "seed: \"\\e[31m\"", "seed: "),
        ("lr: 0.006", "lr: 1.0e+308", r"hook_points\.sae_delta_early\.lr.*not 1e\+308"),
        ("dict_size: 256", "dict_size: 1000000000000", "dict_size.*less than"),
        ("window_tokens: 32768", "window_tokens: 1000000000000000000", "window_tokens.*less than"),
        ("cache: null", "cache: nosuch://x", "nosuch:// is no scheme"),
        ("cache: null", "cache: simplecache::nosuch://x", "nosuch:// is no scheme"),
    ],
)  # fmt: skip
def test_what_a_file_cannot_mean_is_one_line(old: str, new: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    text = load_recipe("standin").to_yaml()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(RecipeError, match=f"recipe.yaml.*{said}") as caught:
        load_recipe(path)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 600


def test_aliases_and_merged_keys_may_be_used(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    points = "hook_points:\n  a: &shape {layer: 6, dict_size: 64, k: 4, lr: 0.1}\n  b: {<<: *shape, layer: 7}\n"
    tree = {key: value for key, value in standin_tree().items() if key != "hook_points"}
    path.write_text(points + yaml.safe_dump(tree))
    assert {id: (point.layer, point.k) for id, point in load_recipe(path).hook_points.items()} == {
        "a": (6, 4),
        "b": (7, 4),
    }


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32", "latin-1"])
def test_another_encoding_is_named_and_a_byte_order_mark_passes(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    text = "# für später\n" + load_recipe("standin").to_yaml()
    path.write_bytes(text.encode(encoding))
    with pytest.raises(RecipeError, match=r"recipe\.yaml is no recipe: .*(UTF-8|unacceptable character)"):
        load_recipe(path)
    path.write_bytes(text.encode("utf-8-sig"))
    assert load_recipe(path) == load_recipe("standin")


@pytest.mark.parametrize("name", ["x" * 5000, "a\x00b", "large.yaml", "."])
def test_what_cannot_be_a_recipes_file_is_one_line(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("large.yaml").write_bytes(b"#" * (1 << 21))
    with pytest.raises(RecipeError) as caught:
        load_recipe(name)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "taken", ["config.json", "README.md", "evaluation.json", "SHA256SUMS", "Recipe.yaml", "saelens"]
)
def test_an_id_that_a_releases_own_file_has_is_refused(taken: str) -> None:
    tree = standin_tree()
    points = {taken: next(iter(tree["hook_points"].values()))}
    with pytest.raises(ValueError, match=f"{taken} is the name of a release's own file"):
        Recipe.model_validate({**tree, "hook_points": points})


def test_too_few_tokens_name_the_key_that_cures_it() -> None:
    few = "training.tokens=20000"
    with pytest.raises(RecipeError, match=r"set training\.warmup_steps to \d+ \(\d+ at most\)") as caught:
        load_recipe("standin", [few])
    fitting, most = map(int, re.findall(r"to (\d+) \((\d+) at most", str(caught.value))[0])
    for steps in (fitting, most):
        assert load_recipe("standin", [few, f"training.warmup_steps={steps}"]).training.warmup_steps == steps
    with pytest.raises(RecipeError, match="at most"):
        load_recipe("standin", [few, f"training.warmup_steps={most + 1}"])


def test_a_published_recipe_keeps_nothing_of_this_machine(tmp_path: Path) -> None:
    recipe = load_recipe(
        "standin",
        [
            f"lm.model={tmp_path}/models/tiny",
            f"corpus.sources=[{{name: files, path: {tmp_path}/chats, weight: 1}}]",
            "activations.cache='s3://me:password@store.example/windows'",
        ],
    )
    public = recipe.published()
    assert public.lm.model == "tiny"
    assert public.corpus.sources[0].path == Path("chats")
    assert "password" not in public.to_yaml()
    assert str(tmp_path) not in public.to_yaml()
    assert recipe.published().published() == public
    assert load_recipe("qwen3.5-35b-a3b").published() == load_recipe("qwen3.5-35b-a3b")


def test_a_chat_template_of_several_lines_comes_back_from_the_resolved_recipe(tmp_path: Path) -> None:
    (tmp_path / "chat.jinja").write_text("{% for m in messages %}\n{{ m.content }}\u00a0\t\n{% endfor %}\n", "utf-8")
    recipe = load_recipe("standin", [f"corpus.chat_template={tmp_path / 'chat.jinja'}"])
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml(), "utf-8")
    assert load_recipe(tmp_path / "recipe.yaml") == recipe


@pytest.mark.parametrize("name", ["/dev/zero", "hosts", '"{\\ud800"'])
def test_a_file_that_is_no_chat_template_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("hosts").write_text("127.0.0.1 localhost\n")
    with pytest.raises(RecipeError, match=r"^standin: corpus\.chat_template: "):
        load_recipe("standin", [f"corpus.chat_template={name}"])


def test_a_missing_recipe_lists_the_packaged_ones() -> None:
    with pytest.raises(RecipeError, match="standin"):
        load_recipe("no-such-recipe")


def test_ids_that_could_leave_the_folder_are_refused() -> None:
    tree = yaml.safe_load(load_recipe("standin").to_yaml())
    point = next(iter(tree["hook_points"].values()))
    for sae_id in ("../x", "/x", ".x", "a/b", "", "a" * 65, "a\x00", "a\n"):
        with pytest.raises(ValueError, match="hook_points"):
            Recipe.model_validate({**tree, "hook_points": {sae_id: point}})


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("activations.overlop=true", r"activations\.overlop; did you mean activations\.overlap\?"),
        ("training.overlap=true", r"training\.overlap; did you mean activations\.overlap\?"),
        ("hook_points.sae_attn_mid.lrr=1", r"lrr; did you mean hook_points\.<id>\.lr\?"),
        ("corpus.sources.0.wieght=1", r"wieght; did you mean corpus\.sources\.<n>\.weight\?"),
        ("trainin.tokens=3", r"unknown key trainin; did you mean training\?"),
        ("zzz=1", r"unknown key zzz; see qwenscope recipe --help-keys"),
    ],
)
def test_an_unknown_key_says_what_was_probably_meant(wrong: str, meant: str) -> None:
    with pytest.raises(RecipeError, match=meant):
        load_recipe("standin", [wrong])


def test_every_key_of_a_recipe_is_explained() -> None:
    def leaves(tree: Any, prefix: str = "") -> set[str]:
        if isinstance(tree, dict):
            place = "<id>" if prefix == "hook_points." else None
            return {leaf for key, value in tree.items() for leaf in leaves(value, f"{prefix}{place or key}.")}
        if isinstance(tree, list) and tree and isinstance(tree[0], dict):
            return leaves(tree[0], f"{prefix}<n>.")
        return {prefix.removesuffix(".")}

    explained = keys()
    written = leaves(load_recipe("standin").model_dump(mode="json"))
    assert set(explained) == written | {
        "hook_points.<id>.site",  # instead of layer
        "hook_points.<id>.target",  # of transcoders
        "lm.model_b",  # of differences
        "lm.revision_b",
    }
    assert all(meaning.endswith((".", "?")) for meaning in explained.values())


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("seed: 42", "seed: 010", r"'010' would be read as 8.*line 1"),
        ("seed: 42", "seed: 1:30", r"'1:30' would be read as 90.*line 1"),
        ("seed: 42", "seed: yes", "seed: true and false stand for no value here"),
        ("dict_size: 256", "dict_size: true", "dict_size: true and false"),
        ("lr: 0.006", "lr: on", "lr: true and false"),
        ("layer: 6", "layer: true", "layer: true and false"),
        ("layer: 6", "layer: ' 6'", "layer ' 6' is no layer's number"),
        ("layer: 6", "layer: '+6'", "layer '\\+6' is no layer's number"),
        ("cache: null", "cache: ''", "cache: names no folder"),
        ("cache: null", "cache: '  /'", "cache: names no folder"),
        ("cache: null", 'cache: "a\\0b"', "cache: holds a character that cannot be shown"),
        ("model: standin", 'model: "\\e[31m"', "lm.model: holds a character that cannot be shown"),
    ],
)
def test_what_would_be_read_as_something_else_is_refused(old: str, new: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    text = load_recipe("standin").to_yaml()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(RecipeError, match=f"recipe.yaml.*{said}"):
        load_recipe(path)


def test_a_quoted_layer_is_the_layer(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(load_recipe("standin").to_yaml().replace("layer: 6", "layer: '6'", 1))
    assert load_recipe(path) == load_recipe("standin")


def test_a_cache_whose_library_is_missing_is_refused_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(scheme: str) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(sys.modules["fsspec.registry"], "get_filesystem_class", missing)
    recipe = load_recipe("standin", ["activations.cache=simplecache::s3://bucket/x"])  # a run of another machine's
    with pytest.raises(RecipeError, match=r"activations.cache: \w+:// cannot be used here \(Install s3fs"):
        check_cache(recipe)
