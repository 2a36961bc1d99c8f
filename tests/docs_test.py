"""The documentation holds: links lead somewhere, commands parse, generated pages are whole."""

import doctest
import posixpath
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from docs.generate import links, methods, notebooks, paper_run, reference
from fope_jax.command_line.parser import build_parser
from fope_jax.config import load_config
from fope_jax.config.files import SHIPPED
from fope_jax.position.registry import METHODS, SCALINGS
from fope_jax.train.options import parse_arguments

ROOT = Path(__file__).parents[1]
PAGES = [
    *ROOT.glob("*.md"),
    *ROOT.glob("docs/**/*.md"),
    *ROOT.glob("experiments/*/README.md"),
    *(
        ROOT / f"{folder}/README.md"
        for folder in ("benchmarks", "experiments", "tpu_scripts", "tests/goldens")
    ),
]
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in PAGES}
DRAWN = re.compile(r"docs/(concepts|methods)/pictures/[\w+-]+\.svg")  # when the site is built
OWN_CONFIG = re.findall(r"```python\n(.*?)```", TEXTS["docs/howto/your_config.md"], re.DOTALL)[0]
OF_THE_READER = ("my_methods:", "tracking:")  # Python modules
GENERATED = {"docs/reference/cli.md", "docs/reference/configuration.md"}


@pytest.mark.parametrize("page", TEXTS)
def test_relative_links_and_anchors(page):
    for link in links.links(TEXTS[page]):
        target = posixpath.normpath(posixpath.join(posixpath.dirname(page), link.target))
        target = target if link.target else page
        if target in GENERATED or (link.is_image and DRAWN.fullmatch(target)):
            continue
        assert (ROOT / target).exists(), f"{page}: {link.target}"
        if link.anchor:
            known = links.anchors((ROOT / target).read_text(encoding="utf-8"))
            assert link.anchor in known, f"{page}: {link.target}#{link.anchor}"


def commands(text):
    """The ``fope`` commands of a text's shell blocks, without those inside loops or pipes."""
    for block in re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL):
        for line in re.sub(r"\\\n", " ", block).splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["fope"] and "$" not in line and "|" not in words:
                yield words[1:]


@pytest.mark.parametrize("page", [page for page, text in TEXTS.items() if "```bash" in text])
def test_commands_parse_and_name_files_that_exist(page, tmp_path, capsys):
    own = tmp_path / "my_config.py"
    own.write_text(OWN_CONFIG)
    for words in commands(TEXTS[page]):
        words = [word.replace("my_config.py", str(own)) for word in words]
        try:
            arguments = parse_arguments(build_parser(), words)
        except SystemExit:
            pytest.fail(f"{page}: fope {shlex.join(words)}\n{capsys.readouterr().err}")
        name = (getattr(arguments, "config", None) or "").partition(":")[0]
        ours = SHIPPED / f"{name.removeprefix('configs/').removesuffix('.py')}.py"
        assert not name or name.startswith(("runs/", str(own))) or ours.is_file(), f"{page}: {name}"
        is_known = ours.is_file() or name == str(own)
        if is_known and not any(module in " ".join(words) for module in OF_THE_READER):
            load_config(arguments.config, arguments.overrides)


def test_no_line_names_an_index_where_the_package_is_not():
    for page, text in TEXTS.items():
        assert not re.search(r"pip install [^\n`]*\bfope[-_]jax\b", text), page


@pytest.fixture(scope="module")
def pages():
    return methods.pages()


def test_each_method_and_scaling_has_a_page(pages):
    assert set(pages) == {methods.page_of(name) for name in METHODS | SCALINGS}
    for page, text in pages.items():
        parts = re.findall(r"^## (.*)\n\n(.+)", text, flags=re.MULTILINE)
        titles = [title for title, _ in parts]
        assert {"Formula", "Picture", "How to use it", "What was measured", "Source"} <= set(titles)
        formula = re.search(r"```text\n(.*?)```", text, flags=re.DOTALL)
        assert formula and formula[1].strip(), f"{page} has no formula"
        assert "![" in text, f"{page} has no picture"


