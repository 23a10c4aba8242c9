import io
import json
import random
import re

import jinja2
import pytest
import sentencepiece
from transformers import AutoTokenizer

from llama_jax.text import export
from llama_jax.text.chat import CodeLlama70BChat, Llama2Chat, Llama3Chat, chat_format
from llama_jax.text.open import load_tokenizer, read_files, tokenizer_from_gguf
from llama_jax.text.samples import sample_texts
from tests.material import llama3_tokenizer
from tests.text.helpers import CORPUS, load, random_texts, smollm2_oracle, write_folder
from tests.text.test_tokenizer import LLAMA3_GOLDEN

TALKS = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "  What is 2 < 3?\n\n"}],
    [
        {"role": "system", "content": "你好"},
        {"role": "user", "content": [{"type": "text", "text": "a  b"}, {"type": "text", "text": " c\n"}]},
        {"role": "assistant", "content": "\tdef f(): 🦙 "},
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": " 1234567"},
        {"role": "user", "content": "é?"},
    ],
]


def transformers_tokenizer(folder, files):
    """As a converted checkpoint is loaded: with the model's configuration beside the tokenizer."""
    return AutoTokenizer.from_pretrained(write_folder(folder, {"config.json": {"model_type": "llama"}, **files}))


def texts_of_text(sp, tokenizer, count, seed):
    """Random texts in which the model sees no piece that is a control token to us, and runs of spaces."""
    control = set(tokenizer.control_tokens.values())
    texts = [*random_texts(count, seed), *sample_texts(), *(" " * n + "x" + " " * n for n in range(40))]
    # Typed in a text, these are control tokens to transformers.
    texts = [text for text in texts if not any(name in text for name in ("<s>", "</s>", "<unk>", "▁<PRE>"))]
    return [text for text in texts if control.isdisjoint(sp.encode(text))]


@pytest.fixture(scope="module")
def llama3_files():
    return export.hf_files({"tokenizer.model": llama3_tokenizer().read_bytes()})


def test_sentencepiece_in_every_format(sp, sp_model, sp_tokenizer, tmp_path):
    files = export.hf_files({"tokenizer.model": sp_model})
    metadata = export.gguf_metadata(files, sp.vocab_size() + 3)
    again = export.hf_files_from_gguf(metadata)
    tokenizer = load(write_folder(tmp_path / "ours", files))
    others = [tokenizer, tokenizer_from_gguf(metadata), load(write_folder(tmp_path / "again", again))]
    others.append(load(write_folder(tmp_path / "meta", {"tokenizer.model": again["tokenizer.model"]})))
    hf = [transformers_tokenizer(tmp_path / name, folder) for name, folder in [("hf", files), ("hf again", again)]]
    texts = texts_of_text(sp, tokenizer, 2000, seed=11)
    assert len(texts) > 1000
    for text in texts:
        ids = sp.encode(text)
        for other in others:
            assert other.encode(text) == ids, text
        for other in hf:
            assert other.encode(text) == [1, *ids], text
            assert other.decode(ids) == sp.decode(ids) == text.replace("▁", " ")
    for other in others:
        assert (other.bos_id, other.add_bos) == (1, True)
        assert {"<unk>": 0, **other.control_tokens} == {"<unk>": 0, **sp_tokenizer.control_tokens}

    assert metadata["tokenizer.ggml.tokens"][: sp.vocab_size()] == [sp.id_to_piece(i) for i in range(sp.vocab_size())]
    assert metadata["tokenizer.ggml.tokens"][-1] == f"[PAD{sp.vocab_size() + 2}]"
    assert metadata["tokenizer.ggml.scores"][: sp.vocab_size()] == [sp.get_score(i) for i in range(sp.vocab_size())]
    kinds = [(sp.is_unknown, 2), (sp.is_control, 3), (sp.is_byte, 6), (lambda i: 3 <= i < 8, 3)]
    expected = [next((kind for test, kind in kinds if test(i)), 1) for i in range(sp.vocab_size())]
    assert metadata["tokenizer.ggml.token_type"] == [*expected, 5, 5, 5]
    names = ("bos", "eos", "unknown", "fim_pre", "fim_suf", "fim_mid", "eot")
    ids = [metadata[f"tokenizer.ggml.{name}_token_id"] for name in names]
    assert ids == [1, 2, 0, *(sp.piece_to_id(f"▁<{name}>") for name in ("PRE", "SUF", "MID", "EOT"))]


