"""Measures a model: loss over a whole split, HellaSwag, LAMBADA.

`python -m jaxgpt.evaluate --out_dir=out --tasks=val,hellaswag=FILE` or `--init_from=gpt2 --data_dir=data/openwebtext`.
"""

import contextlib
import functools
import json
from collections.abc import Sequence
from pathlib import Path

import jax

from jaxgpt import UserError, local_path, output
from jaxgpt.cli import Parser, run_main
from jaxgpt.run.processes import Processes
from jaxgpt.scoring.scorer import Scorer
from jaxgpt.scoring.tasks import METRICS, Task, Validation, load_task, open_validation, parse_tasks
from jaxgpt.sharding import configure_jax, make_mesh
from jaxgpt.weights.opening import OpenedModel, add_model_arguments, model_arguments, open_model


def main(argv: Sequence[str]) -> None:
    parser = Parser(prog="python -m jaxgpt.evaluate", description="Measures a model on a corpus and on task suites.")
    add_model_arguments(parser)
    parser.add_argument("--tasks", default="val", help="of val, hellaswag[=FILE], lambada[=FILE], with commas between")
    parser.add_argument("--data_dir", help="where val.bin is; default: the run's")
    parser.add_argument("--block_size", type=int, help="length of `val`'s windows; default: the model's")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--per_token", type=local_path, metavar="FILE", help="write every scored token and its loss: a "
                        "JSON object for each row of a task, with task, row, tokens, text and loss (nats)")  # fmt: skip
    args = parser.parse(argv)
    files = parse_tasks(args.tasks, also=["val"])
    if not files or files.get("val"):
        raise UserError("--tasks names one task at least, and no file for val: that is in --data_dir")
    configure_jax()
    with Processes():  # of which the first alone prints
        mesh = make_mesh()
        model = open_model(args.out_dir, mesh=mesh, block_size=args.block_size, **model_arguments(args))
        tasks = [  # all read and tokenized before the parameters
            open_validation(model, args.data_dir) if name == "val" else load_task(name, file, model.tokenizer)
            for name, file in files.items()
        ]
        scorer, results = Scorer(model.config, mesh), {}
        params = model.params
        if not args.json:
            print(model.source if model.step is None else f"{model.source}, step {model.step}", flush=True)
        for task in tasks:
            scores = {f"{task.name}_{key}": value for key, value in task.run(scorer, params).items()}
            for name, value in {} if args.json else scores.items():
                print(f"  {name:<20}{value:>12.4f}  {METRICS.get(name, '')}", flush=True)
            results |= scores
        if args.json:
            print(json.dumps({"model": model.source, "step": model.step, **results}))
        if args.per_token:
            write_losses(args.per_token, tasks, scorer, model)


def write_losses(path: Path, tasks: Sequence[Task | Validation], scorer: Scorer, model: OpenedModel) -> None:
    """Each scored token's loss. Every process computes them; the first writes."""
    decode = functools.cache(lambda token: model.tokenizer.decode([token]))
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(output(path)) if jax.process_index() == 0 else None
        for task in tasks:
            losses = scorer.per_token(model.params, task.rows, label=f"{task.name}, tokens")
            for i, (row, of_row) in enumerate(zip(task.rows, losses, strict=True)):
                tokens = row.tokens[len(row.tokens) - len(of_row) :].tolist()
                rounded = [round(float(loss), 6) for loss in of_row]
                record = {"task": task.name, "row": i, "tokens": tokens, "text": [decode(token) for token in tokens]}
                if file:
                    file.write(
                        json.dumps(record | {"loss": rounded}, ensure_ascii=False).encode(errors="backslashreplace")
                        + b"\n"
                    )


if __name__ == "__main__":
    run_main(main)
