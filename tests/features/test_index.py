"""Every number of an index against a plain computation, conversation by conversation."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from planted_suite import PLANTED, PLANTED_LATENT

from qwenscope.corpus.conversation import ROLES, Conversation
from qwenscope.errors import CorpusError, FormatError
from qwenscope.features import corpus_pass
from qwenscope.features.geometry import CoActivation, principal_plane, token_effects
from qwenscope.features.index import build_index
from qwenscope.features.statistics import AFTER, BEFORE, FIRINGS, TOP, bin_of
from qwenscope.features.store import Index, MissingLatentError, read_explanations
from qwenscope.lm.forward import final_norm, site_rows, unembedding
from qwenscope.lm.hooks import find_routers, watch_routers
from qwenscope.lm.load import load_language_model
from qwenscope.lm.model import LanguageModel
from qwenscope.opening import SPLITS, Target, open_target
from qwenscope.sae.sae import TopKSAE

TOKENS = 2500  # as the index of conftest


class Plain:
    """The same corpus, one conversation at a time, dense codes."""

    def __init__(self, release: Path, corpus: Path) -> None:
        self.target: Target = open_target(release)
        self.lm: LanguageModel = load_language_model(self.target.recipe.lm, lm_head=True)
        self.conversations: list[Conversation] = []
        with self.target.conversations(self.lm.tokenizer, corpus) as stream:
            for conversation in stream:
                self.conversations.append(conversation)
                if sum(len(c.token_ids) for c in self.conversations) >= TOKENS:
                    break
        self.codes: dict[str, list[torch.Tensor]] = {sae_id: [] for sae_id in self.target.saes}
        self.experts: dict[str, list[torch.Tensor]] = {sae_id: [] for sae_id in self.target.saes}
        for conversation in self.conversations:
            ids = torch.from_numpy(conversation.token_ids.astype(np.int64))[None]
            routers = find_routers(self.lm)
            seen: dict[int, torch.Tensor] = {}
            with watch_routers(routers, seen.__setitem__):
                streams = site_rows(self.lm, ids, self.target.recipe.sites)
            for sae_id, sae in self.target.saes.items():
                site = self.target.sites[sae_id]
                layer = site.layer
                with torch.no_grad():
                    dense = sae.encode(streams[site][0]).dense()
                dense[0] = 0  # the first position is left out
                self.codes[sae_id].append(dense)
                self.experts[sae_id].append(seen[layer].topk(routers[layer].top_k, dim=1).indices)

    def context(self, number: int, position: int) -> tuple[int, ...]:
        """What stands before the token of conversation `number` and is shown, and that token."""
        return tuple(self.conversations[number].token_ids[max(0, position - BEFORE) : position + 1].tolist())


@pytest.fixture(scope="module")
def plain(release: Path, corpus: Path) -> Plain:
    return Plain(release, corpus)


def test_no_row_was_an_outlier_so_that_plain_counts_apply(index: Index) -> None:
    left_out = index.meta["left_out"]
    assert left_out["outlier"] == left_out["non_finite"] == 0
    assert left_out["first_position"] > 10


def test_densities_maxima_and_histograms(index: Index, plain: Plain) -> None:
    rows = sum(len(c.token_ids) - 1 for c in plain.conversations)
    for sae_id, codes in plain.codes.items():
        dense = torch.cat(codes)
        table = index.table(sae_id)
        torch.testing.assert_close(torch.tensor(table["density"]), (dense > 0).sum(0) / rows, check_dtype=False)
        torch.testing.assert_close(torch.tensor(table["max"]), dense.max(0).values, rtol=1e-3, atol=1e-6)
        assert index.saes[sae_id]["tokens"] == rows
        assert index.saes[sae_id]["dead"] == int((dense.max(0).values == 0).sum())
        for latent in range(0, dense.shape[1], 17):
            values = dense[:, latent][dense[:, latent] > 0]
            histogram = index.latent(sae_id, latent)["histogram"]
            assert sum(histogram["counts"]) == len(values)
            if len(values):
                bins = torch.bincount(bin_of(values))
                assert bins[bins.nonzero()[0, 0] :].tolist() == histogram["counts"]


def test_top_examples_are_the_largest_of_each_conversation(index: Index, plain: Plain) -> None:
    checked = 0
    for sae_id, codes in plain.codes.items():
        for latent in range(PLANTED_LATENT, codes[0].shape[1], 3):
            best = [(float(c[:, latent].max()), int(c[:, latent].argmax()), n) for n, c in enumerate(codes)]
            # of what reads the same, the first of the largest
            once = {plain.context(n, t): (v, t, n) for v, t, n in sorted(best, key=lambda b: (b[0], -b[2])) if v > 0}
            best = sorted(once.values(), key=lambda b: -b[0])[:TOP]
            shown = [e for e in index.latent(sae_id, latent)["examples"] if e["kind"] == "top"]
            assert [e["activations"][e["peak"]] for e in shown] == pytest.approx([b[0] for b in best], rel=2e-3)
            for example, (_, position, number) in zip(shown, best, strict=True):
                if example["conversation"] != plain.conversations[number].id:
                    continue  # equal to rounding: another order is as good
                assert example["position"] == position
                _check_window(example, plain, number, codes[number][:, latent])
                checked += 1
    assert checked > 500


def _check_window(example: dict[str, Any], plain: Plain, number: int, codes_T: torch.Tensor) -> None:
    conversation, position = plain.conversations[number], example["position"]
    low, high = max(0, position - BEFORE), min(len(conversation.token_ids), position + AFTER + 1)
    assert example["tokens"] == [plain.lm.tokenizer.decode([t]) for t in conversation.token_ids[low:high]]
    assert example["roles"] == conversation.roles[low:high].tolist()
    assert example["split"] == conversation.split
    torch.testing.assert_close(torch.tensor(example["activations"]), codes_T[low:high], rtol=2e-3, atol=1e-4)


def test_quantile_examples_are_firings_and_negatives_are_not(index: Index, plain: Plain) -> None:
    number_of = {conversation.id: n for n, conversation in enumerate(plain.conversations)}
    for sae_id, codes in plain.codes.items():
        for latent in range(0, codes[0].shape[1], 5):
            detail = index.latent(sae_id, latent)
            by_kind: dict[str, list[dict[str, Any]]] = {}
            for example in detail["examples"]:
                by_kind.setdefault(example["kind"], []).append(example)
                mine = codes[number_of[example["conversation"]]][:, latent]
                low, high = example["position"] - example["peak"], len(example["tokens"])
                torch.testing.assert_close(
                    torch.tensor(example["activations"]), mine[low : low + high], rtol=2e-3, atol=1e-4
                )
                if example["kind"] == "negative":
                    assert max(example["activations"]) == 0
                else:
                    assert example["activations"][example["peak"]] > 0
            firing = [e for e in detail["examples"] if e["kind"] != "negative"]
            assert len({tuple(e["tokens"][: e["peak"] + 1]) for e in firing}) == len(firing)
            contexts = {plain.context(n, t) for n, c in enumerate(codes) for t in c[:, latent].nonzero().flatten()}
            if len(contexts) >= FIRINGS:
                strengths = [
                    [e["activations"][e["peak"]] for e in by_kind[band]]
                    for band in ("75-100", "50-75", "25-50", "0-25")
                ]
                assert all(len(band) == 4 for band in strengths)
                flat = [value for band in strengths for value in band]
                assert flat == sorted(flat, reverse=True)


def test_shares_by_role_split_and_expert(index: Index, plain: Plain) -> None:
    for sae_id, codes in plain.codes.items():
        fires = torch.cat(codes) > 0
        roles = torch.cat([torch.from_numpy(c.roles.astype(np.int64)) for c in plain.conversations])
        splits = torch.cat([torch.full((len(c.token_ids),), int(c.split == "tool_use")) for c in plain.conversations])
        experts = torch.cat(plain.experts[sae_id])
        kept = torch.cat([torch.arange(len(c.token_ids)) > 0 for c in plain.conversations])
        for latent in range(0, fires.shape[1], 11):
            detail, mine = index.latent(sae_id, latent), fires[:, latent]
            assert detail["roles"] == torch.bincount(roles[mine], minlength=len(ROLES)).tolist()
            assert detail["splits"] == torch.bincount(splits[mine], minlength=len(SPLITS)).tolist()
            for expert, share, base in detail["experts"]:
                chosen = (experts == expert).any(1)
                assert share == pytest.approx(float(chosen[mine].float().mean()), rel=1e-3)
                assert base == pytest.approx(float(chosen[kept].float().mean()), rel=1e-3, abs=1e-4)


def test_every_latent_that_fired_has_a_label_by_rule(index: Index, plain: Plain) -> None:
    """Where it peaks, the role and split that it has more than others, what it promotes: against plain counts."""
    roles = torch.from_numpy(np.concatenate([c.roles.astype(np.int64) for c in plain.conversations]))
    kept = torch.cat([torch.arange(len(c.token_ids)) > 0 for c in plain.conversations])
    base = torch.bincount(roles[kept], minlength=len(ROLES)).double() / int(kept.sum())
    for sae_id, codes in plain.codes.items():
        labels, table = index.labels(sae_id), index.table(sae_id)
        assert sorted(labels) == index.alive(sae_id)
        for latent in index.alive(sae_id)[::7]:
            mine = roles[torch.cat(codes)[:, latent] > 0]
            counts = torch.bincount(mine, minlength=len(ROLES))
            lifts = (counts.double() / len(mine) / base).nan_to_num(0.0)
            assert float(lifts[table["role"][latent]]) == pytest.approx(float(lifts.max()))
            splits = np.array(index.latent(sae_id, latent)["splits"])
            assert table["split"][latent] == (splits / np.maximum(index.saes[sae_id]["base_splits"], 1e-9)).argmax()
            label = labels[latent]
            peak = table["peaks"][latent][0]
            assert label.startswith("by rule: " + json.dumps(peak.strip() or peak, ensure_ascii=False))
            said = f"{ROLES[int(lifts.argmax())].replace('_', ' ')} {float(lifts.max()):.1f} times as often"
            if float(lifts.max()) > 1.6 and int(counts[lifts.argmax()]) >= 5:
                assert said in label
            elif float(lifts.max()) < 1.4:
                assert said not in label
            shown = index.latent(sae_id, latent)["explanation"]
            assert (shown["label"], shown["client"], shown["detection"]) == (label, "rule", None)
    assert f'by rule: "{PLANTED.strip()}"' in index.labels("sae_delta")[PLANTED_LATENT]
    assert list(read_explanations(index)) == []


def test_promoted_tokens_and_neighbours(index: Index, plain: Plain) -> None:
    saes = plain.target.saes
    words = unembedding(plain.lm)
    for sae_id, sae in saes.items():
        directions_ND = torch.nn.functional.normalize(sae.decoder.weight.detach().T, dim=1)
        cosines_NN = directions_ND @ directions_ND.T
        cosines_NN.fill_diagonal_(-2)
        (other,) = [other for other in saes if other != sae_id]
        across = directions_ND @ torch.nn.functional.normalize(saes[other].decoder.weight.detach().T, dim=1).T
        for latent in range(0, sae.dict_size, 31):
            detail = index.latent(sae_id, latent)
            with torch.no_grad():
                logits_V = words @ final_norm(plain.lm)(directions_ND[latent])
            for name, order in (("promoted", logits_V.argsort(descending=True)), ("suppressed", logits_V.argsort())):
                assert [t for t, _ in detail[name]][:5] == [plain.lm.tokenizer.decode([t]) for t in order[:5].tolist()]
            assert [n for n, _ in detail["neighbours"]] == cosines_NN[latent].argsort(descending=True)[:10].tolist()
            assert detail["elsewhere"] == [
                [other, int(across[latent].argmax()), pytest.approx(float(across[latent].max()), rel=1e-3)]
            ]


def test_logit_histograms_count_every_token_of_the_vocabulary(index: Index, plain: Plain) -> None:
    """Against dense float64 logits; a score within rounding of a bin's edge may lie on either side of it."""
    words_VD = unembedding(plain.lm).double()
    norm = copy.deepcopy(final_norm(plain.lm)).double()
    for sae_id, sae in plain.target.saes.items():
        for latent in range(0, sae.dict_size, 13):
            detail = index.latent(sae_id, latent)
            with torch.no_grad():
                logits_V = words_VD @ norm(sae.decoder.weight.detach().double()[:, latent])
            scores_V = (logits_V - logits_V.mean()) / logits_V.std()
            found = detail["logits"]
            assert sum(found["counts"]) == len(words_VD)
            assert found["counts"][0] > 0 < found["counts"][-1]
            edges = found["first"] + np.arange(len(found["counts"]) + 1) / found["per_sd"]
            below = np.concatenate([[0], np.cumsum(found["counts"])])
            for edge, count in zip(edges, below, strict=True):
                least, most = (int((scores_V < edge + by).sum()) for by in (-1e-4, 1e-4))
                assert least <= count <= most
            best, worst = detail["promoted"][0][1], detail["suppressed"][0][1]
            assert edges[-2] - 1e-3 <= best <= edges[-1] + 1e-3
            assert edges[0] - 1e-3 <= worst <= edges[1] + 1e-3


