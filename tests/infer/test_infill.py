"""`infill` against Meta's rule for the prompt, by SentencePiece, and transformers' greedy generation."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
import torch
import transformers

import llama_jax
from tests.builders import one_device, tiny_config, write_hf
from tests.text.helpers import CORPUS

GAPS = [("def f(x):\n    ", "\n    return y"), ("the ca", " of France"), (" a b", "c")]
INFILL = ("▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>")


@pytest.fixture(scope="module")
def code_llama(tmp_path_factory) -> Path:
    """A random model with a vocabulary like Code Llama's, in a Hugging Face folder."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS.splitlines() * 20), model_writer=model, model_type="bpe", vocab_size=500,
        hard_vocab_limit=False, byte_fallback=True, normalization_rule_name="identity", minloglevel=2,
        remove_extra_whitespaces=False, allow_whitespace_only_pieces=True, user_defined_symbols=[*INFILL, "<step>"],
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("code_llama")
    size = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).vocab_size()
    write_hf(folder, tiny_config(num_layers=1, vocab_size=size, max_seq_len=256), std=0.3)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": "CodeLlamaTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return folder


@pytest.mark.parametrize("suffix_first", [False, True])
def test_middle_is_that_of_meta_and_transformers(code_llama, suffix_first):
    """Ids and text by SentencePiece and Meta's rule, which hides the first space behind a smiley.

    transformers 5's own tokenizer puts a space before the suffix, which Meta's code does not.
    """
    sp = sentencepiece.SentencePieceProcessor(model_file=str(code_llama / "tokenizer.model"))
    smiley = sp.encode("☺")
    pre, suf, mid, eot = map(sp.piece_to_id, INFILL)
    llama = llama_jax.load(code_llama, mesh=one_device())
    assert {sp.eos_id(), eot} <= set(llama.tokenizer.stop_ids)
    hf = transformers.LlamaForCausalLM.from_pretrained(code_llama).float()
    found = llama_jax.infill(llama, GAPS, suffix_first=suffix_first, max_new_tokens=12)
    for (prefix, suffix), completion in zip(GAPS, found, strict=True):
        head, tail = sp.encode(prefix), sp.encode("☺" + suffix)[len(smiley) :]
        ids = [1, pre, suf, *tail, mid, *head] if suffix_first else [1, pre, *head, suf, *tail, mid]
        prompt = torch.tensor([ids])
        whole = hf.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False,
            eos_token_id=[*llama.tokenizer.stop_ids], pad_token_id=0,
        )  # fmt: skip
        middle = [token for token in whole[0, len(ids) :].tolist() if token not in llama.tokenizer.stop_ids]
        assert completion.tokens == middle
        assert completion.text == sp.decode([*smiley, *middle])[1:]


def test_what_cannot_be_filled(code_llama, smollm2):
    with pytest.raises(ValueError, match="no infill tokens"):
        llama_jax.infill(smollm2, [("a", "b")])
    llama = llama_jax.load(code_llama, mesh=one_device())
    for gap in ("ab", ("a", "b", "c"), ("a", None)):
        with pytest.raises(ValueError, match="pair of texts"):
            llama_jax.infill(llama, [gap])
    assert llama_jax.infill(llama, []) == []


@pytest.mark.slow
def test_generate_script_fills_a_gap(code_llama, tmp_path):
    script = Path(__file__).parents[2] / "scripts" / "generate.py"
    file = tmp_path / "gaps.jsonl"
    file.write_text("".join(json.dumps({"prefix": a, "suffix": b}) + "\n" for a, b in GAPS))
    command = [sys.executable, script, "--model", code_llama, "--max-new-tokens", "8"]

    def run(*args):
        return subprocess.run([*command, *args], capture_output=True, text=True, check=False)

    lines = [json.loads(line) for line in run("--prompts-file", file, "--json").stdout.splitlines()]
    assert [(line["prefix"], line["suffix"]) for line in lines] == GAPS
    done = run("--prefix", GAPS[0][0], "--suffix", GAPS[0][1])
    assert done.stdout == GAPS[0][0] + lines[0]["text"] + GAPS[0][1] + "\n", done.stderr
    refused = run("--prefix", "a", "--prompt", "b")
    assert refused.returncode == 1
    assert refused.stderr == "error: --prefix and --suffix fill one gap: leave out --prompt and --prompts-file\n"
