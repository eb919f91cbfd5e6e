"""Methods from other packages: found through entry points, used like ours, never the reason why our import fails."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import HubServer


TESTS = Path(__file__).resolve().parent


def fake_package(target: Path, name: str, entry: str, code: str) -> None:
    """Installs a module as pip would have."""
    module = entry.partition(":")[0]
    (target / f"{module}.py").write_text(code)
    info = target / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[peft_ext.methods]\nmethod = {entry}\n")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the package `tests/plugin`, installed by pip, and two packages whose methods do not load."""
    folder = tmp_path_factory.mktemp("installed")
    source = shutil.copytree(TESTS / "plugin", tmp_path_factory.mktemp("source") / "plugin")  # pip leaves files there
    options = ("--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check", "--quiet")
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(folder), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    fake_package(folder, "peft-ext-broken", "peft_ext_broken", "1 / 0\n")
    fake_package(folder, "peft-ext-function", "peft_ext_function:register", "def register(): ...\n")
    return folder


def test_a_method_of_another_package(installed: Path, tmp_path: Path) -> None:
    with HubServer() as server:
        settings = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "hub"), "HF_TOKEN": "hf_alice"}
        settings |= {"NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        settings |= {"PYTHONPATH": os.pathsep.join([str(installed), str(TESTS.parent)]), "MPLBACKEND": "agg"}
        environment = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "HF_HUB_CACHE")} | settings
        command = [sys.executable, str(TESTS / "plugin_session.py")]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.endswith("all of it works\n"), done.stdout + done.stderr


def test_import_in_the_other_order(installed: Path) -> None:
    """The module that the entry point names may be imported first."""
    code = "import peft_ext_gain\nfrom peft_ext.core import method_of\nprint(method_of('GAIN').import_name)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(installed), str(TESTS.parent)])}
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "peft_ext\n"


def test_the_help_imports_nothing(tmp_path: Path) -> None:
    """What would make `peft-ext --help` slow is imported by the command that needs it."""
    code = (
        "import sys, peft_ext_cli\n"
        "try:\n    peft_ext_cli.main(['--help'])\nexcept SystemExit as stop:\n    assert stop.code == 0\n"
        "heavy = {'torch', 'transformers', 'peft', 'peft_ext', 'numpy', 'huggingface_hub', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    environment = {**os.environ, "PYTHONPATH": str(TESTS.parent)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    for command in ("inspect", "compare", "export", "card", "methods"):
        assert command in done.stdout
