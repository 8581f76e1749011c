"""A run from its recipe to its exported model: begun, resumed or forked, watched, saved and measured on the way."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from mambalm.data.token_files import Metadata
from mambalm.data.tokenizer import load_tokenizer
from mambalm.models.formats.io import written_whole
from mambalm.models.quiet import without_bars
from mambalm.training.adapters import Adapter, put_on
from mambalm.training.checkpoint import Checkpoints
from mambalm.training.curve import plot_run
from mambalm.training.distributed import Ranks
from mambalm.training.files import replacing
from mambalm.training.guard import Verdict
from mambalm.training.interruption import StopRequest, stop_requests
from mambalm.training.metrics import WANDB_ID, MetricsLog
from mambalm.training.model import build_model
from mambalm.training.parallelism import is_sharded, parallelise
from mambalm.training.position import Position
from mambalm.training.precision import Policy, policy
from mambalm.training.progress import ProgressBar
from mambalm.training.recipe_files import dump, load_recipe
from mambalm.training.trainer import Report, Trainer

if TYPE_CHECKING:
    from mambalm.training.recipe import Recipe

# sysexits' EX_TEMPFAIL, "try again": a scheduler requeues a job that ends so, and the same command goes on.
REQUEUE = 75

Sample = Callable[[Any, Any, str, int], str]


@dataclass(frozen=True)
class Folder:
    """Where things are in a run's folder."""

    path: Path

    @property
    def recipe(self) -> Path:
        """The resolved recipe."""
        return self.path / "recipe.yaml"

    @property
    def checkpoints(self) -> Path:
        """The states of the run."""
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        """The trained model in transformers' format."""
        return self.path / "model"

    @property
    def adapter(self) -> Path:
        """The trained adapters, as PEFT writes them."""
        return self.path / "adapter"

    def prepare(self, recipe: Recipe, restart: bool) -> None:
        """Make the folder and write the recipe into it.

        Raises:
            OSError: it cannot be written to.
            ValueError: it holds the run of a recipe that learns something else.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        if restart:
            for path in (self.checkpoints, self.model, self.adapter, self.path / "tensorboard"):
                shutil.rmtree(path, ignore_errors=True)
            for file in (self.recipe, self.path / "metrics.jsonl", self.path / WANDB_ID):
                file.unlink(missing_ok=True)
        if self.checkpoints.exists():
            self._require_same(recipe)
        with replacing(self.recipe) as file:
            file.write_text(dump(recipe))

    def _require_same(self, recipe: Recipe) -> None:
        before = self.read()
        changed = list(_changes(before.identity(), recipe.identity()))
        if recipe.fork != before.fork:
            changed.append(f"its fork is {_origin(before)}, here it is {_origin(recipe)}")
        if changed:
            raise ValueError(
                f"{self.path} holds another run: {'; '.join(changed)}. Choose another folder with --output, forget "
                "that run with --restart, or go on from one of its checkpoints with fork.run and fork.step"
            )

    def read(self) -> Recipe:
        """The recipe of the run that is there.

        Raises:
            ValueError: it is missing or damaged.
        """
        try:
            return load_recipe(str(self.recipe))
        except ValueError as error:
            raise ValueError(
                f"the run in {self.path} has lost its recipe ({error}): put it back, or forget the run with --restart"
            ) from error

    def leave(self) -> None:
        """Undo `prepare` where no run was begun."""
        if not self.checkpoints.exists():
            self.recipe.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # it holds something else
                self.path.rmdir()


def _origin(recipe: Recipe) -> str:
    return "none" if recipe.fork is None else f"step {recipe.fork.step} of {recipe.fork.run}"


def _changes(before: Any, now: Any, path: str = "") -> Any:
    """What differs between two nested values, a line each."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in {**before, **now}:
            yield from _changes(before.get(key), now.get(key), f"{path}.{key}" if path else key)
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for number, (one, other) in enumerate(zip(before, now, strict=True)):
            yield from _changes(one, other, f"{path}.{number}")
    elif before != now:
        yield f"its {path} is {before}, here it is {now}"


def open_trainer(recipe: Recipe, folder: Folder, ranks: Ranks) -> Trainer:
    """The trainer of a recipe, at the latest checkpoint if there is one, else at the fork or the beginning.

    Raises:
        ValueError: tokenizer, model, data or checkpoint do not fit.
    """
    _require_data(recipe)
    tokenizer = load_tokenizer(recipe.tokenizer)
    precision = policy(recipe.precision, ranks.device)
    network = build_model(recipe, tokenizer, precision, sharded=is_sharded(recipe.parallel))
    torch.manual_seed(recipe.seed)  # of the adapters' initial values, on every rank
    adapted = None if recipe.adapter is None else put_on(network, Adapter(**recipe.adapter.model_dump()))
    model = parallelise(network, recipe.parallel, precision, ranks, seed=recipe.seed)
    section = recipe.checkpoints
    kept = Checkpoints(folder.checkpoints, keep_last=section.keep_last, keep_every=section.keep_every)
    trainer = Trainer(recipe, network, model, tokenizer, ranks, precision, kept, adapted)
    if kept.latest() is not None:
        trainer.load()
    elif recipe.fork is not None:
        origin = Folder(Path(recipe.fork.run))
        trainer.checkpoints = Checkpoints(origin.checkpoints, read_only=True)
        trainer.load(recipe.fork.step)
        trainer.checkpoints = kept
        if origin.recipe.exists():
            _require_same_beginning(recipe, origin.read(), trainer.position)
    return trainer


