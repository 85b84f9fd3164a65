"""Memory by what it is for: what a run holds at its peak, and where."""

from __future__ import annotations

from dataclasses import dataclass, replace

from quantlab.errors import PreflightError


@dataclass(frozen=True)
class Memory:
    """Bytes that a run holds at its peak, about.

    Attributes:
        libraries: what this process holds already.
        weights: one block, and its twin where one runs beside it, or what is outside the blocks if that is more.
        states: of the suspended calibration batches.
        statistics: of the input of layers that are solved together, and the factor of the second moment.
        solving: their weight in float32, and what the method makes of it.
        movable: bytes of the statistics that can wait on the disk, one matrix of them being in use at a time.
        waiting: bytes of statistics that do; they are counted nowhere else.
    """

    libraries: int
    weights: int
    states: int
    statistics: int
    solving: int
    movable: int = 0
    waiting: int = 0

    @property
    def own(self) -> int:
        """All but the libraries."""
        return self.weights + self.states + self.statistics + self.solving

    @property
    def total(self) -> int:
        """All together."""
        return self.libraries + self.own

    @property
    def without_states(self) -> int:
        """All but the batches, which the disk can take over."""
        return self.total - self.states

    def parted(self, room: int | None) -> Needs:
        """What lies on a device with so much room (None: nobody knows), and what is left in memory.

        Raises:
            PreflightError: there is too little room even if all batches wait in memory.
        """
        needed = self.own - self.states
        if room is not None and needed > room:
            raise PreflightError(
                f"the run needs about {needed / 1e9:.2f} GB on the device ({self.weights / 1e9:.2f} for a block, "
                f"{(self.statistics + self.solving) / 1e9:.2f} to solve its largest layers) and {room / 1e9:.2f} GB "
                "are free there; choose a recipe that needs less, or --device cpu"
            )
        # What a forward makes on its way is in no estimate: it gets the other half of what is left.
        states = 0 if room is None else min(self.states, (room - needed) // 2)
        device = replace(self, libraries=0, states=states, movable=0)
        left = Memory(self.libraries, self.weights, self.states - states, statistics=0, solving=0)
        return Needs(left, device)  # a block passes through memory on its way

    def within(self, budget: int) -> Memory:
        """The same with states on disk, as many as it takes, and with statistics if that does not suffice.

        Raises:
            PreflightError: what is left is more than the budget.
        """
        waiting = self.movable if self.without_states > budget else 0
        needed, statistics = self.without_states - waiting, self.statistics - waiting
        if needed > budget:
            raise PreflightError(
                f"memory {budget / 1e9:.2f} GB: this run needs about {needed / 1e9:.2f} GB with its batches and "
                f"statistics on disk ({self.libraries / 1e9:.2f} for the libraries, {self.weights / 1e9:.2f} for a "
                f"block, {(statistics + self.solving) / 1e9:.2f} to solve its largest layers); give it that much, or "
                "choose a recipe that needs less"
            )
        states = min(self.states, budget - needed)
        return replace(self, states=states, statistics=statistics, movable=self.movable - waiting, waiting=waiting)


@dataclass(frozen=True)
class Needs:
    """What a run holds, and where.

    Attributes:
        memory: of the process.
        device: memory of the device that it computes on; None if that is the CPU.
    """

    memory: Memory
    device: Memory | None = None

    @property
    def states(self) -> int:
        """Of suspended batches, all that need not be on disk."""
        return self.memory.states + (0 if self.device is None else self.device.states)
