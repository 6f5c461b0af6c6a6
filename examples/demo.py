"""Fine-tunes a real transformer with AdamW and with ChildAdamW (F and D), and reports the scores.

Run `python -m examples.demo` to compare the methods over three seeds; it takes minutes on two cores and no network.
Run `python -m examples.demo --quick` to see whether everything works; it takes under a minute, and its scores mean
nothing.
"""

import argparse
import functools
import importlib.util
import sys
import time
from pathlib import Path

NEEDED = ("torch", "transformers", "sklearn", "matplotlib", "tqdm", "childtune_fast")
TASK = "pairs:300"
SPECTRA = ("f", "d")  # methods of which it is shown what they moved
QUICK = {"seeds": 1, "epochs": 1, "limit": 128}


def parse(arguments):
    """Returns the options on the command line; `--quick` sets the defaults in `QUICK`, which other options replace."""
    from benchmarks.finetune.methods import DEMO, METHODS, Settings
    from benchmarks.finetune.options import positive

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="one seed, one epoch, few examples")
    add("--model", help="name or folder of a transformers model (default: all-MiniLM-L6-v2, from its package)")
    add("--task", default=TASK, help="pairs:300 (default), docstrings:40, a .tsv[.gz] file, or Hub data NAME[:CONFIG]")
    add("--dev", help="dev file that goes with a TSV --task (default: a fifth of its inputs is held out)")
    add("--methods", nargs="+", choices=METHODS, default=DEMO, help=f"default: {' '.join(DEMO)}")
    add("--seeds", type=positive(int), default=3, help="how many seeds, counted from 0 (default: %(default)s)")
    add("--epochs", type=positive(int), default=Settings.epochs, help="default: %(default)s")
    add("--lr", type=positive(float), default=Settings.lr, help="where all weights are trained (default: %(default)s)")
    add("--head-lr", type=positive(float), default=Settings.head_lr, help="for method frozen (default: %(default)s)")
    add("--reserve-p", type=positive(float, 1), default=Settings.reserve_p, help="the p of F (default: %(default)s)")
    add("--reserve-p-d", type=positive(float, 1), default=Settings.reserve_p_d, help="that of D (default: %(default)s)")
    add("--batch-size", type=positive(int), default=Settings.batch_size, help="default: %(default)s")
    add("--max-length", type=positive(int), default=Settings.max_length, help="in tokens (default: %(default)s)")
    add("--limit", type=positive(int), help="at most this many examples in train, and in dev (default: all)")
    add("--out", type=Path, default=Path("demo-results"), help="folder for the results (default: %(default)s)")
    add("--threads", type=positive(int), help="CPU threads (default: torch's own choice)")
    add("--device", default="cpu", help="a torch device (default: %(default)s)")
    if "--quick" in arguments:
        parser.set_defaults(**QUICK)
    return parser.parse_args(arguments)


def prepare(options):
    """Loads and describes task and model, and returns the experiment and the model's name."""
    from benchmarks.finetune import data, methods, model, report, train

    device = model.find_device(options.device)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise data.UserError(f"--out {options.out} cannot be made ({error.strerror}); name another folder") from error
    task = data.load_task(options.task, options.dev, options.limit, options.limit)
    print(report.describe_task(task), flush=True)
    tokenizer, backbone = model.load_pretrained(options.model or model.packaged_model())
    name = Path(options.model).name if options.model else model.PACKAGED_MODEL
    millions = sum(parameter.numel() for parameter in backbone.parameters()) / 1e6
    print(f"model: {name}, {millions:.1f} M weights, on {device}", flush=True)
    names = methods.Settings.__dataclass_fields__
    settings = methods.Settings(**{key: value for key, value in vars(options).items() if key in names})
    return train.Experiment(tokenizer, backbone, task, settings, device), name


def compare(experiment, methods, seeds):
    """Runs every method with every seed under a progress bar, and returns the records of the runs."""
    from tqdm import tqdm

    runs = []
    total = seeds * sum(map(experiment.steps, methods))
    with tqdm(total=total, unit="step", smoothing=0.05, dynamic_ncols=True) as bar:
        for seed in range(seeds):
            for method in methods:
                bar.set_description(f"{method}, seed {seed}")
                look = functools.partial(experiment.look, method) if seed == 0 and method in SPECTRA else None
                runs.append(experiment.run(method, seed, bar.update, afterwards=look))
                scores = ", ".join(f"{key} {100 * value:.1f}" for key, value in runs[-1]["curve"][-1][1].items())
                bar.write(f"{method:>13}, seed {seed}: {scores} after {runs[-1]['seconds']:.0f} s")
    return sorted(runs, key=lambda run: methods.index(run["method"]))


def main(arguments):
    """Runs the command and returns its exit status."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"demo: needs {', '.join(missing)}; run `pip install '.[examples]'` in the repository, or `make demo`",
            file=sys.stderr,
        )
        return 2
    import torch

    from benchmarks.finetune import report
    from benchmarks.finetune.sources import UserError
    from childtune_fast import spectra

    options, started = parse(arguments), time.perf_counter()
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        experiment, model = prepare(options)
    except UserError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    runs = compare(experiment, options.methods, options.seeds)
    settings = {key: value if not isinstance(value, Path) else str(value) for key, value in vars(options).items()}
    child, moved = experiment.children.get("d"), experiment.spectra
    base = spectra.analyze(experiment.backbone, null=1)
    report.save(options.out, settings, runs, experiment.task, model, child, base, moved)
    print(f"\n{report.table(runs)}\n\n{report.caveats(runs, experiment.task)}")
    if child is not None:
        print(f"\nchild network of d, first seed: {child!r}; {options.out}/child.png shows where it lies")
    print(f"\n{model} before fine-tuning:\n{base}")
    for method, found in moved.items():
        if len(found):
            print(f"{options.out}/spectra-{method}.png shows what {method} moved in it, first seed")
    print(f"{time.perf_counter() - started:.0f} s in all; table, pictures and raw numbers are in {options.out}/")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
