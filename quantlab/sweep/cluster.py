"""Variants of a sweep side by side, through Ray: several on one machine, or on many.

A variant is a task, with a GPU of its own where the sweep is on GPUs. Every worker process makes the original's
predictions its own where it finds no record of them in the sweep's folder, so machines may share that folder or not;
they must know the model by the same name. Records come back to the process that called, which alone writes them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

from quantlab.errors import QuantlabError
from quantlab.sweep.run import Job, Runner, Watcher
from quantlab.sweep.space import Candidate
from quantlab.sweep.workbench import Setup, Workbench

RETRIES = 3
"""How often a variant is run again whose worker was lost."""


def runner(address: str | None = None) -> Runner:
    """What runs the variants of a sweep on Ray.

    Args:
        address: of a cluster, ``host:port`` or ``auto``; None: a Ray of its own on this machine.

    Raises:
        QuantlabError: Ray is not installed.
    """
    try:
        import ray  # noqa: F401
    except ImportError as error:
        raise QuantlabError("--ray: Ray is not installed; pip install 'quantlab[ray]'") from error

    def run(setup: Setup, jobs: Sequence[Job], watcher: Watcher) -> Iterator[tuple[str, dict[str, Any]]]:
        return _on_ray(address, replace(setup, threads=setup.threads or 1), jobs, watcher)

    return run


def _on_ray(
    address: str | None, setup: Setup, jobs: Sequence[Job], watcher: Watcher
) -> Iterator[tuple[str, dict[str, Any]]]:
    import ray

    Workbench(setup, lambda doing: watcher.working("original", doing))  # recorded once, before anybody needs it
    own = not ray.is_initialized()
    if own:
        try:
            ray.init(address=address, log_to_driver=False, include_dashboard=None if address else False)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise QuantlabError(f"--ray-address {address}: cannot be joined: {error}") from error
    try:
        gpus = 0 if setup.device == "cpu" else 1  # a worker sees its own alone
        task = ray.remote(num_cpus=setup.threads, num_gpus=gpus, max_retries=RETRIES)(_record)
        running = {task.remote(setup, candidate, key): (candidate, key) for candidate, key in jobs}
        for count in itertools.count(1):
            if not running:
                return
            watcher.working("ray", f"{len(running)} variants to go, {count - 1} done")
            (ended, *_), _ = ray.wait(list(running), num_returns=1)
            candidate, key = running.pop(ended)
            yield key, _result(ended, candidate)
    finally:
        if own:
            ray.shutdown()


def _result(reference: Any, candidate: Candidate) -> dict[str, Any]:
    import ray

    try:
        return dict(ray.get(reference))
    except ray.exceptions.RayError as error:  # lost more often than it is run again
        about: dict[str, Any] = {"variant": candidate.name, "kind": candidate.kind, "labels": candidate.labels()}
        said = " ".join(str(error).split())
        return {
            **about,
            "error": f"its worker was lost {RETRIES + 1} times: {said}",
            "error_kind": type(error).__name__,
        }


def _record(setup: Setup, candidate: Candidate, key: str) -> dict[str, Any]:
    """One variant, in a worker."""
    return _workbench(_Same(setup)).record(candidate, key, lambda doing: None)  # noqa: ARG005


class _Same:
    """A setup that is found again by its text: it holds mappings, which have no hash."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup

    def __hash__(self) -> int:
        return hash(repr(self.setup))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and repr(self.setup) == repr(other.setup)


@lru_cache(maxsize=1)
def _workbench(same: _Same) -> Workbench:
    return Workbench(same.setup)
