"""One corpus, two checkpoints: the same one twice gives no finding, one fine-tuned behavior is found where it shows."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from planted_suite import PLANTED, PLANTED_LATENT
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer
from typer.testing import CliRunner
from word_piles import rows

from qwenscope.analysis.checkpoints import Fit, diff_checkpoints
from qwenscope.analysis.piles import Reader
from qwenscope.analysis.result_forms import FORMS
from qwenscope.cli.main import app
from qwenscope.corpus.tool_use import chat_conversation
from qwenscope.errors import QwenscopeError
from qwenscope.files import write_text
from qwenscope.lm.forward import site_rows, unembedding
from qwenscope.lm.load import load_language_model
from qwenscope.lm.model import LanguageModel
from qwenscope.lm.sites import Site
from qwenscope.lm.standin import STANDIN_FOLDER
from qwenscope.opening import open_target
from qwenscope.recipe import HookPoint, load_recipe
from qwenscope.sae.sae import TopKSAE

SITE = Site("layers.39")
WORD = " Certainly"
LATENT = 5
STEPS = 30
Write = Callable[[str, list[dict[str, Any]]], Path]


def chats(start: int, count: int) -> list[dict[str, Any]]:
    """Short generated conversations, none of which begins an answer with the word."""
    rows = []
    for index in range(start, start + count):
        messages = [m for m in chat_conversation(11, index)["messages"] if m["role"] != "system"][:2]
        rows.append({"messages": [{"role": m["role"], "content": m["content"][:120]} for m in messages]})
    return rows


@pytest.fixture(scope="module")
def standin() -> LanguageModel:
    return load_language_model(load_recipe("standin").lm, lm_head=True)


@pytest.fixture(scope="module")
def word(standin: LanguageModel) -> int:
    """The first token of what the fine-tuned model begins its answers with."""
    return int(standin.tokenizer(WORD, add_special_tokens=False).input_ids[0])


@pytest.fixture(scope="module")
def tuned(standin: LanguageModel, word: int, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stand-in, its last layers taught for seconds to begin answers with the word, and elsewhere to stay."""
    lm = load_language_model(load_recipe("standin").lm, lm_head=True)
    learning = [parameter.requires_grad_(True) for layer in lm.layers[36:] for parameter in layer.parameters()]
    optimizer = torch.optim.Adam(learning, lr=3e-3)
    for row in chats(900, STEPS):
        ids_1T = asked(lm, row)
        before_TV = standin.model(input_ids=ids_1T).logits[0, :-1].log_softmax(-1)
        logits_TV = lm.model(input_ids=ids_1T).logits[0].log_softmax(-1)
        kept = torch.nn.functional.kl_div(logits_TV[:-1], before_TV, log_target=True, reduction="batchmean")
        optimizer.zero_grad()
        (3 * kept - logits_TV[-1, word]).backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("tuned") / "model"
    lm.model.save_pretrained(folder)
    standin.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(write_rows: Write) -> Path:
    return write_rows("both", chats(100, 16))


@pytest.fixture(scope="module")
def suite(standin: LanguageModel, word: int, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random SAE at the last layer, one latent of which reads that the word comes next more surely than here."""
    sae = TopKSAE(64, 256, 8, seed=1)
    with torch.no_grad():
        given = Reader(standin.tokenizer, 256).pile(data)
        ids = [torch.from_numpy(each.conversation.token_ids).long()[None] for each in given]
        rows_RD = torch.cat([site_rows(standin, each, [SITE])[SITE][0, 1:] for each in ids])
        direction_D = standin.model.model.norm.weight.add(1) * (
            unembedding(standin)[word] - unembedding(standin).mean(0)
        )
        sae.encoder.weight[LATENT] = 100 * direction_D
        sae.encoder.bias[LATENT] = -100 * (rows_RD @ direction_D).max()
    folder = tmp_path_factory.mktemp("suite")
    sae.save(folder / "late")
    point = {"site": SITE.name, "dict_size": 256, "k": 8, "lr": 1e-3}
    recipe = load_recipe("standin").model_copy(update={"hook_points": {"late": HookPoint.model_validate(point)}})
    write_text(folder / "recipe.yaml", recipe.to_yaml())
    return folder


def asked(lm: LanguageModel, row: dict[str, Any]) -> torch.Tensor:
    """Token ids [1, T] up to where the answer begins."""
    ids = lm.tokenizer.apply_chat_template(row["messages"][:1], add_generation_prompt=True, return_dict=False)
    return torch.tensor([ids])


@pytest.fixture(scope="module")
def quiet(release: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny release's model with the planted word's embedding as short as any other's."""
    folder = tmp_path_factory.mktemp("quiet") / "lm"
    shutil.copytree(load_recipe(release / "recipe.yaml").lm.model, folder)
    weights = load_file(folder / "model.safetensors")
    (word,) = AutoTokenizer.from_pretrained(folder)(PLANTED, add_special_tokens=False).input_ids
    (name,) = [name for name in weights if "embed_tokens" in name]
    weights[name][word] /= 10
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def words(write_rows: Write) -> Path:
    return write_rows("words", [*rows(300, 12, False), *rows(400, 12, True)])


def test_the_same_checkpoint_twice_gives_no_finding(release: Path, words: Path) -> None:
    found = diff_checkpoints(release, data=words, model_b=load_recipe(release / "recipe.yaml").lm.model)
    assert (found["found"], found["latents"]) == (0, [])
    assert found["conversations"] == {"a": 24, "b": 24}
    assert found["tested"] == 0  # no latent changed in any conversation
    assert {(cell["change"], *cell["interval"]) for cell in found["fvu"].values()} == {(0, 0, 0)}


def test_a_latent_that_fell_silent_is_found_with_its_token(release: Path, words: Path, quiet: Path) -> None:
    arguments = ["diff", release, "--data", words, "--model-b", quiet, "--sae", "sae_delta", "--json"]
    found = json.loads(CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False).stdout)
    FORMS[found["kind"]].validate_json(json.dumps(found), strict=True)
    (planted,) = [each for each in found["latents"] if each["latent"] == PLANTED_LATENT]
    assert planted["q"] <= 0.05
    assert planted["effect"] > 0.7  # a more than b
    assert planted["active"] == pytest.approx({"a": 0.5, "b": 0.0}, abs=0.1)
    assert planted["tokens"][0] == {"token": PLANTED, "count": 12, "a": 12, "b": 0}
    assert [each["side"] for each in planted["conversations"]] == ["a"] * 5
    given = Reader(open_target(release).language_model().tokenizer, 128).pile(words)
    told = {each.conversation.id: each.conversation for each in given}
    assert all(PLANTED in told[each["id"]].text for each in planted["conversations"])


