"""The page in a real browser: it opens without errors, and every chart is drawn."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from atlas_rl.cli import main
from atlas_rl.report.page.html import PANELS
from atlas_rl.report.page.reading import read_runs
from tests.report.page.runs import OFF, grpo_folder, long_run, real_folder, steps, write

pytest.importorskip("plotly")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")]
PROBE = """<script>
addEventListener("error", (event) => { document.body.dataset.error = event.message; });
addEventListener("unhandledrejection", (event) => { document.body.dataset.error = event.reason; });
</script>"""
NARROW = """<script>
const narrow = setInterval(() => {
  if (!document.body.dataset.drawn) return;
  document.body.style.width = "360px";
  const widths = [...document.querySelectorAll(".main-svg")].map((svg) => svg.getBoundingClientRect().width);
  document.body.dataset.widest = Math.max(...widths);
}, 200);
</script>"""


PRINTED = """<script>
const printing = setInterval(() => {
  if (!document.body.dataset.drawn) return;
  clearInterval(printing);
  dispatchEvent(new Event("beforeprint"));
  const charts = [...document.querySelectorAll(".chart")].filter((chart) => chart.querySelector(".legend"));
  const edge = (chart, name, side) => chart.querySelector(name).getBoundingClientRect()[side];
  document.body.dataset.gaps = charts.map((c) => edge(c, ".nsewdrag", "top") - edge(c, ".legend", "bottom")).join(" ");
}, 200);
</script>"""


PLOTLYS_OWN = "WARN: Too many auto-margin redraws."  # what plotly says on a machine that is busy; the chart is whole


def opened(path: Path, *options: str, more: str = "") -> tuple[str, str]:
    """What became of the page in the browser, and what its console said."""
    probed = path.with_name("probed.html")
    text = path.read_text(encoding="utf-8")
    probed.write_text(text.replace("<main>", PROBE + more + "<main>", 1), encoding="utf-8")
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0",
               f"--user-data-dir={path.parent / 'profile'}", "--virtual-time-budget=20000", *options,
               "--dump-dom", probed.as_uri()]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, timeout=180, check=True)
    said = [line for line in result.stderr.splitlines() if "CONSOLE" in line and PLOTLYS_OWN not in line]
    return result.stdout, "\n".join(said)


def reports_of(folder: Path):
    return read_runs([folder])[0].steps


def folders(name: str, tmp_path: Path) -> list[Path]:
    if name == "real, beside one without speculation":
        return [real_folder(), real_folder(False)]
    if name == "GRPO":
        return [grpo_folder()]
    reports = {
        "one step": lambda: reports_of(real_folder())[:1],
        "no speculation": lambda: steps(range(5), **OFF),
        "500 steps": lambda: long_run(reports_of(real_folder()), 500),
        "broken lines": lambda: reports_of(real_folder()),
    }[name]()
    folder = write(tmp_path / "run", [("a", 0, report) for report in reports])
    if name == "broken lines":
        file = folder / "rollouts.jsonl"
        file.write_bytes(b'\xff\xfe\n{"step": 3}\n' + file.read_bytes()[:-40])
    return [folder]


KINDS = ("real, beside one without speculation", "one step", "no speculation", "500 steps", "broken lines", "GRPO")


@pytest.mark.parametrize("name", KINDS)
def test_the_page_opens_without_errors_and_shows_every_panel(name, tmp_path, capsys):
    output = tmp_path / "out" / "report.html"
    main(["report", *map(str, folders(name, tmp_path)), "--output", str(output)])
    assert f"{output}: " in capsys.readouterr().out
    dom, console = opened(output)
    body = dom[dom.index("<main>") :]
    assert console == ""
    assert "data-error" not in dom
    charts = body.count('class="chart')
    assert charts > 4
    assert int(re.search(r'data-drawn="(\d+)"', dom).group(1)) >= charts
    for make in PANELS:
        assert f'<section id="{make([read_runs(folders(name, tmp_path))[0]]).key}">' in body
    if name == "GRPO":
        assert "measured on 3 of 3 steps" in body
    if name == "broken lines":
        assert "1 half-written or damaged line (1)" not in body  # two of them: the first and the last
        assert "2 half-written or damaged lines (1, 6) were skipped" in body
        assert "1 line (2) was skipped (no step report: it lacks" in body


def test_the_page_asks_no_network_for_anything(tmp_path):
    output = tmp_path / "report.html"
    main(["report", str(real_folder()), "--output", str(output)])
    text = output.read_text(encoding="utf-8")
    assert not re.search(r"<(script|img|iframe|link)[^>]*(src|href)=.?(https?:)?//", text)
    assert "Content-Security-Policy" in text
    _, console = opened(output, "--host-resolver-rules=MAP * ~NOTFOUND")
    assert console == ""


def test_charts_follow_a_narrow_page(tmp_path):
    output = tmp_path / "report.html"
    main(["report", str(real_folder()), "--output", str(output)])
    dom, console = opened(output, more=NARROW)
    assert console == ""
    assert 200 < float(re.search(r'data-widest="([\d.]+)"', dom).group(1)) <= 360


@pytest.mark.parametrize("scheme", [0, 1])
def test_text_of_charts_is_readable_in_both_schemes(scheme, tmp_path):
    output = tmp_path / "report.html"
    main(["report", str(real_folder()), "--output", str(output)])
    dom, _ = opened(output, f"--blink-settings=preferredColorScheme={scheme}")
    ink = {0: "rgb(228, 232, 236)", 1: "rgb(28, 33, 40)"}[scheme]
    titles = re.findall(r'class="xtitle"[^>]*fill: (rgb\([^)]*\))', dom)
    assert titles
    assert set(titles) == {ink}


def test_printed_legends_stand_right_above_their_lines(tmp_path):
    output = tmp_path / "report.html"
    main(["report", str(grpo_folder()), "--output", str(output)])
    dom, console = opened(output, more=PRINTED)
    assert console == ""
    gaps = list(map(float, re.search(r'data-gaps="([^"]+)"', dom).group(1).split()))
    assert len(gaps) > 4
    assert all(0 <= gap < 10 for gap in gaps), gaps  # px


def test_a_page_is_printed(tmp_path):
    output = tmp_path / "report.html"
    main(["report", str(real_folder()), "--output", str(output)])
    printed = tmp_path / "report.pdf"
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=20000",
               f"--user-data-dir={tmp_path / 'profile'}", f"--print-to-pdf={printed}", output.as_uri()]  # fmt: skip
    subprocess.run(command, capture_output=True, timeout=180, check=True)
    assert len(re.findall(rb"/Type\s*/Page\b", printed.read_bytes())) > 3
