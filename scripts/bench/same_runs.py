"""The runs of same.py, in one checkout: python same_runs.py INPUTS RESULTS NAME ...

Each is a function that returns JSON; arrays and files are given by their hashes. Only the public interface of llama_jax
and the scripts are used, so that the list holds whatever moves inside.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from same_inputs import MODELS, SENTENCES, make_inputs

RECIPE = """
from llama_jax.config import ModelConfig
from llama_jax.train.recipe import *

def recipe():
    return Recipe(
        model=ModelConfig(
            vocab_size={vocab}, embed_dim=32, mlp_dim=64, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=8,
            norm_eps=1e-5, rope_theta=1e4, rope_scaling=None, max_seq_len=256, tie_embeddings={tied}),
        data=Data(train=({bpe!r}, {jsonl!r}), weights=(0.7, 0.3), validation=({jsonl!r},)),
        batch=Batch(seq_len=32, sequences=8, microbatches={microbatches}),
        optimizer=Optimizer(Schedule(peak=3e-3, steps=6, warmup_steps=2), z_weight=1e-4),
        checkpoints=Checkpoints(every=3), validation=Validation(every=3),
        samples=Samples(prompts=("the fox",), every=3, new_tokens=4), tensorboard=False,
    )
"""
VOLATILE = ("time", "seconds", "speed", "rate_", "tokens_per_second", "mfu", "memory", "version", "path", "at", "host")
PROMPTS = [[5, 17, 99, 3], [7], list(range(20, 57))]


@dataclasses.dataclass(frozen=True)
class Run:
    """One run: what it compares, and on how many simulated devices."""

    function: Callable[[Path, Path], Any]
    what: str
    devices: int = 1


RUNS: dict[str, Run] = {}


def add(name: str, what: str, devices: int = 1):
    """Registers a function of the inputs' folder and an empty folder."""

    def register(function):
        RUNS[name] = Run(function, what, devices)
        return function

    return register


# --- How results are given ---


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def hashed(array: Any) -> str:
    import numpy as np

    array = np.asarray(array)
    return f"{array.dtype}{list(array.shape)} {digest(array.tobytes())}"


def files(path: Path) -> dict[str, str]:
    """The hash of each file."""
    found = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return {str(p.relative_to(path.parent)): digest(p.read_bytes()) for p in found}


def steady(value: Any) -> Any:
    """JSON without what differs from run to run."""
    if isinstance(value, dict):
        return {k: steady(v) for k, v in value.items() if not any(k == w or k.endswith(f"_{w}") for w in VOLATILE)}
    return [steady(v) for v in value] if isinstance(value, list) else value


def script(name: str, *args: Any, stdin: str = "", code: int = 0, processes: int = 1, devices: int = 0) -> str:
    """What a script prints, of several processes the first one."""
    command = [sys.executable, Path("scripts") / f"{name}.py", *map(str, args)]
    variables = dict(os.environ)
    if devices:
        variables["JAX_NUM_CPU_DEVICES"] = str(devices)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    started = []
    for i in range(processes):
        if processes > 1:
            address = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(processes)}
            variables |= address | {"JAX_PROCESS_ID": str(i)}
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        started.append(subprocess.Popen(command, env=variables, text=True, **pipes))
    ends = [process.communicate(stdin if i == 0 else "", timeout=300) for i, process in enumerate(started)]
    for process, (_, err) in zip(started, ends, strict=True):
        if process.returncode != code:
            raise RuntimeError(f"{command} ended with {process.returncode}: {err[-2000:]}")
    return ends[0][0]


def load(path: Path, **options: Any) -> Any:
    import llama_jax

    return llama_jax.load(path, **options)


def completions(llama: Any, prompts: Any = PROMPTS, **options: Any) -> Any:
    import llama_jax

    found = llama_jax.generate(llama, prompts, **{"max_new_tokens": 24, "logprobs": True, **options})
    return [dataclasses.asdict(completion) | {"logprobs": hashed(completion.logprobs)} for completion in found]


def both(llama: Any) -> Any:
    """Greedy tokens of prompts of different lengths, and logits."""
    import llama_jax

    ids = [[(7 * i * i + 3) % 300 for i in range(150)]]
    return {"greedy": completions(llama), "logits": hashed(llama_jax.logits(llama, ids))}


# --- Formats and architectures ---

FORMATS = ("hf", "meta", "gguf", "native")


def converted(inputs: Path, work: Path, to: Any, source: str = "gqa") -> Path:
    import llama_jax

    if to == "hf":
        return inputs / source
    path = work / (f"{source}.gguf" if to == "gguf" else to)
    llama_jax.convert(inputs / source, path, to=to)
    return path


