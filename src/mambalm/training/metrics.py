"""What a run writes down: JSON lines and TensorBoard always, wandb on request. One rank only makes a log."""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mambalm.training.files import replacing

# Dense bfloat16 or float16 operations per second by the vendors' datasheets, by a part of the device's name.
_PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "V100": 125e12, "L40S": 362e12, "B200": 2250e12}

# In a run's folder: which of wandb's runs is this one.
WANDB_ID = "wandb-id.txt"


def peak_flops(device_name: str) -> float | None:
    """Operations per second of a device's matrix units; None of one that is not known."""
    return next((peak for name, peak in _PEAKS.items() if name in device_name), None)


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last line that a kill cut off is left out."""
    if not path.exists():
        return
    for line in path.read_text().splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            return


class MetricsLog:
    """Numbers by step, into metrics.jsonl, TensorBoard's files and perhaps wandb."""

    def __init__(
        self, folder: Path, step: int, *, wandb: str | None = None, name: str = "", config: Any = None
    ) -> None:
        """Go on after ``step``: what a killed run wrote of later steps is taken back.

        Args:
            folder: of the run.
            step: of the checkpoint that the run goes on from; 0: from the beginning.
            wandb: the project to log to as well.
            name: of the run there.
            config: kept there with the run.

        Raises:
            ImportError: TensorBoard's writer or wandb is not installed.
            ValueError: wandb does not let us in.
        """
        try:
            from torch.utils.tensorboard.writer import SummaryWriter
        except ImportError as error:
            raise ImportError("training logs to TensorBoard: pip install 'mambalm[train]'") from error
        self.path = folder / "metrics.jsonl"
        kept = [json.dumps(line) for line in read_metrics(self.path) if line["step"] <= step]
        with replacing(self.path) as file:
            file.write_text("".join(f"{line}\n" for line in kept))
        self._file = self.path.open("a")
        self._board = SummaryWriter(folder / "tensorboard", purge_step=step + 1)
        self._wandb = None if wandb is None else _open_wandb(folder, wandb, name, config)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Note values of a step; what is no number goes into the JSON alone."""
        line = {name: _finite(value) for name, value in values.items() if value is not None}
        self._file.write(json.dumps({"step": step, **line}) + "\n")
        self._file.flush()
        numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
        for name, value in numbers.items():
            self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            # With a step of its own, wandb would leave out those that come again after a kill.
            self._wandb.log({"step": step, **numbers})

    def close(self) -> None:
        """Write out what is held back."""
        self._file.close()
        self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def _open_wandb(folder: Path, project: str, name: str, config: Any) -> Any:
    """wandb's run of this folder, which is gone on with."""
    try:
        import wandb
    except ImportError as error:
        raise ImportError("logging.wandb needs wandb: pip install 'mambalm[train]'") from error
    kept = folder / WANDB_ID
    if not kept.exists():
        with replacing(kept) as file:
            file.write_text(secrets.token_hex(4))
    try:
        run = wandb.init(project=project, name=name, config=config, dir=folder, id=kept.read_text(), resume="allow")
    except wandb.Error as error:
        raise ValueError(f"logging.wandb={project} does not open: {error} Or do without logging.wandb.") from error
    run.define_metric("*", step_metric="step")
    return run


def _finite(value: Any) -> Any:
    """JSON knows no NaN and no infinity."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
