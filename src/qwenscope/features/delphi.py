"""Explanations as a results folder of delphi (eai-delphi 0.1), which its analysis reads."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from qwenscope.errors import FormatError
from qwenscope.features.store import Index, read_explanations
from qwenscope.files import whole_folder, write_json


def export_delphi(index: Index, out: Path) -> int:
    """Write all explanations as a results folder of delphi (eai-delphi 0.1), which its analysis reads.

    explanations/, scores/detection/ and scores/fuzz/ hold a file per latent, log/hookpoint_firing_counts.pt how often
    each latent fired, run_config.json the hook points. These are named layers.22.sae_delta_mid: delphi finds a hook
    point's files by a part of their name, and sae_delta_mid alone is a part of sae_delta_mid_pos1.

    Returns:
        The number of latents written.

    Raises:
        FormatError: there are no explanations, or `out` is not empty.
    """
    records = list(read_explanations(index))
    if not records:
        raise FormatError(f"{index.folder} holds no explanations; write some with `qwenscope explain`")
    with whole_folder(out) as folder:
        for name in ("explanations", "scores/detection", "scores/fuzz"):
            (folder / name).mkdir(parents=True)
        for sae_id, latent, record in records:
            file = f"{_hook_point(index, sae_id)}_latent{latent}.txt"
            (folder / "explanations" / file).write_text(json.dumps(record["label"], ensure_ascii=False), "utf-8")
            for score, name in (("detection", "detection"), ("fuzzing", "fuzz")):
                if record[score] is not None:
                    samples = json.dumps(record["samples"][score], ensure_ascii=False)
                    (folder / "scores" / name / file).write_text(samples, "utf-8")
        names = {sae_id: _hook_point(index, sae_id) for sae_id in sorted({sae_id for sae_id, _, _ in records})}
        (folder / "log").mkdir()
        torch.save({name: _fired(index, id) for id, name in names.items()}, folder / "log/hookpoint_firing_counts.pt")
        write_json(folder / "run_config.json", {"hookpoints": list(names.values())})
    return len(records)


def _hook_point(index: Index, sae_id: str) -> str:
    return f"layers.{index.saes[sae_id]['layer']}.{sae_id}"


def _fired(index: Index, sae_id: str) -> torch.Tensor:
    """int64 [N], tokens on which each latent fired."""
    shares_N = torch.tensor(index.table(sae_id)["density"], dtype=torch.float64)
    fired_N: torch.Tensor = (shares_N * index.saes[sae_id]["tokens"]).round().long()
    return fired_N
