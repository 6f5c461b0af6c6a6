"""Makes the tables of a report, as Markdown, one for each group of benchmarks."""

from .contestants import CHILD_TITLES, TITLES, title_of
from .eight_bit import LOW_BIT_CHILD_TITLES, LOW_BIT_TITLES
from .markdown import markdown
from .readings import Record, Results

WORKLOAD_TITLES = {
    "bert-base": "BERT-base, 109 M weights in 199 tensors: ns per weight",
    "1000x33": "1000 tensors of 33 weights: us per tensor",
}
FISHER_TITLES = {"ours": "one fused pass", "addcmul": "F.addcmul_(g, g)", "add_product": "F.add_(g * g)"}
PASS_TITLES = {
    "plain": "forward and backward pass",
    "batch": "Fisher pass, gradients of batches",
    "per_example": "Fisher pass, gradients of examples",
    "one_by_one": "the same, each example in a pass of its own",
    "opacus": "opacus, squares of its gradients of examples",
}
CHOICE_TITLES = {
    "ours": "ChildNetwork.from_scores, masks included",
    "percentile": "np.percentile(np.concatenate(...)), no masks yet",
}
TRAINING_TITLES = {"ours": TITLES["ours"], "child": CHILD_TITLES["ours"], "fused": TITLES["fused"]}
BANDWIDTH_TITLES = {"reads": "reads alone", "writes": "writes alone", "mix": "a step's mix: 4 reads, 3 writes"}
SPECTRA_TITLES = {
    "float64": "spectra.analyze in float64",
    "float32": "spectra.analyze in float32",
    "weightwatcher": "WeightWatcher.analyze, 0.7.7",
}

_OF_D = {"ours": "D, p = 0.3, to it", "ours_p0.1": "D, p = 0.1, to it"}


def measured(results: Results) -> list[str]:
    """Returns the tables of all benchmarks that were run, each under its heading."""
    times = (times_table(results, workload) for workload in WORKLOAD_TITLES)
    others = (
        bandwidth_table,
        training_table,
        fisher_table,
        pass_table,
        child_table,
        low_bit_table,
        low_bit_child_table,
        choice_table,
        saving_table,
        memory_table,
        spectra_table,
        spectra_memory_table,
    )
    return [table for table in (*times, *(make(results) for make in others)) if table]


def times_table(results: Results, workload: str) -> str:
    """Returns the table of all contestants' times on a workload and F's ratios to them; "" if nothing was measured."""
    columns = results.steps(workload)
    if not columns:
        return ""
    rows = []
    for name in contestants_of(columns, TITLES):
        row = [title_of(name, TITLES)]
        for step in columns.values():
            times = name in step["times_ns"]
            row += [f"{time_per_unit(step, workload, name):.3g}", ratio_to(step, name)] if times else ["", ""]
        rows.append(row)
    head = [""]
    for column in columns:
        head += [column, "F to it"]
    return f"## {WORKLOAD_TITLES[workload]}\n\n" + markdown(head, rows)


def contestants_of(columns: dict[str, Record], titles: dict[str, str]) -> list[str]:
    """Returns the names of all that were timed in any column: in the order of the titles, then those held to a set."""
    timed = dict.fromkeys(name for step in columns.values() for name in step["times_ns"])
    return [name for name in titles if name in timed] + [name for name in timed if "@" in name]


def time_per_unit(step: Record, workload: str, name: str) -> float:
    """Returns a contestant's median time: ns per weight for "bert-base", us per tensor for the tiny tensors."""
    nanoseconds = step["times_ns"][name]["median"]
    return nanoseconds / step["weights"] if workload == "bert-base" else nanoseconds / 1e3 / step["tensors"]


def ratio_to(step: Record, name: str) -> str:
    """Returns the ratio of F's time to that of contestant `name`, as text; "" if there is none."""
    ratio = step["ratios"]["ours"].get(name)
    return f"{ratio['median']:.2g}" if ratio else ""


def bandwidth_table(results: Results) -> str:
    """Returns the table of what memory gives; "" if it was not measured."""
    columns = results.by_threads("bandwidth")
    if not columns:
        return ""
    rows = [
        [title, *(f"{noted['gb_per_s'][name]:.1f}" for noted in columns.values())]
        for name, title in BANDWIDTH_TITLES.items()
    ]
    return "## Memory: GB/s that a plain loop reads and writes\n\n" + markdown(["", *columns], rows)


