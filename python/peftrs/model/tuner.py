"""What stands between `PeftModel` and the user's model, so that names read `base_model.model.<path>` as they
do in files.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from peftrs import registry
from peftrs.bases.kinds import LayerKind
from peftrs.config import PeftConfig
from peftrs.convert.weighted import add_weighted
from peftrs.core import manage
from peftrs.core.manage import progress
from peftrs.core.merge import Track
from peftrs.core.tree import adapted_layers, embedding_layers
from peftrs.errors import PeftrsWarning
from peftrs.model.adapters import Adapters
from peftrs.model.kbit import no_longer_quantized
from peftrs.model.recast import check_castable, recast
from peftrs.planning.attach import attach


class Tuner(Adapters):
    """A model with adapters in it. What it does not know itself, it asks the model for."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model" or "model" not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self.model, name)

    def forward(self, *inputs: Any, **options: Any) -> Any:
        return self.model(*inputs, **options)

    def get_base_model(self) -> nn.Module:
        return self.model

    @property
    def prefix(self) -> str:
        """How the names of the first adapter's tensors begin."""
        config = next(iter(self.peft_config.values()), None)
        return "" if config is None else registry.method(cast(str, config.peft_type)).prefix

    @property
    def targeted_module_names(self) -> list[str]:
        """The layers that adapters change."""
        return [name for name, kind in self._targets() if kind is not LayerKind.PARAMETER]

    @property
    def targeted_parameter_names(self) -> list[str]:
        """The bare parameters that adapters change (`target_parameters`)."""
        return [name for name, kind in self._targets() if kind is LayerKind.PARAMETER]

    def _targets(self) -> Iterable[tuple[str, LayerKind]]:
        for layer in adapted_layers(self.model):
            if any(fitted.method.public for fitted in layer.adapters.values()):
                yield layer.spec.name, layer.spec.kind

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        *,
        config: PeftConfig,
        **options: Any,
    ) -> None:
        """Puts one more adapter into the model; see `peftrs.planning.attach`."""
        attach(
            model,
            config,
            adapter_name,
            autocast_adapter_dtype=autocast_adapter_dtype,
            low_cpu_mem_usage=low_cpu_mem_usage,
            **options,
        )

    def disable_adapter_layers(self) -> None:
        """Makes the model run without its adapters.

        Biases that an adapter trains stay trained, with a warning.
        """
        self.warn_of_biases()
        manage.set_enabled(self.model, False)

    def enable_adapter_layers(self) -> None:
        """Makes the active adapters act again."""
        manage.set_enabled(self.model, True)

    def warn_of_biases(self) -> None:
        """Warns where turning adapters off does not give the base model, since biases of it were trained."""
        for name in self.active_adapters:
            bias = self.peft_config[name].bias
            if bias != "none":
                warnings.warn(
                    f"Careful, disabling adapter layers with bias configured to be {bias!r} does not produce"
                    " the same output as the base model would without adaption.",
                    PeftrsWarning,
                    stacklevel=4,
                )

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
    ) -> None:
        """Adds a frozen adapter made of others of one kind, with a weight each, which may be negative.

        For LoRA, of what each changes in a layer:

        - "exact", "linear": the weighted sum itself. "cat": the same, of the sum of the ranks even where the
          layer has less.
        - "svd": the best approximation of the sum of rank `svd_rank` (by default the largest among the
          sources), from the factors.
        - "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd": the same of changes of which
          only the part `density` of the entries is kept (see `peftrs.convert.task_vectors`).
        - "ties", "dare_linear", "dare_ties", "magnitude_prune": both factors so, one by one; the sources need
          the same rank.

        Biases of LoRAs are put together likewise; layers keep ranks of their own. `svd_clamp` cuts off
        entries of the factors beyond that quantile, `svd_driver` is torch's choice of solver on CUDA,
        `svd_full_matrices` has no effect: none are formed. For IA3 the result is the weighted sum of the
        vectors. Under `peftrs.compat.install()` "linear" adds up the factors as PEFT does, whose product is
        another change. Raises `AdapterError`, with nothing changed, for what cannot be combined (DoRA).
        """
        add_weighted(
            self.model,
            adapter_name,
            adapters,
            weights,
            kind=combination_type,
            rank=svd_rank,
            clamp=svd_clamp,
            driver=svd_driver,
            density=density,
            sign=majority_sign_method,
        )

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        dtype: torch.dtype | None = None,
    ) -> nn.Module:
        """The user's model with adapters (the active ones unless named) merged into its weights, and nothing
        of ours left.

        Quantized layers are quantized again: a warning tells what that left of the update, and where it is
        less than half the merge is refused, with nothing changed. With `dtype`, such as `torch.bfloat16`,
        every quantized layer of the model becomes a dense one instead, and all of the model is of that dtype,
        but for what transformers would keep in another in a model loaded in it; the model's config says the
        dtype, and no longer that it is quantized.
        """
        return self._unloaded(merged=True, names=adapter_names, progressbar=progressbar, dtype=dtype)

    def unload(self) -> nn.Module:
        """The user's model without its adapters; modules that were trained whole stay in it."""
        return self._unloaded(merged=False)

    def _unloaded(
        self,
        *,
        merged: bool,
        names: list[str] | None = None,
        progressbar: bool = False,
        dtype: torch.dtype | None = None,
    ) -> nn.Module:
        model = self.model
        track: Track = partial(progress, doing="Merging") if progressbar else iter
        if dtype is not None:
            check_castable(model, dtype)
        manage.unload(model, merged=merged, names=names, track=track, dtype=dtype)
        if dtype is not None:
            no_longer_quantized(model)
            recast(model, dtype)
        model.__dict__.pop("peft_config", None)
        untie(model)
        return model


def untie(model: nn.Module) -> None:
    """Ties the input and output embeddings again where they are equal, and says in the config where they
    differ now.
    """
    settings = getattr(model, "config", None)
    if not getattr(settings, "tie_word_embeddings", False):
        return
    ends = embedding_layers(model)
    first, last = (cast("Tensor | None", getattr(one, "weight", None)) for one in ends)
    if first is None or last is None or first.data_ptr() == last.data_ptr():
        return
    if torch.equal(first, last):
        # Merged alike, they are one again: some models compute otherwise where they are said to differ.
        cast(Any, ends[1]).weight = first
        return
    cast(Any, settings).tie_word_embeddings = False
    warnings.warn(
        "the input and output embeddings differ now: tie_word_embeddings is set to False in the model's"
        " config",
        PeftrsWarning,
        stacklevel=4,
    )
