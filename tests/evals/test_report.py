from __future__ import annotations

import json
import re
import struct
import xml.etree.ElementTree as ElementTree

import pytest
from browser import CHROMIUM, Browser
from quantlab_evals import EvalError, measure_called, non_dominated, pareto
from quantlab_evals.report import page, pictures, verdicts
from quantlab_evals.report.page import content
from swept import ABOUT, BLOCKS, KINDS, swept

pytest.importorskip("plotly")

WHOLE = [record for record in swept() if "error" not in record]


def of(name):
    return next(record for record in WHOLE if record["variant"] == name)


# --- verdicts ---


def test_each_verdict_is_what_a_search_by_hand_finds():
    found = {verdict.wish: verdict for verdict in verdicts(WHOLE)}
    original = of("original")["measures"]["ppl"]
    near = [r for r in WHOLE if r["kind"] != "original" and r["measures"]["ppl"] <= 1.01 * original]
    smallest = min(near, key=lambda record: record["measures"]["bytes"])
    first = verdicts(WHOLE)[0]
    assert first.wish.startswith("Smallest within 1 %")
    assert first.variant == smallest["variant"] == "int6/64 gptq"
    under = next(verdict for wish, verdict in found.items() if "Best under 3.6 bits" in wish)
    assert under.variant == "int3/64 gptq"
    assert "2.4 times smaller" in found[next(w for w in found if "4.6 bits" in w)].why


def test_nothing_that_is_spoilt_is_recommended():
    assert not any("2.6 bits" in verdict.wish for verdict in verdicts(WHOLE))


def test_variants_that_only_noise_tells_apart_are_named_together():
    twin = json.loads(json.dumps(of("int8/64 gptq")))
    twin["variant"] = "twin"
    clusters = twin["evaluation"]["divergence"]["kl_clusters"]
    clusters["means"] = [mean * (1.02 if place % 2 else 0.98) for place, mean in enumerate(clusters["means"])]
    closest = next(verdict for verdict in verdicts([*WHOLE, twin]) if "losest to the original" in verdict.wish)
    assert {closest.variant, *closest.alike} >= {"int8/64 gptq", "twin"}
    assert "int3/64 rtn" not in closest.alike


def test_verdicts_make_do_with_what_was_measured():
    errors = {"a": (8, 0.01), "b": (4, 0.1), "c": (3, 0.5)}
    bare = [
        {"variant": name, "kind": "quantized", "measures": {"bits": bits, "output_error": error}}
        for name, (bits, error) in errors.items()
    ]
    found = {wish: verdict.variant for verdict in verdicts(bare) for wish in verdict.wish.split("; ")}
    assert found["Best under 4.6 bits a weight"] == "b"
    assert found["Best under 3.6 bits a weight"] == "c"
    assert found["closest to the original" if "closest to the original" in found else "Closest to the original"] == "a"
    assert verdicts([]) == []


# --- the page, as text ---


def test_the_page_is_one_file_and_not_too_large(tmp_path):
    text = page(swept(), ABOUT)
    assert len(text.encode()) < 6e6
    assert not re.findall(r'(?:src|href)="(?!data:)[^"#]', text.split("<script>")[0])
    embedded = re.search(r'<script id="data" type="application/json">(.*?)</script>', text, re.DOTALL)[1]
    assert json.loads(embedded) == content(swept(), ABOUT)
    assert "<" not in embedded
    assert "tiny/&lt;model&gt; &amp; co" in text


def test_no_axis_has_measured_and_predicted_figures():
    document = content(swept(), ABOUT)
    for measure in document["measures"]:
        assert measure["predicted"] == measure["name"].startswith("predicted:")
        if measure["predicted"]:
            assert "predicted" in measure["label"]
    assert [m["predicted"] for m in document["measures"]] == sorted(m["predicted"] for m in document["measures"])
    assert not any(measure_called(axis).predicted for axis in document["axes"])


