"""The ``quantlab`` command: parses, calls the API, prints.

Importing this imports neither torch nor transformers: each command imports what it needs when it runs.
"""

from quantlab.cli.app import main

__all__ = ["main"]
