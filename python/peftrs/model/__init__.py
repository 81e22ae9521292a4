"""Adapters on whole models: `PeftModel` and its task classes, loading and saving, and the functions around
them.
"""
