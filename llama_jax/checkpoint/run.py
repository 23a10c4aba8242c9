"""The checkpoints of a training run: saved in the background, whole or not at all, and some of them kept."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import json
import logging
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from llama_jax.checkpoint.arrays import DamagedError, SavedArray, handler, open_arrays, save_request

PROGRESS = "progress.json"
DELETED = "deleted"


class RunCheckpoints:
    """The checkpoints of one training run: `FOLDER/STEP`, each a native checkpoint with the optimizer's state beside.

    Saved in the background, and there whole or not at all. All processes make the same calls.

    Args:
      folder: of this run; made if need be.
      keep_last: how many of the newest are kept,
      keep_every: beside those of every so many steps (0: none),
      keep_best: and so many with the lowest loss.
      stacked: as for `save_arrays`.
    """

    def __init__(
        self, folder: Path, *, keep_last: int, keep_every: int, keep_best: int, stacked: Callable[[str], bool]
    ):
        import orbax.checkpoint as ocp
        from orbax.checkpoint import checkpoint_managers as managers

        _be_quiet()
        policies: list[Any] = [managers.LatestN(max(1, keep_last))]
        if keep_every:
            policies.append(managers.EveryNSteps(keep_every))
        if keep_best:
            best = managers.BestN(
                get_metric_fn=lambda metrics: metrics["loss"], reverse=True, n=keep_best,
                keep_checkpoints_without_metrics=False,
            )  # fmt: skip
            policies.append(best)
        # Renamed in one step before they are deleted: a kill meanwhile leaves no half of a checkpoint.
        options = ocp.CheckpointManagerOptions(
            preservation_policy=managers.AnyPreservationPolicy(policies), cleanup_tmp_directories=True,
            todelete_subdir=DELETED,
        )  # fmt: skip
        self.folder, self._stacked, self._options = folder.absolute(), stacked, options
        self._manager: Any = None
        self._begun: int | None = None

    def steps(self) -> list[int]:
        """Those that are whole, in order."""
        return run_steps(self.folder)

    def progress(self, step: int) -> dict[str, Any]:
        """What was saved beside the arrays.

        Raises:
          DamagedError: it cannot be read.
        """
        path = self.folder / str(step) / "run" / PROGRESS
        try:
            return json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise DamagedError(f"{path}: cannot be read ({error})") from error

    def restore(self, step: int, like: Mapping[str, Mapping[str, jax.Array]]) -> dict[str, dict[str, jax.Array]]:
        """Reads a checkpoint onto the devices, each process its own part.

        Args:
          step: which one.
          like: item -> name -> abstract array with its sharding, on any mesh.

        Raises:
          DamagedError: it cannot be read.
          ValueError: it holds other arrays; says which.
        """
        import orbax.checkpoint as ocp

        found = {}
        for item, arrays in like.items():
            path = self.folder / str(step) / item
            stored = open_arrays(path)
            _check_same(path, stored, arrays)
            restore_args = ocp.checkpoint_utils.construct_restore_args(dict(arrays))
            args = ocp.args.PyTreeRestore(item=dict(arrays), restore_args=restore_args)
            try:
                with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_zarr3=True)) as checkpointer:
                    found[item] = checkpointer.restore(path, args=args)
            except Exception as error:  # Orbax and tensorstore raise many kinds
                raise DamagedError(f"{path}: cannot be read ({type(error).__name__}: {error})") from error
        return found

    def save(
        self,
        step: int,
        items: Mapping[str, Mapping[str, jax.Array]],
        progress: dict[str, Any],
        files: Mapping[str, bytes],
        loss: float | None = None,
    ) -> None:
        """Begins to save; the arrays may be donated when it returns. An error comes with the next call of this object.

        Args:
          step: larger than any before; does nothing where there is one of that step already.
          items: item -> name -> array.
          progress: what JSON can hold.
          files: beside the items: `config.json` and the tokenizer, so that `load` takes the folder.
          loss: by which the best are chosen.

        Raises:
          OSError: the disk is full, or cannot be written, now or during the save before; older checkpoints are as they
            were.
        """
        import orbax.checkpoint as ocp

        if step in (*self.steps(), self._begun):
            return
        self.wait()
        manager, self._begun = self._open(items), step
        self._check_room(items)
        args = {item: save_request(arrays, self._stacked) for item, arrays in items.items()}
        with self._failure_in_words():
            manager.save(
                step,
                args=ocp.args.Composite(**args, run=_run_files().Save(progress, dict(files))),
                metrics=None if loss is None else {"loss": loss},
                force=True,
            )

    @contextlib.contextmanager
    def _failure_in_words(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of Orbax, tensorstore, the file system
            whole = self.steps()
            good = f"the newest good one is of step {whole[-1]}, and it is as it was" if whole else "there is none yet"
            raise OSError(
                f"{self.folder / str(self._begun)}: this checkpoint could not be saved ({_cause(error)}); {good}. Mend"
                " the cause and go on with --resume auto"
            ) from error

    def _check_room(self, items: Mapping[str, Mapping[str, jax.Array]]) -> None:
        """Raises OSError where this process's part of the arrays does not fit on the disk."""
        arrays = [x for item in items.values() for x in item.values()]
        needed = sum(s.data.nbytes for x in arrays for s in x.addressable_shards if s.replica_id == 0)
        with self._failure_in_words():
            free = shutil.disk_usage(self.folder).free
            if free < needed:
                raise OSError(
                    errno.ENOSPC, f"the disk is full: it needs {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free"
                )

    def check(self) -> None:
        """Raises OSError if the save that goes on has failed."""
        if self._manager:
            with self._failure_in_words():
                self._manager.check_for_errors()

    def wait(self) -> None:
        """Returns when all is on disk; raises OSError if it is not."""
        if self._manager:
            with self._failure_in_words():
                self._manager.wait_until_finished()
            self._delete()

    def close(self) -> None:
        """Ends the threads, without waiting for what goes on beyond that."""
        if self._manager:
            self._manager.close()

    def _set_aside(self) -> None:
        """Takes step folders that are not whole out of the manager's sight, which would count them."""
        if jax.process_index() == 0:
            broken = {str(p.name) for p in self.folder.iterdir() if p.name.isdecimal()} - set(map(str, self.steps()))
            for name in broken:
                (self.folder / DELETED).mkdir(exist_ok=True)
                (self.folder / name).rename(self.folder / DELETED / name)

    def _delete(self) -> None:
        """Deletes what the manager no longer keeps."""
        if jax.process_index() == 0:
            shutil.rmtree(self.folder / DELETED, ignore_errors=True)

    def _open(self, items: Mapping[str, Mapping[str, jax.Array]]) -> Any:
        import orbax.checkpoint as ocp

        if self._manager is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._set_aside()
            handlers: dict[str, Any] = {item: handler(arrays) for item, arrays in items.items()}
            self._manager = ocp.CheckpointManager(
                self.folder, options=self._options, item_handlers=handlers | {"run": _run_files().Handler()}
            )
        return self._manager


