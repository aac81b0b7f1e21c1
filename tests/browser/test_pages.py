"""The pages in a real browser: views, search, try it, steering, notes, keys, export; no error, no foreign request."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from axe_playwright_python.sync_playwright import Axe
from made_results import ODD_NAME, SHARED
from planted_suite import CALL, HOSTILE, PLANTED, PLANTED_LATENT, TOOL
from playwright.sync_api import Browser, Page, expect
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.staticfiles import StaticFiles
from torch.nn import Module
from torch.nn.modules.module import register_module_forward_pre_hook
from visiting import Visit, serving

from qwenscope.features.continuation import answer_start, generate, prompt_tokens
from qwenscope.features.index import open_origin
from qwenscope.features.steering import Steering
from qwenscope.features.store import Index, explaining

LATENT = f"#/sae/sae_delta/{PLANTED_LATENT}"
RUNS = ["steered", "unsteered", "negative strength", "random latent", "random direction"]
CHAT = {
    "messages": [
        {"role": "system", "content": "You find orders."},
        {"role": "user", "content": f"order{PLANTED} status"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": f"title{PLANTED}"},
        {"role": "assistant", "content": "done"},
    ],
    "tools": [TOOL],
}
ROUTES = [
    "",
    "#/sae/sae_delta?color=role&role=user&at=7",
    LATENT,
    f"#/compare?at=sae_delta/{PLANTED_LATENT}&at=sae_delta/3&at=sae_attn/5",
    "#/search?q=that",
    "#/try?text=order+that+status",
    f"#/try?given={quote(json.dumps(CHAT))}",
    "#/steer",
    "#/find?on=order+that+that+that+that+that+that%0A%0Atitle+that+that+that+that+that+that",
    "#/notes",
    "#/nowhere",
    "#/results/monitor",
    "#/results/contrast",
    "#/results/scenarios",
]
ODD = f"#/results/{quote(ODD_NAME)}"


@pytest.fixture
def model_passes() -> Iterator[list[str]]:
    """Grows with every pass of a language model in this process."""
    passes: list[str] = []

    def count(module: Module, _inputs: object) -> None:
        if (name := type(module).__name__).endswith("ForCausalLM"):
            passes.append(name)

    hook = register_module_forward_pre_hook(count)
    yield passes
    hook.remove()


def test_the_suite_shows_every_sae_by_depth_and_kind(visit: Visit) -> None:
    page = visit.go("")
    expect(page.locator(".card h3")).to_have_text(["sae_delta", "sae_attn"])
    expect(page.locator(".ladder .hooked a")).to_have_text(["1", "3"])
    page.get_by_role("link", name="sae_attn, layer 3").click()
    expect(page.locator("h1")).to_have_text("sae_attn")


def test_the_table_filters_sorts_and_links(visit: Visit) -> None:
    page = visit.go("#/sae/sae_delta")
    rows = page.locator(".latents tbody tr")
    page.get_by_label("Filter latents").fill("that")
    expect(page.locator(".tools [role=status]")).to_contain_text("of 256 latents")
    assert all("that" in text for text in rows.all_inner_texts())
    page.get_by_role("button", name="latent", exact=True).click()
    numbers = [int(text) for text in page.locator(".latents td.latent").all_inner_texts()]
    assert numbers == sorted(numbers)
    assert "q=that" in page.url
    page.get_by_role("link", name=str(PLANTED_LATENT), exact=True).click()
    expect(page.locator("h1")).to_contain_text(f"/ {PLANTED_LATENT}")


def test_a_number_finds_its_latent_first_and_ticks_are_plain_numbers(visit: Visit) -> None:
    page = visit.go("#/sae/sae_delta?dead=1&sort=latent&down=1")
    page.get_by_label("Filter latents").fill("40")
    numbers = page.locator(".latents td.latent")
    expect(numbers.first).to_have_text("40")
    assert numbers.all_inner_texts()[1:] == sorted(numbers.all_inner_texts()[1:], key=int, reverse=True)
    ticks = page.locator(".histogram .axis span").all_inner_texts()
    assert [float(tick.removesuffix(" %")) for tick in ticks][-1] == 100
    assert all(set(tick) <= set("0123456789. %") for tick in ticks), ticks


def test_search_finds_the_planted_latent_and_its_page_shows_the_word(visit: Visit) -> None:
    page = visit.go("")
    page.get_by_label("Search latents").fill(PLANTED.strip())
    page.locator(".hit a").first.click()
    expect(page.locator("h1")).to_have_text(f"sae_delta / {PLANTED_LATENT}")
    assert set(page.locator(".contexts .peak").all_inner_texts()) == {PLANTED}
    page.get_by_role("tab", name="Not firing").click()
    assert page.locator(".contexts li").count() > 0
    assert page.locator(".contexts .peak").count() == 0


def test_deep_links_and_keys(visit: Visit) -> None:
    page = visit.go(LATENT)
    page.keyboard.press("ArrowRight")
    expect(page.locator("h1")).to_have_text(f"sae_delta / {PLANTED_LATENT + 1}")
    page.keyboard.press("k")
    expect(page.locator("h1")).to_have_text(f"sae_delta / {PLANTED_LATENT}")
    page.keyboard.press("?")
    expect(page.get_by_role("dialog")).to_be_visible()
    page.keyboard.press("Escape")
    page.keyboard.press("u")
    expect(page.locator("h1")).to_have_text("sae_delta")
    page.keyboard.press("/")
    expect(page.get_by_label("Search latents")).to_be_focused()


def test_j_and_k_walk_the_list_that_a_latent_was_opened_from(visit: Visit) -> None:
    page = visit.go("#/sae/sae_delta?q=that&sort=max&role=user")
    shown = page.locator(".latents td.latent").all_inner_texts()
    assert len(shown) > 3
    assert set(page.locator(".latents td.role").all_inner_texts()) == {"user"}
    page.keyboard.press("j")
    page.keyboard.press("Enter")
    for place, latent in enumerate(shown[:3], 1):
        expect(page.locator("h1")).to_have_text(f"sae_delta / {latent}")
        expect(page.locator(".whereabouts")).to_contain_text(f"{place} of {len(shown)}")
        page.keyboard.press("j")
    expect(page.locator("h1")).to_have_text(f"sae_delta / {shown[3]}")
    page = visit.go(page.url.removeprefix(visit.site))  # as whoever was sent the link
    page.keyboard.press("k")
    expect(page.locator("h1")).to_have_text(f"sae_delta / {shown[2]}")
    page.keyboard.press("u")
    expect(page.get_by_label("Filter latents")).to_have_value("that")
    assert page.locator(".latents td.latent").all_inner_texts() == shown
    page = visit.go("#/search?q=that")
    hits = [text.replace(" ", "") for text in page.locator(".hit a").all_inner_texts()]
    page.locator(".hit a").first.click()
    expect(page.locator(".whereabouts")).to_contain_text(f"1 of {len(hits)}")
    page.keyboard.press("ArrowLeft")  # round to the last
    expect(page.locator("h1")).to_have_text(hits[-1].replace("/", " / "))


def test_the_map_shows_the_list_and_opens_a_latent(visit: Visit, index: Path) -> None:
    page = visit.go("#/sae/sae_delta?color=role")
    solid = """() => {
        const canvas = document.querySelector(".map canvas");
        const copy = new OffscreenCanvas(canvas.width, canvas.height).getContext("2d", { willReadFrequently: true });
        copy.drawImage(canvas, 0, 0);
        const { data } = copy.getImageData(0, 0, canvas.width, canvas.height);
        return data.filter((value, i) => i % 4 === 3 && value > 180).length;
    }"""
    everything = page.evaluate(solid)
    counts = [int(text) for text in page.locator(".colors small").all_inner_texts()]
    assert sum(counts) == len(Index(index).alive("sae_delta"))
    page.get_by_label("any role").select_option("user")
    expect(page.locator(".colors span")).to_have_count(1)
    assert 0 < page.evaluate(solid) < everything
    area = page.get_by_role("application", name="Map of latents")
    area.focus()
    page.keyboard.press("ArrowRight")
    at = page.locator(".named-point a")
    first = at.inner_text()
    page.keyboard.press("ArrowRight")
    expect(at).not_to_have_text(first)
    assert f"at={at.inner_text()}" in page.url
    name = at.inner_text()
    assert Index(index).meta["roles"][Index(index).table("sae_delta")["role"][int(name)]] == "user"
    page = visit.go(page.url.removeprefix(visit.site))
    expect(page.locator(".named-point a")).to_have_text(name)
    assert "color=role" in page.url
    ring, box = page.locator(".ring").bounding_box(), page.locator(".map").bounding_box()
    assert ring is not None
    assert box is not None
    page.mouse.move(box["x"] + 3, box["y"] + 3)
    page.mouse.move(ring["x"] + ring["width"] / 2, ring["y"] + ring["height"] / 2)
    expect(page.locator(".named-point a")).to_have_text(name)
    page.mouse.down()
    page.mouse.up()
    expect(page.locator("h1")).to_have_text(f"sae_delta / {name}")
    page.get_by_role("link", name="Map").click()
    expect(page.locator(".named-point a")).to_have_text(name)


def test_a_tap_names_a_latent_before_the_next_opens_it(chromium: Browser, site: str) -> None:
    visit = Visit(chromium, site, viewport={"width": 390, "height": 900}, has_touch=True)
    page = visit.go(f"#/sae/sae_delta?at={PLANTED_LATENT}")
    place = page.locator(".ring").bounding_box()
    assert place is not None
    x, y = place["x"] + place["width"] / 2, place["y"] + place["height"] / 2
    page.evaluate("location.hash = '#/sae/sae_delta'")
    expect(page.locator(".ring")).to_be_hidden()
    page.touchscreen.tap(x, y)
    expect(page.locator(".named-point a")).to_have_text(str(PLANTED_LATENT))
    expect(page.locator("h1")).to_have_text("sae_delta")
    page.touchscreen.tap(x, y)
    expect(page.locator("h1")).to_have_text(f"sae_delta / {PLANTED_LATENT}")
    visit.close()


def test_the_logits_of_a_latent_stand_over_round_numbers(visit: Visit, index: Path) -> None:
    page = visit.go(LATENT)
    found = Index(index).latent("sae_delta", PLANTED_LATENT)
    logits = page.locator("section", has=page.get_by_role("heading", name="Logits"))
    ticks = [int(tick.replace("−", "-")) for tick in logits.locator(".axis span").all_inner_texts()]
    assert 0 in ticks
    assert ticks == sorted(ticks)
    for tone, name in (("up", "promoted"), ("down", "suppressed")):
        expect(logits.locator(f".mark.{tone}")).to_have_count(len(found[name]))
    titles = "".join(logits.locator("title").all_text_contents())
    assert sum(found["logits"]["counts"]) == sum(
        int(n) for n in re.findall(r": ([\d,]+) tokens", titles.replace(",", ""))
    )
    assert all(f'"{text}"' in titles for text, _ in found["promoted"] if text.isalpha())
    activations = page.locator("section", has=page.get_by_role("heading", name="Activations", exact=False).first)
    round_ones = activations.first.locator(".axis span").all_inner_texts()
    assert 2 <= len(round_ones) <= 7
    assert all(re.fullmatch(r"(0\.0*)?[125]0*", tick.replace(",", "")) for tick in round_ones), round_ones


def test_latents_are_compared_side_by_side(visit: Visit, index: Path) -> None:
    page = visit.go(LATENT)
    depth = page.locator("section", has=page.get_by_role("heading", name="Through depth")).locator("li")
    expect(depth).to_have_count(2)
    expect(depth.first.locator(".num")).to_have_text("here")
    page.get_by_role("link", name="Compare").click()
    found = Index(index).latent("sae_delta", PLANTED_LATENT)
    nearest, cosine = found["neighbours"][0]
    page.locator(".peers a").first.click()
    sides = page.locator(".sides > section")
    expect(sides.locator("h2")).to_have_text([f"sae_delta / {PLANTED_LATENT}", f"sae_delta / {nearest}"])
    expect(page.get_by_label("Between them").locator("tbody td").nth(1)).to_have_text(f"{cosine:.2f}")
    page.get_by_label("Another latent").fill("nonsense")
    page.get_by_role("button", name="Add").click()
    expect(page.get_by_role("status")).to_contain_text("sae_attn_mid/40")
    page.get_by_label("Another latent").fill("sae_attn/5")
    page.get_by_role("button", name="Add").click()
    expect(sides).to_have_count(3)
    page.get_by_role("link", name=f"Leave out sae_delta / {nearest}").click()
    expect(sides.locator("h2")).to_have_text([f"sae_delta / {PLANTED_LATENT}", "sae_attn / 5"])
    page = visit.go("#/compare?at=sae_delta/999999")
    expect(page.locator("h1")).to_have_text("Not found")


def test_the_try_it_box_runs_the_model(visit: Visit) -> None:
    page = visit.go("#/try")
    page.get_by_role("textbox", name="Text").fill(f"order{PLANTED} status")
    page.get_by_role("button", name="Read").click()
    page.locator(".readable .tok", has_text="that").click()
    expect(page.locator(".active h3")).to_contain_text("that")
    expect(page.locator(".active .entry a", has_text=str(PLANTED_LATENT)).first).to_be_visible()


def test_a_text_is_read_over_all_saes_at_once(visit: Visit) -> None:
    page = visit.go("#/try?text=order+that+status&sae=all+SAEs")
    links = page.locator(".active .entry a")
    expect(page.locator(".active h3")).to_have_text("Strongest in this text")
    assert {text.split(" / ")[0] for text in links.all_inner_texts()} == {"sae_delta", "sae_attn"}
    page.locator(".readable .tok", has_text="that").hover()
    expect(page.locator(".active h3")).to_contain_text("that")
    expect(links.filter(has_text=f"sae_delta / {PLANTED_LATENT}")).to_be_visible()
    page.locator("h1").hover()
    expect(page.locator(".active h3")).to_have_text("Strongest in this text")
    page.get_by_label("Order by").select_option("lift")
    expect(page.locator(".active h3")).to_have_text("Beyond their base rate")
    lifts = [float(text.split()[0].replace(",", "")) for text in page.locator(".active .num").all_inner_texts()]
    assert lifts == sorted(lifts, reverse=True)
    assert lifts[0] > 1
    assert "by=lift" in page.url


def test_latents_are_found_by_example(visit: Visit) -> None:
    page = visit.go("#/find")
    texts = page.get_by_label("Texts, an empty line between two")
    texts.fill("\n\n".join(f"{word}{6 * PLANTED} status" for word in ("order", "title", "query")))
    page.get_by_role("button", name="Find").click()
    first = page.locator(".hit").first
    expect(first.locator("a")).to_contain_text("sae_")
    expect(first.locator(".figures")).to_contain_text("in 3 of 3")
    assert "#/find?on=" in page.url
    page.get_by_label("But not on these").fill(texts.input_value())
    page.get_by_role("button", name="Find").click()
    expect(page.locator("form [role=status]")).to_contain_text("No latent fires")


def test_steering_shows_its_controls(visit: Visit) -> None:
    page = visit.go(LATENT)
    page.get_by_label("Prompt").fill("order status")
    page.get_by_role("button", name="Steer").click()
    for name in RUNS:
        expect(page.locator(".run h3", has_text=name).first).to_be_visible()
    expect(page.get_by_role("button", name="Steer")).to_be_enabled()
    strength = page.get_by_label("Strength", exact=True).input_value()
    assert float(strength) > 0, "it was measured"
    slider = page.get_by_label("Strength, in shares of the residual norm")
    stop = int(slider.input_value())
    slider.press("Home")
    expect(page.locator(".range [role=status]")).to_contain_text("strength 0: KL 0 nats a token")
    expect(page.get_by_label("Strength", exact=True)).to_have_value("0")
    page.locator(".range figure").first.locator(".hit").nth(stop).click()
    expect(page.get_by_label("Strength", exact=True)).to_have_value(strength)
    page.get_by_role("link", name="Link to this steering").click()
    expect(page.locator("h1")).to_have_text("Steer")
    for name in RUNS:  # a link runs
        expect(page.locator(".run h3", has_text=name).first).to_be_visible()
    expect(page.get_by_label("Strength", exact=True)).to_have_value(strength)
    expect(page.get_by_label("Prompt")).to_have_value("order status")
    expect(page.get_by_label("Latent", exact=True)).to_have_value(str(PLANTED_LATENT))


@pytest.mark.parametrize("how", ["Esc", "the button", "a closed tab"])
def test_a_steer_is_ended(visit: Visit, model_passes: list[str], how: str) -> None:
    page = visit.go(LATENT)
    page.get_by_label("Strength", exact=True).fill("0.25")
    longer = {"tokens": 200}
    page.route("**/api/steer", lambda route: route.continue_(post_data={**route.request.post_data_json, **longer}))
    page.get_by_role("button", name="Steer").click()
    expect(page.locator(".run h3", has_text="steered").first).to_be_visible()
    if how == "a closed tab":
        page.close()
    else:
        page.keyboard.press("Escape") if how == "Esc" else page.get_by_role("button", name="Stop").click()
        expect(page.locator("form.steer").get_by_role("status")).to_have_text("stopped")
    headers = {"Content-Type": "application/json"}
    answer = visit.context.request.post(f"{visit.site}api/read", data={"text": "order"}, headers=headers)
    assert answer.ok
    assert 0 < len(model_passes) < 200  # the read went behind the steer, which did not come to its end


def test_several_latents_steer_together_from_a_link(visit: Visit) -> None:
    link = "#/steer?push=sae_delta:7:clamp:-1.5&push=sae_attn:41:ablate:2&unit=norm&where=prefill&prompt=order+status"
    page = visit.go(link)
    expect(page.get_by_label("SAE", exact=True)).to_have_count(2)
    expect(page.get_by_label("Strength").nth(1)).to_be_disabled()
    page.get_by_role("button", name="Add a latent").click()
    expect(page.get_by_label("Latent", exact=True)).to_have_count(3)
    page.get_by_role("button", name="Remove").nth(2).click()
    page.get_by_role("button", name="Steer").click()
    expect(page.locator(".run h3")).to_contain_text(RUNS)
    expect(page.get_by_role("button", name="Steer")).to_be_enabled()
    address = page.url
    page = visit.go(address[address.index("#") :])
    expect(page.get_by_label("in units of")).to_have_value("norm")
    expect(page.get_by_label("at", exact=True)).to_have_value("prefill")
    expect(page.get_by_label("Mode").nth(1)).to_have_value("ablate")
    expect(page.get_by_label("Strength").first).to_have_value("-1.5")


def test_a_conversation_with_tools_is_written_on(visit: Visit, index: Path) -> None:
    push = f"push=sae_delta:{PLANTED_LATENT}:add:2&tokens=4"
    page = visit.go(f"#/steer?{push}&given={quote(json.dumps({**CHAT, 'messages': CHAT['messages'][:4]}))}")
    expect(page.get_by_label("Content")).to_have_count(4)
    page.get_by_role("button", name="Steer").click()
    expect(page.locator(".run h3")).to_contain_text(RUNS)
    expect(page.get_by_role("button", name="Steer")).to_be_enabled()
    address = page.url
    target = open_origin(index)
    lm = target.language_model()
    messages = [dict(turn) for turn in CHAT["messages"][:4]]
    ids = prompt_tokens(lm, messages, CHAT["tools"])
    where = slice(answer_start(lm, messages, CHAT["tools"]), None)
    along = Steering(1, 2.0, target.saes["sae_delta"], PLANTED_LATENT, where=where)
    assert page.locator(".run.first .written").text_content() == "".join(generate(lm, ids, [along], 4))
    page = visit.go(address[address.index("#") :])
    expect(page.get_by_label("Role").nth(3)).to_have_value("tool")


def test_a_latent_is_tested_on_ones_own_text(visit: Visit) -> None:
    page = visit.go(LATENT)
    page.get_by_label("Text to test").fill(f"order{PLANTED} status")
    page.get_by_role("button", name="Test").click()
    expect(page.locator("form .text .peak")).to_have_text(PLANTED)
    page.get_by_label("Text to test").fill("order status")
    page.get_by_role("button", name="Test").click()
    expect(page.locator("form", has=page.locator("#test")).get_by_role("status")).to_contain_text("not active")


def test_what_a_latent_does_is_measured_when_asked_for(visit: Visit) -> None:
    page = visit.go(LATENT)
    page.get_by_role("button", name="Measure", exact=True).click()
    expect(page.locator(".stat", has_text="output score")).to_contain_text("0.")
    expect(page.locator(".stat", has_text="Δ token confidence")).to_have_text(re.compile(r"[+−]\d"))
    page.get_by_role("button", name="Ablate it").click()
    expect(page.locator(".stat", has_text="its ablation")).to_have_text(re.compile(r"[+−]\d"))
    expect(page.locator(".stat", has_text="a random direction")).to_be_visible()
    expect(page.locator("aside")).to_contain_text(re.compile(r"n = \d+ positions of \d+ conversations"))


def test_an_example_is_copied_and_read(visit: Visit) -> None:
    visit.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page = visit.go(LATENT)
    example = page.locator(".contexts li").first
    text = "".join(example.locator(".tok").all_inner_texts()).replace("↵", "\n")
    example.hover()
    example.get_by_role("button", name="copy").click()
    expect(example.get_by_role("button", name="copied")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == text
    example.get_by_role("link", name="read").click()
    expect(page.locator("form [role=status]")).to_contain_text("of the index")
    expect(page.locator(".readable .tok[aria-pressed=true]")).to_have_text(PLANTED)
    expect(page.locator(".active .entry a", has_text=f"sae_delta / {PLANTED_LATENT}")).to_be_visible()


def test_a_context_expands_to_its_conversation_and_back(visit: Visit, index: Path) -> None:
    page = visit.go(LATENT)
    example = page.locator(".contexts li").first
    part = example.locator(".tok").count()
    example.hover()
    example.get_by_role("button", name="whole").click()
    whole = example.get_by_role("region", name="The whole conversation")
    expect(whole.locator(".peak")).to_have_text(PLANTED)
    found = next(each for each in Index(index).latent("sae_delta", PLANTED_LATENT)["examples"] if each["kind"] == "top")
    kept = Index(index).conversation(found["start"])
    assert whole.locator(".tok").count() == len([token for token in kept["tokens"] if token]) > part
    assert kept["tokens"][found["position"]] == PLANTED
    example.get_by_role("button", name="part").click()
    expect(example.locator(".tok")).to_have_count(part)


def test_template_tokens_are_folded_until_asked_for(visit: Visit) -> None:
    page = visit.go(f"#/try?given={quote(json.dumps(CHAT))}")
    turns = page.locator(".turn .speaker")
    expect(turns).to_have_text(["system", "user", "assistant", "tool", "assistant"])
    expect(page.locator(".part")).to_have_text(["tool call"])
    marker = page.locator(".readable .tok", has_text="<|im_start|>").first
    expect(marker).to_be_hidden()
    page.locator(".fold").first.click()
    expect(marker).to_be_visible()
    last = page.locator(".readable .tok", has_text="<|im_start|>").last
    expect(last).to_be_hidden()
    page.get_by_label("template tokens").check()
    expect(last).to_be_visible()


def test_a_conversation_is_built_turn_by_turn(visit: Visit) -> None:
    page = visit.go("#/try")
    page.get_by_label("Chat").check()
    page.get_by_label("Content").fill(f"order{PLANTED} status")
    page.get_by_role("button", name="Add a turn").click()
    page.get_by_label("Content").nth(1).fill("done")
    page.get_by_label("Role").nth(1).select_option("assistant")
    page.get_by_text("Tools", exact=True).click()
    page.get_by_label("JSON list of their schemas").fill(json.dumps(CHAT["tools"]))
    page.get_by_role("button", name="Read").click()
    expect(page.locator(".turn .speaker")).to_have_text(["system", "user", "assistant"])
    page.get_by_label("JSON", exact=True).check()
    written = json.loads(page.get_by_label("Conversation as JSON").input_value())
    assert [turn["role"] for turn in written["messages"]] == ["user", "assistant"]
    assert written["tools"] == CHAT["tools"]
    page.locator(".active .entry a").first.click()
    expect(page.locator("h1")).to_have_text("Try it")  # it opens beside the text
    card = page.locator(".latent-card")
    expect(card.locator("h2")).to_contain_text("sae_")
    page.get_by_role("button", name="Close").click()
    expect(card).to_have_count(0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"messages": [', "cannot be read as JSON"),
        ('{"turns": []}', 'A conversation is {"messages"'),
        ('{"messages": [{"role": "nobody", "content": "x"}]}', "turn 1 has the role 'nobody'"),
        ('{"messages": [{"role": "user", "content": ""}]}', "empty_message"),
        ('{"messages": [{"role": "user", "content": "x"}], "tools": [1]}', "tools is a list of objects"),
    ],
)
def test_what_is_wrong_with_a_conversation_is_one_line(visit: Visit, text: str, said: str) -> None:
    page = visit.go("#/try")
    page.get_by_label("JSON", exact=True).check()
    page.get_by_label("Conversation as JSON").fill(text)
    page.get_by_role("button", name="Read").click()
    expect(page.locator("form [role=status]")).to_contain_text(said)
    visit.problems = [problem for problem in visit.problems if "400" not in problem]  # what the server refuses


def test_html_in_tokens_labels_and_notes_stays_text(visit: Visit, index: Path) -> None:
    with explaining(Index(index)) as add:
        add("sae_delta", 9, {"label": HOSTILE, "client": HOSTILE, "detection": 1.0, "fuzzing": None, "samples": {}})
    page = visit.go("#/sae/sae_delta/9")
    expect(page.locator(".lead")).to_contain_text(HOSTILE)
    page.get_by_label("Notes on this latent").fill(HOSTILE)
    page.get_by_role("button", name="Bookmark").click()
    expect(page.locator(".star")).to_have_attribute("aria-pressed", "true")
    for route in ("#/notes", "#/sae/sae_delta?q=onerror", "#/search?q=onerror", LATENT):
        page = visit.go(route)
        expect(page.locator("main")).to_contain_text("<script>")
        assert page.locator("main img, main script").count() == 0
    assert page.evaluate("document.querySelectorAll('script').length") == 1


def test_notes_are_exported_and_imported(visit: Visit, tmp_path: Path) -> None:
    page = visit.go("#/sae/sae_attn/7")
    page.get_by_label("Notes on this latent").fill("mine")
    with page.expect_response(lambda response: '"bookmarked":true' in (response.request.post_data or "")):
        page.get_by_role("button", name="Bookmark").click()
    page = visit.go("#/notes")
    with page.expect_download() as download:
        page.get_by_role("button", name="Export as JSON").click()
    kept = {(note["sae"], note["latent"]): note for note in json.loads(download.value.path().read_text())}
    assert kept["sae_attn", 7] == {"sae": "sae_attn", "latent": 7, "note": "mine", "bookmarked": True, "lists": []}
    file = tmp_path / "theirs.json"
    notes = {7: ["theirs"], 8: ["theirs", "of two\nlines"]}
    theirs = [{"sae": "sae_attn", "latent": latent, "note": note} for latent in notes for note in notes[latent]]
    file.write_text(json.dumps(theirs))
    for _ in range(2):  # what is there already is not written twice
        page = visit.go("#/notes")
        with page.expect_response(lambda response: "of two" in (response.request.post_data or "")):
            page.get_by_label("File of notes").set_input_files(file)
    page = visit.go("#/notes")
    note = page.locator(".hit", has_text="sae_attn / 8").locator(".written-note")
    assert note.inner_text() == "theirs\nof two\nlines"
    expect(page.locator(".hit", has_text="sae_attn / 7")).to_contain_text("mine\ntheirs")
    expect(page.locator(".hit", has_text="sae_attn / 7").locator(".star-mark")).to_have_text("★")
    file.write_text('[{"sae": 1}, null]')
    page.get_by_label("File of notes").set_input_files(file)
    expect(page.get_by_role("status")).to_have_text("theirs.json holds no notes")


def test_latents_are_put_on_lists_and_walked(visit: Visit, tmp_path: Path) -> None:
    for address in ("sae_attn/21", "sae_delta/20"):
        page = visit.go(f"#/sae/{address}")
        page.keyboard.press("l")
        page.get_by_label("Put on a list").fill("to read")
        with page.expect_response(lambda response: response.request.method == "PUT"):
            page.get_by_role("button", name="Put on list").click()
        expect(page.get_by_role("checkbox", name="to read")).to_be_checked()
    page = visit.go("#/sae/sae_delta?list=to+read")
    expect(page.locator(".latents td.latent")).to_have_text(["20"])
    page = visit.go("#/notes")
    page.get_by_role("link", name="to read").click()
    expect(page.locator("h1")).to_have_text("to read")
    _check_accessible(page, "a list")
    page.get_by_role("link", name="sae_attn / 21").click()
    expect(page.locator("h1")).to_have_text("sae_attn / 21")
    page.keyboard.press("j")
    expect(page.locator("h1")).to_have_text("sae_delta / 20")
    _check_accessible(page, "a latent of a list")
    expect(page.locator(".whereabouts")).to_contain_text("2 of 2")
    page.keyboard.press("j")
    expect(page.locator("h1")).to_have_text("sae_attn / 21")
    page = visit.go("#/notes")
    with page.expect_download() as download:
        page.get_by_role("button", name="Export as JSON").click()
    kept = json.loads(download.value.path().read_text())
    assert [one["latent"] for one in kept if "to read" in one["lists"]] == [21, 20]
    page = visit.go("#/sae/sae_delta/20")
    with page.expect_response(lambda response: response.request.method == "PUT"):
        page.get_by_role("checkbox", name="to read").uncheck()
    file = tmp_path / "lists.json"
    file.write_text(json.dumps([one for one in kept if "to read" in one["lists"]]))
    page = visit.go("#/notes")
    with page.expect_response(lambda response: "20" in response.url and response.request.method == "PUT"):
        page.get_by_label("File of notes").set_input_files(file)
    page = visit.go("#/notes?list=to%20read")
    expect(page.locator(".hit a")).to_have_text(["sae_attn / 21", "sae_delta / 20"])


def test_two_tabs_lose_nothing(visit: Visit) -> None:
    page = visit.go("#/sae/sae_attn/30")
    other = visit.context.new_page()
    other.goto(f"{visit.site}#/sae/sae_attn/30")
    for tab, text in ((page, "the one"), (other, "the other")):
        tab.get_by_label("Notes on this latent").fill(text)
        tab.get_by_label("Notes on this latent").blur()
        expect(
            tab.locator("section", has=tab.get_by_label("Notes on this latent")).get_by_role("status")
        ).to_contain_text("kept")
    expect(other.get_by_label("Notes on this latent")).to_have_value("the one\nthe other")
    other.get_by_role("button", name="Bookmark").click()
    page.get_by_label("Notes on this latent").fill("the one, more")
    with page.expect_response(lambda response: response.ok and response.request.method == "PUT"):
        page.get_by_label("Notes on this latent").blur()
    expect(page.get_by_label("Notes on this latent")).to_have_value("the one\nthe other\nthe one, more")
    page = visit.go("#/sae/sae_attn/30")
    expect(page.get_by_label("Notes on this latent")).to_have_value("the one\nthe other\nthe one, more")
    expect(page.locator(".star")).to_have_attribute("aria-pressed", "true")
    visit.problems = [problem for problem in visit.problems if "409" not in problem]  # Chromium reports the answer


def test_results_are_listed_and_open_their_latents(visit: Visit) -> None:
    page = visit.go("")
    page.get_by_role("link", name="Results").click()
    names = ["contrast", ODD_NAME, "checkpoints", "test", "scenarios", "monitor"]
    expect(page.locator(".hit.result a")).to_have_text(names)
    page.get_by_role("link", name="scenarios").click()
    expect(page.locator("svg.doses circle")).to_have_count(4)
    page.locator("table a", has_text=f"sae_delta / {PLANTED_LATENT}").first.click()
    expect(page.locator("h1")).to_have_text(f"sae_delta / {PLANTED_LATENT}")


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("contrast", ["0.80 to 0.95", "without any SAE", "probe on raw rows", "What else differs", "mean tokens"]),
        ("test", ["does not hold", "5 % to 20 %", "recall at 0.1 %", "too few", "words"]),
        ("scenarios", ["random direction", "beyond random", "+30 %", "-25 %"]),
        ("checkpoints", ["on which tokens", "0.0500 to 0.1500", "+2 %", "<script>"]),
        (ODD_NAME, ["rate in b", "66.4", "<script>"]),
    ],
)
def test_results_show_latents_and_controls(visit: Visit, name: str, shown: list[str]) -> None:
    page = visit.go(f"#/results/{quote(name)}")
    expect(page.locator("h1")).to_have_text(name)
    for words in shown:
        expect(page.locator("main")).to_contain_text(words)
    expect(page.locator("table a", has_text=f"sae_delta / {PLANTED_LATENT}").first).to_be_visible()
    expect(page.locator(".named .chip", has_text=PLANTED.strip()).first).to_be_visible()
    assert page.locator("main img, main script").count() == 0


def test_a_long_table_is_shortened(visit: Visit) -> None:
    page = visit.go("#/results/contrast")
    rows = page.get_by_role("region", name="Latents").locator("tbody tr")
    expect(rows).to_have_count(10)
    page.get_by_role("button", name="Show all").click()
    expect(rows).to_have_count(14)


def test_a_text_is_scored_by_a_monitor(visit: Visit) -> None:
    page = visit.go("#/results/monitor")
    for text, said in ((f"order{PLANTED} status", "alarm: "), ("order status", "no alarm: ")):
        page.get_by_label("Text", exact=True).fill(text)
        page.get_by_role("button", name="Score").click()
        expect(page.locator("form [role=status]")).to_contain_text(said)
        if said == "alarm: ":
            expect(page.locator("form .peak")).to_have_text(PLANTED)


def test_inline_scripts_and_foreign_connections_are_blocked(chromium: Browser, site: str) -> None:
    visit = Visit(chromium, site)
    page = visit.go("")
    page.evaluate("""() => {
        const inline = document.createElement("script");
        inline.textContent = "window.broken = true";
        document.body.append(inline);
        document.body.insertAdjacentHTML("beforeend", '<b onclick="window.broken = true">x</b>');
        document.querySelector("b").click();
    }""")
    assert page.evaluate("window.broken") is None
    assert page.evaluate("fetch('http://192.0.2.1/').then(() => 'sent', () => 'blocked')") == "blocked"
    assert any("Content Security Policy" in problem for problem in visit.problems)
    visit.context.close()


@pytest.mark.parametrize(
    ("scheme", "width", "routes"),
    [
        ("light", 1280, ROUTES),
        ("dark", 1280, [*ROUTES[1:5:3], LATENT, ODD]),
        ("light", 390, [*ROUTES[:5], *ROUTES[-2:]]),
        pytest.param("dark", 1280, [*ROUTES, ODD], marks=pytest.mark.slow),
        pytest.param("light", 390, [*ROUTES, ODD], marks=pytest.mark.slow),
        pytest.param("dark", 390, [*ROUTES, ODD], marks=pytest.mark.slow),
    ],
)
def test_every_page_is_accessible_and_fits(
    chromium: Browser, site: str, scheme: str, width: int, routes: list[str]
) -> None:
    visit = Visit(chromium, site, color_scheme=scheme, viewport={"width": width, "height": 900})
    for route in routes:
        page = visit.go(route)
        if "try" in route or "find" in route:
            page.wait_for_selector(".active .entry, .figures")
        _check_accessible(page, route)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, route
    visit.close()


def _check_accessible(page: Page, route: str) -> None:
    found = Axe().run(page, options={"resultTypes": ["violations"]}).response["violations"]
    assert [(v["id"], v["nodes"][0]["html"]) for v in found] == [], route


@pytest.fixture(scope="module")
def static_site(exported: Path) -> Iterator[str]:
    with serving(Starlette(routes=[Mount("/deep/below", StaticFiles(directory=exported, html=True))])) as address:
        yield f"{address}deep/below/"


def test_the_exported_site_shows_the_same_without_a_server(chromium: Browser, static_site: str) -> None:
    visit = Visit(chromium, static_site)
    page = visit.go("")
    expect(page.locator(".card h3")).to_have_text(["sae_delta", "sae_attn"])
    page = visit.go(LATENT)
    assert set(page.locator(".contexts .peak").all_inner_texts()) == {PLANTED}
    page.locator(".contexts li").first.hover()
    page.get_by_role("button", name="whole").first.click()
    expect(page.get_by_role("region", name="The whole conversation").locator(".peak")).to_have_text(PLANTED)
    assert page.get_by_role("button", name="Steer").count() == 0
    page.get_by_role("button", name="Bookmark").click()
    page = visit.go("#/search?q=that")
    expect(page.locator(".hit a").first).to_be_visible()
    page = visit.go("#/notes")
    noted = page.locator("section", has=page.get_by_role("heading", name="Bookmarks and notes"))
    expect(noted.locator(".hit a")).to_have_text([f"sae_delta / {PLANTED_LATENT}"])
    assert "stays at home" not in page.locator("main").inner_text()
    page.get_by_role("link", name=f"sae_attn / {SHARED}").click()
    expect(page.locator(".whereabouts")).to_contain_text("1 of 1")
    assert page.get_by_label("Put on a list").count() == 0
    expect(page.get_by_role("link", name="shared", exact=True)).to_be_visible()
    expect(visit.go("#/try").locator("main")).to_contain_text("qwenscope browse")
    expect(visit.go("#/steer").locator("main")).to_contain_text("qwenscope browse")
    page.goto(f"{static_site}embed.html#/sae_delta/{PLANTED_LATENT}")
    expect(page.locator(".latent-card .peak").first).to_have_text(PLANTED)
    for route in ("#/sae/sae_delta", "#/sae/nope/1", "#/sae/sae_delta/99999"):
        visit.go(route)
    visit.problems = [problem for problem in visit.problems if "404" not in problem]  # the nope above
    visit.close()
