"""Laws: a page is one file that asks for nothing and runs nothing, and says what the report says."""

import base64
import csv
import dataclasses
import io
import json
import re
import shutil
import sys
import types
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, ClassVar

import pytest
from huggingface_hub import ModelCard

from compressor.artifacts import verify_manifest
from compressor.cli import main
from compressor.errors import DataError
from compressor.pages.csv_table import runs_csv
from compressor.pages.files import rebuild, run_files
from compressor.pages.markdown import escaped, fenced, model_card, run_markdown
from compressor.pages.run_page import run_page
from compressor.pages.study_page import side_by_side, study_page
from compressor.pages.words import changes, duration, milliseconds
from compressor.report import Footprint, Report, read_report

FILES = ("report.html", "report.md", "results.csv", "model_card.md")
HOSTILE = "<script>alert('x')</script>"
STUDIES = sorted((Path(__file__).resolve().parent.parent / "benchmarks" / "studies").glob("*/study.json"))
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture
def run(finished_run: Path) -> Path:
    return finished_run


@pytest.fixture
def report(run: Path) -> Report:
    return read_report(run / "report.json")


class Elements(HTMLParser):
    """All elements of a page with their attributes, and the text of each table's cells."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[str] = []
        self.inside = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag in ("td", "th"):
            self.inside = True
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.inside and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.cells[-1] += data


def hostile(report: Report) -> Report:
    """The same report with markup wherever a recipe or data put text."""
    labels = [HOSTILE, "=1+1", "a|b`c", *report.data["labels"][3:]]
    worst = [{**one, "name": HOSTILE} for one in report.mistakes["worst"]]
    return dataclasses.replace(
        report,
        notes=(HOSTILE,),
        data={**report.data, "labels": labels, "source": HOSTILE},
        mistakes={**report.mistakes, "worst": worst},
        layers=({**report.layers[0], "layer": HOSTILE}, *report.layers[1:]),
        recipe={**report.recipe, "model": {**report.recipe["model"], "name": HOSTILE}},
    )


def test_a_run_leaves_its_pages_and_they_are_in_the_manifest(run: Path) -> None:
    assert all((run / name).is_file() for name in FILES)
    assert verify_manifest(run) == []


def test_pages_are_made_anew_from_the_report_alone(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(finished_run, tmp_path / "run")
    before = {name: (run / name).read_bytes() for name in FILES}
    for name in FILES:
        (run / name).write_text("lost")
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out == f"{run / 'report.html'}\n"
    assert {name: (run / name).read_bytes() for name in FILES} == before
    assert verify_manifest(run) == []


def test_a_changed_file_stays_a_fault_when_pages_are_made_anew(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / "recipe.yaml").write_text("changed: true\n")
    rebuild([copy])
    assert [fault.partition(":")[0] for fault in verify_manifest(copy)] == ["recipe.yaml"]


@pytest.mark.parametrize("make", [lambda r: run_page(r, "a"), lambda r: study_page(side_by_side({"a": r, HOSTILE: r}))])
def test_a_page_asks_for_nothing_and_runs_nothing(report: Report, make: Callable[[Report], str]) -> None:
    for page in (make(report), make(hostile(report))):
        elements = Elements(page).found
        assert not [tag for tag, _ in elements if tag in ("script", "iframe", "object", "embed", "base", "form")]
        for tag, attributes in elements:
            assert not [name for name in attributes if name.startswith("on")], tag
            for name in ("src", "href", "data", "action"):
                if (value := attributes.get(name)) is not None:
                    assert value.startswith(("data:image/", "data:,", "#")), (tag, value)
            if tag == "img":
                assert attributes.get("alt")
        assert len(page.encode()) < 2_000_000
        assert "default-src 'none'" in page


def test_anchors_lead_somewhere(report: Report) -> None:
    elements = Elements(run_page(report, "a")).found
    places = {attributes["id"] for _, attributes in elements if "id" in attributes}
    targets = {attributes["href"] for tag, attributes in elements if tag == "a"}
    assert {str(target)[1:] for target in targets} <= places
    assert len(targets) >= 9


def test_the_page_says_what_the_report_says(report: Report) -> None:
    cells = Elements(run_page(report, "a")).cells
    latency = cells.index("latency, one image")
    assert cells[latency + 1] == milliseconds(report.baseline.latency_ms)
    assert cells[latency + 2] == milliseconds(report.result.latency_ms)
    assert report.baseline.latency_ms is not None
    assert report.result.latency_ms is not None
    assert cells[latency + 3] == f"{report.result.latency_ms / report.baseline.latency_ms:.3f}x"
    assert all(layer["layer"] in cells for layer in report.layers)
    taken = cells.index("named")
    assert cells[taken + 2 : taken + 5] == ["green", "red", "3"]


def test_charts_are_whole_svgs_with_titles_and_units(report: Report) -> None:
    images = [attributes for tag, attributes in Elements(run_page(report, "a")).found if tag == "img"]
    drawings = [
        base64.b64decode(str(attributes["src"]).partition(",")[2]).decode()
        for attributes in images
        if str(attributes["src"]).startswith("data:image/svg")
    ]
    assert len(drawings) == 5  # curves, layers, confusions, memory, time
    for drawing in drawings:
        assert drawing.rstrip().endswith("</svg>")
        assert '<title id="title">' in drawing
    whole = "".join(drawings)
    for unit in ("validation accuracy, %", "resident memory, MB", "time in one image, ms", "minutes"):
        assert unit in whole


def test_thumbnails_are_of_the_mistakes_the_network_was_surest_of(report: Report) -> None:
    worst = report.mistakes["worst"]
    assert len(worst) == 3
    assert [one["confidence"] for one in worst] == sorted((one["confidence"] for one in worst), reverse=True)
    for one in worst:
        assert "moved" in one["name"]
        assert base64.b64decode(one["jpeg"]).startswith(b"\xff\xd8")


def test_a_report_without_what_newer_ones_have_still_gives_pages(report: Report) -> None:
    stages = tuple({**stage, "details": {}} for stage in report.stages)
    old = dataclasses.replace(
        report, mistakes={}, layers=(), layer_totals={}, stages=stages, timing={}, recommended=None
    )
    for text in run_files(old, "old").values():
        assert text
    assert "Mistakes on the test images" not in run_page(old, "old")


def test_logits_that_are_no_numbers_are_said_to_be_such(report: Report) -> None:
    pairs = {"torch/onnx": {"difference": None, "agreement": 0.0, "disagreeing": 0, "undecided": 0}}
    failed = dataclasses.replace(report, parity={"images": 16, "float": {"pairs": pairs}})
    assert "NaN or infinite" in Elements(run_page(failed, "a")).cells


def test_a_missed_budget_comes_first(report: Report) -> None:
    failed = dataclasses.replace(report, verdict={"status": "failed", "reasons": ["budget.macs: too many"]})
    page = run_page(failed, "a")
    assert page.index("missed: budget.macs: too many") < page.index("Baseline against result")
    assert 'class="verdict failed"' in page
    assert "- missed: budget.macs: too many" in run_markdown(failed, "a")


def test_markdown_shows_markup_as_it_is(report: Report) -> None:
    for text in (run_markdown(hostile(report), "a"), model_card(hostile(report), "a")):
        shown = re.sub(r"(?s)```+yaml.*?```+", "", text.partition("\n---\n")[2] or text)
        assert not re.search(r"(?<!\\)<script", shown)
    assert escaped("a|b\n# c") == r"a\|b \# c"
    assert fenced("x ```` y\n").startswith("`````yaml\n")


def test_the_model_card_is_one_that_hugging_face_reads(report: Report) -> None:
    card = ModelCard(model_card(report, "edge"))
    assert card.data.library_name == "openvino"
    assert card.data.pipeline_tag == "image-classification"
    (result,) = card.data.eval_results
    assert result.metric_value == report.result.accuracy
    for heading in ("## Figures", "## Data", "## Limits", "## Versions"):
        assert heading in card.text
    assert report.result.accuracy_ci is not None
    assert f"{100 * report.result.accuracy_ci[0]:.1f} %" in card.text
    ModelCard(model_card(hostile(report), HOSTILE))


def test_the_table_has_every_figure_and_no_formula(report: Report) -> None:
    lines = list(csv.DictReader(io.StringIO(runs_csv({"=cmd()": report}))))
    assert [line["network"] for line in lines] == ["baseline", "result"]
    assert {line["run"] for line in lines} == {"'=cmd()"}
    for line, figures in zip(lines, (report.baseline, report.result), strict=True):
        assert float(line["latency_ms"]) == figures.latency_ms
        assert line["throughput_fps"] == ""
        assert figures.accuracy_ci is not None
        assert (float(line["accuracy_low"]), float(line["accuracy_high"])) == tuple(figures.accuracy_ci)


def test_runs_side_by_side(run: Path, report: Report, tmp_path: Path) -> None:
    first, second = (shutil.copytree(run, tmp_path / name) for name in ("first", "second"))
    out = tmp_path / "both.html"
    assert rebuild([first, second], out) == [first / "report.html", second / "report.html", out]
    cells = Elements(out.read_text()).cells
    assert {"*\u00a0first", "*\u00a0second"} <= set(cells)  # equal points do not dominate each other
    assert [line["run"] for line in csv.DictReader(io.StringIO(out.with_suffix(".csv").read_text()))] == [
        *["first"] * 2,
        *["second"] * 2,
    ]
    other = dataclasses.replace(report, data={**report.data, "fingerprint": "another"})
    assert "accuracies do not compare" in study_page(side_by_side({"a": report, "b": other}))
    with pytest.raises(DataError, match="a comparison needs two or more"):
        rebuild([first], out)
    with pytest.raises(DataError, match="no report; give the folder of a finished run"):
        rebuild([tmp_path])


def test_figures_read_as_people_write_them() -> None:
    assert [duration(s) for s in (None, 5.04, 75, 3700)] == ["not measured", "5.0 s", "1 min 15 s", "1 h 1 min"]
    assert [milliseconds(v) for v in (None, 0.1234, 12.34, 1234.5)] == ["not measured", "0.12 ms", "12.3 ms", "1234 ms"]
    rows = changes(Footprint(accuracy=0.9, latency_ms=4.0), Footprint(accuracy=0.875, latency_ms=1.0, params=3))
    assert [(row.title, row.ratio) for row in rows] == [
        ("test accuracy", "-2.5 points"),
        ("latency, one image", "0.250x"),
        ("parameters", ""),
    ]
    assert rows[2].before == "not measured"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine; Debian's package is `chromium`")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 768, 1280])
def test_pages_in_a_browser(browser: Any, run: Path, tmp_path: Path, width: int, scheme: str) -> None:
    files = [run / "report.html", tmp_path / "both.html"]
    report = read_report(run / "report.json")
    files[1].write_text(study_page(side_by_side({"first": report, "second": hostile(report)})))
    paper = {"accuracy": 0.7589, "training_avg_memory_bytes": 874.6e6}
    study = {
        **side_by_side({f"a-row-with-a-long-name-{i}": report for i in range(9)}),
        "objectives": {"maximize": ["accuracy"], "minimize": ["latency_ms", "training_avg_memory_bytes"]},
        "published": [{"name": name, "source": "arXiv 2403.10569", "figures": paper} for name in ("Xception", HOSTILE)],
        "failures": [{"row": "broken", "seed": 0, "message": f"weights/{'long' * 40}.safetensors: {HOSTILE}"}],
        "missing": [{"row": "broken", "seed": 0}],
    }
    files.append(tmp_path / "study.html")
    files[-1].write_text(study_page(study))
    for stored in STUDIES:
        files.append(tmp_path / f"{stored.parent.name}.html")
        files[-1].write_text(study_page(json.loads(stored.read_text())))
    for file in files:
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        said: list[str] = []
        asked: list[str] = []
        page.on("console", lambda message, said=said: said.append(message.text))
        page.on("pageerror", lambda error, said=said: said.append(str(error)))
        page.on("request", lambda request, asked=asked: asked.append(request.url))
        page.goto(file.as_uri())
        assert said == []
        assert [url for url in asked if not url.startswith("data:")] == [file.as_uri()]
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        broken = "[...document.images].filter(image => !image.complete || !image.naturalWidth).length"
        assert page.evaluate(broken) == 0
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (background == "rgb(255, 255, 255)") == (scheme == "light")
        assert len(set(page.screenshot(full_page=True))) > 100
        page.keyboard.press("Tab")  # the first stop leads past the header
        assert page.evaluate("document.activeElement.textContent") == "to the content"
        page.close()


class Writer:
    """Stands in for TensorBoard's."""

    written: ClassVar[dict[str, list[tuple[str, float, int]]]] = {}

    def __init__(self, folder: str) -> None:
        self.lines = self.written.setdefault(folder, [])

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.lines.append((tag, value, step))


def test_tensorboard_gets_the_same_numbers(
    run: Path, report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    copy = shutil.copytree(run, tmp_path / "run")
    assert main(["report", str(copy), "--tensorboard", str(tmp_path / "board")]) == 0
    lines = Writer.written[str(tmp_path / "board" / "run")]
    assert ("result/latency_ms", report.result.latency_ms, 0) in lines
    curves = [(value, step) for tag, value, step in lines if tag == "training/val_accuracy"]
    told = [epoch["val_accuracy"] for stage in report.stages for epoch in stage["details"].get("history") or []]
    assert curves == [(value, step + 1) for step, value in enumerate(told)]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert main(["report", str(copy), "--tensorboard", str(tmp_path / "other")]) == 5
    assert "pip install tensorboard" in capsys.readouterr().err
