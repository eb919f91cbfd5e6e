"""The one change this package makes to PEFT: a member of `PeftType` per method, and its entries in the registries."""

from __future__ import annotations

import copy
import importlib
import inspect
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from models import tiny
from peft import PeftConfig, PeftModel, PeftType, get_peft_config, get_peft_model
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_MIXED_MODEL_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)

import peft_ext
from peft_ext import SSFConfig, SSFModel
from peft_ext.core.registry import add_member, is_registered, register_method


# Runs on every Python, in a fresh process; `add_member` is put before it.
CHECK = """
import copy, enum, json, pickle, sys

class Kind(str, enum.Enum):
    LORA = "LORA"
    IA3 = "IA3"

member = add_member(Kind, "SSF")
assert add_member(Kind, "SSF") is member and add_member(Kind, "LORA") is Kind.LORA
assert Kind.SSF is member and Kind["SSF"] is member and Kind("SSF") is member and getattr(Kind, "SSF") is member
assert isinstance(member, Kind) and type(member) is Kind and isinstance(member, str)
assert member.name == "SSF" and member.value == "SSF" and member == "SSF" and hash(member) == hash("SSF")
assert repr(member) == "<Kind.SSF: 'SSF'>" and str(member) == str(Kind.LORA).replace("LORA", "SSF")
assert format(member) == format(Kind.LORA).replace("LORA", "SSF")
assert list(Kind) == [Kind.LORA, Kind.IA3, member] and len(Kind) == 3 and list(reversed(Kind))[0] is member
assert member in Kind and list(Kind.__members__) == ["LORA", "IA3", "SSF"] and "SSF" in dir(Kind)
if sys.version_info >= (3, 12):  # before, the test itself is an error
    assert "SSF" in Kind and "VQT" not in Kind
assert json.dumps({"kind": member}) == '{"kind": "SSF"}' and json.dumps({member: 1}) == '{"SSF": 1}'
for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
    assert pickle.loads(pickle.dumps(member, protocol)) is member
assert copy.copy(member) is member and copy.deepcopy(member) is member and copy.deepcopy([member])[0] is member
assert {Kind.SSF: 1}["SSF"] == 1 and {"SSF": 1}[Kind.SSF] == 1
assert member is not Kind.LORA and member != Kind.LORA
second = add_member(Kind, "VQT")
assert list(Kind) == [Kind.LORA, Kind.IA3, member, second] and second._sort_order_ == 3
for wrong in ("SPT", "ssf"):
    try:
        Kind(wrong)
    except ValueError:
        pass
    else:
        raise AssertionError(wrong)
try:
    Kind.SSF = 1
except AttributeError:
    pass
else:
    raise AssertionError("a member can be rebound")
print("ok", *sys.version_info[:2])
"""
VERSIONS = ("3.11", "3.12", "3.13", "3.14")


def _interpreter(version: str) -> str | None:
    """A Python of this version: the one that runs, one of pyenv, or one on the path that answers."""
    if version == f"{sys.version_info.major}.{sys.version_info.minor}":
        return sys.executable
    candidates = [str(path) for path in Path.home().glob(f".pyenv/versions/{version}.*/bin/python")]
    on_path = shutil.which(f"python{version}")
    for candidate in [*candidates, *([on_path] if on_path else [])]:
        if subprocess.run([candidate, "-c", ""], check=False, capture_output=True).returncode == 0:
            return candidate
    return None


@pytest.mark.parametrize("version", VERSIONS)
def test_member_on_every_python(version: str) -> None:
    executable = _interpreter(version)
    if executable is None:
        pytest.skip(f"no Python {version} on this machine")
    head = "from __future__ import annotations\nfrom typing import Any\n"
    command = [executable, "-c", head + inspect.getsource(add_member) + CHECK]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.stdout.split() == ["ok", *version.split(".")], run.stderr


def test_member_of_peft_type() -> None:
    members = list(PeftType)
    assert members.count(PeftType.SSF) == 1
    assert PeftType("SSF") is PeftType["SSF"] is PeftType.SSF
    assert PeftType.SSF.value == "SSF" == PeftType.SSF
    assert pickle.loads(pickle.dumps(PeftType.SSF)) is PeftType.SSF
    assert copy.deepcopy(PeftType.SSF) is PeftType.SSF
    assert json.loads(json.dumps(PeftType.SSF)) == "SSF"
    assert peft.utils.peft_types.PeftType is PeftType
    with pytest.raises(ValueError, match="NO_SUCH"):
        PeftType("NO_SUCH")


