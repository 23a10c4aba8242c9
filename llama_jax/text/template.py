"""Rendering a checkpoint's chat template: Jinja in a sandbox, with a limit on its time."""

from __future__ import annotations

import datetime
import functools
import json
import time
from collections.abc import Callable
from typing import Any

from llama_jax.typing import Foreign

_DEADLINE, _TICK = "template deadline", "template tick"  # no template can spell a name with a space
SECONDS = 5.0  # of processor time; a thousand messages take a thousandth of that


class ChatError(ValueError):
    """A conversation that the chat format cannot hold."""


class ChatTemplateError(ChatError):
    """The checkpoint's chat template failed or refused the conversation."""


def render(source: str, **variables: object) -> str:
    """Renders a chat template; whatever goes wrong in it is a `ChatTemplateError`."""
    try:
        return _compile(source).render({_DEADLINE: time.thread_time() + SECONDS}, **variables)
    except Exception as error:  # of Jinja, of the sandbox, or whatever the template's expressions raise
        kind, line = type(error).__name__, getattr(error, "lineno", None)
        where = f" in line {line}" if line else ""
        raise ChatTemplateError(f"the chat template failed with {kind}{where}: {error}") from error


@functools.lru_cache(maxsize=8)
def _compile(source: str) -> Any:
    """Compiles a chat template in the environment that transformers gives it."""
    import jinja2
    from jinja2 import ext, nodes, sandbox

    class GenerationTag(ext.Extension):
        """`{% generation %}` marks the assistant's text for training masks; here it only groups."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Foreign) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

        def _body(self, caller: Callable[[], str]) -> str:
            return caller()

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(x: object, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    @jinja2.pass_context
    def tick(context: Any, _: object = None) -> bool:
        if time.thread_time() > context[_DEADLINE]:
            raise TimeoutError(f"it still ran after {SECONDS} seconds")
        return True

    class Sandbox(sandbox.ImmutableSandboxedEnvironment):
        # Jinja bounds a range, but not the product of nested ones: every turn of a loop and every call, such as a
        # macro's of itself, looks at the clock.
        def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
            for loop in source.find_all(nodes.For):
                ticks = nodes.Filter(nodes.Const(None), _TICK, [], [], None, None, lineno=loop.lineno)
                if loop.test is None:
                    loop.body.insert(0, nodes.ExprStmt(ticks, lineno=loop.lineno))
                else:
                    loop.test = nodes.And(ticks, loop.test, lineno=loop.lineno)
            return super()._generate(source, *args, **kwargs)

        def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
            tick(context)
            return super().call(context, obj, *args, **kwargs)

        def unsafe_undefined(self, obj: object, attribute: str) -> Any:  # Jinja's own prints as nothing
            raise jinja2.exceptions.SecurityError(f"a template may not reach for {attribute!r}")

    extensions = [GenerationTag, ext.loopcontrols]
    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters |= {"tojson": tojson, _TICK: tick}
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(source)
