"""The choice of a config, and what was tuned."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("triton")

from hypothesis import given
from hypothesis import strategies as st
from quantlab_kernels.gpu import tune
from quantlab_kernels.gpu.configs import (
    TABLES,
    Device,
    GemmConfig,
    GemvConfig,
    PanelConfig,
    candidates,
    choose,
    choose_w8a8,
    shares,
    table_for,
)
from quantlab_kernels.gpu.formats import INTEGER, TABLE, TABLE16, Format
from quantlab_kernels.gpu.layout import Layout, lane_width
from quantlab_kernels.gpu.weight import prepare

H100 = Device("sm_90", 132)
INT4 = Format(4, INTEGER, -8)
SMALL = Layout.of(4, 4096, 32)


def test_one_row_is_a_gemv_several_are_a_gemm_and_many_are_panels():
    assert isinstance(choose(H100, INT4, SMALL, 4096, 1)[0], GemvConfig)
    for rows in (2, 16, 17, 64):
        config, _ = choose(H100, INT4, SMALL, 4096, rows)
        assert isinstance(config, GemmConfig)
        assert config.block_m >= rows
    for rows in (65, 4096):
        assert isinstance(choose(H100, INT4, SMALL, 4096, rows)[0], PanelConfig)


@pytest.mark.parametrize("outputs", [64, 576, 4096, 11008, 100_000])
def test_fewer_outputs_are_cut_into_more_programs(outputs):
    config, splits = choose(H100, INT4, SMALL, outputs, 1)
    programs = outputs / config.block_rows
    assert config.block_rows in (1, 8) or programs >= 7 * H100.multiprocessors
    assert programs * splits >= min(2 * H100.multiprocessors - outputs, 7 * H100.multiprocessors) or splits == 8


@pytest.mark.parametrize(
    ("architecture", "like"),
    [
        *(("sm_75", "sm_80"), ("sm_80", "sm_80"), ("sm_86", "sm_80"), ("sm_89", "sm_89"), ("sm_103", "sm_100")),
        *(("sm_121", "sm_120"), ("gfx950", "gfx942")),
    ],
)
def test_a_device_that_is_not_in_the_tables_uses_the_newest_before_it(architecture, like):
    assert table_for(architecture) is TABLES[like]


@given(
    st.sampled_from(sorted(TABLES)),
    st.integers(2, 8),
    st.sampled_from([INTEGER, TABLE, TABLE16]),
    st.sampled_from([128, 576, 4096, 11008]),
    st.integers(1, 20000),
    st.integers(1, 3000),
)
def test_shares_give_work_to_all_and_are_not_more_than_there_are_steps(
    architecture, bits, decode, columns, outputs, rows
):
    layout = Layout.of(bits, columns, 1)
    device = Device(architecture, 100)
    for config in candidates(device, Format(bits, decode), outputs, rows):
        count = shares(device, config, layout, outputs, rows)
        if isinstance(config, PanelConfig):
            assert count == 1
            continue
        lanes = config.block_lanes if isinstance(config, GemvConfig) else config.lanes(bits)
        assert 1 <= count <= -(-layout.lanes // lanes)
        if isinstance(config, GemmConfig):
            assert count == 1 or count * rows * outputs * 8 <= outputs * columns * bits / 8


def test_a_step_is_what_tensor_cores_take():
    for table in TABLES.values():
        for config in table.gemm.values():
            for bits in range(2, 9):
                lanes = config.lanes(bits)
                assert lanes & (lanes - 1) == 0
                assert 2 * lanes >= 16
                assert config.depth(bits) >= 1
                assert lanes * lane_width(bits) <= 512


def test_eight_bit_products_have_configs_for_any_rows():
    assert [choose_w8a8(H100, rows).block_m for rows in (1, 16, 17, 64, 65, 9999)] == [16, 16, 64, 64, 128, 128]


# --- what was tuned ---


@pytest.fixture
def file(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "configs.json"
    monkeypatch.setenv("QUANTLAB_GPU_CONFIGS", str(path))
    tune._read.cache_clear()
    yield path
    tune._read.cache_clear()


def weight():
    codes = torch.zeros(64, 2048, dtype=torch.uint8)
    table = torch.arange(-8.0, 8.0)
    return prepare(codes, torch.ones(64, 32), None, table, 4, -8, 4096)


def test_without_a_file_the_static_choice_stands(file):
    assert tune.best(H100, INT4, SMALL, 64, 1) == choose(H100, INT4, SMALL, 64, 1)
    assert not file.exists()


def test_the_fastest_is_kept_and_found_again(file):
    ran = []

    # The clock is the call itself: a candidate takes as long as it says.
    def run(config, splits):
        return (type(config) is GemvConfig) * 10 + abs(splits - 2)

    found = tune.tune(torch.zeros(1, 4096), weight(), run, H100, time=lambda call: ran.append(call()) or float(ran[-1]))
    assert found == (next(c for c in candidates(H100, INT4, 64, 1) if isinstance(c, GemmConfig)), 2)
    assert len(ran) >= 8
    (name,) = json.loads(file.read_text())
    assert name == "sm_90/132/integer4/64x4096u128/1"
    assert tune.best(H100, INT4, SMALL, 64, 1) == found
    assert tune.best(H100, INT4, SMALL, 64, 2) == choose(H100, INT4, SMALL, 64, 2)
    other = Device("sm_90", 114)
    assert tune.best(other, INT4, SMALL, 64, 1) == choose(other, INT4, SMALL, 64, 1)


def test_more_entries_stand_beside_each_other(file):
    for rows in (1, 12):
        tune.tune(torch.zeros(rows, 4096), weight(), lambda config, splits: splits, H100, time=lambda call: call())
    assert {name.rpartition("/")[2] for name in json.loads(file.read_text())} == {"1", "16"}


def test_a_file_that_is_none_is_named(file):
    file.parent.mkdir()
    file.write_text('{"sm_90/132": {"kernel": "gemv"}}')
    with pytest.raises(ValueError, match=r"configs.json is no file of tuned configs .*remove it"):
        tune.best(H100, INT4, SMALL, 64, 1)


def test_rows_are_bucketed_by_powers_of_two():
    assert [tune.bucket(rows) for rows in (1, 2, 3, 4, 5, 300, 1024, 9999)] == [1, 2, 4, 4, 8, 512, 1024, 1024]
