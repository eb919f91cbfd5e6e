"""Fine-tuning methods that PEFT does not have, as a plug-in: `import peft_ext` registers them with PEFT."""

from .calibrate import calibrate
from .core import ExtConfig, PeftMixedModel, load_plugins, register_method
from .export import load_pruned, prune_and_unload, push_pruned_to_hub, save_as_lora, save_pruned
from .hotswap import hotswap_adapter
from .loading import load
from .training import (
    Plan,
    Probe,
    SparseActivationsCallback,
    activation_report,
    layer_sampling,
    linear_probe,
    recommend,
    sparse_activations,
)
from .tuners import (
    binary_adapter,
    binary_lora,
    lora_fusion,
    lora_sb,
    mask_pruning,
    pasta,
    s2ft,
    sct,
    snell,
    sparse_ft,
    spt,
    ssf,
    unipt,
    vpt,
    vqt,
    wegeft,
)
from .tuners.binary_adapter import BinaryAdapterConfig, BinaryAdapterModel
from .tuners.binary_lora import BinaryLoraConfig, BinaryLoraModel
from .tuners.lora_fusion import LoraFusionConfig, LoraFusionModel
from .tuners.lora_sb import LoraSBConfig, LoraSBModel
from .tuners.mask_pruning import MaskLoraCallback, MaskLoraConfig, MaskLoraModel, fix_masks, keep_ratios
from .tuners.pasta import PASTAConfig, PASTAModel
from .tuners.s2ft import S2FTConfig, S2FTModel
from .tuners.sct import SCTConfig, SCTModel
from .tuners.snell import SNELLConfig, SNELLModel
from .tuners.sparse_ft import (
    SparseFTCallback,
    SparseFTConfig,
    SparseFTModel,
    graft,
    import_lt_sft,
    lt_sft,
    overlap,
)
from .tuners.spt import SPTConfig, SPTModel
from .tuners.ssf import SSFConfig, SSFModel
from .tuners.unipt import UniPTConfig, UniPTModel, layer_confidence
from .tuners.vpt import VPTConfig, VPTModel, attention_to_prompts, prune_prompts
from .tuners.vqt import FrozenPassCache, VQTConfig, VQTModel, attention_maps, select_features
from .tuners.wegeft import WeGeFTConfig, WeGeFTModel
from .version import __version__


METHODS = (
    "SSF",
    "VQT",
    "SPARSE_FT",
    "SPT",
    "MASK_PRUNING",
    "WEGEFT",
    "BINARY_LOW_RANK",
    "BINARY_ADAPTER",
    "PASTA",
    "S2FT",
    "LOW_RANK_CORE",
    "VPT",
    "SCT",
    "UNIPT",
    "SNELL",
    "FUSED_LOW_RANK",
)  # the peft types that importing this package adds

__all__ = [
    "METHODS",
    "BinaryAdapterConfig",
    "BinaryAdapterModel",
    "BinaryLoraConfig",
    "BinaryLoraModel",
    "ExtConfig",
    "FrozenPassCache",
    "LoraFusionConfig",
    "LoraFusionModel",
    "LoraSBConfig",
    "LoraSBModel",
    "MaskLoraCallback",
    "MaskLoraConfig",
    "MaskLoraModel",
    "PASTAConfig",
    "PASTAModel",
    "PeftMixedModel",
    "Plan",
    "Probe",
    "S2FTConfig",
    "S2FTModel",
    "SCTConfig",
    "SCTModel",
    "SNELLConfig",
    "SNELLModel",
    "SPTConfig",
    "SPTModel",
    "SSFConfig",
    "SSFModel",
    "SparseActivationsCallback",
    "SparseFTCallback",
    "SparseFTConfig",
    "SparseFTModel",
    "UniPTConfig",
    "UniPTModel",
    "VPTConfig",
    "VPTModel",
    "VQTConfig",
    "VQTModel",
    "WeGeFTConfig",
    "WeGeFTModel",
    "__version__",
    "activation_report",
    "attention_maps",
    "attention_to_prompts",
    "calibrate",
    "fix_masks",
    "graft",
    "hotswap_adapter",
    "import_lt_sft",
    "keep_ratios",
    "layer_confidence",
    "layer_sampling",
    "linear_probe",
    "load",
    "load_pruned",
    "lt_sft",
    "overlap",
    "prune_and_unload",
    "prune_prompts",
    "push_pruned_to_hub",
    "recommend",
    "save_as_lora",
    "save_pruned",
    "select_features",
    "sparse_activations",
]

register_method("ssf", SSFConfig, SSFModel, about=ssf.ABOUT)
register_method("vqt", VQTConfig, VQTModel, about=vqt.ABOUT)
register_method("sparse_ft", SparseFTConfig, SparseFTModel, about=sparse_ft.ABOUT)
register_method("spt", SPTConfig, SPTModel, about=spt.ABOUT)
register_method("mask_pruning", MaskLoraConfig, MaskLoraModel, about=mask_pruning.ABOUT)
register_method("wegeft", WeGeFTConfig, WeGeFTModel, about=wegeft.ABOUT)
register_method("binary_low_rank", BinaryLoraConfig, BinaryLoraModel, about=binary_lora.ABOUT)
register_method("binary_adapter", BinaryAdapterConfig, BinaryAdapterModel, about=binary_adapter.ABOUT)
register_method("pasta", PASTAConfig, PASTAModel, about=pasta.ABOUT)
register_method("s2ft", S2FTConfig, S2FTModel, about=s2ft.ABOUT)
register_method("low_rank_core", LoraSBConfig, LoraSBModel, about=lora_sb.ABOUT)
register_method("vpt", VPTConfig, VPTModel, about=vpt.ABOUT)
register_method("sct", SCTConfig, SCTModel, about=sct.ABOUT)
register_method("unipt", UniPTConfig, UniPTModel, about=unipt.ABOUT)
register_method("snell", SNELLConfig, SNELLModel, about=snell.ABOUT)
register_method("fused_low_rank", LoraFusionConfig, LoraFusionModel, about=lora_fusion.ABOUT)
load_plugins()
