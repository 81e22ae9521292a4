"""Optimizers for LoRA: torch's own and others' with what an adapter's two factors call for."""

from peftrs.train.lora_fa import create_lorafa_optimizer
from peftrs.train.lora_plus import create_loraplus_optimizer
from peftrs.train.riemannian import create_riemannian_optimizer

__all__ = ["create_lorafa_optimizer", "create_loraplus_optimizer", "create_riemannian_optimizer"]
