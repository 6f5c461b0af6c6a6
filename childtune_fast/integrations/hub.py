"""Fine-tuned models of transformers as small folders, here and on the Hub: what differs from the base, and a card.

Such a folder has the child network (`child.safetensors`), what training changed (`delta.safetensors`), the model's
`config.json`, `childtune.json` with what it is a delta of and how it was made, and a card, `README.md`.
"""

import copy
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from .._version import __version__
from ..arguments import FilePath, check_type
from ..child import ChildNetwork
from ..whole_file import written
from .card import card, scores_of, settings_of
from .config import CHILD_FILE
from .stored import load_base

__all__ = ["child_from_pretrained", "from_pretrained", "push_to_hub", "save_pretrained"]

DELTA_FILE, ABOUT_FILE = "delta.safetensors", "childtune.json"
_FILES = [CHILD_FILE, DELTA_FILE, ABOUT_FILE, "config.json"]  # what is read of a folder


def save_pretrained(
    folder: FilePath,
    model: PreTrainedModel,
    child: ChildNetwork,
    *,
    base: FilePath,
    revision: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    settings: Any = None,
    scores: Mapping[str, float] | None = None,
) -> None:
    """Writes what differs between a fine-tuned model and its base to a folder, with a card that says how it was made.

    The base is loaded a second time. What it does not have, such as a new head, or one of another size, is stored in
    full. Files of other names in the folder stay.

    Args:
        folder: the folder to write to; it is made if it is not there.
        model: the fine-tuned model, whole, and not wrapped.
        child: the child network that it was fine-tuned with.
        base: name on the Hub, or folder, of the model before fine-tuning, as `from_pretrained` took it.
        revision: branch, tag or commit of the base on the Hub; None takes the newest, whose commit is then noted where
            the Hub tells it (default: None).
        tokenizer: saved beside it; None saves none (default: None).
        settings: how the child network was chosen and trained, for the card: a ChildTuningConfig, or a mapping of
            names to values (default: None).
        scores: for the card, such as what `Trainer.evaluate` returns: {name: number} (default: None).

    Raises:
        ValueError: a weight outside the child network is not the base's, bit for bit, or what else `save_delta` raises.
        OSError: the base cannot be loaded, or a file cannot be written.
        TypeError: an argument is of another type. Nothing is written then, nor if the base is another one.
    """
    check_type("save_pretrained: model", model, PreTrainedModel, "a model of transformers, without a wrapper")
    check_type("save_pretrained: child", child, ChildNetwork, "a ChildNetwork")
    check_type("save_pretrained: base", base, (str, os.PathLike), "a name on the Hub or a folder")
    check_type("save_pretrained: tokenizer", tokenizer, (PreTrainedTokenizerBase, type(None)), "a tokenizer or None")
    named = os.path.abspath(base) if os.path.isdir(base) else str(base)
    total = child.summary().total
    about = {
        "base": named,
        "dtype": str(model.dtype).removeprefix("torch."),
        "revision": revision,
        "child_network": {
            "kept": total.count,
            "maskable": total.numel,
            "reserve_p": total.density,
            "fingerprint": child.fingerprint,
        },
        "settings": settings_of(settings),
        "scores": scores_of(scores),
        "versions": {
            "childtune_fast": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    before, missing = load_base(config, model.dtype, named, revision)
    about["revision"] = revision or getattr(before.config, "_commit_hash", None)
    known = {name: tensor for name, tensor in before.state_dict().items() if name not in missing}
    place = Path(folder)
    new = not place.exists()
    place.mkdir(parents=True, exist_ok=True)
    try:
        child.save_delta(place / DELTA_FILE, model, known)
    except BaseException:
        if new:
            place.rmdir()
        raise
    child.save(place / CHILD_FILE)
    config.save_pretrained(place)
    if tokenizer is not None:
        tokenizer.save_pretrained(place)
    for name, text in ((ABOUT_FILE, f"{json.dumps(about, indent=1)}\n"), ("README.md", str(card(about)))):
        with written(place / name) as file:
            file.write(text.encode())


def push_to_hub(
    repo_id: str, folder: FilePath, *, private: bool | None = None, token: str | None = None, message: str | None = None
) -> str:
    """Uploads a folder that `save_pretrained` wrote, and returns the address of the commit.

    Args:
        repo_id: name on the Hub, which is made if it is not there.
        folder: the folder, of which all files are uploaded.
        private: whether a new repository is private; None leaves it to the account (default: None).
        token: access token; None takes that of `hf auth login` (default: None).
        message: of the commit; None takes huggingface_hub's (default: None).

    Raises:
        ValueError: `folder` holds no delta, or one of a base that is a folder, too, which nobody else could load.
        OSError: the Hub cannot be reached, or refuses.
    """
    if not Path(folder, DELTA_FILE).is_file():
        raise ValueError(
            f"push_to_hub: the folder must hold what save_pretrained wrote (got no {DELTA_FILE} in '{folder}')"
        )
    try:
        validate_repo_id(base := about_in(Path(folder))["base"])
    except HFValidationError:
        raise ValueError(
            f"push_to_hub: the delta must be of a base on the Hub (got '{base}'); save it with base= the base's name "
            "there, which loads the same weights"
        ) from None
    api = HfApi(token=token, library_name="childtune_fast", library_version=__version__)
    name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    return str(api.upload_folder(repo_id=name, folder_path=Path(folder), commit_message=message))


def from_pretrained(
    name: FilePath,
    *,
    base: str | None = None,
    revision: str | None = None,
    base_revision: str | None = None,
    token: str | None = None,
) -> PreTrainedModel:
    """Returns the fine-tuned model, bit for bit, in evaluation mode, on the CPU: loads the base and applies the delta.

    Args:
        name: name on the Hub, or folder, of what `save_pretrained` wrote.
        base: name or folder of the base, where it is not the one that is noted there (default: None).
        revision: branch, tag or commit of `name` on the Hub (default: None).
        base_revision: that of the base; None takes the one that is noted, if `base` is None (default: None).
        token: access token for both; None takes that of `hf auth login` (default: None).

    Raises:
        ValueError: there is no delta under that name, it is damaged, its files are of several saves, or the base is
            another one or cannot be loaded.
    """
    place = folder_of(name, revision, token)
    about = about_in(place)
    if base is None:
        base, base_revision = about["base"], base_revision or about["revision"]
    config = AutoConfig.from_pretrained(place, trust_remote_code=False)
    try:
        model, _ = load_base(config, about["dtype"], base, base_revision, token)
    except OSError as error:
        raise ValueError(
            f"'{base}', the base of '{name}', cannot be loaded; say where it is by base=: {error}"
        ) from error
    _check_child(place, about, ChildNetwork.apply_delta(place / DELTA_FILE, model))
    return model


def child_from_pretrained(
    name: FilePath, model: torch.nn.Module, *, revision: str | None = None, token: str | None = None
) -> ChildNetwork:
    """Returns the child network of what `save_pretrained` wrote, to train the same weights of a model.

    Args:
        name: name on the Hub, or folder.
        model: torch.nn.Module with parameters of the names and shapes that the masks have.
        revision: branch, tag or commit on the Hub (default: None).
        token: access token; None takes that of `hf auth login` (default: None).

    Raises:
        ValueError: there is none under that name, or it is damaged, or of another model.
    """
    place = folder_of(name, revision, token)
    child = ChildNetwork.load(place / CHILD_FILE, model)
    _check_child(place, about_in(place), child)
    return child


def _check_child(place: Path, about: Mapping[str, Any], child: ChildNetwork) -> None:
    """Raises ValueError unless a child network is the one that `childtune.json` is about."""
    if child.fingerprint != about["fingerprint"]:
        raise ValueError(
            f"'{place}' must hold files of one save (got those of several: the child network is not the one that "
            f"{ABOUT_FILE} tells of); save it again"
        )


def folder_of(name: FilePath, revision: str | None = None, token: str | None = None) -> Path:
    """Returns the folder of what `save_pretrained` wrote, with what of it is downloaded where that is on the Hub.

    Raises:
        ValueError: there is none under that name.
    """
    check_type("name", name, (str, os.PathLike), "a name on the Hub or a folder")
    place = Path(name)
    try:
        if not place.is_dir():
            place = Path(snapshot_download(str(name), revision=revision, token=token, allow_patterns=_FILES))
    except (OSError, ValueError) as error:  # as all of the Hub's are
        raise ValueError(
            f"'{name}' must be a folder or a name on the Hub (got neither: {str(error).splitlines()[0]})"
        ) from error
    if lacking := [file for file in _FILES if not (place / file).is_file()]:
        raise ValueError(f"'{name}' must hold what save_pretrained of childtune_fast wrote (got no {lacking[0]})")
    return place


def about_in(place: Path) -> dict[str, Any]:
    """Returns what `childtune.json` says, its `dtype` as one of torch and the child network's `fingerprint`.

    Raises:
        ValueError: it does not say these, or no base and revision.
        TypeError: they are of other types.
    """
    try:
        about = json.loads((place / ABOUT_FILE).read_text(encoding="utf-8"))
        base, revision, dtype = (about[name] for name in ("base", "revision", "dtype"))
        fingerprint = about["child_network"]["fingerprint"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"'{place / ABOUT_FILE}' must name base, revision, dtype and child network ({error!r})"
        ) from None
    check_type(f"'{place / ABOUT_FILE}': base", base, str, "a string")
    check_type(f"'{place / ABOUT_FILE}': revision", revision, (str, type(None)), "a string or null")
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else None
    check_type(f"'{place / ABOUT_FILE}': dtype", found, torch.dtype, "the name of a dtype of torch")
    return {**about, "dtype": found, "fingerprint": fingerprint}


def base_of(folders: Sequence[Path], base: str | None) -> tuple[PreTrainedModel, set[str]]:
    """Returns what `load_base` does, for several deltas, of the class of the first one.

    Args:
        folders: those of what `save_pretrained` wrote.
        base: name or folder of the base; None takes the one that all of them note.

    Raises:
        ValueError: they note several bases.
        OSError: there is no such base.
    """
    noted = list(map(about_in, folders))
    if base is None and len(bases := {(about["base"], about["revision"]) for about in noted}) > 1:
        raise ValueError(f"deltas to merge must be of one base (got {sorted(bases, key=str)})")
    revision = noted[0]["revision"] if base is None else None
    config = AutoConfig.from_pretrained(folders[0], trust_remote_code=False)
    return load_base(config, noted[0]["dtype"], base or noted[0]["base"], revision)