def test_extreme_logits_stand_in_the_end_bins() -> None:
    words_VD = torch.zeros(1000, 2)
    words_VD[0, 0] = 1000.0  # 31 standard deviations
    effects = token_effects(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), torch.nn.Identity(), words_VD, 1)
    assert effects.histogram_MH.sum(1).tolist() == [1000, 1000]
    assert effects.histogram_MH[0, -1] == effects.histogram_MH[1, 0] == 1
    assert float(effects.promoted[0][0]) == pytest.approx(31.6, abs=0.1)


def test_the_map_is_the_principal_plane_of_the_directions_that_fire(index: Index, plain: Plain) -> None:
    for sae_id, sae in plain.target.saes.items():
        table, alive = index.table(sae_id), index.alive(sae_id)
        places = [(x, y) for x, y in zip(table["x"], table["y"], strict=True)]
        assert [n for n, place in enumerate(places) if place != (None, None)] == alive
        directions_AD = torch.nn.functional.normalize(sae.decoder.weight.detach().double().T[alive], dim=1)
        centred_AD = directions_AD - directions_AD.mean(0)
        u, s, _ = torch.linalg.svd(centred_AD, full_matrices=False)
        expected_A2 = u[:, :2] * s[:2]
        expected_A2 *= 1000 / expected_A2.abs().max()
        found_A2 = torch.tensor([places[latent] for latent in alive]).double()
        found_A2 *= (found_A2 * expected_A2).sum(0).sign()  # either way round
        torch.testing.assert_close(found_A2, expected_A2, rtol=0, atol=1.0)
        shares = s.square() / s.square().sum()
        assert index.saes[sae_id]["map_shares"] == pytest.approx(shares[:2].tolist(), rel=2e-3)


