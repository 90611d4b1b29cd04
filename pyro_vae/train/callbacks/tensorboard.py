"""``TensorBoard``: write the history for TensorBoard."""

import warnings
from pathlib import Path
from typing import Any

from pyro_vae.errors import OutputError, SettingsError
from pyro_vae.train.callbacks.base import Callback, Run


class TensorBoard(Callback):
    """Write the history to a TensorBoard file after each epoch, indexed by the step.

    The tags are the names of the history: ``objective``, ``train_elbo``, ``validation_elbo`` and their errors
    ``_se`` in nats per datum, and ``seconds``; ``lr`` is the learning rate (``lr_1``, … for further parameter
    groups). TensorBoard stores single precision. After a resume or a rollback, entries of later steps are purged. The
    file may contain epochs after the newest checkpoint.

    Args:
        folder: created if it does not exist; by default ``tensorboard`` in the run folder.

    Raises:
        SettingsError: at the start, if tensorboard is not installed, or if there is no folder.
        OutputError: if the folder cannot be written.

    Example:
        >>> TensorBoard("runs/first/tensorboard").state()
        {}
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = None if folder is None else Path(folder)
        self._target: Path | None = None
        self._writer: Any = None
        self._written = -1

    def start(self, run: Run) -> None:
        """Choose the folder, and raise if there is none or tensorboard is not installed."""
        _writer_class()
        self._close()
        run_folder = getattr(run, "folder", None)
        self._target = self.folder or (Path(run_folder) / "tensorboard" if run_folder else None)
        if self._target is None:
            raise SettingsError("TensorBoard needs a folder, as the training has no run folder; pass folder=")

    def epoch(self, run: Run) -> None:
        """Write the epoch's numbers."""
        if getattr(run, "rank", 0):
            return
        numbers = {name: value for name, value in run.epochs[-1].items() if name != "step"}
        for i, group in enumerate(run.optimizer.param_groups):
            numbers["lr" if i == 0 else f"lr_{i}"] = float(group["lr"])
        try:
            if run.step <= self._written:
                self._purge(run.step)
            if self._writer is None:
                self._writer = _writer_class()(str(self._target), purge_step=run.step)
            self._written = run.step
            for name, number in numbers.items():
                self._writer.add_scalar(name, number, run.step)
            self._writer.flush()
        except OSError as error:
            raise OutputError(f"{self._target}: cannot be written ({error.strerror or error})") from error

    def end(self, run: Run) -> None:
        """Close the file."""
        self._close()

    def _purge(self, step: int) -> None:
        """Purge entries from this step on, in the same file: two files of the same second have no order."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        self._writer.file_writer.add_event(Event(step=step, session_log=SessionLog(status=SessionLog.START)))

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._writer, self._written = None, -1


def _writer_class() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings of its imports
            from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise SettingsError(
            "TensorBoard needs the tensorboard package, which is not installed; pip install 'pyro-vae[logs]'"
        ) from error
    return SummaryWriter
