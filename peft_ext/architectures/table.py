"""The one table of what is where in each architecture, by `config.model_type`.

A new architecture is an entry here; relatives share one. `tests/test_architectures.py` builds a model of each and
checks every name. Names of older versions of transformers stand beside today's.
"""

from __future__ import annotations

from dataclasses import replace

from .layout import Architecture, Classifier, attention, ffn


# Text encoders

_ENCODER_LAYER = ("encoder.layer",)
_TOKENS = ("word_embeddings",)
_BERT_CROSS = attention(
    *("crossattention.self", "query key value", "crossattention.output.dense"),
    is_cross=True,
    head_size="attention_head_size",
)
_BERT = Architecture(
    attention=(
        attention(
            *("attention.self", "query key value", "attention.output.dense"),
            head_size="attention_head_size",
            norm="",
            stream="attention.output.LayerNorm",
        ),
        _BERT_CROSS,
    ),
    ffn=(ffn("intermediate.dense", "output.dense"),),
    embeddings=_TOKENS,
    classifier=Classifier("BertForSequenceClassification", "bert", _ENCODER_LAYER, class_token="dropout"),
    unread=r"(.*\.)?pooler(\..*)?",
)
_ROBERTA = replace(_BERT, classifier=Classifier("RobertaForSequenceClassification", "roberta", _ENCODER_LAYER))
_SHARED_BIAS = {"heads": "all layers share one position bias per head, so a layer cannot lose its own heads"}


def _like_roberta(name: str, backbone: str = "roberta") -> Architecture:
    return replace(_BERT, classifier=Classifier(f"{name}ForSequenceClassification", backbone, _ENCODER_LAYER))


_TEXT_ENCODERS = {
    "albert": Architecture(
        attention=(attention("attention", "query key value dense", head_size="attention_head_size"),),
        ffn=(ffn("ffn", "ffn_output"),),
        embeddings=_TOKENS,
        unread=r"(.*\.)?pooler",
        shares_layers=True,
    ),
    "bert": _BERT,
    "camembert": _like_roberta("Camembert"),
    "data2vec-text": _like_roberta("Data2VecText", "data2vec_text"),
    "deberta": Architecture(
        attention=(
            attention(
                *("attention.self", "in_proj", "attention.output.dense"),
                order="heads",
                head_size="attention_head_size",
            ),
        ),
        ffn=(ffn("intermediate.dense", "output.dense"),),
        embeddings=_TOKENS,
        position="bias",
        prunable=("ffn",),
        fixed={"heads": "its heads have biases of queries and values that are parameters of their own"},
    ),
    "deberta-v2": Architecture(
        attention=(
            attention(
                *("attention.self", "query_proj key_proj value_proj", "attention.output.dense"),
                further=("attention.self.pos_query_proj", "attention.self.pos_key_proj"),
                head_size="attention_head_size",
            ),
        ),
        ffn=(ffn("intermediate.dense", "output.dense"),),
        embeddings=_TOKENS,
        position="bias",
        # the norm of the relative positions goes around re-entrant checkpoints
        unread=r"((.*\.)?pooler\..*)|((.*\.)?encoder\.(LayerNorm|conv\..*))",
    ),
    "distilbert": Architecture(
        attention=(
            attention(
                *("attention", "q_lin k_lin v_lin out_lin"),
                head_size="attention_head_size",
                norm="",
                stream="sa_layer_norm",
            ),
        ),
        ffn=(ffn("ffn.lin1", "ffn.lin2"),),
        embeddings=_TOKENS,
        classifier=Classifier(
            *("DistilBertForSequenceClassification", "distilbert", ("transformer.layer",)),
            class_token="pre_classifier",
        ),
    ),
    "electra": _like_roberta("Electra", "electra"),
    "layoutlm": replace(_BERT, classifier=None),
    "modernbert": Architecture(
        attention=(attention("attn", "Wqkv Wo", order="blocks", norm="attn_norm"),),
        ffn=(ffn("mlp.Wi", "mlp.Wo", "mlp.Wi"),),
        embeddings=("tok_embeddings",),
        position="rotary",
    ),
    "mpnet": Architecture(
        attention=(attention("attention.attn", "q k v o", head_size="attention_head_size"),),
        ffn=(ffn("intermediate.dense", "output.dense"),),
        embeddings=_TOKENS,
        position="bias",
        prunable=("ffn",),
        fixed=_SHARED_BIAS,
        unread=r"(.*\.)?pooler\..*",
    ),
    "roberta": _ROBERTA,
    "xlm-roberta": _like_roberta("XLMRoberta"),
}