def _require_same_beginning(recipe: Recipe, before: Recipe, position: Position) -> None:
    """Raise ValueError where a fork's recipe differs in what gives its place in stages and data their meaning."""

    def beginning(of: Recipe) -> dict[str, Any]:
        stages = []
        for number, stage in enumerate(of.stages[: position.stage + 1]):
            done = number < position.stage
            if done or position.sequences:
                ramp = None if stage.ramp is None else stage.ramp.model_dump(mode="json")
                kept = {"context": stage.context, "batch": stage.batch, "ramp": ramp}
                kept |= {"tokens": stage.tokens} if done else {}
                stages.append(kept | {"data": of.data_of(number).model_dump(mode="json")})
        return {"seed": of.seed, "longest context": of.longest_context, "stages": stages}

    if changed := list(_changes(beginning(before), beginning(recipe))):
        raise ValueError(
            f"the run {recipe.fork and recipe.fork.run} has another beginning than this recipe: {'; '.join(changed)}. "
            "What was read before the fork must be the same; change the schedule, and stages behind it"
        )


def _require_data(recipe: Recipe) -> None:
    """Raise TokenFileError where token files are missing, before the Hub is asked for anything."""
    for stage in range(len(recipe.stages)):
        for source in recipe.data_of(stage).sources:
            if source.kind == "tokens":
                Metadata.read(Path(source.path))


def run(
    recipe: Recipe, output: Path, ranks: Ranks, console: Console, *, restart: bool = False, sample: Sample | None = None
) -> StopRequest:
    """Train until the recipe is done or a signal asks to stop; the result says which.

    Args:
        recipe: what to do.
        output: the run's folder; one that holds a part of this run is gone on with.
        ranks: who takes part.
        console: where the main rank reports.
        restart: forget an earlier run there.
        sample: writes a text from (model, tokenizer, prompt, tokens).

    Raises:
        ValueError, OSError, DivergedError: the message says what to do; the last checkpoint is intact.
    """
    folder = Folder(output)
    if ranks.is_main:
        folder.prepare(recipe, restart)
    ranks.barrier()
    try:
        trainer = open_trainer(recipe, folder, ranks)
        trainer.prepare()
    except Exception:
        if ranks.is_main:
            folder.leave()
        raise
    if ranks.is_main and trainer.adapted is not None:
        console.print(str(trainer.adapted.report))
    if ranks.is_main and trainer.position.step:
        begin = "Nothing is left to do" if trainer.is_over else "Going on"
        console.print(f"{begin} at step {trainer.position.step:,}, after {trainer.position.tokens:,} tokens.")
    with ExitStack() as stack:
        log = None
        if ranks.is_main:
            log = MetricsLog(
                output, trainer.position.step, wandb=recipe.logging.wandb, name=recipe.name, config=recipe.identity()
            )
            stack.callback(log.close)
        request = stack.enter_context(stop_requests())
        bar = stack.enter_context(ProgressBar(console, recipe.name)) if ranks.is_main else None
        Watch(trainer, folder, log, bar, sample).run(request)
    if not request:
        export(trainer, folder)
    return request