def test_scores_order_the_merges_not_ids(sp, sp_metadata, tmp_path):
    size, special = sp.vocab_size(), 264
    order = [*range(special), *random.Random(0).sample(range(special, size), size - special)]
    keys = [f"tokenizer.ggml.{key}" for key in ("tokens", "scores", "token_type")]
    shuffled = sp_metadata | {key: [sp_metadata[key][i] for i in order] for key in keys}
    tokenizer = load(write_folder(tmp_path, export.hf_files_from_gguf(shuffled)))
    for text in texts_of_text(sp, tokenizer, 500, seed=15):
        assert [order[i] for i in tokenizer.encode(text)] == sp.encode(text), text


@pytest.mark.parametrize("form", ["legacy", "metaspace"])
def test_tokenizer_json_without_its_sentencepiece_model(sp, sp_folders, tmp_path, form):
    """The order of merges stands in for the scores."""
    files, warnings = export.meta_files(read_files(sp_folders[form]))
    assert (warnings, sorted(files)) == ([], ["tokenizer.json", "tokenizer.model", "tokenizer_config.json"])
    rebuilt = load(write_folder(tmp_path, {"tokenizer.model": files["tokenizer.model"]}))
    for text in texts_of_text(sp, rebuilt, 1000, seed=12):
        assert rebuilt.encode(text) == sp.encode(text), text
    assert rebuilt.vocab_size == sp.vocab_size()


def test_newer_form_and_added_tokens(sp, sp_model, tmp_path):
    """Beside tokenizer.model, a fine-tune's files say `legacy: false` and add tokens."""
    size = sp.vocab_size()
    config = {"legacy": False, "tokenizer_class": "LlamaTokenizer", "padding_side": "left"}
    config |= {"bos_token": {"content": "<s>"}, "eos_token": "<|e|>", "pad_token": "</s>"}
    files = {"tokenizer.model": sp_model, "tokenizer_config.json": json.dumps(config).encode()}
    files["added_tokens.json"] = json.dumps({"<|e|>": size, "<|f|>": size + 2}).encode()
    original = load(write_folder(tmp_path / "original", files))
    converted = export.hf_files(files)
    assert "chat_template" not in json.loads(converted["tokenizer_config.json"])
    hf = transformers_tokenizer(tmp_path / "hf", converted)
    assert (hf.pad_token, hf.padding_side, hf.eos_token_id) == ("</s>", "left", size)
    text = "The <|e|>capital<|f|> 12"
    assert hf.encode(text) == original.encode(text, bos=True, control=True)
    assert {size, size + 2} <= set(hf.encode(text))
    metadata = export.gguf_metadata(converted, size + 3)
    assert metadata["tokenizer.ggml.tokens"][size:] == ["<|e|>", f"[PAD{size + 1}]", "<|f|>"]
    assert metadata["tokenizer.ggml.token_type"][size:] == [3, 5, 4]  # nothing calls <|f|> special: a word
    assert metadata["tokenizer.ggml.eos_token_id"] == size
    _, warnings = export.meta_files(converted)
    assert re.search(f"only the first {size} of {size + 3} tokens", *warnings)


@pytest.mark.slow
def test_llama3_in_every_format(llama3, llama3_files, llama3_parts, tmp_path):
    hf = transformers_tokenizer(tmp_path, llama3_files)
    metadata = export.gguf_metadata(llama3_files, 128_256)
    gguf, ours = tokenizer_from_gguf(metadata), load(tmp_path)
    for text in [*LLAMA3_GOLDEN, *random_texts(1000, seed=13), *sample_texts()]:
        ids = llama3.encode(text)
        assert hf.encode(text, add_special_tokens=False, split_special_tokens=True) == ids, text
        assert hf.decode(ids) == ours.decode(ids) == text
        assert ours.encode(text) == gguf.encode(text) == ids, text
    for other in (ours, gguf):
        assert (other.bos_id, other.add_bos, other.stop_ids) == (128_000, True, (128_001, 128_008, 128_009))
    assert hf.encode("a<|eot_id|>b") == [128_000, 64, 128_009, 65]
    _, merges, control = llama3_parts
    assert hf.convert_tokens_to_ids(list(control)) == list(control.values()) == list(range(128_000, 128_256))
    assert metadata["tokenizer.ggml.merges"] == [" ".join(pair) for pair in merges]
    assert metadata["tokenizer.ggml.pre"] == "llama-bpe"
    ids = [metadata[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "eot", "eom")]
    assert ids == [128_000, 128_001, 128_009, 128_008]

    files, warnings = export.meta_files(export.hf_files_from_gguf(metadata))
    assert warnings == []
    assert files["tokenizer.model"] == llama3_tokenizer().read_bytes()


