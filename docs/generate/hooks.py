"""What mkdocs calls while it builds the site; mkdocs.yml names this file."""

from __future__ import annotations

from typing import Any

from mkdocs.structure.files import File, Files

from docs.generate import links, methods, notebooks, pictures, reference
from docs.generate.links import ROOT
from fope_jax.position.registry import METHODS, SCALINGS

NOTEBOOKS = ROOT / "docs/notebooks"


def on_config(config: Any) -> Any:
    """Puts the generated pages into the navigation, after those that mkdocs.yml lists."""
    listed = {title: pages for entry in config.nav for title, pages in entry.items()}
    listed["Methods"] += [
        {"Position embeddings": [methods.page_of(name) for name in METHODS]},
        {"Scalings": [methods.page_of(name) for name in SCALINGS]},
    ]
    included = links.included_pages().values()
    listed["Findings"] += [page for page in included if page.startswith("findings/")]
    listed["How to"] += [page for page in included if page.startswith("howto/")]
    written = sorted(page for page in notebooks.pages(NOTEBOOKS))
    if written:
        listed["How to"].append({"Notebooks": written})
    return config


def on_files(files: Files, config: Any) -> Files:
    """Adds the generated pages, those from elsewhere in the repository, and all pictures."""
    generated = methods.pages() | reference.pages() | notebooks.pages(NOTEBOOKS)
    for page, text in generated.items():
        files.append(File.generated(config, page, content=text))
    for name, content in pictures.pictures().items():
        files.append(File.generated(config, name, content=content))
    for source, place in links.site_files().items():
        if not source.startswith("docs/") and source != "README.md":
            files.append(File.generated(config, place, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links between files of the repository become links between pages."""
    place = page.file.src_uri
    sources = {place: source for source, place in links.included_pages().items()}
    return links.for_site(markdown, sources.get(place, f"docs/{place}"), place)
