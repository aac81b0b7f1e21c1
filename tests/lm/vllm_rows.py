"""python vllm_rows.py MODEL DTYPE CONVERSATIONS OUT: rows of the first layers of a checkpoint, by vLLM (test_vllm.py).

CONVERSATIONS is JSON: token ids. OUT gets rows per layer, and how many tokens each step of the engine took.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from qwenscope.lm.sites import Site
from qwenscope.lm.vllm.engine import VllmModel
from qwenscope.lm.vllm.parity import sample_rows
from qwenscope.recipe import LMRecipe

MAX_LENGTH, BATCH_TOKENS = 200, 400


def main(model: str, dtype: Any, layers: str, conversations: str, out: str) -> None:
    lm = LMRecipe(model=model, dtype=dtype, device="cpu")
    hooked = [Site.of(layer) for layer in json.loads(layers)]
    source = VllmModel(lm, hooked, max_length=MAX_LENGTH, batch_tokens=BATCH_TOKENS, weights="")
    scheduler = source._engine.llm_engine.engine_core.engine_core.scheduler
    schedule, steps = scheduler.schedule, []

    def noted(*args: Any, **kwargs: Any) -> Any:
        output = schedule(*args, **kwargs)
        steps.append(output.total_num_scheduled_tokens)
        return output

    scheduler.schedule = noted
    token_ids = [np.array(ids, np.int32) for ids in json.loads(Path(conversations).read_text())]
    first, again = (sample_rows(source, token_ids, hooked, BATCH_TOKENS) for _ in range(2))
    assert all(torch.equal(first[layer], again[layer]) for layer in hooked), "the same batches gave other bits"
    assert not source._connector.rows, "rows were left behind"
    save_file({str(site.layer): rows for site, rows in first.items()}, out)
    Path(out).with_suffix(".json").write_text(json.dumps(steps))
    source.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
