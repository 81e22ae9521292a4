"""One file a method: its config, then its maths.

The registry imports them by name when they are asked for.
"""