def test_a_page_shows_what_was_measured(pages):
    """FoPE's numbers are those of experiments/tournament/README.md."""
    (row,) = re.findall(r"^\| `fope` \|(.*)\|$", pages["methods/fope.md"], flags=re.MULTILINE)
    assert [cell.strip() for cell in row.split("|")] == [
        *("95.39", "126.47"),
        *("99%", "85%", "47%", "12%"),
    ]
    assert "No experiment" in pages["methods/learned.md"]


@pytest.mark.parametrize("name", METHODS | SCALINGS)
def test_the_commands_of_a_page_name_the_method(name, pages):
    found = list(commands(pages[methods.page_of(name)]))
    assert found
    for words in found:
        arguments = parse_arguments(build_parser(), words)
        if words[0] == "train":
            config = load_config(arguments.config, arguments.overrides)
            assert name in methods.names_in(config.to_dict()["position"])
        elif words[0] == "evaluate":
            assert arguments.variants[0].startswith(f"{name}:")
        else:
            assert arguments.method == name


def test_the_reference_of_position_has_the_module_of_each_method_and_scaling():
    """A page of a method links to its class there."""
    page = TEXTS["docs/reference/position.md"]
    for cls in (METHODS | SCALINGS).values():
        assert f"::: {cls.__module__}\n" in page, cls


def test_the_reference_has_every_verb_and_section():
    pages = reference.pages()
    verbs = re.findall(r"^## (.*)$", pages["reference/cli.md"], flags=re.MULTILINE)
    assert {"fope", "fope train", "fope data build", "fope plan"} <= set(verbs)
    for key in ("`train.steps`", "`mesh.context`", "`evaluate.protocols`", "`position.method`"):
        assert f"| {key} |" in pages["reference/configuration.md"]


def test_the_page_of_the_papers_run_is_what_the_plan_says():
    """Its numbers are those of today's plan, configuration and inputs; two of them by hand."""
    text = paper_run.PAGE.read_text(encoding="utf-8")
    assert text == paper_run.page() + "\n", "python -m docs.generate.paper_run writes it again"
    # 10 B tokens in steps of 1,024 x 512 are 19,073; fope plan: 0.1051035 s each by memory traffic.
    training = 19_073 * 0.1051035 / 3600
    (row,) = re.findall(r"^\| training \| 19,073 updates \|(.*)\|$", text, flags=re.MULTILINE)
    cells = [cell.strip() for cell in row.split("|")]
    dollars = [f"${2 * training * price:.2f}" for price in (19.2, 3.92)]
    assert cells == [f"{training:.2f}", f"{2 * training:.2f}", *dollars]
    # The rows of a table add up to its last.
    table = text[text.index("| part |") : text.index("The build needs")]
    hours = [float(line.split("|")[4]) for line in table.splitlines()[2:] if line.strip()]
    assert abs(sum(hours[:-1]) - hours[-1]) < 0.01 * len(hours)


def test_links_on_the_site():
    figure = "quickstart/figures/perplexity.svg"
    text = f"[a](../glossary.md#runs), [b](../../setup.py) ![c](../../experiments/{figure})"
    shown = links.for_site(text, "docs/howto/extend.md", "howto/extend.md")
    moved = "../findings/figures/quickstart/perplexity.svg"
    assert shown == f"[a](../glossary.md#runs), b ![c]({moved})"
    code = "```\n[a](../../setup.py)\n```\n"
    assert links.for_site(code, "docs/howto/extend.md", "howto/extend.md") == code


@pytest.mark.parametrize("module", [links, methods, notebooks, reference])
def test_examples_of_the_generators(module):
    assert doctest.testmod(module).failed == 0


@pytest.mark.slow
def test_the_site_builds_without_warnings_and_loads_nothing_from_elsewhere(tmp_path):
    pytest.importorskip("mkdocs", reason="needs the site's libraries: pip install '.[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > len(METHODS | SCALINGS) + 30
    for page in pages:
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r'(?:src|<link[^>]* href)="(https?:[^"]*)"', text)
        assert not loaded, page
        assert "][fope_jax." not in text, f"{page}: a link to a class that has no entry"
