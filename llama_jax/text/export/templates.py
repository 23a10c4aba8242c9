"""Chat templates in Jinja, by the names of `text.chat`'s formats: the same ids."""

from __future__ import annotations

from llama_jax.text.open import read_files as read_files  # of the folder that a tokenizer comes from
from llama_jax.text.samples import sample_texts as sample_texts

_TEXT = """
{%- macro text(m) %}
    {{- m.content if m.content is string else m.content | map(attribute='text') | join }}
{%- endmacro %}"""


# By the names of `chat.py`'s formats: the same ids, in Jinja.
CHAT_TEMPLATES = {
    "llama2": _TEXT
    + r"""
{%- set system, turns = '', messages %}
{%- if messages[0].role == 'system' %}
    {%- set system, turns = '<<SYS>>\n' + text(messages[0]) + '\n<</SYS>>\n\n', messages[1:] %}
{%- endif %}
{%- for m in turns %}
    {%- if m.role != ('user' if loop.index0 is even else 'assistant') %}
        {{- raise_exception('roles must alternate user, assistant, user, ...') }}
    {%- endif %}
    {%- set content = ((system if loop.first else '') + text(m)) | trim %}
    {{- bos_token + '[INST] ' + content + ' [/INST]' if m.role == 'user' else ' ' + content + ' ' + eos_token }}
{%- endfor %}""",
    "codellama70b": _TEXT
    + r"""
{{- bos_token }}
{%- if messages[0].role != 'system' %}
    {{- ' Source: system<step>' }}
{%- endif %}
{%- for m in messages %}
    {%- set content = text(m) | trim %}
    {{- ' Source: ' + m.role + (' \n\n ' + content if content else '') + '<step>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- ' Source: assistant\nDestination: user \n\n ' }}
{%- endif %}""",
    "llama3": _TEXT
    + r"""
{%- macro header(role) %}
    {{- '<|start_header_id|>' + role + '<|end_header_id|>\n\n' }}
{%- endmacro %}
{{- bos_token }}
{%- for m in messages %}
    {{- header('ipython' if m.role == 'tool' else m.role) + text(m) | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- header('assistant') }}
{%- endif %}""",
}
