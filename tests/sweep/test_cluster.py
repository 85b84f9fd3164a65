from __future__ import annotations

import os
import sys
from importlib.util import find_spec

import pytest

from quantlab.errors import QuantlabError
from quantlab.sweep import cluster, sweep

FIGURES = ("bits", "ppl", "kl", "agreement", "ece")


def figures(found):
    return {r["variant"]: {name: r["measures"].get(name) for name in FIGURES} for r in found.records}


needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: pip install 'quantlab[ray]'")


@pytest.fixture(scope="module")
def local_ray():
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@needs_ray
def test_side_by_side_gives_the_same_records(local_ray, swept, place, space, setup, tmp_path):
    found = sweep(place / "model", space, tmp_path / "out", setup=setup, runner=cluster.runner())
    assert figures(found) == figures(swept)
    assert [record["variant"] for record in found.records] == [record["variant"] for record in swept.records]


@needs_ray
def test_a_lost_worker_s_variant_is_run_again(local_ray, swept, place, space, setup, tmp_path, monkeypatch):
    true, lost = cluster._record, tmp_path / "lost"

    def dies_once(setup, candidate, key):
        if candidate.name == "int3/32 rtn" and not lost.exists():
            lost.touch()
            os._exit(1)
        return true(setup, candidate, key)

    monkeypatch.setattr(cluster, "_record", dies_once)
    found = sweep(place / "model", space, tmp_path / "out", setup=setup, runner=cluster.runner())
    assert lost.exists()
    assert not found.failed
    assert figures(found) == figures(swept)


@needs_ray
def test_a_variant_that_always_kills_its_worker_fails_alone(local_ray, place, space, setup, tmp_path, monkeypatch):
    true = cluster._record

    def dies(setup, candidate, key):
        if candidate.name == "int3/32 rtn":
            os._exit(1)
        return true(setup, candidate, key)

    monkeypatch.setattr(cluster, "_record", dies)
    some = {**space, "grids": [{"bits": [3, 4], "groups": [32]}], "baselines": []}
    found = sweep(place / "model", some, tmp_path / "out", setup=setup, runner=cluster.runner())
    assert [record["variant"] for record in found.failed] == ["int3/32 rtn"]
    assert "worker was lost" in found.failed[0]["error"]
    assert [record["variant"] for record in found.measured] == ["original", "int4/32 rtn"]


def test_without_ray_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(QuantlabError, match=r"pip install 'quantlab\[ray\]'"):
        cluster.runner()
