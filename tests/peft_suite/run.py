"""Runs PEFT's own tests over the configs of `cases.py`; see README.md beside this file.

python tests/peft_suite/run.py [--suites custom,decoder,...] [-- further arguments of pytest]
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path


HERE = Path(__file__).resolve().parent
SUITES = {
    "custom": "test_custom_models.py",
    "config": "test_config.py",
    "decoder": "test_decoder_models.py",
    "encdec": "test_encoder_decoder_models.py",
    "feature": "test_feature_extraction_models.py",
    "seqcls": "test_seq_classifier.py",
    "tokenqa": "test_token_classification_qa.py",
    "vision": "test_vision_models.py",
}


def fetch(cache: Path) -> Path:
    """The tests in the source distribution of the installed PEFT, downloaded once."""
    release = f"peft-{version('peft')}"
    if not (cache / release / "tests").is_dir():
        pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
        # the version of the tests is that of the installed package, so nothing is installed but what they import
        source = ["--no-binary", "peft", "--no-deps", "--dest", str(cache), release.replace("-", "==")]
        subprocess.run([*pip, "download", *source], check=True)
        subprocess.run([*pip, "install", "--target", str(cache / "packages"), "parameterized"], check=True)
        with tarfile.open(cache / f"{release}.tar.gz") as archive:
            archive.extractall(cache, filter="data")
    return cache / release / "tests"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suites", default=",".join(SUITES), help=f"of {', '.join(SUITES)}; default: all")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "peft_ext" / "peft_suite")
    arguments, further = parser.parse_known_args()
    suites = arguments.suites.split(",")
    if unknown := set(suites) - set(SUITES):
        parser.error(f"unknown suites {sorted(unknown)}; there are {', '.join(SUITES)}")
    cache: Path = arguments.cache / version("peft")
    cache.mkdir(parents=True, exist_ok=True)
    tests = fetch(cache)
    settings = {
        "PEFT_SUITE_PACKAGES": str(cache / "packages"),
        "HF_HUB_CACHE": str(cache / f"hub-{version('transformers')}"),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
    }
    os.environ.update(settings)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
    make_models = "import sys, pathlib, tiny_models; tiny_models.build(pathlib.Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", make_models, settings["HF_HUB_CACHE"]], check=True)
    with tempfile.TemporaryDirectory(prefix="peft_suite_") as directory:
        # a copy: the source distribution lacks `__init__.py`, and its `pyproject.toml` asks for coverage
        stage = Path(directory)
        left_out = shutil.ignore_patterns("__pycache__", "conftest.py", "regression")
        shutil.copytree(tests, stage / "tests", ignore=left_out)
        (stage / "tests" / "__init__.py").touch()
        (stage / "pytest.ini").write_text("[pytest]\n")
        command = [sys.executable, "-m", "pytest", "-c", str(stage / "pytest.ini"), "--rootdir", directory, "-q"]
        command += ["-p", "plugin", "-p", "no:cacheprovider", "-W", "ignore"]
        command += [str(stage / "tests" / SUITES[suite]) for suite in suites]
        command += [argument for argument in further if argument != "--"]
        os.environ["PEFT_SUITE_TESTS"] = str(stage / "tests")
        return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