@pytest.mark.parametrize("alive", [0, 1, 2])
def test_fewer_than_three_latents_have_no_plane(alive: int) -> None:
    places, shares = principal_plane(TopKSAE(8, 16, 2), np.arange(alive))
    assert (places.tolist(), shares) == ([[0.0, 0.0]] * alive, [0.0, 0.0])


def test_coactivation_equals_the_correlation_matrix() -> None:
    torch.manual_seed(0)
    latents_SK = torch.stack([torch.randperm(12)[:3] for _ in range(200)]).to(torch.int32)
    latents_SK[::4, 2] = -1
    fires_SN = torch.zeros(200, 12).scatter_(1, latents_SK.clamp(min=0).long(), 1.0)
    fires_SN[::4] = torch.zeros(50, 12).scatter_(1, latents_SK[::4, :2].long(), 1.0)
    expected = np.corrcoef(fires_SN.T.numpy())
    np.fill_diagonal(expected, -np.inf)
    (phi_MN, latents_MN), together = CoActivation(latents_SK, 12).of(2, 9, 4)
    for m in range(7):
        order = np.argsort(-expected[m + 2])[:4]
        np.testing.assert_allclose(phi_MN[m], expected[m + 2][order], atol=1e-5)
        assert together[m].tolist() == [int((fires_SN[:, m + 2] * fires_SN[:, n]).sum()) for n in latents_MN[m]]


