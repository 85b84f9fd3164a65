"""Models on disk: reading them, writing them, and what transformers must know to load the result."""