@pytest.mark.slow
def test_only_llama3s_tokenizer_json_becomes_a_tiktoken_file(llama3_files):
    state = json.loads(llama3_files["tokenizer.json"])

    def warning():
        files, warnings = export.meta_files({"tokenizer.json": json.dumps(state).encode()})
        assert "tokenizer.model" not in files
        return warnings[0]

    state["model"]["merges"].insert(0, state["model"]["merges"].pop())
    assert "Meta's code cannot use this tokenizer" in warning()
    state["model"]["merges"].pop(0)
    assert "Meta's code cannot use this tokenizer" in warning()


def test_smollm2_from_gguf_and_back(smollm2_metadata, tmp_path):
    files = export.hf_files_from_gguf(smollm2_metadata)
    hf, oracle = transformers_tokenizer(tmp_path, files), smollm2_oracle(smollm2_metadata)
    for text in [*random_texts(500, seed=14), *sample_texts()]:
        assert hf.encode(text) == oracle.encode(text), text
        assert hf.decode(hf.encode(text)) == oracle.decode(oracle.encode(text))
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        assert getattr(hf, name) == getattr(oracle, name)
    for talk in (TALKS[0], TALKS[1]):
        ids = [t.apply_chat_template(talk, add_generation_prompt=True, return_dict=False) for t in (hf, oracle)]
        assert ids == [chat_format(load(tmp_path)).prompt(talk)] * 2
    for original in (files, files | {"tokenizer.json": oracle.backend_tokenizer.to_str().encode()}):
        metadata = export.gguf_metadata(original, 49_152)
        for key, value in smollm2_metadata.items():
            if key.startswith("tokenizer."):
                assert list(metadata[key]) == list(value) if hasattr(value, "__len__") else metadata[key] == value, key
    kept, warnings = export.meta_files(files)
    assert (kept, len(warnings)) == (files, 1)


def test_chat_templates_give_the_ids_of_the_formatters(sp_model, llama3_files, llama3, tmp_path):
    without_step = sp_model.replace(b"<step>", b"<stop>")
    cases = [
        (Llama2Chat, export.hf_files({"tokenizer.model": without_step})),
        (CodeLlama70BChat, export.hf_files({"tokenizer.model": sp_model})),
        (Llama3Chat, llama3_files),
    ]
    for chat, files in cases:
        hf, ours = transformers_tokenizer(tmp_path / chat.name, files), load(tmp_path / chat.name)
        meta = load(write_folder(tmp_path / f"{chat.name} meta", {"tokenizer.model": files["tokenizer.model"]}))
        with pytest.warns(UserWarning, match=f"the {chat.name} format is a guess"):
            assert (chat_format(meta).name, chat_format(ours).name) == (chat.name, "template")
        for talk in TALKS:
            ids = chat(meta).prompt(talk)
            assert hf.apply_chat_template(talk, add_generation_prompt=True, return_dict=False) == ids
            assert chat_format(ours).prompt(talk) == ids
        answered = TALKS[2][:5]
        ids = chat(meta).prompt(answered, add_generation_prompt=False)
        assert hf.apply_chat_template(answered, return_dict=False) == ids
    tool = [*TALKS[0], {"role": "tool", "content": " 4"}]
    ids = Llama3Chat(llama3).prompt(tool)
    assert hf.apply_chat_template(tool, add_generation_prompt=True, return_dict=False) == ids
    with pytest.raises(jinja2.TemplateError, match="roles must alternate"):
        transformers_tokenizer(tmp_path / "llama2", cases[0][1]).apply_chat_template(tool)


def test_a_checkpoint_without_tokenizer_and_llama1s_folders(sp_model, tmp_path):
    assert (read_files(tmp_path), export.hf_files({}), export.hf_files_from_gguf({})) == ({}, {}, {})
    assert export.meta_files({}) == ({}, [])
    assert tokenizer_from_gguf(export.gguf_metadata({}, 8)) is None
    write_folder(tmp_path, {"tokenizer.model": sp_model})
    folder = write_folder(tmp_path / "7B", {"params.json": {}})
    assert read_files(folder) == {"tokenizer.model": sp_model}
    assert load(folder).encode("The") == load(tmp_path).encode("The")
    write_folder(folder, {"tokenizer.model": llama3_tokenizer().read_bytes()})
    assert load(folder).vocab_size == 128_256
    assert load_tokenizer(write_folder(tmp_path / "hf", {"config.json": {}})) is None


def sentencepiece_model(**options) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS.splitlines()), model_writer=model, vocab_size=100, minloglevel=2, **options
    )
    return model.getvalue()


