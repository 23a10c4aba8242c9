"""Chat formats that a checkpoint does not ask for are named, and tools never vanish without a word."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from llama_jax.text.chat import ChatError, chat_format
from tests.text.helpers import load, write_folder

ASK = [{"role": "user", "content": "hi"}]
TOOLS = [{"type": "function", "function": {"name": "get_time", "description": "d", "parameters": {}}}]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": "PreTrainedTokenizerFast"}
NAMED = [{"name": "rag", "template": "RAG {{ messages[0].content }}"}, {"name": "plain", "template": "P {{ tools }}"}]
TOOL_USE = {"name": "tool_use", "template": "{{ tools[0].function.name }} {{ messages[0].content }}"}


@pytest.fixture
def folder(sp_folders, tmp_path):
    """Makes a folder with Llama 2's kind of vocabulary and this chat template."""

    def make(template):
        files = {"tokenizer.json": (sp_folders["legacy"] / "tokenizer.json").read_bytes().replace(b"<step>", b"<stop>")}
        config = SPECIAL if template is None else SPECIAL | {"chat_template": template}
        return write_folder(
            tmp_path / "it", files | {"tokenizer_config.json": config, "config.json": {"model_type": "llama"}}
        )

    return make


def test_a_guess_is_said(folder):
    """transformers raises; here a warning names the format and the option that chooses."""
    path = folder(None)
    with pytest.raises(ValueError, match="chat_template is not set"):
        AutoTokenizer.from_pretrained(path).apply_chat_template(ASK)
    tokenizer = load(path)
    with pytest.warns(UserWarning, match=r"no chat template: the llama2 format is a guess.*--chat-format.*base model"):
        guessed = chat_format(tokenizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chosen = chat_format(tokenizer, "llama2")
    assert guessed.prompt(ASK) == chosen.prompt(ASK)
    with pytest.raises(ChatError, match="the llama2 format has no tools"):
        guessed.prompt(ASK, tools=TOOLS)


def test_named_templates_without_a_default(folder):
    tokenizer = load(folder(NAMED))
    hf = AutoTokenizer.from_pretrained(folder(NAMED))
    with pytest.raises(ValueError, match="multiple chat templates with no default"):
        hf.apply_chat_template(ASK)
    with pytest.warns(
        UserWarning, match="templates named rag, plain, and none is the default: the llama2.*template:rag"
    ):
        assert chat_format(tokenizer).name == "llama2"
    for name in ("rag", "plain"):
        text = hf.apply_chat_template(ASK, tools=TOOLS, chat_template=name, tokenize=False)
        chat = chat_format(tokenizer, f"template:{name}")
        if name == "rag":
            with pytest.warns(UserWarning, match="never mentions tools: they are not in the prompt"):
                ids = chat.prompt(ASK, tools=TOOLS)
        else:
            ids = chat.prompt(ASK, tools=TOOLS)
        assert tokenizer.decode(ids) == text
    with pytest.raises(ChatError, match="no chat template named 'x': choose one of rag, plain"):
        chat_format(tokenizer, "template:x")
    with pytest.raises(ChatError, match="named rag, plain, none of them the default: choose one as template:rag"):
        chat_format(tokenizer, "template")


def test_a_template_for_tools_alone(folder):
    """transformers takes it where there are tools, and raises where there are none."""
    path = folder([TOOL_USE])
    tokenizer, hf = load(path), AutoTokenizer.from_pretrained(path)
    with pytest.warns(UserWarning, match="templates named tool_use, and none is the default: the llama2 format"):
        chat = chat_format(tokenizer)
    text = hf.apply_chat_template(ASK, tools=TOOLS, tokenize=False)
    assert tokenizer.decode(chat.prompt(ASK, tools=TOOLS)) == text == "get_time hi"
    assert chat.prompt(ASK) == chat_format(tokenizer, "llama2").prompt(ASK)


def test_templates_in_files_of_their_own(folder):
    path = folder(None)
    write_folder(path, {"chat_template.jinja": "{% for m in messages %}{{ m.content }}{% endfor %}"})
    write_folder(path / "additional_chat_templates", {"tool_use.jinja": TOOL_USE["template"]})
    tokenizer, hf = load(path), AutoTokenizer.from_pretrained(path)
    for tools in (None, TOOLS):
        text = hf.apply_chat_template(ASK, tools=tools, tokenize=False)
        assert tokenizer.decode(chat_format(tokenizer).prompt(ASK, tools=tools)) == text


def test_warnings_are_one_line_on_the_command_line():
    code = (
        "import warnings\nfrom llama_jax.cli import fail_clearly\n"
        "with fail_clearly():\n    warnings.warn('the llama2 format is a guess')\n    print('answer')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    assert (done.stdout, done.stderr) == ("answer\n", "warning: the llama2 format is a guess\n")


def test_a_base_model_of_no_known_generation_has_no_format(tmp_path):
    state = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None}
    state |= {
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    }
    state |= {"post_processor": None, "decoder": state["pre_tokenizer"]}
    state |= {"model": {"type": "BPE", "vocab": {"h": 0, "i": 1}, "merges": []}}
    tokenizer = load(write_folder(tmp_path, {"tokenizer.json": json.dumps(state)}))
    with pytest.raises(ChatError, match="has no chat template, and its vocabulary is not one of a known chat format"):
        chat_format(tokenizer)
