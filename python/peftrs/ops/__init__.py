"""Arithmetic that is ours: a plain torch form everywhere, and a faster one where it was measured to win."""
