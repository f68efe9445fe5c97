"""A finished model -> its card written again with results; a hub repository, without paths of this machine."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_token, is_offline_mode
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from lens.backbone import load_tokenizer
from lens.card import README_FILE, check_card, model_card, public, read_facts, result_facts, write_card
from lens.explain import ClusterTokens
from lens.files import read_json, read_tensors, write_json
from lens.model import CONFIG_FILE, HEAD_FILE, LensModel, read_config

PLACES = {
    CONFIG_FILE: "base",
    "adapter_config.json": "base_model_name_or_path",
    "config.json": "_name_or_path",
    "tokenizer_config.json": "name_or_path",
}
"""The fields of an artifact's files that name where something came from."""
STALE = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
"""Files of an earlier upload that go when the new one lacks them: an old backbone beside a new adapter is loaded."""


def rewrite_card(
    path: str | os.PathLike[str],
    results: str | os.PathLike[str] | None = None,
    system: str | None = None,
    license: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes README.md of a model's folder again, without loading its weights, and returns its path.

    `results` is the results.json of eval/run.py and `system` the model's name in it; what is not given stays as the
    card has it. Raises FileNotFoundError for a folder that is no model, FileExistsError for a README.md that was
    edited by hand unless `overwrite`, and ValueError for results without this model.
    """
    folder = Path(path)
    if not (folder / CONFIG_FILE).is_file():
        raise FileNotFoundError(f"{folder} holds no {CONFIG_FILE}: it is no LENS model folder")
    if system is not None and results is None:
        raise ValueError("system names the model in results: give results (--results) too")
    config = read_config(folder)
    facts = read_facts(folder)
    if results is not None:
        facts = facts.replace(results=result_facts(results, system))
    if license is not None:
        facts = facts.replace(license=license)
    if not overwrite:
        check_card(folder)
    labels = read_tensors(folder / HEAD_FILE, {"labels": (None,)})["labels"].numpy()
    tokens = ClusterTokens(labels, config.dimensions, load_tokenizer(str(folder)))
    adapter = (folder / "adapter_config.json").is_file()
    write_card(folder, facts, model_card(config, facts, tokens, adapter))
    return folder / README_FILE


def push(
    model: LensModel,
    tokenizer: Any,
    repo_id: str,
    private: bool | None = None,
    commit_message: str | None = None,
    revision: str | None = None,
    include_backbone: bool = False,
    token: str | None = None,
) -> str:
    """Uploads the artifact as one commit to the hub's model repository `repo_id`, made where absent; returns its URL.

    `private` is for a new repository, `revision` a branch, made where absent. Raises ValueError for a name that is no
    repository's, without a token, and for an adapter on a backbone that only this machine has; ConnectionError when
    offline or cut off; FileExistsError for a repository that holds something else than a LENS model.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} is no repository name of the hub, OWNER/NAME: {error}") from error
    base = model.config.base
    if not (include_backbone or model.backbone_is_own) and (os.path.isabs(base) or os.path.exists(base)):
        raise ValueError(
            f"the backbone {base} is a folder of this machine, so nobody else could load the model: give "
            "include_backbone=True (--include-backbone), or load the model with base= the backbone's hub id"
        )
    if is_offline_mode():
        raise ConnectionError("the hub is switched off by HF_HUB_OFFLINE=1: unset it to upload")
    if token is None and get_token() is None:
        raise ValueError("no token of the hub: run `hf auth login`, or set the environment variable HF_TOKEN")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model.write(folder, tokenizer, include_backbone, repo_id)
        make_public(folder)
        try:
            return _upload(HfApi(token=token), folder, repo_id, private, commit_message, revision)
        except (OSError, ValueError):
            raise
        except Exception as error:  # those of the hub's network library, which is another in every version
            raise ConnectionError(f"the hub did not take {repo_id} ({type(error).__name__}: {error})") from error


def _upload(
    api: HfApi, folder: Path, repo_id: str, private: bool | None, commit_message: str | None, revision: str | None
) -> str:
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    present = set(api.list_repo_files(repo_id, revision=revision)) - {".gitattributes", "README.md", "LICENSE"}
    if present and CONFIG_FILE not in present:
        raise FileExistsError(
            f"{repo_id} holds {', '.join(sorted(present)[:3])} and no {CONFIG_FILE}, so it is no LENS model and "
            "is not overwritten: choose another name"
        )
    commit = api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        commit_message=commit_message or "Upload LENS model",
        revision=revision,
        delete_patterns=STALE,
    )
    return str(commit.repo_url)


def make_public(folder: Path) -> None:
    """Cuts the local paths that an artifact's files record to their last name."""
    for file, field in PLACES.items():
        if (folder / file).is_file():
            content = read_json(folder / file)
            if isinstance(content.get(field), str):
                write_json(folder / file, {**content, field: public(content[field])})
