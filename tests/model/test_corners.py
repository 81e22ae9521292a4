"""Where two features meet: each of these once gave a wrong result, a crash or a half-changed model."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from peftrs import (
    AdapterError,
    ConfigError,
    LoraConfig,
    MergeError,
    OFTConfig,
    PeftModel,
    PeftrsWarning,
    get_peft_model,
    inject_adapter_in_model,
)
from peftrs.compat import functional
from peftrs.methods.oft import Oft


class Small(nn.Module):
    def __init__(self, padding: int | None = None) -> None:
        super().__init__()
        self.emb = nn.Embedding(12, 8, padding_idx=padding)
        self.lin = nn.Linear(8, 8)
        self.blk = nn.Module()
        self.blk.lin = nn.Linear(8, 8)
        self.head = nn.Linear(8, 4)

    def get_input_embeddings(self) -> nn.Module:
        return self.emb

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.blk.lin(self.lin(self.emb(tokens)).tanh()))


TOKENS = torch.tensor([[2, 3, 5, 2]])


def stir(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("padding", [0, 5])
def test_every_trained_row_trains_whatever_the_padding(padding: int) -> None:
    model = get_peft_model(Small(padding), LoraConfig(target_modules=["lin"], trainable_token_indices=[2, 3]))
    model(TOKENS).square().sum().backward()
    rows = model.base_model.model.emb.adapters["default"]["token_adapter.trainable_tokens_delta"]
    assert (rows.grad.abs().sum(1) > 0).all()


def test_adapters_that_replace_the_same_rows_do_not_act_together() -> None:
    model = get_peft_model(Small(), LoraConfig(target_modules=["lin"], trainable_token_indices=[2, 3]))
    for name, tokens in {"apart": [4], "again": [3, 5]}.items():
        model.add_adapter(name, LoraConfig(target_modules=["lin"], trainable_token_indices=tokens))
    model.base_model.set_adapter(["default", "apart"])
    with pytest.raises(AdapterError, match=r"emb: 2 adapters each replace the rows of tokens \[3\]"):
        model.base_model.set_adapter(["default", "again"])
    with pytest.raises(AdapterError, match=r"tokens \[3\]"):
        model.base_model.model.emb.set_adapter(["default", "again"])
    with pytest.raises(MergeError, match=r"tokens \[3\]"):
        model.merge_adapter(["default", "again"])
    assert model.active_adapters == ["default", "apart"]
    assert not model.base_model.model.emb.merged


def test_trained_rows_reach_embeddings_that_share_the_table() -> None:
    base = Small()
    base.other = nn.Embedding(12, 8)
    base.other.weight = base.emb.weight
    model = get_peft_model(base, LoraConfig(target_modules=["lin"], trainable_token_indices=[2]))
    stir(model)
    inner = model.base_model.model
    assert torch.equal(inner.other(TOKENS), inner.emb(TOKENS))
    assert not torch.equal(inner.other(TOKENS)[0, 0], base.other.base_layer.weight[2])


def test_a_module_is_adapted_or_trained_whole_not_both() -> None:
    both = get_peft_model(Small(), LoraConfig(target_modules=["lin", "head"], modules_to_save=["head"]))
    assert [name for name, _ in both.named_parameters() if "head" in name and "lora_" in name] == []
    model = get_peft_model(Small(), LoraConfig(target_modules=["head"]), "a")
    with pytest.raises(ConfigError, match="head: holds layers that other adapters change"):
        model.add_adapter("b", LoraConfig(target_modules=["blk.lin"], modules_to_save=["head"]))


def test_a_merge_that_breaks_off_leaves_nothing_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    model = stir(get_peft_model(Small(), OFTConfig(oft_block_size=4, target_modules=["lin"])))
    before, calls, apply = model(TOKENS), [], Oft.apply

    def fails(self: Oft, adapter: object, affine: object) -> object:
        calls.append(adapter)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("no more")
        return apply(self, adapter, affine)  # type: ignore[arg-type]

    monkeypatch.setattr(Oft, "apply", fails)
    with pytest.raises(torch.OutOfMemoryError):
        model.merge_adapter()
    assert not any(status.merged_adapters for status in model.get_layer_status())
    assert torch.equal(model(TOKENS), before)


def test_choosing_the_active_adapter_takes_a_merged_one_out() -> None:
    model = get_peft_model(Small(), LoraConfig(target_modules=["lin"], init_lora_weights=False), "a")
    model.add_adapter("b", LoraConfig(target_modules=["lin"], init_lora_weights=False))
    before = model(TOKENS)
    model.merge_adapter(["b"])
    with pytest.warns(PeftrsWarning, match="unmerged"):
        model.set_adapter("a")
    assert torch.equal(model(TOKENS), before)


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.mha(x, x, x, need_weights=False)[0]


def test_attention_without_its_merged_adapter_is_the_base() -> None:
    base, x = Attends(), torch.randn(2, 3, 8)
    plain = base(x)
    model = stir(get_peft_model(base, LoraConfig(target_modules=["mha"])))
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.allclose(model(x), plain, atol=1e-6)


def test_an_attention_adapter_summed_alone_is_itself() -> None:
    model = stir(get_peft_model(Attends(), LoraConfig(target_modules=["mha"])))
    x = torch.randn(2, 3, 8)
    before = model(x)
    model.add_weighted_adapter(["default"], [1.0], "same", "linear")
    model.set_adapter("same")
    assert torch.allclose(model(x), before, atol=1e-5)


@pytest.mark.filterwarnings("ignore:adapter .* was active:peftrs.errors.PeftrsWarning")
def test_deleting_leaves_layers_that_go_their_own_way_an_adapter() -> None:
    model = get_peft_model(Small(), LoraConfig(target_modules=["lin"]), "a")
    model.add_adapter("b", LoraConfig(target_modules=["lin"]))
    layers = [model.base_model.model.lin, model.base_model.model.blk.lin]
    for layer in layers:
        layer.set_adapter("b")
    functional.delete_adapter(model.base_model.model, "b")
    assert [layer.active_adapters for layer in layers] == [["a"], ["a"]]
    layers[0].enable_adapters(False)
    model.add_adapter("c", LoraConfig(target_modules=["lin"]))
    functional.delete_adapter(model.base_model.model, "a")
    assert layers[0].disable_adapters


def test_a_state_dict_names_its_layers_exactly() -> None:
    model = Small()
    inject_adapter_in_model(
        LoraConfig(target_modules=["lin"]),
        model,
        state_dict=dict.fromkeys(["lin.lora_A.weight"], torch.zeros(8, 8)),
    )
    assert hasattr(model.lin, "lora_A")
    assert isinstance(model.blk.lin, nn.Linear)


@pytest.mark.parametrize("config", [{"bias": "lora_only", "lora_bias": True}, {"init_lora_weights": "pissa"}])
def test_what_is_saved_while_merged_loads_as_it_was(config: dict[str, object], tmp_path: Path) -> None:
    base = Small()
    fresh = copy.deepcopy(base)
    model = stir(get_peft_model(base, LoraConfig(target_modules=["lin"], **config)))
    before = model(TOKENS)
    model.merge_adapter()
    model.save_pretrained(tmp_path)
    assert torch.allclose(PeftModel.from_pretrained(fresh, tmp_path)(TOKENS), before, atol=1e-6)


def test_a_start_from_the_base_ignores_what_is_merged_and_needs_the_weights(tmp_path: Path) -> None:
    base = Small()
    fresh = copy.deepcopy(base)
    model = stir(get_peft_model(base, LoraConfig(target_modules=["lin"]), "a"))
    model.merge_adapter()
    model.add_adapter("b", LoraConfig(target_modules=["lin"], init_lora_weights="pissa"))
    model.unmerge_adapter()
    model.set_adapter("b")
    stir(model)
    model.save_pretrained(tmp_path, selected_adapters=["b"])
    assert torch.allclose(PeftModel.from_pretrained(fresh, tmp_path / "b")(TOKENS), model(TOKENS), atol=1e-6)
    with pytest.raises(ConfigError, match="needs the base's weights"):
        get_peft_model(Small().to("meta"), LoraConfig(target_modules=["lin"], init_lora_weights="pissa"))
    with pytest.warns(PeftrsWarning, match="negative"):
        config = LoraConfig(target_modules=["lin"], init_lora_weights="olora", lora_alpha=-8)
    with pytest.raises(ConfigError, match="lora_alpha=-8"):
        get_peft_model(Small(), config)


def test_a_model_that_has_adapters_can_be_given_as_the_base(tmp_path: Path) -> None:
    model = stir(get_peft_model(Small(), LoraConfig(target_modules=["lin"])))
    model.save_pretrained(tmp_path)
    both = PeftModel.from_pretrained(model, tmp_path, adapter_name="again")
    both.set_adapter("again")
    assert torch.allclose(both(TOKENS), model(TOKENS))
    assert sorted(both.peft_config) == ["again", "default"]
