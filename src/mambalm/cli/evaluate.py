"""`mambalm evaluate`: tasks of EleutherAI's lm-evaluation-harness."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from mambalm.cli.options import Adapter, Device, Dtype, Quantization, load_model, require_writable
from mambalm.data.tokenizer import load_tokenizer
from mambalm.training.files import replacing


def evaluate(
    model: Annotated[str, typer.Argument(help="A checkpoint's folder, or the name of a Hugging Face repository.")],
    tasks: Annotated[
        list[str], typer.Argument(help="Names of tasks or groups of the harness, or a task's .yaml file.")
    ],
    shots: Annotated[int | None, typer.Option(help="Examples before each question; by default the task's.")] = None,
    limit: Annotated[float | None, typer.Option(help="Of each task so many samples, or below 1 that part.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows that are read at once at most.")] = 32,
    chat: Annotated[bool, typer.Option("--chat", help="Put every prompt into the tokenizer's chat template.")] = False,
    include: Annotated[Path | None, typer.Option(help="A folder of further tasks in the harness's format.")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write all results to this JSON file.")] = None,
    dtype: Dtype = None,
    device: Device = None,
    quantization: Quantization = None,
    adapter: Adapter = None,
    tokenizer: Annotated[str | None, typer.Option(help="A tokenizer's folder or name; by default MODEL's.")] = None,
) -> None:
    """Score a model on tasks."""
    if output is not None:
        require_writable(output)
    if include is not None and not include.is_dir():
        raise ValueError(f"{include} is no folder: name one that holds tasks' .yaml files")
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import handle_non_serializable, make_table

    from mambalm.evaluation.harness import HarnessModel

    manager = TaskManager(include_path=None if include is None else str(include))
    unknown = [name for name in tasks if not Path(name).is_file() and not manager.match_tasks([name])]
    if unknown:
        raise ValueError(f"the harness knows no {', '.join(unknown)}: `lm-eval ls tasks` lists what it knows")
    network = load_model(model, dtype, device, quantization, adapter)
    adapted = HarnessModel(network, load_tokenizer(tokenizer or model), batch_size=batch_size)
    results: dict[str, Any] = simple_evaluate(
        model=adapted,
        tasks=list(tasks),
        num_fewshot=shots,
        limit=limit,
        apply_chat_template=chat,
        task_manager=manager,
        log_samples=False,
    )
    typer.echo(make_table(results))
    if results.get("groups"):
        typer.echo(make_table(results, "groups"))
    if output is not None:
        with replacing(output) as path:
            path.write_text(json.dumps(results, indent=2, default=handle_non_serializable, ensure_ascii=False) + "\n")
