"""Replicas, as `nn.DataParallel` makes one for each device, run with their own tensors, and gradients reach
the originals.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from peftrs import AdapterError, IA3Config, LoraConfig, OFTConfig, TrainableTokensConfig, get_peft_model


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 8)
        self.lin = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.lin(self.embed(x)))  # type: ignore[no-any-return]


def replicated(network: nn.Module, factor: float) -> Any:
    """What `torch.nn.parallel.replicate` makes for one device, of other values than the originals."""
    modules = list(network.modules())
    replicas: dict[nn.Module, Any] = {module: module._replicate_for_data_parallel() for module in modules}
    for module, replica in replicas.items():
        for name, child in module._modules.items():
            replica._modules[name] = None if child is None else replicas[child]
        for name, parameter in module._parameters.items():
            if parameter is None:
                replica._parameters[name] = None
            else:
                setattr(replica, name, parameter * factor)
    return replicas[network]


LORA: dict[str, Any] = {"r": 2, "init_lora_weights": False}
CONFIGS = {
    "lora": lambda: LoraConfig(
        target_modules=["embed", "lin"], modules_to_save=["head"], lora_dropout=0.0, **LORA
    ),
    "dora": lambda: LoraConfig(target_modules=["lin"], use_dora=True, **LORA),
    "tokens": lambda: TrainableTokensConfig(target_modules=["embed"], token_indices=[1, 2]),
    "ia3": lambda: IA3Config(target_modules=["lin"], feedforward_modules=[], init_ia3_weights=False),
    "oft": lambda: OFTConfig(target_modules=["lin"], r=2, oft_block_size=0, init_weights=False),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_replica_runs_with_its_own_tensors(kind: str) -> None:
    torch.manual_seed(0)
    model = get_peft_model(Net(), CONFIGS[kind]())
    x = torch.arange(6).view(2, 3)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter *= 2
    expected, found = other(x), replicated(model, 2.0)(x)
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, model(x))
    found.square().sum().backward()
    expected.square().sum().backward()
    for parameter, twin in zip(model.parameters(), other.parameters(), strict=True):
        if twin.requires_grad:
            torch.testing.assert_close(parameter.grad, 2 * twin.grad if twin.grad is not None else None)


def test_tensors_that_layers_share_are_refused() -> None:
    net: Any = Net()
    net.lin = nn.Linear(8, 6, bias=False)
    net.lin.weight = net.embed.weight
    net.config = {"tie_word_embeddings": True}
    net.get_input_embeddings, net.get_output_embeddings = lambda: net.embed, lambda: net.lin
    model = get_peft_model(net, LoraConfig(target_modules=["embed"], ensure_weight_tying=True, r=2))
    with pytest.raises(AdapterError, match="DistributedDataParallel"):
        replicated(model, 1.0)
