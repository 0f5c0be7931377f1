"""For the hub of Hugging Face: `push_to_hub` of a folder that `save` or `save_pretrained` wrote."""

from glob import escape
from importlib import import_module
from os import PathLike
from pathlib import Path
from typing import Any

__all__ = ["push_to_hub"]

_SAVED = ("plan.json", "config.json")
_PARTS = ("*.safetensors", "*.json", "README.md", "heads/*.safetensors")
_TOKENIZER = ("*.txt", "*.model")


def push_to_hub(
    directory: str | PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    message: str = "Upload a model that was pruned with mtprune",
    endpoint: str | None = None,
) -> str:
    """Put a saved model on the hub: tensors, plan or configuration, card, tokenizer, in one commit.

    The repository is made if it does not exist. Other files of the folder stay here. Needs the
    extra ``mtprune[hub]``.

    Args:
        directory: The folder.
        repo_id: ``"owner/name"``.
        private: Whether a new repository is private; as the hub has it unless given.
        token: As huggingface_hub takes it; what you logged in with unless given.
        revision: The branch.
        message: Of the commit.
        endpoint: Another hub's address.

    Returns:
        The address of the commit.

    Raises:
        ImportError: If huggingface_hub is not installed.
        FileNotFoundError: If the folder holds no saved model.
    """
    folder = Path(directory)
    if not any((folder / name).is_file() for name in _SAVED):
        raise FileNotFoundError(
            f"'{folder}' holds neither of {_SAVED}. Give a folder that mtprune.save or "
            "save_pretrained wrote."
        )
    try:
        hub: Any = import_module("huggingface_hub")
    except ImportError as error:
        raise ImportError(
            "push_to_hub needs huggingface_hub. Install the extra: pip install 'mtprune[hub]'."
        ) from error
    api = hub.HfApi(endpoint=endpoint, token=token, library_name="mtprune")
    parts = [file for part in (*_PARTS, *_TOKENIZER) for file in folder.glob(part)]
    repo = api.create_repo(repo_id, private=private, exist_ok=True)
    commit = api.upload_folder(
        repo_id=repo.repo_id,
        folder_path=folder,
        allow_patterns=[escape(part.relative_to(folder).as_posix()) for part in parts],
        commit_message=message,
        revision=revision,
    )
    return str(commit.commit_url)
