"""The embedded world's model as vLLM takes it: `python widened.py MODEL OUT` writes an equal one.

vLLM's CPU kernels know no heads of 16, and it wants the vision tower's weights under the names that published models
have. Each head gets 32 dimensions, the new ones zero; old ones stand where rotary embedding turns them as before, and
the queries are longer by √2, since attention divides by √32 now.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

OLD, NEW = 16, 32


def widen(model: Path, out: Path) -> None:
    shutil.copytree(model, out)
    config = json.loads((out / "config.json").read_text())
    config["text_config"]["head_dim"] = NEW
    (out / "config.json").write_text(json.dumps(config))
    weights = {published(name): wider(name, tensor) for name, tensor in load_file(out / "model.safetensors").items()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})


def published(name: str) -> str:
    return name.replace("vision_tower.", "vision_tower.vision_model.", 1)


def wider(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if "language_model" not in name or "self_attn" not in name:
        return tensor
    # Dimension j of the first half turns with frequency j of 8, which is frequency 2j of 16; so does its partner.
    half = torch.arange(0, NEW // 2, NEW // OLD)
    places = torch.cat([half, half + NEW // 2])
    by_output = "o_proj" not in name
    rows = tensor if by_output else tensor.T
    heads = rows.reshape(-1, OLD, rows.shape[-1])
    wide = heads.new_zeros(len(heads), NEW, rows.shape[-1])
    wide[:, places] = heads * (NEW / OLD) ** 0.5 if "q_proj" in name else heads
    flat = wide.flatten(0, 1)
    return flat if by_output else flat.T.contiguous()


if __name__ == "__main__":
    widen(Path(sys.argv[1]), Path(sys.argv[2]))
