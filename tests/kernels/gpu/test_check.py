"""The compiled kernels, without a GPU: the rules they keep to, and the table of their figures."""

from __future__ import annotations

from collections import Counter

import pytest

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from quantlab_kernels.gpu import check, offline, report  # noqa: E402
from quantlab_kernels.gpu.cases import ARCHITECTURES, FORMATS, PEAKS, Case, cases  # noqa: E402
from quantlab_kernels.gpu.configs import GemmConfig, GemvConfig  # noqa: E402
from quantlab_kernels.gpu.formats import INTEGER, Format  # noqa: E402
from quantlab_kernels.gpu.offline import SHARED_LIMIT, Compiled, is_tensor_core, is_wide_load  # noqa: E402

INT4 = Format(4, INTEGER, -8)
KEPT = check.read()
SAME_TRITON = KEPT["triton"] == triton.__version__


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory):
    """Nothing that an earlier run compiled."""
    before = triton.knobs.cache.dir
    triton.knobs.cache.dir = str(tmp_path_factory.mktemp("triton"))
    yield
    triton.knobs.cache.dir = before


@pytest.mark.parametrize("case", check.representative(), ids=lambda case: case.name)
def test_what_stands_for_the_others_compiles_as_it_must(case):
    compiled = case.compile()
    assert check.faults(case, compiled) == []
    if SAME_TRITON:
        assert check.differences(case, check.figures(case, compiled), KEPT["cases"]) == []


@pytest.mark.skipif(
    not SAME_TRITON, reason=f"verified.json holds figures of triton {KEPT['triton']}, not of {triton.__version__}"
)
def test_the_table_is_of_these_sources():
    assert KEPT["sources"] == check.sources(), f"the kernels were changed: {check.REMEDY}"


def test_the_table_holds_all_that_is_shipped_and_nothing_else():
    shipped = {case.name for architecture in ARCHITECTURES for case in cases(architecture)}
    assert set(KEPT["cases"]) == shipped, check.REMEDY


def test_the_table_has_no_faults():
    """The rules again, over all figures that are kept, not only those that are compiled here."""
    for architecture in ARCHITECTURES:
        for case in cases(architecture):
            figures = KEPT["cases"][case.name]
            assert figures["spilled"] == 0, case.name
            assert figures["shared"] <= SHARED_LIMIT[architecture], case.name
            assert figures["tensor_core"].startswith(case.tensor_core), case.name
            assert bool(figures["tensor_core"]) == (case.kernel in ("gemm", "w8a8")), case.name
            if case.kernel == "gemv":
                assert figures["barriers"] == 0, case.name
            if case.format is not None:
                assert figures["wide_loads"] >= case.weight_loads, case.name


def test_what_is_over_its_issue_budget_is_known():
    """Printed in bold in the page, and no more than these: a change that adds one is seen."""
    over: dict[tuple[str, str], set[str]] = {}
    for architecture in ARCHITECTURES:
        for case in cases(architecture):
            if case.format is not None and check.over_budget(case, KEPT["cases"][case.name]):
                over.setdefault((architecture, case.kernel), set()).add(case.format.name)
    assert over == {place: set(formats.split()) for place, formats in check.OVER_BUDGET.items()}
    # Four and eight bits and the six-bit floats are what memory bounds on every NVIDIA GPU but the B200.
    good = {"integer8", "e3m2", "e2m3"}
    assert not any(good & formats for (name, _), formats in over.items() if name not in ("sm_100", "gfx942"))


def test_every_format_has_both_kernels_everywhere():
    for architecture in ARCHITECTURES:
        found = {(case.kernel, case.format, case.dtype) for case in cases(architecture)}
        for format in FORMATS:
            dtypes = ("fp16",) if architecture in ("sm_89", "sm_120") and format != INT4 else ("fp16", "bf16")
            assert {(kernel, format, dtype) for kernel in ("gemv", "gemm") for dtype in dtypes} <= found


def test_the_page_prints_the_table():
    page = report.PAGE.read_text(encoding="utf-8")
    assert page == report.with_figures(page, KEPT), "run `python -m quantlab_kernels.gpu.report`"


# --- the rules can be broken ---


def test_a_tile_that_spills_is_a_fault():
    case = Case("sm_80", "gemm", INT4, "fp16", GemmConfig(128, 256, 128, 4, 3))
    assert any(fault.startswith("spills") for fault in check.faults(case, case.compile()))


def test_a_tile_that_needs_more_shared_memory_than_there_is_is_a_fault():
    case = Case("sm_89", "gemm", INT4, "fp16", GemmConfig(128, 64, 128, 8, 6))
    assert any("bytes of shared memory of 101376" in fault for fault in check.faults(case, case.compile()))


def test_one_load_and_one_barrier_too_few_or_many():
    case = Case("sm_90", "gemv", INT4, "fp16", GemvConfig(8, 32))
    faults = check.faults(case, case.compile())
    assert any("barriers in its loop" in fault for fault in faults), faults


@pytest.mark.parametrize(("missing", "wide"), [("words_ptr", False), ("nothing else", True)])
def test_codes_that_begin_anywhere_lose_the_wide_loads_and_odd_sizes_do_not(missing, wide):
    case = Case("sm_90", "gemv", INT4, "fp16", GemvConfig(8, 128))
    kernel, types, constants, options = case._gemv()
    aligned = tuple(name for name in types if name.endswith("_ptr") and name != missing)
    compiled = offline.compile_for(kernel, "sm_90", types, constants, aligned, **options)
    assert any("loads of 128 bits and needs" in fault for fault in check.faults(case, compiled)) is not wide


