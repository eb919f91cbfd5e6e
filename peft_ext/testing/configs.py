"""Configs, on disk and in pickles."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import pytest
from peft import PeftConfig

from .method import ConformanceTests


class ConfigTests(ConformanceTests):
    """A config comes back as it was written."""

    def test_config_round_trip(self, tmp_path: Path) -> None:
        task = "CAUSAL_LM" if self.method.adapts_modules else "SEQ_CLS"
        config = self.method.config(target_modules=["b", "a"], layers_to_transform=[0], task_type=task)
        config.save_pretrained(str(tmp_path))
        again = PeftConfig.from_pretrained(str(tmp_path))
        assert type(again) is type(config) and again.to_dict() == config.to_dict()
        assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == ["a", "b"]
        assert pickle.loads(pickle.dumps(config)).to_dict() == copy.deepcopy(config).to_dict() == config.to_dict()

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