def training_table(results: Results) -> str:
    """Returns the table of whole steps of fine-tuning, and the optimizer's share in them; "" if not measured."""
    sizes = {"minilm": "MiniLM", "bert-base": "BERT-base"}
    columns = {title: noted for size, title in sizes.items() if (noted := results.find(f"training_step[{size}]"))}
    if not columns:
        return ""
    rows = []
    for name, title in TRAINING_TITLES.items():
        row = [title]
        for noted in columns.values():
            ratio = noted["ratios"].get(name, {}).get("fused")
            quartiles = f"{ratio['median']:.3f} [{ratio['q1']:.3f}, {ratio['q3']:.3f}]" if ratio else ""
            share = noted["optimizer_share"][name]["median"]
            row += [f"{noted['times_ns'][name]['median'] / 1e6:.0f}", quartiles, f"{100 * share:.1f} %"]
        rows.append(row)
    head = [""]
    for title in columns:
        head += [f"{title}, ms", "to torch's fused", "of it the optimizer"]
    tokens = next(iter(columns.values()))["tokens"]
    return f"## Whole steps of fine-tuning, float32, {tokens} tokens, 2 threads\n\n" + markdown(head, rows)


def fisher_table(results: Results) -> str:
    """Returns the table of times to accumulate squared gradients; "" if they were not measured."""
    measured = results.by_threads("fisher")
    if not measured:
        return ""
    rows = [
        [title, *(f"{noted['times_ns'][name]['median'] / noted['weights']:.3g}" for noted in measured.values())]
        for name, title in FISHER_TITLES.items()
    ]
    return "## Fisher accumulation, 84 M weights, fp32: ns per weight\n\n" + markdown(["", *measured], rows)


def pass_table(results: Results) -> str:
    """Returns the table of times of the passes that estimate scores; "" if they were not measured."""
    columns = {size: noted for size in ("16x64", "32x128") if (noted := results.find(f"fisher_pass[{size}]"))}
    if not columns:
        return ""
    rows = []
    for name, title in PASS_TITLES.items():
        row = [title]
        for noted in columns.values():
            times = noted["times_ns"]
            if name in times:
                row += [f"{times[name]['median'] / 1e6:.0f}", f"{times[name]['median'] / times['plain']['median']:.2f}"]
            else:
                row += ["", ""]
        rows.append(row)
    trial = [["what the first batch takes more, for a trial", *(
        text for noted in columns.values() for text in ("", f"{noted['trial_in_plain_passes']:.1f}")
    )]]  # fmt: skip
    head = [""]
    for size in columns:
        head += [f"{size.replace('x', ' x ')} tokens, ms", "to the first"]
    heading = "## Passes for Fisher scores, a BERT of MiniLM's sizes, fp32, 2 threads"
    return heading + "\n\n" + markdown(head, rows + trial)


def child_table(results: Results) -> str:
    """Returns the table of a step's times with a child network and D's ratios to them; "" if nothing was measured."""
    heading = "## Child networks, 84 M weights in 20 tensors, fp32: ns per weight"
    return _ratios_table(heading, results.by_threads("child_step"), CHILD_TITLES, _OF_D)


def low_bit_table(results: Results) -> str:
    """Returns the table of a step's times with averages of few bits, and our ratios to them; "" if not measured."""
    columns = {
        f"{dtype}, {title}": noted
        for dtype in ("float32", "bfloat16")
        for title, noted in results.by_threads("low_bit_step", dtype).items()
    }
    heading = "## Averages of few bits, 84 M weights in 20 tensors: ns per weight"
    return _ratios_table(heading, columns, LOW_BIT_TITLES, {"ours": "F to it", "ours_p1": "p = 1 to it"})


def low_bit_child_table(results: Results) -> str:
    """Returns the same of child networks, in float32."""
    heading = "## The same with child networks, fp32: ns per weight"
    return _ratios_table(heading, results.by_threads("low_bit_child_step"), LOW_BIT_CHILD_TITLES, _OF_D)


