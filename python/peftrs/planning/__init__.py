"""What a config would do to a model, and doing it."""
