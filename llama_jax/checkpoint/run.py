"""The checkpoints of a training run: saved in the background, whole or not at all, and some of them kept."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import json
import logging
import math
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import jax
import numpy as np

from llama_jax.checkpoint.arrays import DamagedError, SavedArray, check_saved, handler, open_arrays, save_request
from llama_jax.checkpoint.keep import KeepRules, Validated
from llama_jax.checkpoint.paths import plain
from llama_jax.typing import Foreign, JsonObject

log = logging.getLogger("llama_jax")

PROGRESS, VALIDATED = "progress.json", "validated.json"  # in the folder `run` of each
DELETED, UNREADABLE = "deleted", "unreadable"


class RunCheckpoints:
    """The checkpoints of one training run: `FOLDER/STEP`, each a native checkpoint with the optimizer's state beside.

    Saved in the background, and there whole or not at all. One counts as saved when it has been opened again; only then
    are older ones deleted. All processes make the same calls.

    Args:
      folder: of this run; made if need be.
      keep_last: how many of the newest are kept,
      keep_every: beside those of every so many steps (0: none),
      keep_best: and so many with the lowest loss, by what each checkpoint records.
      stacked: as for `save_arrays`.
      earlier: losses of checkpoints that record none, as those of older versions, by step; None: it was not measured.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep_last: int,
        keep_every: int,
        keep_best: int,
        stacked: Callable[[str], bool],
        earlier: Callable[[], Mapping[int, float | None]] = dict,
    ):
        import orbax.checkpoint as ocp

        _be_quiet()
        # Without a limit it deletes nothing: what is deleted, and when, is decided here.
        options = ocp.CheckpointManagerOptions(max_to_keep=None, cleanup_tmp_directories=True)
        self.folder, self._stacked, self._options = folder.absolute(), stacked, options
        self._rules = KeepRules(keep_last, keep_every, keep_best)
        self._earlier = functools.cache(earlier)
        self._validated: dict[int, Validated] = {}
        self._unknown: set[int] = set()
        self._manager: Foreign = None
        self._begun: int | None = None
        self._expected: _Expected | None = None

    def steps(self) -> list[int]:
        """Those that are whole, in order."""
        return run_steps(self.folder)

    def progress(self, step: int) -> JsonObject:
        """What was saved beside the arrays.

        Raises:
          DamagedError: it cannot be read.
        """
        path = self.folder / str(step) / "run" / PROGRESS
        try:
            return json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise DamagedError(f"{path}: cannot be read ({error})") from error

    def check(self, step: int, like: Mapping[str, Mapping[str, jax.Array]]) -> None:
        """Raises as `restore`, without reading the arrays."""
        for item, arrays in like.items():
            path = self.folder / str(step) / item
            _check_same(path, open_arrays(path), arrays)

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
            _check_same(path, open_arrays(path), arrays)
            restore_args = ocp.checkpoint_utils.construct_restore_args(dict(arrays))
            args = ocp.args.PyTreeRestore(item=dict(arrays), restore_args=restore_args)
            try:
                with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_zarr3=True)) as checkpointer:
                    found[item] = checkpointer.restore(plain(path), args=args)
            except Exception as error:  # Orbax and tensorstore raise many kinds
                raise DamagedError(f"{path}: cannot be read ({type(error).__name__}: {error})") from error
        return found

    def save(
        self,
        step: int,
        items: Mapping[str, Mapping[str, jax.Array]],
        progress: JsonObject,
        files: Mapping[str, bytes],
        loss: float | None = None,
        of: str = "",
    ) -> None:
        """Begins to save; the arrays may be donated when it returns. An error comes with the next call of this object.

        Args:
          step: larger than any before; does nothing where there is one of that step already.
          items: item -> name -> array.
          progress: what JSON can hold.
          files: beside the items: `config.json` and the tokenizer, so that `load` takes the folder.
          loss: by which the best are chosen.
          of: what the loss was measured on.

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
        loss = loss if loss is None or math.isfinite(loss) else None
        small = {PROGRESS: json.dumps(progress, indent=1), VALIDATED: json.dumps({"loss": loss, "of": of})}
        args = {item: save_request(arrays, self._stacked) for item, arrays in items.items()}
        with self._failure_in_words():
            manager.save(step, args=ocp.args.Composite(**args, run=_run_files().Save(small, dict(files))), force=True)
        shapes = {
            item: {name: (x.shape, np.dtype(x.dtype)) for name, x in arrays.items()} for item, arrays in items.items()
        }
        sizes = {f"run/{name}": len(text.encode()) for name, text in small.items()}
        self._expected = _Expected(step, shapes, sizes | {name: len(data) for name, data in files.items()})

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

    def poll(self) -> None:
        """Raises OSError if the save in the background has failed; after its end, deletes what is not kept."""
        if self._manager:
            with self._failure_in_words():
                self._manager.check_for_errors()
            if self._expected and not self._manager.is_saving_in_progress():
                self.wait()  # for the error, if there was one

    def wait(self) -> None:
        """Returns when all is on disk and has been opened again; raises OSError if it is not."""
        if self._manager:
            with self._failure_in_words():
                self._manager.wait_until_finished()
            self._settle()

    def tidy(self) -> None:
        """Deletes what is not kept, as after a save."""
        if jax.process_index():
            return
        steps = self.steps()
        validated = {step: known for step in steps if (known := self._known(step))}
        if self._rules.best and (unknown := set(steps) - validated.keys() - self._unknown):
            self._unknown |= unknown
            log.warning(
                "%s: of the checkpoints of steps %s it is not known how well they did on what is held out, so that they"
                " are kept: delete those that you do not need",
                self.folder,
                ", ".join(map(str, sorted(unknown))),
            )
        # Renamed before they are deleted: a kill meanwhile leaves no half of a checkpoint.
        self._put_away({str(step) for step in steps} - {str(step) for step in self._rules.kept(steps, validated)})
        shutil.rmtree(self.folder / DELETED, ignore_errors=True)

    def _known(self, step: int) -> Validated | None:
        """What a checkpoint records of its validation; None where it says nothing."""
        if step not in self._validated:
            try:
                found = json.loads((self.folder / str(step) / "run" / VALIDATED).read_text())
                self._validated[step] = Validated(found.get("loss"), found.get("of", ""))
            except FileNotFoundError:  # of an older version
                if step in self._earlier():
                    self._validated[step] = Validated(self._earlier()[step])
            except (OSError, ValueError, AttributeError):
                pass
        return self._validated.get(step)

    def _settle(self) -> None:
        """Opens the newest checkpoint again, then deletes what is not kept."""
        expected, self._expected = self._expected, None
        if expected is None or jax.process_index():
            return
        with self._failure_in_words():
            try:
                expected.check(self.folder / str(expected.step))
            except DamagedError:
                with contextlib.suppress(OSError):  # not to be taken for a good one
                    (self.folder / str(expected.step)).rename(self.folder / f"{expected.step}.{UNREADABLE}")
                raise
        self.tidy()

    def close(self) -> None:
        """Ends the threads, without waiting for saves that are still running."""
        if self._manager:
            self._manager.close()

    def _set_aside(self) -> None:
        """Takes step folders that are not whole out of the manager's sight, which would count them."""
        if jax.process_index() == 0:
            found = {path.name for path in self.folder.iterdir() if path.name.isdecimal()}
            self._put_away(found - set(map(str, self.steps())))

    def _put_away(self, names: set[str]) -> None:
        """Moves step folders to where they are deleted."""
        for name in sorted(names):
            (self.folder / DELETED).mkdir(exist_ok=True)
            shutil.rmtree(self.folder / DELETED / name, ignore_errors=True)
            (self.folder / name).rename(self.folder / DELETED / name)

    def _open(self, items: Mapping[str, Mapping[str, jax.Array]]) -> Foreign:
        import orbax.checkpoint as ocp

        if self._manager is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._set_aside()
            handlers: JsonObject = {item: handler(arrays) for item, arrays in items.items()}
            self._manager = ocp.CheckpointManager(
                plain(self.folder), options=self._options, item_handlers=handlers | {"run": _run_files().Handler()}
            )
        return self._manager


