"""GGUF exports in llama.cpp itself: python -m pytest -m slow tests/weights/test_llama_cpp.py (needs node and npm)."""

from __future__ import annotations

import io
import json
import subprocess
from pathlib import Path

import gguf
import numpy as np
import pytest
import sentencepiece

import llama_jax
from llama_jax.config import LinearScaling, RopeScaling, YarnScaling, yarn_attention_factor
from llama_jax.config.hf import to_hf_config
from llama_jax.text.gguf import tokenizer_from_gguf
from llama_jax.text.pre_tokenizers import PRE_TOKENIZERS
from llama_jax.weights import hub
from llama_jax.weights.save import convert
from tests.builders import one_device, tiny_config, write_hf
from tests.text import gguf_material, pre_tokenizer_material

SCRIPT = Path(__file__).with_name("llama_cpp.mjs")
PACKAGES = ["node-llama-cpp@3", "@node-llama-cpp/linux-x64@3"]
TEXT = "Hello  wörld, 你好 🦙\n\tdef f(x):  return x+12345"


@pytest.fixture(scope="module")
def node_folder() -> Path:
    """A folder with llama.cpp, prebuilt, from the npm registry; kept in the cache."""
    folder = hub.cache_folder() / "test-material" / "llama.cpp"
    if not (folder / "node_modules").exists():
        folder.mkdir(parents=True, exist_ok=True)
        install = ["npm", "install", "--prefix", str(folder), "--ignore-scripts", "--omit=optional", *PACKAGES]
        subprocess.run(install, check=True, capture_output=True, timeout=600)
    return folder


# llama.cpp rounds activations to 8 bits where weights are quantized, which is coarse for so small a model. After SHORT
# it gives " Paris" 0.69 to 0.72, depending on its kernels, where the same Q8_0 file computed exactly gives 0.765. Asked
# about France, where the first token is a close call (0.152 against 0.140), it answers "L'Étoile, la ...": with this
# Q8_0 file as with the published Q4_1 one. Computed exactly, both answer Paris. So those two are asked in F16 only.
SHORT = "The capital of France is"
PROMPTS = [
    "Paris is the capital and most populous city of France. Berlin is the capital of Germany. Rome is the capital of",
    "Once upon a time, there was a little girl who lived in a",
    "def fibonacci(n):\n    if n <= 1:\n        return",
]


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"dtype": "float16"}, {"quantize": "q8_0"}], ids=["F16", "Q8_0"])
def test_llama_cpp_runs_the_export(options, node_folder, tmp_path):
    llama = llama_jax.load("smollm2-135m-instruct", mesh=one_device(), dtype="float32")
    convert("smollm2-135m-instruct", tmp_path / "hf", to="hf")  # through another format, tokenizer and all
    convert(tmp_path / "hf", tmp_path / "x.gguf", to="gguf", **options)
    prompts = [llama.tokenizer.encode(text) for text in [*PROMPTS, SHORT]]
    question = [{"role": "user", "content": "What is the capital of France?"}]
    chat = llama.chat_format.prompt(question)
    stop = [int(i) for i in llama.tokenizer.stop_ids]
    request = json.dumps({"prompts": prompts, "chat": chat, "stop": stop, "text": TEXT})
    command = ["node", str(SCRIPT), str(tmp_path / "x.gguf"), request]
    done = subprocess.run(command, cwd=node_folder, check=True, capture_output=True, text=True, timeout=300)
    result = json.loads(done.stdout.strip().splitlines()[-1])
    written = llama_jax.load(tmp_path / "x.gguf", mesh=one_device(), dtype="float32")
    for ids, top in zip(prompts, result["top"], strict=True):
        expected, exact = probabilities(llama, ids), probabilities(written, ids)
        five = {int(i) for i in np.argsort(-expected)[:5]}
        rows = [f"{i}: {p:.4f} {exact[i]:.4f} {expected[i]:.4f}" for i, p in top]
        print(f"{llama.tokenizer.decode(ids)[-20:]!r}: llama.cpp, this file exactly, the original: {rows}")
        assert {int(i) for i in np.argsort(-exact)[:5]} == five
        assert max(abs(expected[i] - exact[i]) for i in five) <= 0.02
        if "quantize" not in options or ids != prompts[-1]:
            assert {i for i, _ in top} == five
            assert max(abs(exact[i] - p) for i, p in top) <= 0.02
    print(f"llama.cpp answers {result['answer']!r}")
    assert llama_jax.chat(written, question).text == "The capital of France is Paris."
    if "quantize" not in options:
        assert result["answer"].strip() == "The capital of France is Paris."
    assert result["tokens"] == llama.tokenizer.encode(TEXT)