@dataclass
class Watch:
    """The loop around the steps: what is due after which of them.

    Attributes:
        trainer: does the steps.
        folder: where files go.
        log, bar: of the main rank.
        sample: writes a text.
    """

    trainer: Trainer
    folder: Folder
    log: MetricsLog | None
    bar: ProgressBar | None
    sample: Sample | None

    def run(self, request: StopRequest) -> None:
        """Do the steps that are left, then save."""
        trainer = self.trainer
        traced = trainer.recipe.logging.profile if trainer.ranks.is_main else None
        profile = Profile(traced, self.folder.path / "profile.json")
        profile.after(trainer.position.step)
        saved = trainer.position.step if trainer.checkpoints.latest() is not None else None
        begun = trainer.position.step
        while not trainer.is_over and not self._asked(request):
            report = trainer.advance()
            if report.step == begun + 1 and report.verdict is Verdict.APPLY:
                trainer.prepare_checkpoints()
            profile.after(report.step)
            self._note(report)
            if report.verdict is not Verdict.APPLY:
                continue
            if report.step % trainer.recipe.checkpoints.every == 0:
                trainer.save()
                saved = report.step
            self._measure(report.step)
        profile.close()
        if saved != trainer.position.step:
            trainer.save()
        trainer.checkpoints.wait()
        self._plot()

    def _asked(self, request: StopRequest) -> bool:
        """Whether any rank was asked to stop, so that all of them do after the same step.

        Raises:
            OSError: the checkpoint that was being written could not be, on every rank.
        """
        ranks, kept = self.trainer.ranks, self.trainer.checkpoints
        # Between hosts: a device would first finish its step.
        number, failed = ranks.sum(torch.tensor([request.signal, kept.has_failed])).tolist()
        if failed:
            kept.wait()
        request.signal = max(request.signal, number)
        return bool(request)

    def _note(self, report: Report) -> None:
        """Write the step down, and all that is amiss whenever it is."""
        logging, trainer = self.trainer.recipe.logging, self.trainer
        values = dict(report.values)
        amiss = report.verdict is not Verdict.APPLY
        norms = not amiss and logging.layers and report.step % logging.layers == 0
        if norms:
            values |= trainer.layer_norms()
        if self.log is None or self.bar is None:
            return
        if amiss:
            values["verdict"] = report.verdict.value
            self.bar.say(f"after step {report.step}: loss {values['loss']}, gradient norm {values['gradient_norm']}: "
                         f"{report.verdict.value}")  # fmt: skip
        if amiss or norms or report.step % logging.every == 0 or trainer.is_over:
            self.log.write(report.step, values)
        mfu = f" · {values['mfu']:.1%} MFU" if "mfu" in values else ""
        speed = f"{values['tokens_per_second']:,.0f} tokens/s{mfu}"
        done = trainer.position.tokens / trainer.recipe.tokens
        self.bar.update(min(done, 1.0), f"step {report.step:,} · loss {values['loss']:.3f} · {speed}")
        if logging.plot and report.step % logging.plot == 0:
            self._plot()

    def _measure(self, step: int) -> None:
        section, trainer = self.trainer.recipe.evaluation, self.trainer
        if not trainer.is_over and (not section.every or step % section.every):
            return
        values: dict[str, Any] = trainer.measure()
        if self.log is not None and values:
            self.log.write(step, values | {"tokens": trainer.position.tokens})
        if section.prompt is None or self.sample is None or trainer.ranks.world > 1 or self.log is None:
            return
        trainer.network.eval()
        with trainer.policy.autocast():
            text = self.sample(trainer.network, trainer.tokenizer, section.prompt, section.new_tokens)
        trainer.network.train()
        self.log.write(step, {"sample": section.prompt + text})

    def _plot(self) -> None:
        if self.log is not None:
            plot_run(self.log.path, self.folder.path / "curves.png")


class Profile:
    """torch's profiler over some steps, into a file that chrome://tracing and Perfetto read."""

    def __init__(self, steps: tuple[int, int] | None, path: Path) -> None:
        """Trace the steps from ``steps[0]`` to ``steps[1]``; None: nothing."""
        self._steps, self._path = steps, path
        self._profiler: Any = None

    def after(self, step: int) -> None:
        """Begin or end, as the step says that is done, or that a run goes on from."""
        if self._steps is None:
            return
        first, last = self._steps
        if self._profiler is None and first - 1 <= step < last:
            self._profiler = torch.profiler.profile()
            self._profiler.__enter__()
        elif step >= last:
            self.close()

    def close(self) -> None:
        """Write what was traced, also of a run that ends before the last of the steps."""
        if self._profiler is not None:
            self._profiler.__exit__(None, None, None)
            self._profiler.export_chrome_trace(str(self._path))
        self._steps = self._profiler = None


def export(trainer: Trainer, folder: Folder, shard_size: str = "5GB") -> None:
    """Write the model in transformers' format, bfloat16 if it was trained in half precision; of adapters those alone.

    Raises:
        OSError: it cannot be written; the last checkpoint is intact.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    tensors: dict[str, Any] = get_model_state_dict(trainer.model, options=options)
    if not trainer.ranks.is_main:
        return
    if trainer.adapted is not None:
        trainer.adapted.save(folder.adapter, tensors)
        return
    dtype = torch.float32 if trainer.recipe.precision in ("fp32", "v100") else torch.bfloat16
    trainer.network.config.dtype = dtype
    state = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    try:
        with written_whole(folder.model, overwrite=True) as partial, without_bars():
            trainer.network.save_pretrained(partial, state_dict=state, max_shard_size=shard_size)
            trainer.tokenizer.save_pretrained(partial)
    except OSError as error:
        raise OSError(f"cannot write {folder.model}: {error}; the last checkpoint is intact") from error


__all__ = ["REQUEUE", "Folder", "Policy", "export", "open_trainer", "run"]