def test_fvu_is_that_of_all_rows_of_the_conversations_drawn() -> None:
    random = torch.Generator().manual_seed(0)
    x_RD, x_hat_RD = (torch.randn(30, 4, generator=random, dtype=torch.float64) + 3 for _ in range(2))
    conversation_R = torch.arange(30) // 10
    fit = Fit(3, 4)
    fit.add(x_RD[:15], x_hat_RD[:15], conversation_R[:15])
    fit.add(x_RD[15:], x_hat_RD[15:], conversation_R[15:])
    for drawn in ([0, 1, 2], [0, 0, 2]):
        rows = torch.cat([torch.arange(10) + 10 * c for c in drawn])
        deviation = (x_RD[rows] - x_RD[rows].mean(0)).square().sum()
        wanted = (x_hat_RD[rows] - x_RD[rows]).square().sum() / deviation
        weights_SC = torch.bincount(torch.tensor(drawn), minlength=3).double()[None]
        assert fit.fvu(weights_SC) == pytest.approx(float(wanted))


def test_what_does_not_go_together_is_one_line(release: Path, words: Path, quiet: Path, tmp_path: Path) -> None:
    def refused(*arguments: Any) -> str:
        result = CliRunner().invoke(app, ["diff", str(release), *map(str, arguments)])
        assert isinstance(result.exception, QwenscopeError)
        assert "\n" not in str(result.exception)
        return str(result.exception)

    assert "--data and --model-b" in refused("--data", words)
    assert "--data and --model-b" in refused("--data", words, "--model-b", quiet, "--a", words)
    assert "nowhere" in refused("--data", words, "--model-b", "./nowhere")
    assert "nowhere.jsonl" in refused("--data", "nowhere.jsonl", "--model-b", quiet)
    other = shutil.copytree(quiet, tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["\u0120that"], vocabulary["\u0120the"] = vocabulary["\u0120the"], vocabulary["\u0120that"]
    write_text(other / "tokenizer.json", json.dumps(tokenizer))
    assert "'Ġthat' to the SAEs' language model and 'Ġthe' to" in refused("--data", words, "--model-b", other)


@pytest.mark.slow
def test_a_fine_tuned_behavior_is_found_where_it_shows(
    standin: LanguageModel, suite: Path, data: Path, tuned: Path, tmp_path: Path
) -> None:
    path = tmp_path / "d.json"
    arguments = ["diff", suite, "--data", data, "--model-b", tuned, "--out", path]
    shown = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False).stdout
    found = json.loads(path.read_text())
    (planted,) = [each for each in found["latents"] if each["latent"] == LATENT]
    assert planted["q"] <= 0.05
    assert planted["effect"] < -0.9  # a less than b
    assert planted["interval"][1] < 0
    assert planted["active"] == pytest.approx({"a": 0.0, "b": 1.0}, abs=0.1)
    assert planted["tokens"][0]["token"] == standin.tokenizer.decode([asked(standin, chats(100, 1)[0])[0, -1]])
    assert (planted["tokens"][0]["a"], planted["conversations"][0]["side"]) == (0, "b")
    assert found["fvu"]["late"]["interval"][0] > 0
    assert "How well the SAEs fit" in shown
    same = diff_checkpoints(suite, data=data, model_b=str(STANDIN_FOLDER))
    assert (same["found"], same["fvu"]["late"]["change"]) == (0, 0)
