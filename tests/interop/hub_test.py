"""Checkpoints by name: downloaded once, read without a network, and one line where neither works.

A server of this machine speaks what huggingface_hub asks of the Hub.
"""

import hashlib
import http.server
import json
import shutil
import threading
from pathlib import Path

import huggingface_hub.constants as constants
import pytest

from fope_jax.evaluate.restore import read_experiment
from fope_jax.extend.parent import open_parent
from fope_jax.interop.hub import local_checkpoint, origin_of
from fope_jax.interop.weights import import_weights
from fope_jax.main import main

LLAMA = Path(__file__).parents[1] / "goldens" / "weights" / "llama"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {path.name: path.read_bytes() for path in LLAMA.iterdir()}
TOKENIZER = b'{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}'
FILES |= {"tokenizer.json": TOKENIZER, "onnx/model.safetensors": b"x", "pytorch_model.bin": b"y"}
OUT_OF_REACH = "http://127.0.0.1:9"


class Hub(http.server.BaseHTTPRequestHandler):
    """One repository, org/tiny."""

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.partition("?")[0]
        self.server.asked.append(path)
        name = path.partition(f"/resolve/{COMMIT}/")[2]
        if "/org/tiny/" not in path:
            self.answer(b"", 404, **{"X-Error-Code": "RepoNotFound"})
        elif path.endswith("/revision/main"):
            self.answer(json.dumps({"id": "org/tiny", "sha": COMMIT}).encode())
        elif "/revision/" in path:
            self.answer(b"", 404, **{"X-Error-Code": "RevisionNotFound"})
        elif "/tree/" in path:
            files = [
                {"type": "file", "path": name, "size": len(content), "oid": digest(content)}
                for name, content in FILES.items()
            ]
            self.answer(json.dumps(files).encode())
        else:
            etag = {"ETag": f'"{digest(FILES[name])}"', "X-Repo-Commit": COMMIT}
            self.answer(FILES[name], **etag)

    def answer(self, content, status=200, **headers):
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_):
        pass


def digest(content):
    return hashlib.sha1(content).hexdigest()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The server, and an empty cache."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    use_endpoint(monkeypatch, f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    yield server
    server.shutdown()
    server.server_close()


def use_endpoint(monkeypatch, address):
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def test_a_name_is_downloaded_once_and_becomes_a_run(hub, tmp_path, monkeypatch, capfd):
    directory = local_checkpoint("hf:org/tiny", progress=False)
    assert capfd.readouterr() == ("", "")
    assert sorted(p.name for p in directory.iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert import_weights(directory).config == import_weights(LLAMA).config
    assert origin_of(directory) == ("org/tiny", COMMIT)

    use_endpoint(monkeypatch, OUT_OF_REACH)  # from here on there is no network
    asked = len(hub.asked)
    assert local_checkpoint(f"hf:org/tiny@{COMMIT}") == directory
    assert main(["import", "hf:org/tiny", "--workdir", "run"]) == 0
    experiment = read_experiment(tmp_path / "run")
    assert (experiment.name, experiment.data.tokenizer) == ("tiny", f"{directory}/tokenizer.json")
    origin = json.loads(Path("run/run.json").read_text())["imported"]
    assert (origin["repository"], origin["commit"]) == ("org/tiny", COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert open_parent("hf:org/tiny").source == f"hf:{directory}"
    assert len(hub.asked) == asked


def test_a_directory_that_exists_wins(hub, tmp_path):
    shutil.copytree(LLAMA, tmp_path / "org" / "tiny")
    assert local_checkpoint("hf:org/tiny") == Path("org/tiny")
    assert local_checkpoint(LLAMA) == local_checkpoint(f"hf:{LLAMA}") == LLAMA
    assert origin_of(LLAMA) is None
    assert not hub.asked


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "hf:org/none",
            "no directory org/none, and the Hub shows no model org/none: look at https",
        ),
        ("hf:org/tiny@v9", "org/tiny has no revision 'v9'; accepted: a branch, tag or commit"),
        ("hf:org/..tiny", "no directory org/..tiny, and no model can have this name"),
        ("hf:tiny", "tiny is no checkpoint of Hugging Face: there is no such directory"),
    ],
)
def test_a_name_that_is_none_is_one_line(hub, capsys, source, message):
    assert main(["import", source, "--workdir", "run"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fope: ") and error.count("\n") == 1 and message in error


@pytest.mark.parametrize(
    ("is_offline", "why"),
    [(True, "HF_HUB_OFFLINE=1 forbids downloads"), (False, "the Hub is out of reach")],
)
def test_without_a_network_what_is_missing_is_told(hub, monkeypatch, capsys, is_offline, why):
    use_endpoint(monkeypatch, OUT_OF_REACH)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", is_offline)
    for verb in (["import"], ["extend", "--method", "yarn", "--length", "32"]):
        assert main([*verb, "hf:org/tiny", "--workdir", "run"]) == 2
        error = capsys.readouterr().err
        assert f"hub lacks files of it; {why}. `hf download org/tiny` where" in error
    assert not Path("run").exists() and not hub.asked


def test_any_other_failure_of_the_library_is_one_line(hub, monkeypatch, capsys):
    def fail(*_, **__):
        raise RuntimeError("the proxy\nsays no")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    assert main(["import", "hf:org/tiny", "--workdir", "run"]) == 2
    assert "the Hub cannot be read (RuntimeError: the proxy). `hf down" in capsys.readouterr().err
