import datetime
import json
import re

import pytest
import tokenizers
from transformers import PreTrainedTokenizerFast

import llama_jax
from llama_jax.text.base import spellings
from llama_jax.text.chat import (
    ChatError,
    ChatTemplateError,
    CodeLlama70BChat,
    Llama2Chat,
    Llama3Chat,
    TemplateChat,
    chat_format,
)
from tests.text.helpers import load, smollm2_oracle, sp_backend, write_folder

# The public templates of Llama 2, 3 and 3.1 in compact form, ChatML, and two that try out what Jinja offers.
LLAMA2 = """
{%- set ns = namespace(system='', messages=messages) %}
{%- if messages[0]['role'] == 'system' %}
    {%- set ns.system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}
    {%- set ns.messages = messages[1:] %}
{%- endif %}
{%- for m in ns.messages %}
    {%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif %}
    {%- set content = (ns.system if loop.first else '') + m['content'] %}
    {%- if m['role'] == 'user' %}
        {{- bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
    {%- else %}
        {{- ' ' + content.strip() + ' ' + eos_token }}
    {%- endif %}
{%- endfor %}"""
LLAMA3 = """{% for m in messages %}
{%- set head = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' %}
{%- set content = head + m['content'] | trim + '<|eot_id|>' %}
{%- if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""
LLAMA31 = """
{%- macro header(role) %}{{ '<|start_header_id|>' + role + '<|end_header_id|>\n\n' }}{% endmacro %}
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = "" %}
{%- endif %}
{{- header('system') }}
{%- if tools is not none %}
    {{- "Environment: ipython\n" }}
{%- endif %}
{{- "Cutting Knowledge Date: December 2023\nToday Date: " + strftime_now('%d %b %Y') + "\n\n" }}
{{- system + "<|eot_id|>" }}
{%- if tools is not none %}
    {{- header('user') + "Given the following functions, please respond with a JSON.\n\n" }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) + "\n\n" }}
    {%- endfor %}
    {{- messages[0]['content'] | trim + "<|eot_id|>" }}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- for m in messages %}
    {%- if 'tool_calls' in m %}
        {%- if not m.tool_calls | length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set call = m.tool_calls[0].function %}
        {{- header('assistant') + '{"name": "' + call.name + '", ' }}
        {{- '"parameters": ' + call.arguments | tojson + "}<|eot_id|>" }}
    {%- elif m.role in ['tool', 'ipython'] %}
        {{- header('ipython') }}
        {%- if m.content is mapping or m.content is iterable %}
            {{- m.content | tojson }}
        {%- else %}
            {{- m.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- else %}
        {{- header(m['role']) + m['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- header('assistant') }}
{%- endif %}"""
CHATML = """{% for m in messages %}
{{- '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
EVERYTHING = """
{%- macro turn(role) %}<|im_start|>{{ role }}
{{ caller() }}<|im_end|>
{% endmacro %}
{%- set ns = namespace(n=0) %}
    {% for m in messages %}
        {%- if m.role == 'system' %}{% continue %}{% endif %}
        {%- if loop.index > 9 %}{% break %}{% endif %}
        {%- set ns.n = ns.n + 1 %}
        {%- if m.role == 'assistant' %}
{% generation %}
{% call turn(m.role) %}{{ m.content.split('</think>')[-1] | trim }}{% endcall %}
{% endgeneration %}
        {%- else %}
            {%- call turn(m.role) %}{{ m.content }}{% endcall %}
        {% endif %}
    {% endfor %}
{%- for m in messages if m.role != 'system' %}{{ loop.index }} of {{ loop.length }}{% else %}none{% endfor %}
{{ ns.n }} {{ messages | tojson }} {{ tools | tojson(indent=2) }} {{ dict(a='<é>', context=1, obj=2) | tojson }}
{{ strftime_now('%Y') }} {{ pad_token }} {{ undefined_thing }}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
JOINING = """{% for m in messages %}{{ m.content }}{% endfor %}<|im_end|>{{ '<|' + messages[0].name + '|>' }}
{%- for m in messages %}{% for line in m.content.split('\n') %}{{ line }}{% endfor %}{% endfor %}
{{- messages | tojson(ensure_ascii=true) }}"""

TALKS = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": "Be brief. 你好 "}, {"role": "user", "content": "  What is 2 < 3?\n\n"}],
    [
        {"role": "user", "content": "a  <b> >c< | x|\n\tdef f(): 🦙"},
        {"role": "assistant", "content": "<think>hm</think> yes <"},
        {"role": "user", "content": "> 'ok' \"&amp;\" é 1234567 \ue000 \\ue001"},
    ],
]
TOOLS = [
    {
        "type": "function",
        "function": {"name": "f", "description": "<it> & 'that'", "parameters": {"x": "int"}},
    }
]


def oracle(tokenizer_json, template, special) -> PreTrainedTokenizerFast:
    backend = tokenizers.Tokenizer.from_file(str(tokenizer_json))
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **special)


def expected(hf, talk, **options) -> list[int]:
    return hf.apply_chat_template(talk, tokenize=True, return_dict=False, **options)


@pytest.fixture(scope="module")
def chat_folders(smollm2_metadata, llama3_folder, sp, sp_folders, tmp_path_factory):
    """Name -> (folder with a tokenizer.json, template, special tokens)."""
    smol = tmp_path_factory.mktemp("smol")
    smollm2_oracle(smollm2_metadata).backend_tokenizer.save(str(smol / "tokenizer.json"))
    chatml = dict(
        zip(("bos_token", "eos_token", "pad_token"), ("<|im_start|>", "<|im_end|>", "<|im_end|>"), strict=True)
    )
    llama3 = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    llama2 = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return {
        "smollm2": (smol, smollm2_metadata["tokenizer.chat_template"], chatml),
        "chatml": (smol, CHATML, chatml),
        "everything": (smol, EVERYTHING, chatml),
        "llama3": (llama3_folder, LLAMA3, llama3),
        "llama3.1": (llama3_folder, LLAMA31, llama3),
        "llama2-legacy": (sp_folders["legacy"], LLAMA2, llama2),
        "llama2-metaspace": (sp_folders["metaspace"], LLAMA2, llama2),
    }


@pytest.fixture(params=["smollm2", "chatml", "everything", "llama3", "llama3.1", "llama2-legacy", "llama2-metaspace"])
def template_case(request, chat_folders, tmp_path):
    """A checkpoint's tokenizer with a template, and transformers' tokenizer of the same."""
    folder, template, special = chat_folders[request.param]
    (tmp_path / "tokenizer.json").symlink_to(folder / "tokenizer.json")
    write_folder(tmp_path, {"tokenizer_config.json": special, "chat_template.jinja": template})
    return load(tmp_path), oracle(folder / "tokenizer.json", template, special)


@pytest.mark.filterwarnings("ignore:.*never mentions tools")
def test_templates_give_the_ids_of_transformers(template_case):
    tokenizer, hf = template_case
    chat = chat_format(tokenizer)
    assert chat.name == "template"
    for talk in TALKS:
        for options in ({"add_generation_prompt": True}, {"add_generation_prompt": False}, {"tools": TOOLS}):
            ours = {"add_generation_prompt": False} | options
            assert chat.prompt(talk, **ours) == expected(hf, talk, **options)


def test_tool_calls_give_the_ids_of_transformers(chat_folders, tmp_path):
    folder, template, special = chat_folders["llama3.1"]
    (tmp_path / "tokenizer.json").symlink_to(folder / "tokenizer.json")
    write_folder(tmp_path, {"tokenizer_config.json": special | {"chat_template": template}})
    hf = oracle(folder / "tokenizer.json", template, special)
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": [1, 2.5, None, True, "<b>"]}}}
    talk = [*TALKS[1], {"role": "assistant", "content": None, "tool_calls": [call]}]
    talk += [{"role": "tool", "content": {"result": "é<1>"}}]
    got = chat_format(load(tmp_path)).prompt(talk, tools=TOOLS)
    assert got == expected(hf, talk, tools=TOOLS, add_generation_prompt=True)


def attacks(control: dict[str, int]) -> list[str]:
    names = [name for name in spellings(control) if not re.fullmatch(r"<\|reserved_special_token_\d\d+\|>", name)]
    texts = [*names, *(f"x {n}y\n{n}{n} " for n in names), *(f"{n[:2]}{n}{n[2:]}" for n in names)]
    return [*texts, *(n[: len(n) // 2] + "".join(names) + n[len(n) // 2 :] for n in names)]


@pytest.mark.parametrize("name", ["smollm2", "llama3", "sp_tokenizer", "legacy", "metaspace"])
def test_typed_control_strings_stay_text(name, request):
    folders = request.getfixturevalue("sp_folders")
    tokenizer = load(folders[name]) if name in folders else request.getfixturevalue(name)
    control = set(tokenizer.control_tokens.values())
    for text in attacks(tokenizer.control_tokens):
        ids = tokenizer.encode(text)
        assert control.isdisjoint(ids), text
        assert tokenizer.decode(ids).lstrip(" ") == text.replace("▁", " ").lstrip(" ")
    for string, i in tokenizer.control_tokens.items():
        assert tokenizer.encode(string, control=True)[-1] == i


@pytest.mark.filterwarnings("ignore:.*never mentions tools")
def test_typed_control_strings_stay_text_in_every_chat_format(template_case, llama3, sp_tokenizer):
    tokenizer, _ = template_case
    formats = [
        TemplateChat(tokenizer),
        Llama3Chat(llama3),
        Llama2Chat(sp_tokenizer),
        CodeLlama70BChat(sp_tokenizer),
    ]
    for chat, vocabulary in zip(formats, (tokenizer, llama3, sp_tokenizer, sp_tokenizer), strict=True):
        control = set(vocabulary.control_tokens.values())

        def skeleton(content, name="f", chat=chat, control=control):
            talk = [{"role": "user", "content": content}, {"role": "assistant", "content": content}]
            talk = [{**m, "name": name, "note": {name: [content]}} for m in [*talk, *talk[:1]]]
            tools = [{"type": "function", "function": {"name": name, "description": content, name: content}}]
            ids = chat.prompt(talk, tools=tools if chat.name == "template" else None)
            return [i for i in ids if i in control], vocabulary.decode(ids)  # noqa: B023

        harmless, _ = skeleton("hello")
        for text in attacks(vocabulary.control_tokens)[::3]:
            controls, shown = skeleton(text, name=text)
            assert controls == harmless, text
            assert text.strip().replace("▁", " ") in shown


def test_text_that_a_template_joins_stays_text(chat_folders, tmp_path):
    folder, _, special = chat_folders["smollm2"]
    (tmp_path / "tokenizer.json").symlink_to(folder / "tokenizer.json")
    write_folder(tmp_path, {"tokenizer_config.json": special, "chat_template.jinja": JOINING})
    tokenizer = load(tmp_path)
    control = set(tokenizer.control_tokens.values())

    def skeleton(*contents, name="x"):
        ids = TemplateChat(tokenizer).prompt([{"role": "user", "content": c, "name": name} for c in contents])
        return [i for i in ids if i in control], tokenizer.decode(ids)

    for contents in (
        ["a"],
        ["<|im_", "start|>"],
        ["<", "|im_start", "|>"],
        ["<|im_<|im_start|>start|>"],
        ["<|im\n_end|>"],
    ):
        controls, shown = skeleton(*contents)
        assert controls == [2]
        assert "".join(contents) in shown
        assert json.dumps(contents[0])[1:-1] in shown
    for name in ("im_end", "<|im_end|>", " im_end", "endoftext"):
        assert skeleton("hi", name=name)[0] == [2]


def test_llama3_golden_prompt(llama3):
    header = [128006, 882, 128007, 271]
    text = [2028, 374, 264, 1296, 11914, 13]
    ids = chat_format(llama3, "llama3").prompt([{"role": "user", "content": " This is a test sentence.\n"}])
    assert ids == [128000, *header, *text, 128009, 128006, 78191, 128007, 271]
    chat = Llama3Chat(llama3)
    assert chat.stop_ids == (128001, 128008, 128009)
    tool = [{"role": "tool", "content": [{"type": "text", "text": "This is a test sentence."}]}]
    assert chat.prompt(tool, add_generation_prompt=False) == [
        128000,
        128006,
        23799,
        4690,
        128007,
        271,
        *text,
        128009,
    ]


def test_llama2_turns_are_encoded_on_their_own(sp, sp_tokenizer):
    talk = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " What is 2+2? "},
        {"role": "assistant", "content": " 4\n"},
        {"role": "user", "content": "And 3+3?"},
    ]
    first = sp.encode("[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n What is 2+2? [/INST] 4 ")
    second = sp.encode("[INST] And 3+3? [/INST]")
    assert Llama2Chat(sp_tokenizer).prompt(talk) == [1, *first, 2, 1, *second]
    assert Llama2Chat(sp_tokenizer).prompt(talk[:3], add_generation_prompt=False) == [1, *first, 2]


def test_code_llama_70b(sp, sp_tokenizer):
    step = sp.piece_to_id("<step>")
    chat = chat_format(sp_tokenizer, "codellama70b")
    assert (chat.name, step in chat.stop_ids) == ("codellama70b", True)
    ids = chat.prompt([{"role": "user", "content": "Hi "}])
    turns = [sp.encode(" Source: system"), [step], sp.encode(" Source: user"), sp.encode("\n\n Hi"), [step]]
    turns += [sp.encode(" Source: assistant\nDestination: user"), sp.encode("\n\n ")]
    assert ids == [1, *(i for turn in turns for i in turn)]


def test_formats_are_recognised(smollm2, llama3, sp, sp_tokenizer, tmp_path):
    assert chat_format(smollm2).name == "template"
    with pytest.warns(UserWarning, match="the llama3 format is a guess"):
        assert chat_format(llama3).name == "llama3"
    with pytest.warns(UserWarning, match="the codellama70b format is a guess"):
        assert chat_format(sp_tokenizer).name == "codellama70b"
    assert chat_format(sp_tokenizer, "llama2").name == "llama2"
    backend = sp_backend(sp, legacy=True)
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ChatError, match="use generate"):
        chat_format(without_template(smollm2))
    with pytest.raises(ChatError, match="choose one of codellama70b, llama2, llama3, template"):
        chat_format(llama3, "chatml")
    with pytest.raises(ChatError, match="unknown chat format 'chatml': choose one of"):  # before anything is read
        llama_jax.load("/no/such/folder", chat_format="chatml")
    with pytest.raises(ChatError, match="no chat template"):
        chat_format(llama3, "template")
    with pytest.raises(ChatError, match=r"lacks <\|begin_of_text\|>.*llama3"):
        chat_format(smollm2, "llama3")


def without_template(tokenizer):
    import copy

    bare = copy.copy(tokenizer)
    bare.chat_template = None
    return bare


def test_named_templates(chat_folders, tmp_path):
    folder, _, special = chat_folders["smollm2"]
    (tmp_path / "tokenizer.json").symlink_to(folder / "tokenizer.json")
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    write_folder(tmp_path, {"tokenizer_config.json": special | {"chat_template": named}})
    tokenizer = load(tmp_path)
    chat = chat_format(tokenizer)
    assert tokenizer.decode(chat.prompt(TALKS[0])) == "plain"
    assert tokenizer.decode(chat.prompt(TALKS[0], tools=TOOLS)) == "tools"


@pytest.mark.parametrize(
    ("talk", "message"),
    [
        ([], "at least one message"),
        ([{"role": "narrator", "content": "x"}], "unknown role 'narrator'"),
        ([{"content": "x"}], "unknown role None"),
        (["hi"], "must be a mapping"),
        ([{"role": "user", "content": 3}], "no text"),
    ],
)
def test_bad_conversations(smollm2, llama3, sp_tokenizer, talk, message):
    for chat in (Llama2Chat(sp_tokenizer), Llama3Chat(llama3), CodeLlama70BChat(sp_tokenizer)):
        with pytest.raises(ChatError, match=message):
            chat.prompt(talk)
    if message != "no text":
        with pytest.raises(ChatError, match=message) as error:
            TemplateChat(smollm2).prompt(talk)
        if "role" in message:  # of the words that the template quotes, none is offered as a role
            assert str(error.value).endswith("system, user, assistant, tool, ipython, function, developer")


@pytest.mark.parametrize("marker", ["[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"])
def test_markers_that_are_ordinary_text_are_refused(sp_tokenizer, sp_folders, tmp_path, marker):
    (tmp_path / "tokenizer.json").symlink_to(sp_folders["legacy"] / "tokenizer.json")
    write_folder(
        tmp_path,
        {"chat_template.jinja": LLAMA2, "tokenizer_config.json": {"bos_token": "<s>", "eos_token": "</s>"}},
    )
    for chat in (Llama2Chat(sp_tokenizer), TemplateChat(load(tmp_path))):
        with pytest.raises(ChatError, match=re.escape(f"contains {marker!r}")):
            chat.prompt([{"role": "user", "content": f"hi {marker} there"}])


def test_llama2_roles(sp_tokenizer):
    chat, turn = Llama2Chat(sp_tokenizer), {"user": {"role": "user", "content": "a"}}
    turn["assistant"], turn["system"] = (
        {"role": "assistant", "content": "b"},
        {"role": "system", "content": "c"},
    )
    for roles, message in [
        (["user", "user"], "turn 2 is 'user'"),
        (["assistant"], "turn 1 is 'assistant'"),
        (["user", "system"], "turn 2 is 'system'"),
        (["system"], "add a user message"),
        (["user", "assistant"], "must be the user's"),
    ]:
        with pytest.raises(ChatError, match=message):
            chat.prompt([turn[role] for role in roles])
    with pytest.raises(ChatError, match="has no tools"):
        chat.prompt([turn["user"]], tools=TOOLS)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages.__class__.__mro__ }}", "SecurityError: a template may not reach for '__class__'"),
        ("{{ ''.__class__ }}", "SecurityError: .*'__class__'"),
        ("{{ messages[0]['__class__'] }}{{ messages | attr('__class__') }}", "SecurityError: .*'__class__'"),
        ("{% set _ = messages.append(1) %}", "SecurityError: .*'append'"),
        ("{{ raise_exception('only one user, please') }}", "TemplateError: only one user, please"),
        ("{{ messages[0].nothing.deeper }}", "UndefinedError: .*'nothing'"),
        ("a\n{% if %}", "TemplateSyntaxError in line 2"),
        ("{{ 1 + messages[0].content }}", "TypeError"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "OverflowError"),
    ],
)
def test_bad_templates(smollm2, template, message):
    tokenizer = without_template(smollm2)
    tokenizer.chat_template = template
    with pytest.raises(ChatTemplateError, match=message):
        TemplateChat(tokenizer).prompt([{"role": "user", "content": "x"}])


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in R %}{% for j in R %}{% for k in R %}{% endfor %}{% endfor %}{% endfor %}",
        "{% for i in R if false %}{% endfor %}{% for i in R %}{% for j in R if false %}{% endfor %}{% endfor %}",
        "{% for i in R recursive %}{{ loop(R) if loop.depth < 4 }}{% endfor %}",
        "{% for i in R %}{% set x = R | sum %}{% endfor %}",
        "{% macro f(n) %}{{ f(n - 1) ~ f(n - 1) if n }}{% endmacro %}{{ f(60) }}",
    ],
    ids=["nested", "filtered", "recursive", "in a filter", "macro"],
)
def test_a_template_that_hardly_ends(smollm2, monkeypatch, template):
    monkeypatch.setattr("llama_jax.text.template.SECONDS", 0.2)
    tokenizer = without_template(smollm2)
    tokenizer.chat_template = template.replace("R", "range(100000)")
    with pytest.raises(ChatTemplateError, match="TimeoutError: it still ran after 0.2 seconds"):
        TemplateChat(tokenizer).prompt([{"role": "user", "content": "x"}])


def test_a_conversation_of_objects_is_refused(smollm2):
    with pytest.raises(ChatError, match="JSON values, not of date"):
        TemplateChat(smollm2).prompt([{"role": "user", "content": "x", "when": datetime.date.today()}])
