"""Names tensors that are not a Llama's, with the remedy; `foreign` does it for folders and files.

One table, tried from top to bottom. docs/checkpoints.md lists the answer to each kind.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from llama_jax.config import ConfigError, ModelConfig
from llama_jax.typing import Fields
from llama_jax.weights import params
from llama_jax.weights.source import Tensor

UNQUANTIZED = "take the weights that it was made from, in bfloat16 or float16, or a GGUF file of this model"
MERGE = "load the base model with peft, then save `model.merge_and_unload()` and give that folder"
OTHER_MODEL = "its results need that architecture, so this library does not compute it"


class Sign(NamedTuple):
    """How a kind of tensors is known.

    Attributes:
      what: a name for the files.
      remedy: what to do.
      names: a regular expression, searched in each name; a kind needs one name at least.
      test: what else must hold, of all tensors.
      format: the expected format; None for any.
    """

    what: str
    remedy: str
    names: str
    test: Callable[[Mapping[str, Tensor]], bool] = lambda tensors: True
    format: params.Format | None = None


def _dtypes(*wanted: str) -> Callable[[Mapping[str, Tensor]], bool]:
    """Returns a test: some matrix has one of these dtypes."""
    return lambda tensors: any(x.dtype.name in wanted and len(x.shape) == 2 for x in tensors.values())


def _packed_across(tensors: Mapping[str, Tensor]) -> bool:
    """Returns whether `qweight` is packed along its outputs, as AWQ has it; GPTQ packs along the inputs."""
    for name, scales in tensors.items():
        packed = tensors.get(f"{name.removesuffix('.scales')}.qweight")
        if name.endswith(".scales") and packed is not None and len(packed.shape) == len(scales.shape) == 2:
            return packed.shape[1] < scales.shape[1]
    return False


def _empty(tensors: Mapping[str, Tensor]) -> bool:
    return any(x.shape == (0,) for x in tensors.values())


def _no_weights(tensors: Mapping[str, Tensor]) -> bool:
    """Returns whether there are adapters alone, without the matrices that they adapt."""
    return not any(re.search(r"(q_proj|wq|embed_tokens)(\.base_layer)?\.weight$", name) for name in tensors)


def _no_head(tensors: Mapping[str, Tensor]) -> bool:
    return not any(name.endswith(("lm_head.weight", "output.weight")) for name in tensors)


# fmt: off
SIGNS = (
    # --- Adapters ---
    Sign("a LoRA adapter without its base model", MERGE, r"lora_[AB]|lora_embedding", _no_weights),
    Sign("a model whose DoRA adapter is not merged", MERGE, r"lora_magnitude_vector"),
    Sign("a model whose LoRA adapter is not merged", MERGE, r"lora_[AB]|lora_embedding|\.base_layer\.|lora_(down|up)"),
    Sign("an adapter of prompt or prefix tuning, which is not merged into weights",
         "this library does not compute it", r"prompt_embeddings|prompt_encoder|prefix_encoder"),
    Sign("a model whose adapter (IA3, LoHa, LoKr, OFT or VeRA) is not merged", MERGE,
         r"ia3_l|hada_w|lokr_w|\boft_|boft_|vera_lambda|\.modules_to_save\."),
    # --- Quantizations ---
    Sign("weights quantized by bitsandbytes to 4 bits",
         f"load them with transformers and save `model.dequantize()`, or {UNQUANTIZED}",
         r"quant_state\.bitsandbytes|\.absmax$|nested_absmax|\.quant_map$"),
    Sign("weights quantized by bitsandbytes to 8 bits",
         f"load them with transformers and save `model.dequantize()`, or {UNQUANTIZED}", r"\.SCB$|\.weight_format$"),
    Sign("weights quantized by AWQ", UNQUANTIZED, r"\.qweight$", _packed_across),
    Sign("weights quantized by GPTQ", UNQUANTIZED, r"\.qzeros$|\.g_idx$"),
    Sign("weights quantized by EETQ", UNQUANTIZED, r"\.weight_scales$|\.qweight$"),
    Sign("weights quantized by HQQ", UNQUANTIZED, r"\.W_q$"),
    Sign("weights quantized for ExLlama (exl2 or exl3)", UNQUANTIZED, r"\.q_weight$|\.q_invperm$|\.trellis$"),
    Sign("weights quantized by AQLM", UNQUANTIZED, r"\.codebooks$|\.codes$"),
    Sign("weights quantized by QuIP", UNQUANTIZED, r"\.Qidxs(_\d+)?$"),
    Sign("weights quantized by compressed-tensors (llm-compressor)", UNQUANTIZED, r"\.weight_packed$|\.weight_shape$"),
    Sign("weights quantized by MLX", f"`mlx_lm.convert --dequantize` makes plain ones; or {UNQUANTIZED}",
         r"\.biases$|\.scales$", _dtypes("uint32")),
    Sign("weights quantized by quanto or torchao", UNQUANTIZED,
         r"weight\._data$|weight\._scale$|_weight_qdata|_weight_scale$|weight:_"),
    Sign("FP8 weights with their scales apart", UNQUANTIZED,
         r"weight_scale_inv$|weight_scale$|input_scale$|activation_scale$|_scale_inv$",
         _dtypes("float8_e4m3fn", "float8_e5m2")),
    Sign("FP8 weights", UNQUANTIZED, r"", _dtypes("float8_e4m3fn", "float8_e5m2")),
    # --- Wrapped, divided or other models ---
    Sign("weights saved by DeepSpeed ZeRO-3 without gathering them: tensors of size 0 stand for them",
         "run `python zero_to_fp32.py . OUTPUT` in the checkpoint's folder, or train with"
         " stage3_gather_16bit_weights_on_model_save", r"", _empty),
    Sign("flattened parameters of FSDP", "save a full state dict (FullStateDictConfig) where it was trained",
         r"_flat_param|flat_param_\d+"),
    Sign("Megatron's tensors", "convert it with Megatron's own checkpoint converter to Hugging Face's format",
         r"language_model\.(encoder|embedding)|decoder\.layers\.\d+\.self_attention|linear_qkv|query_key_value"),
    Sign("a Llama 3.2 Vision model (Mllama), whose text layers attend to images", OTHER_MODEL,
         r"cross_attn|cross_attention"),
    Sign("the text tower of a vision-language model (such as LLaVA)",
         "save it alone with transformers, `model.language_model.save_pretrained(FOLDER)`, or take the language model"
         " that it was made from",
         r"^(model\.)?(language_model|text_model|text_decoder|llm|thinker)\."),
    Sign("a vision-language or audio model: it has the tensors of another encoder beside a Llama's",
         "take the language model that it was made from",
         r"vision_(tower|model|encoder)|visual\.|mm_projector|multi_modal_projector|audio_(tower|encoder)|image_newline"),
    Sign("Meta's tensors under a config.json",
         "put Meta's params.json beside them, named consolidated.00.pth and so on, and give that folder",
         r"^layers\.\d+\.attention\.wq\.weight$", format="hf"),
    Sign("Hugging Face's tensors under a params.json",
         "put Hugging Face's config.json beside them, named model.safetensors or pytorch_model.bin",
         r"^model\.layers\.\d+\.self_attn\.q_proj\.weight$", format="meta"),
    Sign("torchtune's tensors", "save it there in Hugging Face's format (FullModelHFCheckpointer)",
         r"sa_norm\.scale|mlp_norm\.scale|attn\.output_proj"),
    Sign("LitGPT's tensors", "`litgpt convert_from_litgpt` makes Hugging Face's",
         r"transformer\.h\.\d+\.attn\.(attn|qkv)\."),
    Sign("GGUF's tensors in another kind of file", "take the .gguf file itself",
         r"^blk\.\d+\.attn_q\.weight$", format="hf"),
    Sign("quantized weights with their scales apart", UNQUANTIZED,
         r"(weight_scale|\.scales?|\.zeros|\.zero_point|qscale|weight_scale_inv|input_scale)$",
         _dtypes("int8", "uint8", "int16", "int32", "uint32", "int64")),
    # --- Other heads ---
    Sign("a reward model or classifier: its head gives scores, not tokens",
         "this library computes the next token only; take the language model that it was made from",
         r"(^|\.)(score|classifier|v_head|value_head|reward_head|regression_head)\.", _no_head),
    Sign("a model that answers questions by marking a passage",
         "this library computes the next token only; take the language model that it was made from", r"qa_outputs\."),
    # --- Other architectures ---
    Sign("a mixture of experts (such as Mixtral)", OTHER_MODEL,
         r"block_sparse_moe|\.experts\.|mlp\.gate\.weight$|_exps\."),
    Sign("fused projections (such as Phi-3's)", "take a Llama-format conversion of this model, where there is one",
         r"qkv_proj|gate_up_proj|Wqkv|wqkv|query_key_value|attn_qkv|c_attn"),
    Sign("norms that a Llama does not have (such as Gemma's, OLMo's or Qwen 3's)", OTHER_MODEL,
         r"(pre|post)_feedforward_layernorm|[qk]_norm|[qk]_layernorm|attn_sub_norm|ffn_sub_norm|ffn_norm_2"),
    Sign("biases, which a Llama does not have (Qwen 2's projections have some)", OTHER_MODEL,
         r"(proj|attn_[qkv]|attn_output|ffn_\w+|w[qkvo123]|head|norm)\.bias$|layernorm\.bias$"),
    Sign("a GPT-2-like model", OTHER_MODEL, r"(^|\.)(wte|wpe|ln_f|gpt_neox|h\.\d+)\."),
    Sign("a state-space model (such as Mamba)", OTHER_MODEL, r"\.mixer\.|ssm_|A_log$"),
    # --- Not a model's weights ---
    Sign("an optimizer's state, not a model", "give the model's own file", r"exp_avg|param_groups|^optimizer\.",
         _no_weights),
)
# fmt: on


def tensors(
    found: Mapping[str, Tensor],
    config: ModelConfig,
    format: params.Format,
    said: Fields,
    absent: Mapping[str, str],
) -> str:
    """Returns what tensors that are not a Llama's are, and the remedy; "" where nothing is known.

    Args:
      found: stored name -> tensor.
      config: the architecture they should have.
      format: of the expected names.
      said: the content of config.json, params.json or GGUF's metadata.
      absent: tensors that an index names and no file has -> the file that it names.
    """
    if not found:
        return "there are no tensors in them: save the model's state_dict()"
    for sign in SIGNS:
        if sign.format in (None, format) and any(re.search(sign.names, name) for name in found) and sign.test(found):
            return f"{sign.what}: {sign.remedy}"
    countable = config.num_layers <= len(found)  # before a table of that many names is made
    lost = [name for name in params.expected(config, format) if name in absent] if absent and countable else []
    if lost:
        return f"the index says that {absent[lost[0]]} holds it: index and file do not belong together, take both anew"
    return _several(found) or _other_layers(found, config, format) or _headless(found, config, format, said)


def _several(found: Mapping[str, Tensor]) -> str:
    """Returns the remedy where files hold more than one model, else ""."""
    tables = [name for name in found if re.search(r"(^|\.)(embed_tokens|tok_embeddings)\.weight$", name)]
    if len(tables) < 2:
        return ""
    return f"several models side by side ({', '.join(tables[:3])}): save the one that is meant alone"


def _other_layers(found: Mapping[str, Tensor], config: ModelConfig, format: params.Format) -> str:
    """Returns the remedy where the files hold another number of layers than the configuration names, else ""."""
    pattern = re.escape(params.TABLE[1].name(format, 0)).replace("0", r"(\d+)", 1)
    layers = {int(match[1]) for name in found if (match := re.fullmatch(pattern, name))}
    if not layers:
        return ""
    if layers == set(range(len(layers))):
        if len(layers) == config.num_layers:
            return ""
        more = "more" if config.num_layers > len(layers) else "fewer"
        return (
            f"the configuration names {config.num_layers}, {more} layers than the files, which hold {len(layers)}:"
            " weights and configuration do not belong together"
        )
    gone = sorted(set(range(config.num_layers)) - layers)
    return (
        f"of {config.num_layers} layers the files lack {len(gone)}, first layer {gone[0]}; put their files beside them"
    )


def _headless(found: Mapping[str, Tensor], config: ModelConfig, format: params.Format, said: Fields) -> str:
    """Returns the remedy where only the output head is missing, else ""."""
    missing = params.expected(config, format).keys() - found.keys() if config.num_layers <= len(found) else set()
    if missing != {params.head_name(format)}:
        return ""
    kinds = said.get("architectures")
    if isinstance(kinds, list) and kinds and not str(kinds[0]).endswith("ForCausalLM"):
        return f"a {kinds[0]}, saved without an output head: this library computes the next token only"
    return (
        "every other tensor is there: either the model is tied and its configuration has lost that (let config.json say"
        ' "tie_word_embeddings": true), or it was saved without its output head (an embedding model, AutoModel)'
    )


# ---------------------------------------------------------------------------------------------------------------------
# config.json
# ---------------------------------------------------------------------------------------------------------------------

METHODS = {
    "bitsandbytes": "bitsandbytes", "gptq": "GPTQ", "awq": "AWQ", "hqq": "HQQ", "eetq": "EETQ", "aqlm": "AQLM",
    "compressed-tensors": "compressed-tensors (llm-compressor)", "fp8": "FP8", "fbgemm_fp8": "FP8 (FBGEMM)",
    "torchao": "torchao", "quanto": "quanto", "exl2": "ExLlama (exl2)", "quip": "QuIP", "quip_sharp": "QuIP#",
    "mxfp4": "MXFP4", "modelopt": "NVIDIA's ModelOpt", "quark": "AMD's Quark",
}  # fmt: skip


def check_config(config: Fields) -> None:
    """Refuses a config.json with quantized weights.

    Raises:
      ConfigError: names the method and the remedy.
    """
    said = config.get("quantization_config")
    if said:
        method = said.get("quant_method") if isinstance(said, Mapping) else None
        by = METHODS.get(str(method), str(method)) if method else "a method that it does not name"
        first = "load it with transformers and save `model.dequantize()`, or " if method == "bitsandbytes" else ""
        raise ConfigError(f"config.json has a quantization_config: weights quantized by {by}: {first}{UNQUANTIZED}")


# ---------------------------------------------------------------------------------------------------------------------
# GGUF
# ---------------------------------------------------------------------------------------------------------------------


def gguf(metadata: Fields, found: Mapping[str, Tensor]) -> str:
    """Returns what a GGUF file without a Llama is, and the remedy; "" where it may hold one."""
    return next(_gguf_kinds(metadata, found), "")


def _gguf_kinds(metadata: Fields, found: Mapping[str, Tensor]) -> Iterator[str]:
    kind, architecture = metadata.get("general.type"), metadata.get("general.architecture")
    if kind == "adapter" or any(name.endswith((".lora_a", ".lora_b")) for name in found):
        yield "a LoRA adapter: merge it into its base with llama.cpp's `llama-export-lora`, and give the result"
    if kind == "imatrix" or any(name.endswith((".in_sum2", ".counts")) for name in found):
        yield "an importance matrix (imatrix), with which others quantize: give the model's own .gguf file"
    if kind == "mmproj" or architecture == "clip":
        yield "the image encoder of a vision model (mmproj): give the .gguf file of its language model"
    if not found:
        yield "a vocabulary without weights: give the model's own .gguf file"