def test_registries() -> None:
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.SSF] is PEFT_TYPE_TO_CONFIG_MAPPING["SSF"] is SSFConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.SSF] is PEFT_TYPE_TO_MIXED_MODEL_MAPPING[PeftType.SSF] is SSFModel
    # transformers derives the prefix from the type, and looks for it anywhere in a key
    assert PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.SSF] == SSFModel.prefix == f"{PeftType.SSF.value.lower()}_"
    for other, prefix in PEFT_TYPE_TO_PREFIX_MAPPING.items():
        assert other == "SSF" or (prefix not in "ssf_" and "ssf_" not in prefix)


def test_registering_again_changes_nothing() -> None:
    before = [list(PeftType), dict(PEFT_TYPE_TO_CONFIG_MAPPING), dict(PEFT_TYPE_TO_TUNER_MAPPING)]
    assert register_method("ssf", SSFConfig, SSFModel)
    importlib.reload(peft_ext)
    assert [list(PeftType), dict(PEFT_TYPE_TO_CONFIG_MAPPING), dict(PEFT_TYPE_TO_TUNER_MAPPING)] == before
    assert peft_ext.SSFConfig is SSFConfig


def test_config_round_trip(tmp_path: Path) -> None:
    config = SSFConfig(
        target_modules=["q_proj", "k_proj"],
        exclude_modules=["lm_head"],
        modules_to_save=["classifier"],
        layers_to_transform=[0, 1],
        layers_pattern="layers",
        shift=False,
        recover=False,
        init_weights="identity",
        task_type="SEQ_CLS",
    )
    assert config.peft_type is PeftType.SSF
    assert config.to_dict()["target_modules"] == ["k_proj", "q_proj"]
    config.save_pretrained(str(tmp_path))
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["peft_type"] == "SSF"
    config.inference_mode = True  # as PEFT writes and reads it
    for loaded in (SSFConfig.from_pretrained(str(tmp_path)), PeftConfig.from_pretrained(str(tmp_path))):
        assert type(loaded) is SSFConfig and loaded.peft_type is PeftType.SSF
        assert {**loaded.to_dict(), "inference_mode": True} == {**config.to_dict(), "inference_mode": True}
    assert type(get_peft_config({"peft_type": "SSF", "task_type": "SEQ_CLS"})) is SSFConfig
    assert copy.deepcopy(config) == config
    assert pickle.loads(pickle.dumps(config)) == config


def test_config_with_fields_of_a_newer_version(tmp_path: Path) -> None:
    SSFConfig().save_pretrained(str(tmp_path))
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "a_new_field": 1, "peft_ext_version": "99.0"}))
    with pytest.warns(UserWarning) as caught:
        config = PeftConfig.from_pretrained(str(tmp_path))
    assert type(config) is SSFConfig
    messages = " ".join(str(warning.message) for warning in caught)
    assert "a_new_field" in messages and "peft_ext 99.0" in messages and "pip install -U peft-ext" in messages


def test_adapter_made_by_another_process_loads(tmp_path: Path) -> None:
    model = get_peft_model(tiny("llama"), SSFConfig())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny("llama"), tmp_path)
    for key, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[key]), key


def test_only_the_registered_class_counts() -> None:
    class Impostor(SSFConfig):
        METHOD = "SSF"

    assert is_registered(SSFConfig, "SSF") and not is_registered(Impostor, "SSF")
    with pytest.raises(ValueError, match="not registered"):
        Impostor()


# Scenarios that need a process in which this package was not imported yet. One process imports PEFT, which is what
# takes long, and forks for each of them.

IMPORT = """
import pickle, peft, warnings
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING
tables = (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING)
before = [dict(table) for table in tables]
names = [member.name for member in peft.PeftType]
assert "SSF" not in names
warnings.simplefilter("error")
import peft_ext
for table, old in zip(tables, before, strict=True):
    assert {key: value for key, value in table.items() if key not in peft_ext.METHODS} == old
assert [member.name for member in peft.PeftType] == [*names, *peft_ext.METHODS]
"""

