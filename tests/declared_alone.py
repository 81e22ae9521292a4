"""Trains, saves, loads and merges as a user does who has what peftrs declares and nothing else;
`test_declared.py` runs this.

It is given a folder with the base's state as `base.pt`. Beside that it leaves an adapter of each method in a
folder of the method's name, the merged model's state in a file of that name, and the names of the
distributions that are installed.
"""

from __future__ import annotations

import sys
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

import peftrs

LAYERS = ["up", "down"]
METHODS = {
    "lora": peftrs.LoraConfig(r=4, target_modules=LAYERS),
    "dora": peftrs.LoraConfig(r=4, target_modules=LAYERS, use_dora=True),
    "pissa": peftrs.LoraConfig(r=4, target_modules=LAYERS, init_lora_weights="pissa"),
    "ia3": peftrs.IA3Config(target_modules=LAYERS, feedforward_modules=["down"]),
    "oft": peftrs.OFTConfig(oft_block_size=4, target_modules=LAYERS),
}


class Base(nn.Module):
    """Two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).tanh())


def base(folder: Path) -> Base:
    """The user's model."""
    model = Base()
    model.load_state_dict(torch.load(folder / "base.pt"))
    return model


def trained(model: nn.Module, x: Tensor) -> float:
    """By how much the loss falls in a few steps."""
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=0.05)
    losses = []
    for _ in range(5):
        loss = (model(x) - x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses[0] - losses[-1]


def used(folder: Path, method: str, x: Tensor) -> None:
    """Goes the whole way with one method. Raises where anything goes wrong."""
    torch.manual_seed(0)
    model = peftrs.get_peft_model(base(folder), METHODS[method])
    assert trained(model, x) > 0
    model.save_pretrained(folder / method)
    again = peftrs.PeftModel.from_pretrained(base(folder), folder / method)
    with torch.no_grad():
        expected = model.eval()(x)
        torch.testing.assert_close(again(x), expected)
        merged = again.merge_and_unload()
        torch.testing.assert_close(merged(x), expected, rtol=1e-4, atol=1e-5)
    torch.save(merged.state_dict(), folder / f"{method}.pt")


def main(folder: Path) -> None:
    for library in ("numpy", "safetensors", "transformers"):
        assert find_spec(library) is None, f"{library} is here"
    for method in METHODS:
        used(folder, method, torch.randn(32, 8, generator=torch.Generator().manual_seed(1)))
    (folder / "distributions").write_text("\n".join(one.name for one in distributions()))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