def _ratios_table(heading: str, columns: dict[str, Record], titles: dict[str, str], ours: dict[str, str]) -> str:
    """Returns a table of times in ns per weight, and for each of `ours`, {contestant: head}, its ratios to them."""
    if not columns:
        return ""
    rows = []
    for name in contestants_of(columns, titles):
        row = [title_of(name, titles)]
        for step in columns.values():
            spread = step["times_ns"].get(name)
            row.append(f"{spread['median'] / step['weights']:.3g}" if spread else "")
            ratios = (step["ratios"][one].get(name) for one in ours)
            row += [f"{ratio['median']:.2f}" if ratio else "" for ratio in ratios]
        rows.append(row)
    head = [""]
    for column in columns:
        head += [column, *ours.values()]
    return heading + "\n\n" + markdown(head, rows)


def choice_table(results: Results) -> str:
    """Returns the table of time and memory to choose a child network; "" if the time was not measured."""
    noted = results.find("selection")
    if not noted:
        return ""
    extra = results.find("selection_memory").get("extra_bytes", {})
    rows = []
    for name, title in CHOICE_TITLES.items():
        memory = f"{extra[name] / 1e6:.0f}" if name in extra else "unknown"
        rows.append([title, f"{noted['times_ns'][name]['median'] / 1e9:.2f}", memory])
    heading = f"## Choice of a child network among {noted['scores'] / 1e6:.0f} M scores, 2 threads"
    return heading + "\n\n" + markdown(["", "seconds", "memory beside scores and masks, MB"], rows)


def saving_table(results: Results) -> str:
    """Returns the table of bytes per weight that a child network saves; "" if nothing of it was measured."""
    rows = []
    state, file = results.find("child_state"), results.find("delta_file")
    if state:
        held = {**state["state_bytes"], "mask": state["mask_bytes"]}
        child, dense, mask = (f"{held[name] / state['weights']:.3f}" for name in ("child", "dense", "mask"))
        rows += [["optimizer state, the mask in it", child, dense], ["the mask in memory", mask, ""]]
    if file:
        delta, full = (file["file_bytes"][name] / file["weights"] for name in ("delta.safetensors", "full.safetensors"))
        rows.append(["file of the fine-tuned model", f"{delta:.3f}", f"{full:.3f}"])
    if not rows:
        return ""
    head = ["", "child network, p = 0.3", "all weights"]
    return "## What a child network saves, fp32: bytes per weight\n\n" + markdown(head, rows)


def memory_table(results: Results) -> str:
    """Returns the table of the memory that a step allocates; "" if it was not measured."""
    cost = results.find("memory_of_a_step")
    if not cost:
        return ""
    rows = []
    for name, found in cost["allocated"].items():
        resident = found["resident_bytes"]
        rows.append([
            TITLES[name],
            f"{found['torch_bytes'] / cost['weights']:.2f}",
            "unknown" if resident is None else f"{resident / 1e6:.1f}",
            f"{found['python_bytes'] / cost['tensors']:.0f}",
        ])  # fmt: skip
    head = ["", "bytes allocated by torch, per weight", "growth of resident memory, MB", "Python's heap, per tensor"]
    return "## Memory of one step after the first, fp32, BERT-base\n\n" + markdown(head, rows)


def spectra_table(results: Results) -> str:
    """Returns the table of CPU time for a model's spectra; "" if it was not measured."""
    noted = results.find("spectra")
    if not noted:
        return ""
    rows = []
    for name, title in SPECTRA_TITLES.items():
        ratio = noted["ratios"].get(name)
        rows.append([title, f"{noted['cpu_s'][name]['median']:.2f}", f"{ratio['median']:.2f}" if ratio else ""])
    heading = f"## Spectra of MiniLM's {noted['layers']} layers, 1 thread, each in a process of its own"
    return heading + "\n\n" + markdown(["", "seconds of CPU time", "to weightwatcher"], rows)


def spectra_memory_table(results: Results) -> str:
    """Returns the table of memory for the spectrum of one big layer; "" if it was not measured."""
    noted = results.find("spectra_memory")
    if not noted:
        return ""
    rows = []
    for layer, extra in noted["extra_bytes"].items():
        sizes = [f"{noted['yardsticks'][layer][part] / 1e6:.0f}" for part in ("layer", "gram")]
        rows += [[f"{SPECTRA_TITLES[name]}: {layer}", f"{taken / 1e6:.0f}", *sizes] for name, taken in extra.items()]
    head = ["", "memory beside the model, MB", "the layer in float64, MB", "its Gram matrix, MB"]
    return "## Memory of the spectrum of one float32 layer\n\n" + markdown(head, rows)
