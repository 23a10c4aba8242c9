"""The result of a check, and how the results of many processes become a few rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

OK, WARNING, PROBLEM = "ok", "warning", "problem"

# Packages whose version must be the same on every process.
SAME = ("llama_jax", "jax", "jaxlib", "flax", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin")


@dataclasses.dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
      check: its name, a word or two.
      status: ok, warning or problem.
      value: the result.
      remedy: advice, if it is not ok.
      process: index of the process that ran it.
    """

    check: str
    status: str
    value: str
    remedy: str = ""
    process: int = 0


def fine(check: str, value: str) -> Finding:
    """Returns a finding without a problem."""
    return Finding(check, OK, value)


def warning(check: str, value: str, remedy: str) -> Finding:
    """Returns a finding that may do harm."""
    return Finding(check, WARNING, value, remedy)


def problem(check: str, value: str, remedy: str) -> Finding:
    """Returns a finding that must be fixed."""
    return Finding(check, PROBLEM, value, remedy)


def one_line(error: object) -> str:
    """Returns the text of an error as one line of at most 600 characters."""
    text = " ".join(str(error).split())
    return text if len(text) <= 600 else text[:597] + "..."


def ranges(numbers: Iterable[int]) -> str:
    """Returns `[0, 1, 2, 5]` as `0-2, 5`."""
    runs: list[list[int]] = []
    for n in sorted(set(numbers)):
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def rows(findings: Sequence[Finding]) -> list[tuple[str, Finding]]:
    """Returns (processes, finding) for a table: equal findings once, and at most 4 a check that are fine."""
    order = {f.check: i for i, f in reversed(list(enumerate(findings)))}
    groups: dict[tuple[str, str, str], list[Finding]] = {}
    for f in sorted(findings, key=lambda f: (order[f.check], f.process)):
        groups.setdefault((f.check, f.status, f.value), []).append(f)
    shown, good = [], dict.fromkeys(order, 0)
    for (check, status, _), group in groups.items():
        good[check] += status == OK
        if status != OK or good[check] <= 4:
            shown.append((ranges(f.process for f in group), group[0]))
    return shown


def between(findings: Sequence[Finding]) -> list[Finding]:
    """Returns the problems of processes that are fine alone: versions that differ."""
    variants: dict[frozenset[str], list[int]] = {}
    for f in findings:
        if f.check == "versions" and f.status == OK:
            words = frozenset(word for word in f.value.split(", ") if word.split(" ")[0] in SAME)
            variants.setdefault(words, []).append(f.process)
    if len(variants) < 2:
        return []
    common = frozenset.intersection(*variants)
    parts = (f"process {ranges(who)}: {', '.join(sorted(words - common)) or '-'}" for words, who in variants.items())
    remedy = "install the same everywhere: the same commit, then the same `pip install`"
    return [problem("versions", f"not the same everywhere: {'; '.join(parts)}", remedy)]
