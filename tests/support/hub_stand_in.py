"""A folder in the Hub's place: what is uploaded to a repository is what is downloaded of it."""

import shutil
from pathlib import Path

import huggingface_hub

from childtune_fast.integrations import hub


def put_in_place(place, monkeypatch, base):
    """Lets `integrations.hub` upload to a folder, and download from there; returns the folder.

    A base of any name is then the one in the folder `base`.
    """
    place, load_base = Path(place), hub.load_base
    monkeypatch.setattr(hub, "load_base", lambda config, dtype, name, *rest: load_base(config, dtype, base))

    def create_repo(self, repo_id, *, private, exist_ok):
        assert exist_ok
        (place / repo_id).mkdir(parents=True, exist_ok=True)
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        shutil.copytree(folder_path, place / repo_id, dirs_exist_ok=True)
        return f"https://huggingface.co/{repo_id}/commit/1"

    def snapshot_download(name, *, revision, token, allow_patterns):
        if not (place / name).is_dir():
            raise huggingface_hub.errors.LocalEntryNotFoundError(f"nothing called {name}")
        folder = place / "downloaded" / name
        folder.mkdir(parents=True)
        for file in allow_patterns:
            shutil.copy(place / name / file, folder)
        return str(folder)

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    return place