def test_the_planted_word_is_found_and_shown(index: Index) -> None:
    hit = index.search("THAT ")[0]
    assert (hit["sae"], hit["latent"]) == ("sae_delta", PLANTED_LATENT)
    top = [e for e in index.latent("sae_delta", PLANTED_LATENT)["examples"] if e["kind"] == "top"]
    assert len(top) >= 10
    assert {e["tokens"][e["peak"]] for e in top} == {PLANTED}


@pytest.mark.parametrize(
    "query", ["", "   ", '"', "* OR NEAR(", "'; DROP TABLE latents; --", "a" * 5000, "\x00", "label:x"]
)
def test_search_takes_any_text(index: Index, query: str) -> None:
    assert isinstance(index.search(query), list)
    assert index.latent("sae_delta", 0)["latent"] == 0


def test_search_by_punctuation_prefix_and_sae(index: Index) -> None:
    assert index.search("<|im_end|>")
    assert index.search("stat", sae_id="sae_attn", limit=3)
    assert {hit["sae"] for hit in index.search("status", sae_id="sae_attn")} == {"sae_attn"}
    with pytest.raises(MissingLatentError, match="sae_nope"):
        index.search("status", sae_id="sae_nope")


def test_parquet_holds_the_same(index: Index) -> None:
    latents = pq.read_table(index.folder / "latents.parquet").to_pylist()
    assert len(latents) == sum(sae["dict_size"] for sae in index.saes.values())
    row = latents[PLANTED_LATENT]
    detail = index.latent("sae_delta", PLANTED_LATENT)
    assert row["promoted"] == [token for token, _ in detail["promoted"]]
    examples = pq.read_table(index.folder / "examples.parquet").to_pylist()
    mine = [e for e in examples if (e["sae_id"], e["latent"]) == ("sae_delta", PLANTED_LATENT)]
    assert [e["tokens"] for e in mine] == [e["tokens"] for e in detail["examples"]]
    assert [e["activations"] for e in mine] == [pytest.approx(e["activations"]) for e in detail["examples"]]