USUAL = yarn_attention_factor(4.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "scaling",
    [
        LinearScaling(4.0),
        YarnScaling(4.0, 64, USUAL),
        YarnScaling(4.0, 64, 1.7 * USUAL),  # attn_factor multiplies the usual factor
        YarnScaling(4.0, 64, 1.25, 16.0, 2.0, truncate=False),  # by rope_freqs.weight and attn_factor
        RopeScaling(8.0, 1.0, 4.0, 64),
    ],
    ids=["linear", "yarn", "yarn, attention", "yarn by table", "llama3"],
)
def test_llama_cpp_computes_the_scaling_that_we_write(scaling, node_folder, tmp_path):
    """Measured: within 0.0006 of ours, and without scaling 0.04 and more."""
    vocabulary = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the model is small and the house was here before the river"] * 20),
        model_writer=vocabulary, vocab_size=290, model_type="bpe", byte_fallback=True, hard_vocab_limit=False,
        normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    size = sentencepiece.SentencePieceProcessor(model_proto=vocabulary.getvalue()).vocab_size()
    config = tiny_config(vocab_size=size, embed_dim=128, mlp_dim=256, num_heads=4, num_kv_heads=2, head_dim=64)
    write_hf(tmp_path / "hf", config, std=0.15, embed_std=0.02)
    (tmp_path / "hf" / "tokenizer.model").write_bytes(vocabulary.getvalue())
    ids = np.random.default_rng(1).integers(3, size, 400).tolist()
    plain = probabilities(llama_jax.load(tmp_path / "hf", mesh=one_device(), dtype="float32"), ids)
    scaled = to_hf_config(config.replace(rope_scaling=scaling), dtype="float32")
    (tmp_path / "hf" / "config.json").write_text(json.dumps(scaled))
    ours = probabilities(llama_jax.load(tmp_path / "hf", mesh=one_device(), dtype="float32"), ids)
    convert(tmp_path / "hf", tmp_path / "x.gguf", to="gguf")
    request = json.dumps({"prompts": [ids], "chat": [1, 5], "stop": [2], "text": "the"})
    command = ["node", str(SCRIPT), str(tmp_path / "x.gguf"), request]
    done = subprocess.run(command, cwd=node_folder, check=True, capture_output=True, text=True, timeout=300)
    top = json.loads(done.stdout.strip().splitlines()[-1])["top"][0]
    assert max(abs(ours[i] - p) for i, p in top) <= 0.002
    assert max(abs(plain[i] - p) for i, p in top) > 0.02


@pytest.mark.slow
def test_llama_cpp_gives_the_ids_of_its_vocabularies(node_folder, tmp_path):
    """The constants of tests/text/test_gguf_vocabularies.py, asked for again, and every pre-tokenizer."""
    texts = pre_tokenizer_material.texts()
    cases = {pre: (pre_tokenizer_material.metadata(pre), texts, False) for pre in PRE_TOKENIZERS}
    odd = [f"<s>{text}" for text in gguf_material.TEXTS]  # the binding trims a space at the start
    cases |= {"llama": (gguf_material.sentencepiece(), odd, True), "gpt2": (gguf_material.byte_level(), odd, True)}
    request = {}
    for name, (metadata, told, special) in cases.items():
        write_vocabulary(tmp_path / f"{name}.gguf", metadata)
        request[str(tmp_path / f"{name}.gguf")] = {"texts": told, "special": special}
    (tmp_path / "request.json").write_text(json.dumps(request))
    command = ["node", str(SCRIPT.with_name("llama_cpp_tokens.mjs"))]
    files = [str(tmp_path / name) for name in ("request.json", "answers.json")]
    subprocess.run([*command, *files], cwd=node_folder, check=True, capture_output=True, timeout=300)
    answers = json.loads((tmp_path / "answers.json").read_text())
    for name, (metadata, told, special) in cases.items():
        tokenizer = tokenizer_from_gguf(metadata)
        for text, ids in zip(told, answers[str(tmp_path / f"{name}.gguf")], strict=True):
            if text.isascii() or name not in pre_tokenizer_material.ASCII:
                assert tokenizer.encode(text, control=special) == ids, (name, text)


def write_vocabulary(path: Path, metadata: dict) -> None:
    """A GGUF file without tensors: llama.cpp can load its vocabulary alone."""
    writer = gguf.GGUFWriter(path, "llama")
    sizes = {"context_length": 64, "embedding_length": 32, "block_count": 1, "feed_forward_length": 32}
    kinds = {bool: gguf.GGUFValueType.BOOL, int: gguf.GGUFValueType.UINT32, str: gguf.GGUFValueType.STRING}
    writer.add_layer_norm_rms_eps(1e-5)
    for key, value in ({f"llama.{k}": v for k, v in (sizes | {"attention.head_count": 4}).items()} | metadata).items():
        writer.add_key_value(key, value, kinds.get(type(value), gguf.GGUFValueType.ARRAY))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def probabilities(llama: llama_jax.LoadedLlama, ids: list[int]) -> np.ndarray:
    logits_V = np.asarray(llama_jax.logits(llama, [ids]))[0, -1].astype(np.float64)
    return np.exp(logits_V - np.logaddexp.reduce(logits_V))
