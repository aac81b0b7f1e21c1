"""Write docs/recipes/: what `qwenscope recipe --for MODEL` says for a well-known model of each common family.

    python bench/family_recipes.py docs/recipes

Models are described here by their sizes, so that nothing is downloaded; on a machine with the Hub the command itself
reads the model's own config and tokenizer.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer

from qwenscope.lm.standin import STANDIN_FOLDER
from qwenscope.planning.suggest import suggest


def sizes(
    width: int, layers: int, heads: int, kv_heads: int, inner: int, positions: int, **more: Any
) -> dict[str, Any]:
    """Of a dense decoder, under transformers' names."""
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": inner,
        "max_position_embeddings": positions,
        **more,
    }


QWEN3_MOE = {"head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768}
GLM = {"n_routed_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 1408, "first_k_dense_replace": 1}
OSS = {"head_dim": 64, "num_local_experts": 32, "num_experts_per_tok": 4}
MODELS: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "openai-community/gpt2": ("gpt2", False, {}),
    "EleutherAI/pythia-160m": ("gpt_neox", False, sizes(768, 12, 12, 12, 3072, 2048, vocab_size=50304)),
    "meta-llama/Llama-3.1-8B-Instruct": ("llama", True, sizes(4096, 32, 32, 8, 14336, 131072, vocab_size=128256)),
    "google/gemma-2-2b-it": ("gemma2", True, sizes(2304, 26, 8, 4, 9216, 8192, head_dim=256, vocab_size=256000)),
    "google/gemma-3-1b-it": ("gemma3_text", True, sizes(1152, 26, 4, 1, 6912, 32768, head_dim=256, vocab_size=262144)),
    "mistralai/Mistral-7B-Instruct-v0.3": ("mistral", True, sizes(4096, 32, 32, 8, 14336, 32768, vocab_size=32768)),
    "microsoft/Phi-3-mini-4k-instruct": ("phi3", True, sizes(3072, 32, 32, 32, 8192, 4096, vocab_size=32064)),
    "allenai/OLMo-2-1124-7B": ("olmo2", False, sizes(4096, 32, 32, 32, 11008, 4096, vocab_size=100352)),
    "mistralai/Mixtral-8x7B-Instruct-v0.1": ("mixtral", True, sizes(4096, 32, 32, 8, 14336, 32768, vocab_size=32000)),
    "Qwen/Qwen3-30B-A3B": ("qwen3_moe", True, sizes(2048, 48, 32, 4, 6144, 40960, vocab_size=151936, **QWEN3_MOE)),
    "Qwen/Qwen3-Next-80B-A3B-Instruct": ("qwen3_next", True, {}),
    "openai/gpt-oss-20b": ("gpt_oss", True, sizes(2880, 24, 64, 8, 2880, 131072, vocab_size=201088, **OSS)),
    "zai-org/GLM-4.5-Air": ("glm4_moe", True, sizes(4096, 46, 96, 8, 10944, 131072, vocab_size=151552, **GLM)),
    "deepseek-ai/DeepSeek-V3": ("deepseek_v3", True, {}),
}
"""{Hub id: (transformers' name of the family, whether it has a chat template, sizes that are not transformers' own)}"""


def write(model: str, folder: Path) -> None:
    """The recipe of one model, in `folder`."""
    family, chat, changes = MODELS[model]
    with tempfile.TemporaryDirectory() as temporary:
        config = AutoConfig.for_model(family, dtype="bfloat16", **changes)
        config.save_pretrained(temporary)
        tokenizer = AutoTokenizer.from_pretrained(STANDIN_FOLDER)  # nothing but its template is asked for
        if not chat:
            tokenizer.chat_template = None
        tokenizer.save_pretrained(temporary)
        text = suggest(temporary).replace(json.dumps(temporary), json.dumps(model)).replace(temporary, model)
    (folder / f"{model.rpartition('/')[2].lower()}.yaml").write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for model in MODELS:
        write(model, folder)


if __name__ == "__main__":
    main()
