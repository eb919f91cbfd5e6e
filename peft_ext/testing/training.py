"""Training, in every precision, and what is trained."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from ..core import ExtLayer
from .method import (
    ConformanceTests,
    Method,
    among,
    close,
    everywhere,
    on,
    on_a_few,
    same,
    shows,
    trained_parameters,
    warns_only,
)
from .models import PLAIN_TARGETS, inputs, logits, loss, tiny


def _takes_targets(method: Method) -> bool:
    return method.adapts_modules and not method.looks_at_data and "llama" in method.models


def _head_of(name: str) -> str:
    """The module of a tiny model that a user would train in full."""
    children = dict(tiny(name).named_children())
    return next(head for head in ("head", "lm_head", "classifier", "score") if head in children)


class TrainingTests(ConformanceTests):
    """The adapter learns, whatever surrounds it, and nothing else does."""

    @everywhere
    def test_every_trainable_parameter_moves_and_nothing_else(self, name: str) -> None:
        torch.manual_seed(0)
        model, batch = self.adapted(name).train(), inputs(name)
        before = copy.deepcopy(model.state_dict())
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            loss(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
        trained = trained_parameters(model)
        running = r".*\.(running_mean|running_var|num_batches_tracked)"
        still = {key for key in trained if torch.equal(before[key], model.state_dict()[key])}
        assert not {key for key in still if not re.fullmatch(self.method.inert, key)}
        for key, value in model.state_dict().items():
            if key not in trained and not re.fullmatch(running, key) and not re.fullmatch(self.method.counts, key):
                assert torch.equal(before[key], value), key

    @shows("`modules_to_save`")
    @on_a_few
    def test_modules_to_save(self, name: str, tmp_path: Path) -> None:
        head = _head_of(name)
        with warns_only("Model has `tie_word_embeddings=True`"):
            model = self.adapted(name, modules_to_save=[head]).train()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        loss(model, inputs(name)).backward()
        optimizer.step()
        expected = logits(model.eval(), inputs(name))
        with warns_only("Setting `save_embedding_layers`|Could not find a config file"):
            model.save_pretrained(str(tmp_path))
        assert any(f".{head}." in key for key in load_file(tmp_path / "adapter_model.safetensors"))
        loaded = PeftModel.from_pretrained(tiny(name), str(tmp_path)).eval()
        same(logits(loaded, inputs(name)), expected)
        if self.method.merges:
            close(logits(loaded.merge_and_unload(), inputs(name)), expected)

    @shows("fp16 and bf16 base")
    @pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @on_a_few
    def test_half_precision_base(self, name: str, dtype: torch.dtype, autocast_adapter_dtype: bool) -> None:
        base = tiny(name).to(dtype)
        model = get_peft_model(base, self.config_for(name), autocast_adapter_dtype=autocast_adapter_dtype).train()
        for key, parameter in model.named_parameters():
            if self.method.prefix in key:
                stays = autocast_adapter_dtype or re.fullmatch(self.method.keeps_fp32, key)
                assert parameter.dtype == (torch.float32 if stays else dtype)
        batch = {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs(name).items()}
        assert logits(model, batch).dtype == dtype
        loss(model, batch).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)

    @shows("fp16 and bf16 autocast")
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @everywhere
    def test_autocast(self, name: str, dtype: torch.dtype) -> None:
        model, batch = self.adapted(name).train(), inputs(name)
        loss(model, batch).backward()
        exact = {key: p.grad.clone() for key, p in model.named_parameters() if p.requires_grad}
        model.zero_grad()
        with torch.autocast("cpu", dtype=dtype):
            value = loss(model, batch)
        value.backward()
        for key, parameter in model.named_parameters():
            if parameter.requires_grad and not re.fullmatch(self.method.inert, key):
                assert parameter.grad is not None and parameter.grad.dtype == torch.float32
                error = (parameter.grad - exact[key]).norm() / (exact[key].norm() + 1e-3)
                assert error < 0.25, (key, error)

    @shows("gradient checkpointing")
    @pytest.mark.parametrize("use_reentrant", [True, False])
    @on(lambda method: [name for name in method.models if name not in (*PLAIN_TARGETS, "swin")])
    def test_gradient_checkpointing(self, name: str, use_reentrant: bool) -> None:
        def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
            base = tiny(name)
            if not base.supports_gradient_checkpointing:
                pytest.skip(f"{name} does not support it")
            if checkpointing:
                base.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
                base.config.use_cache = False
            model = get_peft_model(base, self.config_for(name)).train()
            self.randomize(model)
            if checkpointing and name in ("vit", "convnext"):
                model.enable_input_require_grads()
            loss(model, inputs(name)).backward()
            return {key: p.grad for key, p in model.named_parameters() if p.requires_grad}

        plain, checkpointed = gradients(False), gradients(True)
        for key, gradient in plain.items():
            if gradient is not None:
                close(checkpointed[key], gradient)

    @shows("`layers_to_transform`")
    @pytest.mark.parametrize("layers", [0, [0], [1], [0, 1]])
    @on(lambda method: [name for name in method.few if method.adapts_modules and name not in PLAIN_TARGETS])
    def test_layers_to_transform(self, name: str, layers: int | list[int]) -> None:
        model = self.adapted(name, layers_to_transform=layers)
        wanted = {layers} if isinstance(layers, int) else set(layers)
        found = {
            int(match.group(1))
            for key, module in model.named_modules()
            if isinstance(module, ExtLayer) and (match := re.search(r"\.layers\.(\d+)\.", key))
        }
        assert found == wanted

    @on(lambda method: ["llama"] if _takes_targets(method) else ())
    def test_targets(self, name: str) -> None:
        def sites(**fields: Any) -> set[str]:
            model = self.adapted(name, **fields)
            names = {key.removeprefix("base_model.model.") for key in model.base_model.targeted_module_names}
            return {key for key in names if not re.fullmatch(self.method.always, key)}

        linears = {key for key, module in tiny(name).named_modules() if isinstance(module, nn.Linear)} - {"lm_head"}
        extra = {key for key in linears if re.fullmatch(self.method.always, key)}
        assert sites(target_modules="all-linear") == linears - extra
        assert sites(target_modules=r".*\.1\..*q_proj") == {"model.layers.1.self_attn.q_proj"}
        assert sites(target_modules=["q_proj"], exclude_modules=r".*\.0\..*") == {"model.layers.1.self_attn.q_proj"}
        model = self.adapted(name, target_modules="all-linear")
        model.add_adapter("second", self.config_for(name, target_modules="all-linear"))
        assert set(model.peft_config["second"].target_modules) == linears

    @on(lambda method: [name for name in ("vit", "bert") if name in method.models] if _takes_targets(method) else ())
    def test_all_linear_beside_a_trained_head(self, name: str) -> None:
        fields: dict[str, Any] = {
            "target_modules": "all-linear", "modules_to_save": [_head_of(name)], "task_type": "SEQ_CLS"
        }  # fmt: skip
        try:
            model = self.adapted(name, **fields)
        except ValueError as refusal:
            pytest.skip(f"one alone is refused: {refusal}")
        model.add_adapter("second", self.config_for(name, **fields))
        first, second = (set(model.peft_config[adapter].target_modules) for adapter in ("default", "second"))
        assert second == first

    @shows("`generate`")
    @among("llama", "gpt2", "t5", "bart")
    def test_generate(self, name: str) -> None:
        model = self.adapted(name, task_type="SEQ_2_SEQ_LM" if name in ("t5", "bart") else "CAUSAL_LM")
        ids = inputs(name)["input_ids"]
        greedy = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
        assert greedy.shape[0] == len(ids)
        if self.method.merges:
            merged = copy.deepcopy(model).merge_and_unload()
            options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "do_sample": False}
            assert torch.equal(merged.generate(input_ids=ids, **options), greedy)
        if self.method.mixes_batches:
            options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "num_beams": 2, "do_sample": False}
            mixed = model.generate(input_ids=ids, adapter_names=["default"] * len(ids), **options)
            assert torch.equal(mixed, model.generate(input_ids=ids, **options))

    @on(lambda method: [name for name in method.few if name != "llama"] or method.few)  # whose norms work in fp32
    def test_gradients_are_the_derivatives_of_the_loss(self, name: str) -> None:
        """Central differences in float64, along a random direction for each tensor; for floating inputs too."""
        model = self.adapted(name, dtype=torch.float64)
        batch = {key: value.double() if value.is_floating_point() else value for key, value in inputs(name).items()}
        tensors = {}
        if self.method.adapts_modules:  # else the backbone has no backward
            floating = {key: value for key, value in batch.items() if value.is_floating_point()}
            tensors = {f"input {key}": value.requires_grad_() for key, value in floating.items()}
        tensors |= {key: parameter for key, parameter in model.named_parameters() if parameter.requires_grad}
        loss(model, batch).backward()
        generator = torch.Generator().manual_seed(0)
        for key, tensor in tensors.items():
            if re.fullmatch(self.method.estimated, key):
                continue
            direction = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
            values = []
            with torch.no_grad():
                for step in (1e-5, -2e-5, 1e-5):
                    tensor.add_(direction, alpha=step)
                    values.append(loss(model, batch).item())
            expected = (values[0] - values[1]) / 2e-5
            gradient = 0.0 if tensor.grad is None else (tensor.grad * direction).sum().item()
            assert abs(gradient - expected) < 1e-5 + 1e-3 * abs(expected), (
                f"{key}: along a random direction its gradient gives {gradient:.6g}, the loss itself {expected:.6g}"
            )
