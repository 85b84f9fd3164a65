"""Short beginnings whose greedy continuations are compared: facts, prose, code."""

PROMPTS = (
    "The capital of France is",
    "Once upon a time there was a",
    "def fibonacci(n):\n    ",
    "In 1969, the first humans",
    "Water boils at 100 degrees",
)
