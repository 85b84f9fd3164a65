"""``python -m quantlab.cli``: the same as ``quantlab``."""

from quantlab.cli.app import main

main()
