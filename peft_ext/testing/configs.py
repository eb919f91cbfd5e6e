"""Configs, on disk and in pickles."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from peft import PeftConfig

from .method import ConformanceTests


def fields_of(config: Any) -> dict[str, Any]:
    """The fields of a config, whether or not its `to_dict` has them; tuples and sets as lists."""
    return {f.name: json.loads(json.dumps(getattr(config, f.name), default=sorted)) for f in fields(config)}


class ConfigTests(ConformanceTests):
    """A config comes back as it was written."""

    def test_config_round_trip(self, tmp_path: Path) -> None:
        task = "CAUSAL_LM" if self.method.adapts_modules else "SEQ_CLS"
        config = self.method.config(target_modules=["b", "a"], layers_to_transform=[0], task_type=task)
        config.save_pretrained(str(tmp_path))
        again = PeftConfig.from_pretrained(str(tmp_path))
        assert type(again) is type(config)
        assert fields_of(again) == fields_of(config)
        assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == ["a", "b"]
        assert fields_of(pickle.loads(pickle.dumps(config))) == fields_of(copy.deepcopy(config)) == fields_of(config)

    def test_config_of_a_newer_version(self, tmp_path: Path) -> None:
        self.method.config(target_modules=["a"]).save_pretrained(str(tmp_path))
        path = tmp_path / "adapter_config.json"
        fields = json.loads(path.read_text())
        path.write_text(json.dumps({**fields, "a_later_field": 1}))
        with pytest.warns(UserWarning, match=r"Unexpected keyword arguments \['a_later_field'\]"):
            PeftConfig.from_pretrained(str(tmp_path))
        path.write_text(json.dumps({**fields, "peft_ext_version": "99.0"}))
        with pytest.warns(UserWarning, match=r"written by peft_ext 99\.0.*pip install -U peft-ext"):
            PeftConfig.from_pretrained(str(tmp_path))