def test_a_page_of_nothing_is_refused():
    with pytest.raises(EvalError, match="no variant has two figures"):
        page([], ABOUT)


def test_pictures_are_drawn_with_a_point_a_variant():
    drawn = pictures(swept(), ABOUT)
    assert set(drawn) == {"front", "size", "speed"}
    for name, text in drawn.items():
        root = ElementTree.fromstring(text)
        circles = [e for e in root.iter("{http://www.w3.org/2000/svg}circle") if len(e)]
        assert len(circles) == len(WHOLE) - 1, name  # the original has no KL
        for circle in circles:
            assert 0 < float(circle.get("cx")) < 860
            assert 0 < float(circle.get("cy")) < 520
    assert set(pictures(swept(speed=False), ABOUT)) == {"front", "size"}


# --- the page, in a browser ---


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    folder = tmp_path_factory.mktemp("browser")
    (folder / "page.html").write_text(page(swept(), ABOUT), encoding="utf-8")
    opened = Browser(folder / "profile")
    opened.resize(1280)
    opened.open(folder / "page.html")
    opened.file = folder / "page.html"
    yield opened
    opened.close()


@pytest.fixture
def fresh(browser):
    """The page as it is when it is opened, at desk width."""
    browser.complained.clear()
    browser.resize(1280)
    browser.open(browser.file)
    return browser


POINTS = "document.getElementById('front').data.filter(t => t.customdata).reduce((n, t) => n + t.x.length, 0)"
LINE = "document.getElementById('front').data[0].y"
DRAWN = "document.querySelectorAll('#front .scatterlayer .trace .points path').length"


def choose(browser, identifier, value):
    browser.run(
        f"(() => {{ const s = document.getElementById('{identifier}'); s.value = '{value}';"
        " s.dispatchEvent(new Event('change')); return s.value; })()"
    )


@pytest.mark.parametrize("width", [390, 768, 1280])
def test_it_fits_and_nobody_complains(fresh, width):
    fresh.resize(width)
    fresh.open(fresh.file)
    assert fresh.run("document.documentElement.scrollWidth") == width
    assert fresh.run("[...document.querySelectorAll('.plot')].every(p => p.querySelector('.main-svg'))")
    wide = fresh.run("Math.max(...[...document.querySelectorAll('.plot .main-svg')].map(s => s.clientWidth))")
    assert wide <= width
    assert fresh.complained == []


def test_every_variant_is_a_point_and_the_line_is_the_front(fresh):
    assert fresh.run(POINTS) == fresh.run(DRAWN) == len(WHOLE) - 1
    front = pareto(WHOLE, ["bits", "kl"])
    kl = sorted({front.records[place]["measures"]["kl"] for place in front.members})
    assert sorted(fresh.run(LINE)) == pytest.approx(kl, rel=1e-4)


@pytest.mark.parametrize(("x", "y"), [("bytes", "ppl"), ("decode", "kl"), ("predicted:rtx4090", "kl")])
def test_axes_can_be_chosen(fresh, x, y):
    choose(fresh, "x", x)
    choose(fresh, "y", y)
    known = [r for r in WHOLE if r["measures"].get(x) is not None and r["measures"].get(y) is not None]
    assert fresh.run(POINTS) == len(known)
    signs = [-1 if measure_called(name).higher_is_better else 1 for name in (x, y)]
    costs = [[sign * r["measures"][name] for sign, name in zip(signs, (x, y), strict=True)] for r in known]
    best_y = {known[place]["measures"][y] for place in non_dominated(costs)}
    assert sorted(fresh.run(LINE)) == pytest.approx(sorted(best_y), rel=1e-4)
    predicted = x.startswith("predicted:")
    assert fresh.run("document.getElementById('prediction').hidden") is not predicted
    title = fresh.run("document.getElementById('front').layout.xaxis.title.text")
    assert ("predicted" in title) is predicted
    assert fresh.complained == []


