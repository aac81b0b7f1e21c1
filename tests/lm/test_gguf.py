"""Language models in one GGUF file: a tiny one that is written here, against the same model as a folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2Config, Qwen2ForCausalLM

from qwenscope.errors import ModelError
from qwenscope.files import public_name, sha256
from qwenscope.lm import gguf as reading
from qwenscope.lm.forward import final_hidden, logits
from qwenscope.lm.load import load_config, load_language_model, load_tokenizer
from qwenscope.lm.sites import Site
from qwenscope.recipe import LMRecipe

gguf = pytest.importorskip("gguf", reason="GGUF files need the extra gguf")
if reading.too_old():
    pytest.skip("the extra gguf needs a newer transformers", allow_module_level=True)
BITS = gguf.GGMLQuantizationType.Q8_0
LAYERS, WIDTH, HEADS = 3, 64, 2
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def gguf_name(name: str) -> str:
    """llama.cpp's name of a parameter."""
    for ours, theirs in {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}.items():
        if name.startswith(ours):
            return name.replace(ours, theirs)
    layer, _, rest = name.removeprefix("model.layers.").partition(".")
    module, _, kind = rest.rpartition(".")
    return f"blk.{layer}.{NAMES[module]}.{kind}"


@pytest.fixture(scope="module")
def model() -> Qwen2ForCausalLM:
    config = Qwen2Config(
        vocab_size=260,
        hidden_size=WIDTH,
        intermediate_size=128,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=1,
        tie_word_embeddings=False,
        initializer_range=0.1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = Qwen2ForCausalLM(config).eval().requires_grad_(False)
    for parameter in made.parameters():
        if parameter.ndim == 2:
            parameter.copy_(torch.from_numpy(gguf.dequantize(gguf.quantize(parameter.numpy(), BITS), BITS)))
    return made


@pytest.fixture(scope="module")
def file(model: Qwen2ForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.Q8_0.gguf"
    writer = gguf.GGUFWriter(path, "qwen2")
    config = model.config
    writer.add_name("tiny")
    writer.add_context_length(512)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    tokens = [*sorted(ByteLevel.alphabet()), "he", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * 257 + [gguf.TokenType.CONTROL] * 3)
    writer.add_token_merges(["h e"])
    writer.add_bos_token_id(257)
    writer.add_eos_token_id(259)
    writer.add_chat_template(TEMPLATE)
    for name, tensor in model.state_dict().items():
        values = tensor.numpy()
        kind = BITS if values.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(gguf_name(name), gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_file_of_eight_bit_weights_is_the_model_of_these_weights(model: Qwen2ForCausalLM, file: Path) -> None:
    lm = load_language_model(LMRecipe(model=str(file)), lm_head=True)
    assert lm.revision == f"sha256:{sha256(file)}"
    ids = torch.arange(24).view(2, 12) * 7
    with torch.no_grad():
        want = model(input_ids=ids).logits
    got = logits(lm, final_hidden(lm, ids))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    text = lm.tokenizer.apply_chat_template([{"role": "user", "content": "he"}], tokenize=False)
    assert text == "<|im_start|>user\nhe<|im_end|>\n"
    assert lm.tokenizer("he").input_ids == [256]
    assert load_tokenizer(LMRecipe(model=str(file))).get_vocab() == lm.tokenizer.get_vocab()


def test_it_is_cut_off_like_a_folder(file: Path) -> None:
    whole = load_language_model(LMRecipe(model=str(file)))
    cut = load_language_model(LMRecipe(model=str(file)), last_layer=1)
    assert (len(cut.layers), cut.truncated) == (2, True)
    ids = torch.arange(10).view(1, 10)
    site = Site("layers.1")
    assert torch.equal(cut.streams(ids, [10], [site])[site], whole.streams(ids, [10], [site])[site])
    assert load_config(LMRecipe(model=str(file))).num_hidden_layers == LAYERS


def test_another_file_in_its_place_a_missing_package_and_a_text_are_one_line(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = LMRecipe(model=str(file), revision="sha256:" + "0" * 64)
    with pytest.raises(ModelError, match=r"tiny\.Q8_0\.gguf is another file than it was"):
        load_language_model(lm)
    junk = tmp_path / "junk.gguf"
    junk.write_text("no model")
    with pytest.raises(ModelError, match=r"junk\.gguf is no GGUF file"):
        load_language_model(LMRecipe(model=str(junk)))
    junk.write_bytes(b"GGUF" + b"\0" * 64)
    with pytest.raises(ModelError, match=r"junk\.gguf cannot be loaded: .") as caught:
        load_language_model(LMRecipe(model=str(junk)))
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(reading, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"needs the package gguf and accelerate; pip install gguf accelerate"):
        load_language_model(LMRecipe(model=str(file)))


def test_a_recipe_is_published_with_the_files_name_alone(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(file.parent.parent)
    assert public_name(f"{file.parent.name}/{file.name}") == file.name