def _whole(index: Index) -> list[dict[str, Any]]:
    return [index.latent(sae_id, n) for sae_id, sae in index.saes.items() for n in range(0, sae["dict_size"], 3)]


def test_an_interrupted_pass_goes_on_to_the_same_index(
    index: Index, release: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus_pass, "SAVE_SECONDS", 0.0)
    out = tmp_path / "index"

    def interrupt(phase: str, done: int, total: int) -> None:
        if phase == "reading" and done > TOKENS // 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        build_index(release, out, data=corpus, tokens=TOKENS, on_progress=interrupt)
    with pytest.raises(FormatError, match="another tokens"):
        build_index(release, out, data=corpus, tokens=TOKENS + 1)
    seen: list[int] = []
    build_index(release, out, data=corpus, tokens=TOKENS, on_progress=lambda p, d, t: seen.append(d))
    assert not (out / ".work").exists()
    assert _whole(Index(out)) == _whole(index)


def test_a_damaged_state_is_refused(
    release: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus_pass, "SAVE_SECONDS", 0.0)
    out = tmp_path / "index"

    def interrupt(phase: str, done: int, total: int) -> None:
        if phase == "describing":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_index(release, out, data=corpus, tokens=TOKENS, on_progress=interrupt)
    (state,) = (out / ".work").glob("state-*")
    file = state / "sae_attn.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    with pytest.raises(FormatError, match=r"sae_attn.safetensors is missing or damaged"):
        build_index(release, out, data=corpus, tokens=TOKENS)


def test_a_finished_index_and_foreign_folders_are_left_alone(index: Index, release: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="finished index"):
        build_index(release, index.folder, tokens=TOKENS)
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(FormatError, match="not an index"):
        build_index(release, tmp_path, tokens=TOKENS)
    with pytest.raises(FormatError, match="at least 1 token"):
        build_index(release, tmp_path / "new", tokens=0)
    with pytest.raises(FormatError, match="neither an existing folder"):
        build_index(tmp_path / "nowhere", tmp_path / "new", tokens=1)


def test_an_empty_corpus_and_a_damaged_index_are_named(release: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(CorpusError):
        build_index(release, tmp_path / "new", data=tmp_path / "empty.jsonl", tokens=10)
    with pytest.raises(FormatError, match=r"holds no index.sqlite"):
        Index(tmp_path)
    (tmp_path / "index.sqlite").write_bytes(b"SQLite format 3\0" + b"\1" * 500)
    with pytest.raises(FormatError, match="damaged"):
        Index(tmp_path)