@functools.cache
def _be_quiet() -> None:
    """Leaves out what Orbax and tensorstore print about a failed save, which comes as an exception too."""
    for name in ("absl", "orbax"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    excepthook, unraisablehook = sys.excepthook, sys.unraisablehook

    def late(error: object) -> bool:
        return isinstance(error, RuntimeError) and str(error) == "Event loop is closed"

    sys.excepthook = lambda kind, error, trace: None if late(error) else excepthook(kind, error, trace)
    sys.unraisablehook = lambda found: None if late(found.exc_value) else unraisablehook(found)


def _cause(error: BaseException) -> str:
    """What is the matter, in a few words."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error)
    for words in ("No space left on device", "File too large", "Disk quota exceeded", "Permission denied"):
        if words in text:
            return words
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"


def run_steps(folder: Path) -> list[int]:
    """The steps of the whole checkpoints in a run's folder of checkpoints, in order."""
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal() and (path / "run").is_dir())


def _check_same(path: Path, stored: Mapping[str, SavedArray], wanted: Mapping[str, jax.Array]) -> None:
    """Raises ValueError that names the first difference."""
    if names := sorted(stored.keys() ^ wanted.keys()):
        raise ValueError(
            f"{path}: the checkpoint is of another model or optimizer: {names[0]!r} is only in"
            f" {'the checkpoint' if names[0] in stored else 'this run'}. Give the recipe it was made with, or start a"
            " new run from its weights: --output NEW --init-from ITS_FOLDER"
        )
    for name, array in wanted.items():
        if stored[name].shape != array.shape:
            raise ValueError(
                f"{path}: the checkpoint is of another shape: {name!r} is {list(stored[name].shape)}, but this run's is"
                f" {list(array.shape)}. Give the recipe it was made with (recipe.json beside it), or another --output"
            )


class _RunFiles:
    """An Orbax item of small files: `run/progress.json`, and others beside the items, in the checkpoint itself."""

    def __init__(self):
        import orbax.checkpoint as ocp

        class Handler(ocp.CheckpointHandler):
            def save(self, directory: Any, args: Any) -> None:
                if jax.process_index() == 0:
                    (directory / PROGRESS).write_text(json.dumps(args.progress, indent=1))
                    for name, data in args.files.items():
                        (directory.parent / name).write_bytes(data)

            def restore(self, directory: Any, args: Any = None) -> Any:
                return json.loads((directory / PROGRESS).read_text())

            def finalize(self, directory: Any) -> None:
                pass

        @ocp.args.register_with_handler(Handler, for_save=True, for_restore=True)
        @dataclasses.dataclass
        class Save(ocp.args.CheckpointArgs):
            progress: dict[str, Any] = dataclasses.field(default_factory=dict)
            files: dict[str, bytes] = dataclasses.field(default_factory=dict)

        self.Handler, self.Save = Handler, Save


@functools.cache
def _run_files() -> _RunFiles:
    return _RunFiles()
