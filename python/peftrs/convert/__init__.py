"""One adapter, or several, into another."""