for _format in FORMATS:
    add(f"load-{_format}", "tokens, log-probabilities and logits of a converted model")(
        lambda inputs, work, to=_format: both(load(converted(inputs, work, to)))
    )
for _name in MODELS:
    add(f"model-{_name}", "tokens, log-probabilities and logits")(
        lambda inputs, work, name=_name: both(load(inputs / name))
    )
for _dtype in ("bfloat16", "float16"):
    add(f"dtype-{_dtype}", "tokens, log-probabilities and logits")(
        lambda inputs, work, dtype=_dtype: both(load(inputs / "gqa", dtype=dtype))
    )
for _kernel in ("reference", "xla"):
    add(f"attention-{_kernel}", "tokens, log-probabilities and logits")(
        lambda inputs, work, kernel=_kernel: both(load(inputs / "llama31", attention=kernel))
    )
for _mesh in ("tensor=8", "fsdp=2,tensor=4", "data=2,context=2,tensor=2", "context=8", "fsdp=8"):
    add(f"mesh-{_mesh}", "tokens, log-probabilities and logits", devices=8)(
        lambda inputs, work, mesh=_mesh: both(load(inputs / "llama31", mesh=mesh))
    )
add("mesh-odd", "a model whose heads do not divide", devices=8)(
    lambda inputs, work: both(load(inputs / "odd", mesh="fsdp=2,tensor=4"))
)


# --- Generation ---


@add("generate-text", "texts, stop strings, a repetition penalty, a cache that fills up")
def generate_text(inputs: Path, work: Path) -> Any:
    llama = load(inputs / "gqa")
    return {
        "texts": completions(llama, SENTENCES, stop=["th", "zz"]),
        "penalty": completions(llama, SENTENCES[:1], repetition_penalty=1.3),
        "one": completions(llama, ["the"], max_new_tokens=1),
        "full": completions(load(inputs / "gqa", max_seq_len=64), [list(range(50))], max_new_tokens=64),
        "spm": completions(load(inputs / "spm"), SENTENCES),
    }


@add("chat", "a chat, its stream, and a conversation of three turns")
def chat(inputs: Path, work: Path) -> Any:
    import llama_jax

    llama, said = load(inputs / "gqa"), [{"role": "user", "content": "what is the name of the river?"}]
    talk = llama_jax.Conversation(llama, max_new_tokens=12)
    return {
        "chat": dataclasses.asdict(llama_jax.chat(llama, said, max_new_tokens=16)),
        "stream": list(llama_jax.chat_stream(llama, said, max_new_tokens=16)),
        "turns": ["".join(talk.ask(text)) for text in SENTENCES],
        "messages": talk.messages,
    }


@add("tokenizers", "ids and texts of three tokenizers")
def tokenizers(inputs: Path, work: Path) -> Any:
    texts = [*SENTENCES, "", " ", "\n\n  a\tb", "<|im_start|>user", "\U0001f999 \u4f60\u597d", "1234567"]
    found = {}
    for name, path in (
        ("bpe", inputs / "gqa"), ("spm", inputs / "spm"), ("gguf", converted(inputs, work, "gguf", "spm")),
    ):  # fmt: skip
        tokenizer = load(path).tokenizer
        ids = [tokenizer.encode(text, bos=False) for text in texts]
        found[name] = [ids, [tokenizer.decode(x) for x in ids], [tokenizer.encode(t, control=True) for t in texts]]
    return found


@add("script-generate", "generate.py --json, prompts from standard input")
def script_generate(inputs: Path, work: Path) -> Any:
    args = ("--prompts-file", "-", "--json", "--logprobs", "--max-new-tokens", 12, "--model", inputs / "gqa")
    return [json.loads(line) for line in script("generate", *args, stdin="\n".join(SENTENCES)).splitlines()]


@add("script-chat", "chat.py, three lines and /reset")
def script_chat(inputs: Path, work: Path) -> Any:
    return script("chat", "--model", inputs / "gqa", "--max-new-tokens", 10, stdin="the fox\nthe wolf\n/reset\nhm\n")


@add("script-two-processes", "generate.py in two processes of four devices")
def script_two_processes(inputs: Path, work: Path) -> Any:
    args = ("--prompt", SENTENCES[0], "--prompt", "it is", "--json", "--model", inputs / "gqa", "--max-new-tokens", 12)
    return script("generate", *args, "--mesh", "data=2,tensor=4", processes=2, devices=4).splitlines()


# --- Conversions: the hash of every file ---

CONVERSIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "hf-meta": ("gqa", {"to": "meta"}),
    "hf-meta-2": ("llama31", {"to": "meta", "shards": 2}),
    "hf-gguf": ("llama31", {"to": "gguf"}),
    "hf-gguf-q8": ("gqa", {"to": "gguf", "quantize": "q8_0"}),
    "hf-gguf-q4-spm": ("spm", {"to": "gguf", "quantize": "q4_0"}),
    "hf-hf-bf16": ("tied", {"to": "hf", "dtype": "bfloat16", "max_shard_size": 100_000}),
    "yarn-gguf": ("yarn", {"to": "gguf"}),
    "tied-meta": ("tied", {"to": "meta"}),
}
for _name, (_source, _options) in CONVERSIONS.items():

    def _convert(inputs: Path, work: Path, source=_source, options=_options) -> Any:
        import llama_jax

        path = work / ("out.gguf" if options["to"] == "gguf" else "out")
        report = llama_jax.convert(inputs / source, path, **options)
        return {"files": files(path), "warnings": list(report.warnings)}

    add(f"convert-{_name}", "every file that is written, and the warnings")(_convert)
for _format in ("meta", "gguf", "native"):

    def _back(inputs: Path, work: Path, via=_format) -> Any:
        import llama_jax

        llama_jax.convert(converted(inputs, work, via, "llama31"), work / "back", to="hf")
        return files(work / "back")

    add(f"convert-{_format}-hf", "every file of a round trip")(_back)


@add("save", "what `save` writes of a loaded model", devices=8)
def save(inputs: Path, work: Path) -> Any:
    import llama_jax

    llama = load(inputs / "llama31", mesh="fsdp=2,tensor=4")
    llama_jax.save(llama, work / "hf", format="hf")
    llama_jax.save(llama, work / "out.gguf", format="gguf")
    return files(work / "hf") | files(work / "out.gguf")


@add("verify", "verify.py --json of a quantized file")
def verify(inputs: Path, work: Path) -> Any:
    import llama_jax

    llama_jax.convert(inputs / "gqa", work / "q8.gguf", to="gguf", quantize="q8_0")
    args = (inputs / "gqa", work / "q8.gguf", "--json", "--tolerance", 10, "--positions", 200)
    return steady(json.loads(script("verify", *args)))


# --- Data and training ---


@add("prepare-text", "every file of corpora of texts and JSON lines, two tokenizers")
def prepare_text(inputs: Path, work: Path) -> Any:
    found = {}
    for name, paths, tokenizer in (
        ("text", [inputs / "texts"], inputs / "gqa"), ("jsonl", [inputs / "texts.jsonl"], inputs / "spm"),
    ):  # fmt: skip
        script("prepare_data", *paths, work / name, "--tokenizer", tokenizer, "--workers", 1, "--shard-bytes", 9000)
        found |= files(work / name)
    return {name: value for name, value in found.items() if not name.endswith("manifest.json")}


@add("prepare-vocabulary", "a vocabulary trained on the input")
def prepare_vocabulary(inputs: Path, work: Path) -> Any:
    args = ("--train-tokenizer", 330, "--workers", 1)
    script("prepare_data", inputs / "texts.jsonl", work / "corpus", *args)
    return {name: value for name, value in files(work / "corpus").items() if not name.endswith("manifest.json")}


def corpora(inputs: Path) -> dict[str, str]:
    """The corpora of the training runs, prepared once, by the checkout that comes first."""
    folder = inputs.parent / "corpora"
    for name, path in (("bpe", inputs / "texts"), ("jsonl", inputs / "texts.jsonl")):
        if not (folder / name / "manifest.json").exists():
            script("prepare_data", path, folder / name, "--tokenizer", inputs / "gqa", "--workers", 1)
    return {name: str(folder / name) for name in ("bpe", "jsonl")}


def recipe(inputs: Path, work: Path, *, tied: bool = True, microbatches: int = 1) -> Path:
    path = work / "recipe.py"
    path.write_text(RECIPE.format(vocab=320, tied=tied, microbatches=microbatches, **corpora(inputs)))
    return path