@pytest.mark.parametrize(
    "convert", [export.hf_files, export.meta_files, lambda files: export.gguf_metadata(files, 999)]
)
@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer.model": b"\x00garbage"}, "tokenizer.model is neither a SentencePiece model nor a tiktoken file"),
        ({"tokenizer.model": b"IQ== 0\nIg== 1\n"}, "tokenizer.model has 2 ranks"),
        ({"tokenizer.model": b"IQ== 0\n", "tokenizer_config.json": b"[]"}, "tokenizer_config.json holds a list"),
        ({"tokenizer.model": b"IQ== 0\n", "added_tokens.json": b"{"}, "added_tokens.json is not valid JSON"),
        (
            {"tokenizer.model": b"IQ== 0\n", "tokenizer_config.json": b'{"added_tokens_decoder": [1]}'},
            "a value in the tokenizer's files has the wrong type (AttributeError",
        ),
    ],
)
def test_damaged_files(convert, files, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        convert(files)


@pytest.mark.parametrize(
    "options",
    [
        {"model_type": "unigram", "normalization_rule_name": "identity", "remove_extra_whitespaces": False},
        {"model_type": "bpe", "normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": False},
        {"model_type": "bpe", "normalization_rule_name": "identity", "remove_extra_whitespaces": True},
    ],
)
def test_sentencepiece_models_of_other_kinds(options, tmp_path):
    """Each format says all of it, or the model stays as it is and a warning says why."""
    model = sentencepiece_model(**options)
    sp = sentencepiece.SentencePieceProcessor(model_proto=model)
    files = export.hf_files({"tokenizer.model": model})
    exact = options["model_type"] == "bpe" and options["normalization_rule_name"] == "identity"
    assert ("tokenizer.json" in files, len(export.hf_warnings(files))) == (exact, 1 - exact)
    metadata = export.gguf_metadata(files, sp.vocab_size())
    meta, warnings = export.meta_files(files)
    assert (meta["tokenizer.model"], warnings) == (model, [])
    ours = [load(write_folder(tmp_path / "hf", files)), tokenizer_from_gguf(metadata)]
    again = export.hf_files_from_gguf(metadata)
    ours += [load(write_folder(tmp_path / "again", again))]
    texts = [*random_texts(300, seed=21), *sample_texts()]
    for text in (text for text in texts if not any(name in text for name in ("<s>", "</s>", "<unk>"))):
        for tokenizer in ours:
            assert tokenizer.encode(text) == sp.encode(text), (text, options)
    if exact:
        hf = transformers_tokenizer(tmp_path / "hf", {})
        assert [hf.encode(text)[1:] for text in texts[:100]] == [
            ours[0].encode(text, control=True) for text in texts[:100]
        ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: None, "the tokenizer has 49152 tokens, the model's embedding only 49151 rows"),
        (lambda state: state.update(pre_tokenizer=None), "splits text by ('None',): llama.cpp has no name for this"),
        (lambda state: state.update(normalizer={"type": "NFC"}), "has normalizer {'type': 'NFC'}"),
        (lambda state: state["pre_tokenizer"]["pretokenizers"].reverse(), "llama.cpp has no name for this"),
        (lambda state: state["model"].update(ignore_merges=True), "ignore_merges True"),
        (
            lambda state: state.update(model={"type": "Unigram", "unk_id": 0, "vocab": [["a", 0.0]]}),
            "model of type Uni",
        ),
    ],
)
def test_tokenizers_that_no_gguf_file_can_hold(smollm2_metadata, change, message):
    state = json.loads(export.hf_files_from_gguf(smollm2_metadata)["tokenizer.json"])
    change(state)
    with pytest.raises(ValueError, match=re.escape(message)):
        export.gguf_metadata({"tokenizer.json": json.dumps(state).encode()}, 49_151 if "rows" in message else 49_152)


def test_a_damaged_model_beside_tokenizer_json(sp_folders, sp):
    files = read_files(sp_folders["legacy"]) | {"tokenizer.model": b"\x00garbage"}
    with pytest.raises(ValueError, match="tokenizer.model is neither"):
        export.gguf_metadata(files, sp.vocab_size())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer.ggml.model": "bert"}, "'bert' is not supported"),
        ({"tokenizer.ggml.scores": None}, "no tokenizer.ggml.scores"),
        ({"tokenizer.ggml.token_type": ["x"]}, "token_type has 1 entries"),
        ({"tokenizer.ggml.tokens": 5}, "a value in the GGUF file's metadata has the wrong type"),
    ],
)
def test_damaged_gguf(sp_metadata, change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        export.hf_files_from_gguf(sp_metadata | change)
