"""push_to_hub: upload an exported model to the Hugging Face Hub, as ``huggingface_hub.PyTorchModelHubMixin`` does."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from hybridnas.arch.model import HybridLM
from hybridnas.export.folder import export


def push_to_hub(
    model: HybridLM,
    repo_id: str,
    *,
    commit_message: str = "Upload a hybridnas model",
    private: bool | None = None,
    token: str | None = None,
    branch: str | None = None,
    create_pr: bool | None = None,
    allow_patterns: list[str] | str | None = None,
    ignore_patterns: list[str] | str | None = None,
    delete_patterns: list[str] | str | None = None,
    **settings: Any,
) -> str:
    """Export the model, upload the folder in one commit, and return the commit's URL.

    The repository is made where there is none. Arguments as in ``PyTorchModelHubMixin.push_to_hub``; ``settings`` are
    those of :func:`hybridnas.export.folder.export` (``tokenizer``, ``card``). Raises ExportError as that does, and
    huggingface_hub's errors.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    full_name = api.create_repo(repo_id=repo_id, private=private, exist_ok=True).repo_id
    with tempfile.TemporaryDirectory() as parent:
        folder = export(model, Path(parent) / "model", name=full_name, **settings)
        return str(
            api.upload_folder(
                repo_id=full_name,
                repo_type="model",
                folder_path=folder,
                commit_message=commit_message,
                revision=branch,
                create_pr=create_pr,
                allow_patterns=allow_patterns,
                ignore_patterns=ignore_patterns,
                delete_patterns=delete_patterns,
            )
        )