# as notebooks with autoreload do
IMPORT_TWICE = """
import sys, warnings
import peft_ext
from peft import PeftType, get_peft_model
old = peft_ext.SSFConfig
for name in [name for name in sys.modules if name.split(".")[0] == "peft_ext"]:
    del sys.modules[name]
warnings.simplefilter("error")
import peft_ext
assert peft_ext.SSFConfig is not old
assert [member.name for member in PeftType].count("SSF") == 1
from torch import nn
model = get_peft_model(nn.Sequential(nn.Linear(2, 2)), peft_ext.SSFConfig(target_modules=["0"]))
assert type(model.base_model) is peft_ext.SSFModel
"""

# as data loaders and launchers that spawn do: unpickling a config imports what registers it
UNPICKLE = """
import pickle
config = pickle.loads({pickled!r})
from peft import PeftType
assert config.peft_type is PeftType.SSF and config.shift is False
"""

# a future PEFT: the member is written in the class, and its tuner registers itself
SHIPPED_BY_PEFT = """
import sys, types, warnings
from dataclasses import dataclass
from typing import Any
import peft
from peft import LoraModel, PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import register_peft_method

{add_member}
add_member(PeftType, "SSF")
sys.modules["peft.tuners.ssf"] = types.ModuleType("peft.tuners.ssf")

@dataclass
class SSFConfig(PeftConfig):
    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PeftType.SSF

class SSFModel(LoraModel):
    prefix = "ssf_"

SSFConfig.__module__ = SSFModel.__module__ = "peft.tuners.ssf"
if {registers}:
    register_peft_method(name="ssf", config_cls=SSFConfig, model_cls=SSFModel, is_mixed_compatible=True)

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import peft_ext
messages = [str(warning.message) for warning in caught if "peft_ext" in str(warning.message)]
assert len(messages) == 1, messages
assert "peft " + peft.__version__ in messages[0] and "'SSF'" in messages[0] and "install an older peft" in messages[0]
if {registers}:
    assert PEFT_TYPE_TO_CONFIG_MAPPING["SSF"] is SSFConfig and PEFT_TYPE_TO_TUNER_MAPPING["SSF"] is SSFModel
assert [member.name for member in PeftType].count("SSF") == 1
try:
    peft_ext.SSFConfig()
except ValueError as error:
    assert "not registered" in str(error) and "'SSF'" in str(error) and "older peft" in str(error)
else:
    raise AssertionError("our config was made although it would run PEFT's method")
"""

RUNNER = """
import json, os, sys, traceback
import peft, peft.mapping, torch, transformers.pytorch_utils, transformers.modeling_utils

outcomes = {}
for name, code in json.load(sys.stdin).items():
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            exec(compile("from __future__ import annotations\\n" + code, name, "exec"), {"__name__": "scenario"})
        except BaseException:
            os.write(write, traceback.format_exc()[-4000:].encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        outcomes[name] = pipe.read()
    os.waitpid(child, 0)
print(json.dumps(outcomes))
"""


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str]:
    """For each scenario what went wrong: nothing, one hopes."""
    if not hasattr(os, "fork"):
        pytest.skip("needs os.fork")
    source = inspect.getsource(add_member)
    scenarios = {
        "import": IMPORT,
        "import twice": IMPORT_TWICE,
        "unpickle": UNPICKLE.format(pickled=pickle.dumps(SSFConfig(shift=False))),
        "shipped": SHIPPED_BY_PEFT.format(add_member=source, registers=True),
        "shipped without a tuner": SHIPPED_BY_PEFT.format(add_member=source, registers=False),
    }
    command = [sys.executable, "-W", "ignore", "-c", RUNNER]
    run = subprocess.run(command, input=json.dumps(scenarios), capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize("scenario", ["import", "import twice", "unpickle", "shipped", "shipped without a tuner"])
def test_in_a_fresh_process(scenario: str, outcomes: dict[str, str]) -> None:
    assert not outcomes[scenario], outcomes[scenario]


def test_two_packages_with_a_method_of_one_name() -> None:
    config = type("OtherConfig", (peft_ext.SSFConfig,), {"__module__": "other.methods"})
    with pytest.raises(ValueError, match=r"called 'SSF': peft_ext\.tuners.* SSFConfig, and other\.methods would"):
        peft_ext.register_method("ssf", config, peft_ext.SSFModel)
    assert type(peft_ext.SSFConfig()) is peft_ext.SSFConfig  # still registered