def test_measured_only_takes_predictions_off_the_axes(fresh):
    choose(fresh, "x", "predicted:rtx4090")
    fresh.run("document.getElementById('measured').click()")
    assert fresh.run("document.getElementById('x').value") == "bits"
    assert not fresh.run("[...document.querySelectorAll('#x option')].some(o => o.value.startsWith('predicted:'))")
    assert fresh.run(POINTS) == len(WHOLE) - 1


def test_filters_take_points_away_and_give_them_back(fresh):
    fresh.run("document.querySelector('#filters').open = true")
    chip = "document.querySelector('[data-facet=quantizer] [data-value=rtn]')"
    fresh.run(f"{chip}.click()")
    left = [r for r in WHOLE if r["kind"] != "original" and r["labels"]["quantizer"] != "rtn"]
    assert fresh.run(POINTS) == fresh.run(DRAWN) == len(left)
    assert fresh.run(f"{chip}.getAttribute('aria-pressed')") == "false"
    assert f"{len(left)} of {len(WHOLE)} shown" in fresh.run("document.getElementById('count').textContent")
    fresh.run(f"{chip}.click()")
    assert fresh.run(POINTS) == len(WHOLE) - 1
    fresh.run("document.getElementById('frontonly').click()")
    assert fresh.run(POINTS) == len(pareto(WHOLE, ["bits", "kl"]).members)


def test_a_point_shows_its_recipe_to_copy(fresh):
    fresh.run(
        "[...document.querySelectorAll('#table tbody tr')].find(r => r.textContent.includes('nf4/64 rtn')).click()"
    )
    assert fresh.run("document.querySelector('#chosen h2').textContent") == "nf4/64 rtn"
    recipe = fresh.run("document.querySelector('#chosen pre').textContent")
    assert "format: nf4" in recipe
    assert fresh.run("document.querySelector('#copy').textContent") == "copy the recipe"
    copied = fresh.run(
        "(async () => { let text; navigator.clipboard.writeText = async t => { text = t; };"
        " document.querySelector('#copy').click(); await 0; return text; })()"
    )
    assert copied == recipe
    assert fresh.run("document.querySelector('#layered').selectedOptions[0].textContent") == "nf4/64 rtn"


def test_layers_are_a_map_of_blocks_and_kinds(fresh):
    shape = fresh.run("(d => [d.z.length, d.z[0].length, d.y])(document.getElementById('errors').data[0])")
    assert shape == [len(KINDS), BLOCKS, list(KINDS)]
    assert fresh.run("document.getElementById('bits').data[0].z[0][0]") == 6.25
    choose(fresh, "layered", 1)
    assert fresh.run("document.getElementById('bits').data[0].z[0][0]") == 2.25


def test_curves_of_the_original_and_of_what_is_recommended(fresh):
    names = fresh.run("document.getElementById('reliability').data.slice(1).map(t => t.name)")
    assert set(names) == {"original", *(verdict.variant for verdict in verdicts(WHOLE))}


def test_light_and_dark(fresh):
    fresh.scheme("dark")
    ground = "getComputedStyle(document.body).backgroundColor"
    dark = fresh.run(ground)
    fresh.run("document.getElementById('theme').click()")
    assert fresh.run(ground) != dark
    fresh.scheme("light")
    assert fresh.complained == []


@pytest.mark.parametrize("width", [390, 1280])
def test_a_picture_of_it_is_whole(fresh, tmp_path, width):
    fresh.resize(width)
    fresh.screenshot(tmp_path / "page.png")
    data = (tmp_path / "page.png").read_bytes()
    size = struct.unpack(">II", data[16:24])  # of the PNG's header
    assert size[0] == width
    assert size[1] > 3000
    assert len(data) > 50_000, "there is something on it"
    assert fresh.complained == []


def test_what_failed_is_said(fresh):
    assert "int4/48 rtn: 576 is not <divisible> by 48" in fresh.run("document.getElementById('failed').textContent")