def trained(output: Path, step: int = 6) -> Any:
    """Each step's numbers, what it wrote, and the weights of its last checkpoint."""
    import llama_jax

    rows = [steady(json.loads(line)) for line in (output / "metrics.jsonl").read_text().splitlines()]
    samples = [steady(json.loads(line)) for line in (output / "samples.jsonl").read_text().splitlines()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        llama_jax.convert(output / "checkpoints" / str(step), output.parent / f"{output.name}-hf", to="hf")
    return {"metrics": rows, "samples": samples, "weights": files(output.parent / f"{output.name}-hf")}


TRAININGS: dict[str, tuple[int, dict[str, Any], tuple[Any, ...]]] = {
    **{f"remat-{name}": (1, {}, ("--remat", name)) for name in ("none", "matmuls", "attention", "full", "groups")},
    "untied": (1, {"tied": False}, ()),
    "microbatches": (1, {"microbatches": 4}, ()),
    "bfloat16": (1, {"microbatches": 2}, ("--dtype", "bfloat16")),
    "fsdp": (8, {}, ("--mesh", "fsdp=8")),
    "mesh": (8, {"microbatches": 2, "tied": False}, ("--mesh", "data=2,fsdp=2,tensor=2")),
    "context": (8, {}, ("--mesh", "fsdp=4,context=2", "--dtype", "bfloat16")),
}
for _name, (_devices, _fields, _options) in TRAININGS.items():

    def _train(inputs: Path, work: Path, fields=_fields, options=_options) -> Any:
        script("train", recipe(inputs, work, **fields), "--output", work / "run", *options)
        return trained(work / "run")

    add(f"train-{_name}", "losses, norms, samples and weights of six steps", _devices)(_train)


@add("train-two-processes", "as train-mesh, in two processes of four devices")
def train_two_processes(inputs: Path, work: Path) -> Any:
    args = (recipe(inputs, work, microbatches=2), "--output", work / "run", "--mesh", "data=2,fsdp=2,tensor=2")
    script("train", *args, processes=2, devices=4)
    return trained(work / "run")


def _resumed(inputs: Path, work: Path, mesh: str) -> Any:
    """Resumes a copy of a run of three steps that the checkout that came first has written."""
    started = inputs.parent / f"started-{mesh}"
    if not started.exists():
        script("train", recipe(inputs, work), "--output", started, "--steps", 3, "--mesh", mesh)
    shutil.copytree(started, work / "run")
    options = ("--output", work / "run", "--resume", "auto", "--mesh", mesh)
    script("train", recipe(inputs, work), *options)
    return trained(work / "run")


add("resume", "three more steps from a checkpoint that BEFORE wrote")(
    lambda inputs, work: _resumed(inputs, work, "fsdp=1")
)
add("resume-mesh", "likewise, on eight devices", devices=8)(
    lambda inputs, work: _resumed(inputs, work, "fsdp=4,tensor=2")
)


@add("train-init-from", "six steps from a model in Hugging Face's format")
def train_init_from(inputs: Path, work: Path) -> Any:
    script("train", recipe(inputs, work), "--output", work / "run", "--init-from", inputs / "llama31")
    return trained(work / "run")


# --- Plans, by arithmetic ---

PLANS = {
    "8b-train": ("llama3.1-8b", "v5litepod-16"),
    "70b-train": ("llama2-70b", "v6e-64"),
    "405b-train": ("llama3.1-405b", "v5p-512", "--batch", 256, "--seq", 8192),
    "8b-h100": ("llama3.1-8b", "8xh100"),
    "7b-decode": ("llama2-7b", "v5litepod-8", "--mode", "decode", "--batch", 8, "--seq", 2048),
    "70b-decode": ("llama3.1-70b", "v5p-8", "--mode", "decode", "--batch", 8, "--seq", 2048),
    "3b-prefill": ("llama3.2-3b", "v6e-4", "--mode", "prefill", "--batch", 4, "--seq", 4096),
    "13b-search": ("llama2-13b", "v5p-16", "--search"),
}
for _name, (_model, _machine, *_rest) in PLANS.items():

    def _plan(inputs: Path, work: Path, model=_model, machine=_machine, rest=tuple(_rest)) -> Any:
        args = ("--model", model, "--machine", machine, *rest, "--compile", 0, "--json")
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            print(script("plan", *args, code=_plan_code(args)))
        return json.loads(out.getvalue())

    add(f"plan-{_name}", "every figure")(_plan)


def _plan_code(args: tuple[Any, ...]) -> int:
    done = subprocess.run([sys.executable, "scripts/plan.py", *map(str, args)], capture_output=True, check=False)
    return done.returncode if done.returncode in (0, 3) else 0


def main(inputs: Path, results: Path, names: list[str]) -> None:
    import llama_jax

    checkout = Path(os.environ["SAME_CHECKOUT"])
    assert Path(llama_jax.__file__).is_relative_to(checkout), f"{llama_jax.__file__} is not of {checkout}"
    if not inputs.exists():
        make_inputs(inputs)
    for name in names:
        print(f"{results.name}: {name}", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = RUNS[name].function(inputs, Path(folder))
        (results / f"{name}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve(), sys.argv[3:])
