"""Run by a peer library's own interpreter: load an exported SAE, encode and decode, save again with the peer's code.

python peer_codes.py saelens|sparsify|dictionary_learning FOLDER ROWS.pt RESULT.pt RESAVED_FOLDER
"""

import json
import sys
from pathlib import Path

import torch


def saelens(folder: Path, x_BD: torch.Tensor, resaved: Path) -> tuple[torch.Tensor, torch.Tensor]:
    from sae_lens import SAE

    sae = SAE.load_from_disk(str(folder))
    sae.save_model(str(resaved))
    codes_BN = sae.encode(x_BD)
    return codes_BN, sae.decode(codes_BN)


def sparsify(folder: Path, x_BD: torch.Tensor, resaved: Path) -> tuple[torch.Tensor, torch.Tensor]:
    from sparsify import SparseCoder

    sae = SparseCoder.load_from_disk(folder)
    sae.save_to_disk(resaved)
    encoded = sae.encode(x_BD)
    codes_BN = torch.zeros(len(x_BD), sae.num_latents).scatter(1, encoded.top_indices, encoded.top_acts)
    return codes_BN, sae.decode(encoded.top_acts, encoded.top_indices)


def dictionary_learning(folder: Path, x_BD: torch.Tensor, resaved: Path) -> tuple[torch.Tensor, torch.Tensor]:
    from dictionary_learning.trainers.top_k import AutoEncoderTopK

    sae = AutoEncoderTopK.from_pretrained(str(folder / "ae.pt"))
    resaved.mkdir(parents=True)
    torch.save(sae.state_dict(), resaved / "ae.pt")
    (resaved / "config.json").write_text(
        json.dumps({"trainer": json.loads((folder / "config.json").read_text())["trainer"]})
    )
    codes_BN = sae.encode(x_BD)
    return codes_BN, sae.decode(codes_BN)


if __name__ == "__main__":
    torch.set_num_threads(1)
    name, folder, rows, result, resaved = sys.argv[1:]
    with torch.no_grad():
        codes, reconstruction = globals()[name](Path(folder), torch.load(rows, weights_only=True), Path(resaved))
    torch.save({"codes": codes, "reconstruction": reconstruction}, result)
