"""Examples that run: each folder is one, started with ``python -m examples.<folder>.demo``."""