# Language models

_PROJECTIONS = "q_proj k_proj v_proj o_proj"
_GATED = ffn("mlp.up_proj", "mlp.down_proj", "mlp.gate_proj")
_LLAMA = Architecture(
    attention=(attention("self_attn", _PROJECTIONS),),
    ffn=(_GATED,),
    embeddings=("embed_tokens",),
    position="rotary",
)
# of the relatives, those whose blocks add first the attention and then, from a norm of the sum, the feed-forward part
_SEQUENTIAL = replace(
    _LLAMA,
    attention=(attention("self_attn", _PROJECTIONS, stream="post_attention_layernorm", enters="input_layernorm"),),
)
_MOE = replace(
    _LLAMA,
    ffn=(_GATED, ffn("mlp.shared_expert.up_proj", "mlp.shared_expert.down_proj", "mlp.shared_expert.gate_proj")),
    prunable=("heads",),
    fixed={"ffn": "its experts are parameters of three dimensions, not Linear modules"},
)
_WHOLE_NORM = {"heads": "queries and keys are normalised over all heads at once, so none can leave without the others"}
_OLMO2 = replace(_LLAMA, prunable=("ffn",), fixed=_WHOLE_NORM)
_GLM = replace(_LLAMA, ffn=(ffn("mlp.gate_up_proj", "mlp.down_proj", "mlp.gate_up_proj"),))
_GPT2_FFN = ffn("mlp.c_fc", "mlp.c_proj")
_ALIBI = {"heads": "each head has a slope of its own for positions, which depends on the number of heads"}
_FUSED = {"heads": "one module makes queries, keys and values in an order in which no head can be cut"}
_NEOX = Architecture(
    attention=(attention("attention", "query_key_value dense", order="heads", head_size="head_size"),),
    ffn=(ffn("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),),
    embeddings=("embed_in",),
    position="rotary",
)
_GEMMA3 = replace(
    _LLAMA,
    attention=(*_LLAMA.attention, attention("self_attn", "q_proj k_proj v_proj out_proj")),
    ffn=(*_LLAMA.ffn, ffn("mlp.fc1", "mlp.fc2")),
    embeddings=("embed_tokens", "patch_embedding"),
    unread=r".*vision_tower.*|.*multi_modal_projector.*",
)

_LANGUAGE_MODELS = {
    "bloom": Architecture(
        attention=(attention("self_attention", "query_key_value dense", order="heads"),),
        ffn=_NEOX.ffn,
        embeddings=_TOKENS,
        position="bias",
        prunable=("ffn",),
        fixed=_ALIBI,
    ),
    "codegen": Architecture(
        attention=(attention("attn", "qkv_proj out_proj", order="other"),),
        ffn=(ffn("mlp.fc_in", "mlp.fc_out"),),
        embeddings=("wte",),
        position="rotary",
        prunable=("ffn",),
        fixed=_FUSED,
    ),
    **dict.fromkeys(("cohere", "cohere2", "gemma2", "granite"), _LLAMA),
    **dict.fromkeys(("gemma", "helium", "llama", "mistral", "qwen2", "qwen3"), _SEQUENTIAL),
    "falcon": Architecture(
        attention=(attention("self_attention", "query_key_value dense", order="other"),),
        ffn=_NEOX.ffn,
        embeddings=_TOKENS,
        position="rotary",
        prunable=("ffn",),
        fixed=_FUSED,
    ),
    "gemma3": _GEMMA3,
    "gemma4": replace(_LLAMA, prunable=("ffn",), fixed={"heads": "its layers share keys and values"}),
    "glm": _GLM,
    "glm4": _GLM,
    "gpt2": Architecture(
        attention=(attention("attn", "c_attn c_proj", order="blocks", stream="ln_2", enters="ln_1"),),
        ffn=(_GPT2_FFN,),
        embeddings=("wte",),
    ),
    "gpt_bigcode": Architecture(
        attention=(attention("attn", "c_attn c_proj", order="other"),),
        ffn=(_GPT2_FFN,),
        embeddings=("wte",),
        prunable=("ffn",),
        fixed=_FUSED,
    ),
    "gpt_neo": Architecture(
        attention=(attention("attn.attention", "q_proj k_proj v_proj out_proj"),),
        ffn=(_GPT2_FFN,),
        embeddings=("wte",),
    ),
    "gpt_neox": _NEOX,
    "gptj": Architecture(
        attention=(attention("attn", "q_proj k_proj v_proj out_proj"),),
        ffn=(ffn("mlp.fc_in", "mlp.fc_out"),),
        embeddings=("wte",),
        position="rotary",
    ),
    "gpt_oss": replace(
        _MOE,
        prunable=(),
        fixed={**_MOE.fixed, "heads": "each head has a learnt sink, which is a parameter of the whole attention"},
    ),
    "llama4": replace(
        _MOE,
        ffn=(
            ffn("feed_forward.up_proj", "feed_forward.down_proj", "feed_forward.gate_proj"),
            ffn(*(f"feed_forward.shared_expert.{name}_proj" for name in ("up", "down", "gate"))),
        ),
    ),
    **dict.fromkeys(("granitemoe", "mixtral", "phimoe", "qwen2_moe", "qwen3_moe"), _MOE),
    "mpt": Architecture(
        attention=(attention("attn", "Wqkv out_proj", order="blocks"),),
        ffn=(ffn("ffn.up_proj", "ffn.down_proj"),),
        embeddings=("wte",),
        position="bias",
        prunable=("ffn",),
        fixed=_ALIBI,
    ),
    "nemotron": replace(_LLAMA, ffn=(ffn("mlp.up_proj", "mlp.down_proj"),)),
    "nemotron_h": Architecture(
        attention=(attention("mixer", _PROJECTIONS),),
        ffn=(ffn("mixer.up_proj", "mixer.down_proj"),),
        embeddings=("embeddings",),
        blocks=("layers",),
        prunable=("ffn",),
        fixed={"heads": "most of its blocks are state spaces, which have no heads"},
    ),
    "olmo": _LLAMA,
    "olmo2": _OLMO2,
    "olmo3": _OLMO2,
    "olmoe": replace(_MOE, prunable=(), fixed={**_MOE.fixed, **_WHOLE_NORM}),
    "phi": replace(
        _LLAMA, attention=(attention("self_attn", "q_proj k_proj v_proj dense"),), ffn=(ffn("mlp.fc1", "mlp.fc2"),)
    ),
    "phi3": replace(_GLM, attention=(attention("self_attn", "qkv_proj o_proj", order="blocks"),)),
    "rwkv": Architecture(
        ffn=(ffn("feed_forward.key", "feed_forward.value"),),
        embeddings=("embeddings",),
        prunable=("ffn",),
        fixed={"heads": "it has no attention"},
    ),
    "seed_oss": _LLAMA,
    "smollm3": _LLAMA,
    "stablelm": _LLAMA,
    "starcoder2": replace(_LLAMA, ffn=(_GPT2_FFN,)),
}

# Encoder-decoders and speech

_BART = Architecture(
    attention=(
        attention("self_attn", "q_proj k_proj v_proj out_proj"),
        attention("encoder_attn", "q_proj k_proj v_proj out_proj", is_cross=True),
    ),
    ffn=(ffn("fc1", "fc2"),),
    embeddings=("embed_tokens",),
)
_T5 = Architecture(
    attention=(
        attention("layer.0.SelfAttention", "q k v o", head_size="key_value_proj_dim"),
        attention("layer.1.EncDecAttention", "q k v o", head_size="key_value_proj_dim", is_cross=True),
    ),
    ffn=tuple(  # the second part of a block of the encoder, the third of one of the decoder
        ffn(f"layer.{part}.DenseReluDense.{up}", f"layer.{part}.DenseReluDense.wo", gate)
        for part in (1, 2)
        for up, gate in (("wi", None), ("wi_1", f"layer.{part}.DenseReluDense.wi_0"))
    ),
    embeddings=("shared", "embed_tokens"),
    position="bias",
    prunable=("ffn",),
    fixed=_SHARED_BIAS,
)
_WAV2VEC2 = Architecture(
    attention=(attention("attention", "q_proj k_proj v_proj out_proj"),),
    ffn=(ffn("feed_forward.intermediate_dense", "feed_forward.output_dense"),),
    embeddings=("feature_projection.projection",),
    position="convolution",
)

_SEQUENCE_TO_SEQUENCE = {
    **dict.fromkeys(("bart", "blenderbot", "m2m_100", "marian", "mbart", "opt", "pegasus"), _BART),
    **dict.fromkeys(("mt5", "t5", "umt5"), _T5),
    "whisper": replace(_BART, embeddings=("embed_tokens", "conv2")),
}
_SPEECH_ENCODERS = {
    **dict.fromkeys(("data2vec-audio", "hubert", "wav2vec2"), _WAV2VEC2),
    "wavlm": replace(
        _WAV2VEC2,
        position="bias",
        prunable=("ffn",),
        fixed={"heads": "all layers share one position bias per head, and its projections are read, never called"},
    ),
}

# Vision

_MLP = ffn("mlp.fc1", "mlp.fc2")
_VIT_BLOCKS = ("layers", "encoder.layer")
_VIT = Architecture(
    attention=(
        attention("attention", _PROJECTIONS, norm="layernorm_before", stream="layernorm_after"),
        attention(
            *("attention.attention", "query key value", "attention.output.dense"),
            head_size="attention_head_size",
            norm="layernorm_before",
            stream="layernorm_after",
        ),
    ),
    ffn=(replace(_MLP, norm="layernorm_after"), ffn("intermediate.dense", "output.dense", norm="layernorm_after")),
    embeddings=("patch_embeddings.projection",),
    classifier=Classifier("ViTForImageClassification", "vit", _VIT_BLOCKS),
    unread=r"(.*\.)?pooler\.dense",
    leading_rows=1,
)
_WINDOW_BIAS = "attention.relative_position_bias.relative_position_bias_table"
_BEIT = replace(
    _VIT,
    attention=(
        attention(
            "attention",
            _PROJECTIONS,
            tables=("relative_position_bias.relative_position_bias_table",),
            norm="layernorm_before",
        ),
        attention(
            *("attention.attention", "query key value", "attention.output.dense"),
            tables=("attention.attention.relative_position_bias.relative_position_bias_table",),
            head_size="attention_head_size",
            norm="layernorm_before",
        ),
    ),
    position="bias",
    classifier=Classifier("BeitForImageClassification", "beit", _VIT_BLOCKS),
    unread=None,
)
_DINOV2 = replace(
    _VIT,
    attention=tuple(replace(names, norm="norm1", stream="norm2", joins="layer_scale1") for names in _VIT.attention),
    ffn=(replace(_MLP, norm="norm2"), _GATED, ffn("mlp.weights_in", "mlp.weights_out", "mlp.weights_in", "norm2")),
    classifier=Classifier("Dinov2ForImageClassification", "dinov2", ("encoder.layer",), class_tokens=2),
)
_CLIP = Architecture(
    attention=(
        attention(
            "self_attn", "q_proj k_proj v_proj out_proj", scale="scale", norm="layer_norm1", stream="layer_norm2"
        ),
    ),
    ffn=(replace(_MLP, norm="layer_norm2"),),
    embeddings=("token_embedding", "patch_embedding"),
    classifier=Classifier("CLIPForImageClassification", "vision_model", ("encoder.layers",)),
    unread=r"(visual|text)_projection",
    # of the class token, while this head reads the patches
    unread_by={"CLIPForImageClassification": r"(visual|text)_projection|.*post_layernorm"},
    leading_rows=1,
    causal_towers=("text_model",),
)
_SIGLIP = replace(
    _CLIP,
    classifier=Classifier("SiglipForImageClassification", "vision_model", ("encoder.layers",)),
    unread=r"(.*\.)?head(\..*)?",  # the pooling head, which classification and captioning do not use
    unread_by={},
    causal_towers=(),
    leading_rows=0,
)
_SWIN = Architecture(
    attention=(attention("attention", _PROJECTIONS, tables=(_WINDOW_BIAS,), norm="layernorm_before"),),
    ffn=(replace(_MLP, norm="layernorm_after"),),
    embeddings=("patch_embeddings.projection",),
    position="bias",
    unread=r".*\.downsample\.reduction",  # has no norm of its own to follow it, and is left out as published
    has_windows=True,
)
_COUPLED = "its channels hang together over the residual connections of a whole stage"
_CONVOLUTIONS = Architecture(
    prunable=(), fixed={"ffn": _COUPLED, "heads": "it has no attention"}, is_convolutional=True, position="convolution"
)
_CONVNEXT = replace(
    _CONVOLUTIONS,
    ffn=(ffn("pwconv1", "pwconv2"), ffn("pointwise_conv1", "pointwise_conv2")),
    embeddings=("embeddings.patch_embeddings",),
    prunable=("ffn",),
    fixed={"heads": "it has no attention"},
)

_VISION_MODELS = {
    "audio-spectrogram-transformer": replace(
        _VIT,
        classifier=Classifier("ASTForAudioClassification", "audio_spectrogram_transformer", _VIT_BLOCKS),
        unread=r"classifier\..*",
        leading_rows=2,
    ),
    "beit": _BEIT,
    "clip": _CLIP,
    "convnext": _CONVNEXT,
    "convnextv2": replace(
        _CONVNEXT,
        prunable=(),
        fixed={"ffn": "its response norm divides by the mean over all channels", "heads": "it has no attention"},
    ),
    "data2vec-vision": replace(_BEIT, classifier=None),
    "deit": replace(_VIT, classifier=Classifier("DeiTForImageClassification", "deit", _VIT_BLOCKS), leading_rows=2),
    "dinov2": _DINOV2,
    "dinov2_with_registers": replace(
        _DINOV2,
        classifier=Classifier(
            *("Dinov2WithRegistersForImageClassification", "dinov2_with_registers", ("encoder.layer",)),
            class_tokens=2,
        ),
    ),
    "dinov3_convnext": replace(_CONVNEXT, embeddings=("stages.0.downsample_layers.0",)),
    "dinov3_vit": Architecture(
        attention=(attention("attention", _PROJECTIONS, norm="norm1", stream="norm2", joins="layer_scale1"),),
        ffn=(ffn("mlp.up_proj", "mlp.down_proj"), _GATED),
        embeddings=("patch_embeddings",),
        position="rotary",
        leading_rows=1,
    ),
    "efficientnet": replace(_CONVOLUTIONS, blocks=("encoder.blocks",), embeddings=("embeddings.convolution",)),
    "ijepa": replace(_VIT, classifier=None, leading_rows=0),
    "mobilenet_v1": replace(_CONVOLUTIONS, blocks=("layer",), embeddings=("conv_stem.convolution",)),
    "mobilenet_v2": replace(_CONVOLUTIONS, blocks=("layer",), embeddings=("conv_stem.first_conv.convolution",)),
    "regnet": replace(_CONVOLUTIONS, blocks=("layers",), embeddings=("embedder.embedder.convolution",)),
    "resnet": replace(_CONVOLUTIONS, blocks=("layers",), embeddings=("embedder.embedder.convolution",)),
    "siglip": _SIGLIP,
    "siglip2": replace(_SIGLIP, classifier=None),
    "swin": _SWIN,
    "swinv2": replace(
        _SWIN,
        attention=(
            attention("attention.self", "query key value", "attention.output.dense", head_size="attention_head_size"),
        ),
        ffn=(ffn("intermediate.dense", "output.dense"),),
        prunable=("ffn",),
        fixed={"heads": "its position bias is computed by a network for all heads at once"},
    ),
    "vit": _VIT,
    "vit_mae": replace(_VIT, classifier=None),
    "vit_msn": replace(_VIT, classifier=Classifier("ViTMSNForImageClassification", "vit", _VIT_BLOCKS)),
}

# Of repositories with code of their own, which no test can build: PEFT's tables know these types
_REMOTE = {
    **dict.fromkeys(("RefinedWeb", "RefinedWebModel", "chatglm"), _LANGUAGE_MODELS["falcon"]),
    "btlm": replace(_LANGUAGE_MODELS["gpt2"], ffn=(ffn("mlp.c_fc", "mlp.c_proj", "mlp.c_fc2"),), position="bias"),
    "rwkv7": Architecture(
        attention=(attention("attn", "r_proj k_proj v_proj o_proj"),),
        ffn=(ffn("ffn.key", "ffn.value"),),
        embeddings=("embeddings",),
        prunable=("ffn",),
        fixed={"heads": "it has a recurrent state instead of attention"},
    ),
}

_GENERATE = {
    name: replace(architecture, generates=True)
    for name, architecture in (_LANGUAGE_MODELS | _SEQUENCE_TO_SEQUENCE | _REMOTE).items()
}
ARCHITECTURES: dict[str, Architecture] = dict(
    sorted((_TEXT_ENCODERS | _GENERATE | _SPEECH_ENCODERS | _VISION_MODELS).items())
)
# the parts of models with several towers go by names of their own
_PARTS = ("_text_model", "_vision_model", "_text", "_vision")


def architecture_of(model_type: str | None) -> Architecture | None:
    """The entry of a `config.model_type`; the text and vision parts of a type have its entry. `None`: not known."""
    if model_type is None:
        return None
    names = [model_type, *(model_type.removesuffix(part) for part in _PARTS if model_type.endswith(part))]
    return next((ARCHITECTURES[name] for name in names if name in ARCHITECTURES), None)