@triton.jit
def _plain(x_ptr, y_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(y_ptr + at, tl.load(x_ptr + at) * 2)


def test_no_tensor_core_where_one_is_claimed_is_a_fault():
    compiled = offline.compile_for(
        _plain, "sm_90", {"x_ptr": "*fp32", "y_ptr": "*fp32"}, {"N": 128}, ("x_ptr", "y_ptr"), num_warps=1
    )
    case = next(case for case in cases("sm_90") if case.kernel == "w8a8")
    assert check.faults(case, compiled) == ["uses no tensor core, not IGMMA"]
    assert compiled.tensor_core == ""
    assert compiled.wide_loads == 1


def test_more_instructions_than_there_is_time_for_are_a_fault():
    case = next(c for c in cases("sm_90") if c.kernel == "gemv" and c.format == Format(8, INTEGER, -128))
    slow = Compiled(64, 0, 0, Counter({"FFMA": 2000, "LDG.E.128": 12}), Counter(), False)
    assert check.faults(case, slow) == ["issues more than the 9.0 instructions a weight that there is time for"]
    fast = Compiled(64, 0, 0, Counter({"FFMA": 500, "LDG.E.128": 12}), Counter(), False)
    assert check.faults(case, fast) == []


def test_figures_that_moved_are_named():
    case = next(iter(cases("sm_80")))
    figures = {"registers": 10, "spilled": 0}
    assert check.differences(case, figures, {}) == [f"is not in verified.json: {check.REMEDY}"]
    assert check.differences(case, figures, {case.name: {"registers": 12, "spilled": 0}}) == [
        f"registers is 10, was 12: {check.REMEDY}"
    ]
    assert check.differences(case, figures, {case.name: figures}) == []


def test_comments_do_not_change_the_hash_of_the_sources(tmp_path, monkeypatch):
    folder = check.Path(check.__file__).parent
    for name in check._SOURCES:
        (tmp_path / name).write_text((folder / name).read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(check, "__file__", str(tmp_path / "check.py"))
    before = check.sources()
    path = tmp_path / "decode.py"
    path.write_text(
        "# a comment\n" + path.read_text(encoding="utf-8").replace("Every function here", "All"), encoding="utf-8"
    )
    assert check.sources() == before
    path.write_text(path.read_text(encoding="utf-8") + "\nMORE = 1\n", encoding="utf-8")
    assert check.sources() != before


# --- reading machine code ---


TENSOR_CORES = [
    *("HMMA.16816.F32", "HGMMA.64x16x16.F32", "IMMA.16832.S8.S8", "IGMMA.64", "QMMA.16832", "QGMMA"),
    *("UTCHMMA.gdesc", "UTCQMMA", "v_mfma_f32_32x32x8_f16"),
]


@pytest.mark.parametrize("name", TENSOR_CORES)
def test_tensor_core_instructions(name):
    assert is_tensor_core(name)


@pytest.mark.parametrize("name", ["HFMA2.MMA", "HFMA2", "FFMA", "UTCBAR", "LDSM.16.M88.4", "v_pk_fma_f32"])
def test_what_only_looks_like_one(name):
    assert not is_tensor_core(name)


def test_loads_of_128_bits():
    assert all(map(is_wide_load, ["LDG.E.128", "LDG.E.EF.128", "LDGSTS.E.BYPASS.128", "global_load_dwordx4"]))
    assert not any(map(is_wide_load, ["LDG.E.64", "LDS.128", "STG.E.128", "global_load_dwordx2"]))


def test_the_innermost_loop_by_labels_and_by_addresses():
    by_label = ["	MOV R1", "LBB0:", "	FADD R2", "LBB1:", "	FMUL R3", "	FFMA R3", "	@P0 BRA LBB1;"]
    by_label += ["	@P1 BRA LBB0;", "LBB2:", "	BRA LBB2;"]
    assert offline.innermost_loop(by_label, offline._LABEL, offline._BRANCH) == by_label[3:7]
    by_address = ["\tMOV R1", "\tFADD R2", "\tFMUL R3", "\tFFMA R3", "\tBRA.U !UP0, 0x20;", "\tEXIT", "\tBRA 0x60;"]
    assert offline.innermost_loop(by_address, offline._LABEL, offline._BRANCH) == by_address[2:5]
    assert offline.innermost_loop(by_address[:4], offline._LABEL, offline._BRANCH) == by_address[:4]


def test_barriers_and_tensor_cores_of_a_count():
    compiled = Compiled(
        1, 0, 0, Counter({"BAR.SYNC": 2, "BAR.ARV": 1, "BARRIER": 5}), Counter({"HFMA2.MMA": 3, "HGMMA.64": 1}), False
    )
    assert compiled.barriers == 3
    assert compiled.tensor_core == "HGMMA"


def test_the_issue_budget_is_that_of_the_reference_page():
    """4-bit groups of 128 on an H100: 132 SMs x 128 lanes x 1.755 GHz over 3.35 TB/s / 0.516 bytes."""
    assert PEAKS["sm_90"].budget(0.5 + 2 / 128) == pytest.approx(4.56, abs=0.02)
    assert PEAKS["sm_80"].budget(0.53) == pytest.approx(5.07, abs=0.02)
