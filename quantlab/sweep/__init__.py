"""Many variants of one model, a record each."""

from quantlab.sweep.run import Sweep, read_sweep, sweep
from quantlab.sweep.space import Space, load_space, ready_spaces
from quantlab.sweep.workbench import Setup

__all__ = ["Setup", "Space", "Sweep", "load_space", "read_sweep", "ready_spaces", "sweep"]
