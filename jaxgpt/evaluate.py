"""Measures a model: loss over a whole split, HellaSwag, LAMBADA.

`python -m jaxgpt.evaluate --out_dir=out --tasks=val,hellaswag=FILE` or `--init_from=gpt2 --data_dir=data/openwebtext`.
"""

import json
from collections.abc import Sequence

from jaxgpt import UserError
from jaxgpt.config import Parser, run_main
from jaxgpt.run.processes import Processes
from jaxgpt.scoring.scorer import Scorer
from jaxgpt.scoring.tasks import METRICS, load_task, open_validation, parse_tasks
from jaxgpt.sharding import configure_jax, make_mesh
from jaxgpt.weights.opening import add_model_arguments, model_arguments, open_model


def main(argv: Sequence[str]) -> None:
    parser = Parser(prog="python -m jaxgpt.evaluate", description="Measures a model on a corpus and on task suites.")
    add_model_arguments(parser)
    parser.add_argument("--tasks", default="val", help="of val, hellaswag[=FILE], lambada[=FILE], with commas between")
    parser.add_argument("--data_dir", help="where val.bin is; default: the run's")
    parser.add_argument("--block_size", type=int, help="length of `val`'s windows; default: the model's")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
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
        for task in tasks:
            results |= {f"{task.name}_{key}": value for key, value in task.run(scorer, model.params).items()}
        if args.json:
            print(json.dumps({"model": model.source, "step": model.step, **results}))
            return
        print(model.source if model.step is None else f"{model.source}, step {model.step}")
        for name, value in results.items():
            print(f"  {name:<20}{value:>12.4f}  {METRICS[name]}")


if __name__ == "__main__":
    run_main(main)
