"""The page: complete by itself, every number in it, readable by machines that read to people."""

import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from fope_jax.report.page import write_report
from fope_jax.report.provenance import config_tables, run_titles
from fope_jax.report.rows import ReportError, read_runs
from fope_jax.report.tables import format_number

pytestmark = pytest.mark.usefixtures("undrawn")

VOID = ("meta", "img", "br", "input")


class Page(HTMLParser):
    """Tags and text of a page; closing tags must match."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.words = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]

    @property
    def text(self):
        return "".join(self.words)


@pytest.fixture(scope="module")
def report(synthetic, tmp_path_factory):
    directory = tmp_path_factory.mktemp("report")
    runs = [synthetic.write_run(directory / name, name) for name in synthetic.LOSSES]
    path = write_report(runs, directory / "report")
    return path, Page(path.read_text())


def test_every_number_is_on_the_page(synthetic, report):
    cells = report[1].text.split("\n")
    text = report[1].text
    for variant, losses in synthetic.LOSSES.items():
        assert variant in text
        for loss in losses:
            assert format_number(math.exp(loss)) in text
            assert format_number(math.exp(loss - losses[0])) in text
            assert f"{loss / math.log(2) / 3:.3f}" in text
            assert f"{loss * 6400:,.2f}" in text  # the sums themselves
        for share in synthetic.ACCURACY[variant]:
            assert f"{2.5 - 2 * share:.3f}" in text
    for fact in ("0123abc", "0.10.2", "1,234,567", "box", "21,345", "1.2%", "3.25"):
        assert fact in text
    assert cells


def test_the_protocol_is_stated_with_what_was_left_out(report):
    text = report[1].text
    assert "The last 64 tokens of 150 windows are scored: 9,600 tokens, 28,800 bytes" in text
    assert "2 held-out documents: Emma, Moby Dick" in text
    assert "Too short for the longest window, and so not scored: Bryant's <Stories>." in text
    assert "20 trials at each length and each of 5 depths" in text


def test_the_page_is_complete_by_itself(report):
    path, page = report
    assert [attrs["src"][:26] for attrs in page.all("img")] == ["data:image/svg+xml;base64,"] * 7
    assert not page.all("link") and all("src" not in attrs for attrs in page.all("script"))
    assert not re.findall(r"(?:src|href)=\"(?:https?:)?//", path.read_text())
    assert path.stat().st_size < 3_000_000
    links = [attrs["href"] for attrs in page.all("a")]
    for link in (link for link in links if not link.startswith("#")):
        assert (path.parent / link).stat().st_size > 2_000
    assert {p.suffix for p in path.parent.iterdir()} == {".html", ".png", ".svg"}


def test_curves_are_live_charts_where_scripts_run_and_pictures_elsewhere(synthetic, report):
    path, page = report
    live = [attrs["id"] for attrs in page.all("div") if attrs.get("class") == "live"]
    assert live == [
        "live-passkey-compact",
        "live-perplexity-validation",
        "live-perplexity-ratio-validation",
        "live-perplexity-difference-validation",
        "live-position-validation",
        "live-training",
    ]
    boxes = [attrs for attrs in page.all("input") if attrs["type"] == "checkbox"]
    assert len(boxes) == 4 + 4 + 4 + 3 + 4 + 4
    assert all("hidden" in a for a in page.all("div") if a.get("class") == "live")
    text = path.read_text()
    specifications = re.findall(r'<script type="application/json">(.*?)</script>', text)
    values = json.loads(specifications[1])["data"]["values"]
    rope = [value["y"] for value in values if value["label"] == "rope"]
    assert rope == pytest.approx([math.exp(loss) for loss in synthetic.LOSSES["rope"]], rel=1e-5)
    assert text.count("vegaEmbed(") and "window.vegaEmbed" in text


def test_the_order_is_figures_numbers_and_where_they_come_from(report):
    headings = re.findall(r"<h2>(.*?)</h2>", report[0].read_text().split("<script>")[0])
    assert headings[0] == "Verdict"
    assert headings[-2:] == ["Numbers", "Where the numbers come from"]
    text = report[0].read_text()
    assert text.index("<li>RoPE") < text.index("<nav") < text.index("<figure>")
    numbers = text.index("<h2>Numbers")
    assert text.rindex("<figure>") < numbers and text[text.index("<nav") : numbers].count("<t") == 0
    after = text[text.index("<h2>Where the numbers come from") :]
    assert after.index("<details>") < after.index("<table")


def test_the_page_can_be_read_aloud_and_on_a_phone(report):
    page = report[1]
    assert page.all("html")[0]["lang"] == "en"
    assert "width=device-width" in page.all("meta")[1]["content"]
    alts = [attrs["alt"] for attrs in page.all("img")]
    assert any(
        alt.startswith(
            "Perplexity against context length, validation split. rope: 22.20 at 128 tokens, 273.14"
        )
        for alt in alts
    )
    assert all(len(alt) > 40 for alt in alts)
    assert all(attrs.get("scope") in ("row", "col") for attrs in page.all("th"))
    assert len(page.all("h1")) == 1
    assert len(page.all("h2")) == 7
    assert len(page.all("caption")) == len(page.all("table"))
    assert len([a for a in page.all("div") if a.get("class") == "scroll"]) == len(page.all("table"))


def test_the_page_can_be_walked_by_keyboard(report):
    page = report[1]
    names = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(set(names)) == len(names)
    inside = [a["href"][1:] for a in page.all("a") if a["href"].startswith("#")]
    assert inside[0] == "main"  # past the list of sections
    assert set(inside) <= set(names)
    assert len(inside[1:]) == len(page.all("h2")) - 1  # the verdict stands above them
    scrolling = [a for a in page.all("div") if a.get("class") in ("scroll", "picture")]
    assert all(a["tabindex"] == "0" and a["aria-label"] for a in scrolling)
    assert len(scrolling) == len(page.all("table")) + len(page.all("img"))
    assert ":focus-visible" in report[0].read_text()


def test_what_was_scored_is_said_once(report):
    text = report[1].text
    assert text.count("windows are scored: 9,600 tokens, 28,800 bytes") == 1
    assert text.count("No intervals over 2 documents: below 10") == 1
    assert text.lower().count("no bos token is added") == 2  # two protocols
    captions = re.findall(r"<figcaption>(.*?)\(<a", report[0].read_text(), re.DOTALL)
    assert not any("9,600" in caption for caption in captions)


def test_the_same_runs_give_the_same_page(four_runs, tmp_path):
    one, two = (write_report(four_runs[:1], tmp_path / name) for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


def test_runs_scored_on_different_tokens_get_sections_and_files_of_their_own(make_run, tmp_path):
    runs = [make_run("rope"), make_run("alibi", tokens={"Emma": 6400})]
    path = write_report(runs, tmp_path / "report")
    headings = re.findall(r"<h2>(Perplexity.*?)</h2>", path.read_text())
    assert sorted(headings) == [
        "Perplexity against context length (validation: alibi)",
        "Perplexity against context length (validation: rope)",
    ]
    assert (path.parent / "perplexity-validation-1.png").exists()
    assert (path.parent / "perplexity-validation-2.svg").exists()


def test_names_cannot_break_the_page(make_run, tmp_path):
    run = make_run("rope")
    for name in ("config.json", "metrics.jsonl"):
        file = run / name
        file.write_text(file.read_text().replace('"rope"', '"<b>rope & \\"co\\"</b>"'))
    path = write_report([run], tmp_path / "report")
    page = Page(path.read_text())
    assert '<b>rope & "co"</b>' in page.text
    assert not page.all("b")
    assert "&lt;b&gt;rope &amp; &#34;co&#34;&lt;/b&gt;" in path.read_text()


def test_what_cannot_be_drawn_is_said(synthetic, make_run, tmp_path):
    rows = synthetic.rows_of("rope", 0)
    for row in rows:
        if row["kind"] == "perplexity" and row["context"] == 2048:
            row["nats"] = 1e3 * row["tokens"]
    text = Page(write_report([make_run("rope", rows=rows)], tmp_path / "r").read_text()).text
    assert "Not finite and so not drawn: rope at 2,048 tokens." in text
    assert "inf" in text


def test_a_run_that_is_only_trained_or_only_evaluated_still_reports(synthetic, make_run, tmp_path):
    everything = synthetic.rows_of("rope", 0)
    young = make_run("rope", name="young", rows=[r for r in everything if r["kind"] == "train"])
    page = Page(write_report([young], tmp_path / "one").read_text())
    assert "young is not evaluated yet" in page.text
    assert len(page.all("img")) == 1
    without = make_run("rope", name="empty", rows=[everything[0] | {"loss": None}])
    assert "empty is not evaluated yet" in write_report([without], tmp_path / "none").read_text()
    bare = make_run(
        "alibi", rows=[r for r in synthetic.rows_of("alibi", 0) if r["kind"] == "passkey"]
    )
    page = Page(write_report([bare], tmp_path / "two").read_text())
    assert "The runs have no training rows." in page.text
    assert len(page.all("img")) == 2


def test_configurations_side_by_side(synthetic, four_runs, make_run):
    differing, shared = config_tables(read_runs(four_runs))
    assert differing.columns == list(synthetic.LOSSES)
    assert dict(differing.rows)["position.method"] == [f'"{name}"' for name in synthetic.LOSSES]
    assert dict(differing.rows)["position.theta"] == ["10000.0", "-", "-", "10000.0"]
    assert dict(shared.rows)["train.length"] == ["128"]
    keys = {key for key, _ in differing.rows} | {key for key, _ in shared.rows}
    assert "model.d_model" in keys
    assert len(keys) == len(differing.rows) + len(shared.rows)


def test_equal_configurations_and_seeds_are_said(make_run, tmp_path):
    twins = [make_run("rope", name="a"), make_run("rope", name="b")]
    text = Page(write_report(twins, tmp_path / "report").read_text()).text
    assert "The runs have the same configuration." in text
    assert "mean ± sample standard deviation over seeds" not in text  # one seed, twice
    titles = run_titles(read_runs([*twins, make_run("rope", 1)]))
    assert len(set(titles)) == 3


def test_an_output_that_cannot_be_written_is_named(four_runs, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ReportError, match="cannot write the report to .*file"):
        write_report(four_runs, tmp_path / "file")
    with pytest.raises(ReportError, match="report to 'gs://bucket/x'; accepted: a path of this m"):
        write_report(four_runs, "gs://bucket/x")


def test_the_report_needs_no_jax():
    code = (
        "import sys, fope_jax.report.page; "
        "sys.exit(any(name in sys.modules for name in ('jax', 'flax', 'tensorflow')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
