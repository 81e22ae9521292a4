"""Adapters in files and state dicts: names as files spell them, tensors without copies, the model card."""