@dataclasses.dataclass(frozen=True)
class _Expected:
    """What a checkpoint must hold when it is opened again: shapes and dtypes by item and name, sizes of small files."""

    step: int
    items: dict[str, dict[str, tuple[tuple[int, ...], np.dtype]]]
    sizes: dict[str, int]

    def check(self, folder: Path) -> None:
        """Raises DamagedError where something is missing; reads no array."""
        for name, size in self.sizes.items():
            file = folder / name
            if not file.is_file() or file.stat().st_size != size:
                raise DamagedError(f"{file}: {'is cut short' if file.is_file() else 'is missing'}")
        for item, arrays in self.items.items():
            check_saved(folder / item, arrays)


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
    if isinstance(error, DamagedError):
        return f"what was written cannot be opened: {text}"
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
    """An Orbax item of small files in `run/`, and of others beside the items, in the checkpoint itself."""

    def __init__(self):
        import orbax.checkpoint as ocp

        class Handler(ocp.CheckpointHandler):
            def save(self, directory: Foreign, args: Foreign) -> None:
                if jax.process_index() == 0:
                    for name, text in args.small.items():
                        (directory / name).write_text(text)
                    for name, data in args.files.items():
                        (directory.parent / name).write_bytes(data)

            def restore(self, directory: Foreign, args: Foreign = None) -> Foreign:
                return json.loads((directory / PROGRESS).read_text())

            def finalize(self, directory: Foreign) -> None:
                pass

        @ocp.args.register_with_handler(Handler, for_save=True, for_restore=True)
        @dataclasses.dataclass
        class Save(ocp.args.CheckpointArgs):
            small: dict[str, str] = dataclasses.field(default_factory=dict)
            files: dict[str, bytes] = dataclasses.field(default_factory=dict)

        self.Handler, self.Save = Handler, Save


@functools.cache
def _run_files() -> _RunFiles:
    return _RunFiles()
