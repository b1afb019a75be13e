"""Models by name from the Hugging Face Hub: its cache, mirror (HF_ENDPOINT) and offline mode are huggingface_hub's."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (  # type: ignore[attr-defined] # HTTPError: its client's base error
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    SafetensorsParsingError,
)

from isthmus.model.errors import ModelError
from isthmus.model.imports.published import SIDE_FILES
from isthmus.model.imports.tensors import (
    PYTORCH,
    PYTORCH_INDEX,
    SAFETENSORS,
    SAFETENSORS_DTYPES,
    SAFETENSORS_INDEX,
    Tensors,
    shape_only,
)

CONFIG = "config.json"
_SAFETENSORS_FILES = [SAFETENSORS, SAFETENSORS_INDEX, "model-*.safetensors"]
_PYTORCH_FILES = [PYTORCH, PYTORCH_INDEX, "pytorch_model-*.bin"]


@dataclass(frozen=True)
class Snapshot:
    """A model of the Hub on this machine: `folder` holds the files of commit `revision`."""

    folder: Path
    revision: str


def download(name: str, revision: str | None = None) -> Snapshot:
    """Fetch a model into huggingface_hub's cache; files that an earlier call completed are not fetched again.

    The library (1.18 and later) starts an interrupted file anew; what a killed process had of it stays in the cache.
    Of a model that is published as safetensors and as PyTorch files, only the safetensors are fetched.

    Args:
        name: `owner/name`.
        revision: Branch, tag or commit; None means the default branch. The commit is returned.

    Raises:
        ModelError: no such model or revision, no access, or no network and nothing in the cache.
    """
    with _one_line(name, revision):
        files = _published_files(name, revision)
        folder = Path(
            snapshot_download(name, revision=revision, allow_patterns=_wanted(files), local_files_only=files is None)
        )
    return Snapshot(folder, folder.name)


def read_headers(name: str) -> tuple[Path, Tensors | None]:
    """Fetch a model's files except its weights, and the headers of its safetensors files; no weights.

    Returns:
        The folder, and the shapes of the tensors; none where the model is published as PyTorch files only.

    Raises:
        ModelError: as `download`, or the headers are damaged.
    """
    with _one_line(name, None):
        files = HfApi().list_repo_files(name)
        folder = Path(snapshot_download(name, allow_patterns=[CONFIG, *SIDE_FILES]))
        if not {SAFETENSORS, SAFETENSORS_INDEX} & set(files):
            return folder, None
        found = HfApi().get_safetensors_metadata(name, revision=folder.name).files_metadata.values()
        tensors = {key: info for file in found for key, info in file.tensors.items()}
        return folder, {
            key: shape_only(tuple(info.shape), SAFETENSORS_DTYPES[info.dtype]) for key, info in tensors.items()
        }


@contextmanager
def _one_line(name: str, revision: str | None) -> Iterator[None]:
    """Turn what can go wrong on the way to the Hub into one line."""
    try:
        yield
    except GatedRepoError as error:
        raise ModelError(f"{name}: ask for access on its page, then set HF_TOKEN") from error
    except RevisionNotFoundError as error:
        raise ModelError(f"{name}: no revision {revision}; give a branch, tag or commit of the model") from error
    except RepositoryNotFoundError as error:
        raise ModelError(f"{name}: no such model on the Hub, or it is private: then set HF_TOKEN") from error
    except HFValidationError as error:
        raise ModelError(f"{name}: neither a file or folder here nor a name on the Hub (owner/name)") from error
    except (SafetensorsParsingError, KeyError) as error:
        raise ModelError(f"{name}: its safetensors headers cannot be read ({_first_line(error)})") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, HTTPError, OSError) as error:
        raise ModelError(
            f"{name}: the Hub cannot be reached and the cache does not hold it ({type(error).__name__}); "
            "set HF_ENDPOINT to a mirror, or give a local folder"
        ) from error


def _published_files(name: str, revision: str | None) -> list[str] | None:
    """Return the names of the model's files; none if the Hub cannot be reached, so that the cache must do."""
    try:
        return HfApi().list_repo_files(name, revision=revision)
    except (RepositoryNotFoundError, RevisionNotFoundError):
        raise
    except (HfHubHTTPError, HTTPError, OSError):
        return None


def _wanted(files: list[str] | None) -> list[str]:
    """Return the patterns of the files to fetch: safetensors if there are any, else PyTorch's."""
    if files is None:
        weights = [*_SAFETENSORS_FILES, *_PYTORCH_FILES]
    else:
        weights = _SAFETENSORS_FILES if any(file.endswith(".safetensors") for file in files) else _PYTORCH_FILES
    return [CONFIG, *SIDE_FILES, *weights]


def upload(folder: Path, name: str, *, private: bool = True) -> str:
    """Upload a folder as one commit and return its address; the token is HF_TOKEN or that of `hf auth login`.

    Raises:
        ModelError: no token, no right to write there, or no network.
    """
    api = HfApi()
    try:
        api.create_repo(name, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=name, folder_path=folder, commit_message="Export of isthmus"))
    except HFValidationError as error:
        raise ModelError(f"{name}: not a name of the Hub; write owner/name") from error
    except (LocalTokenNotFoundError, HfHubHTTPError) as error:
        raise ModelError(
            f"{name}: the Hub refused it ({_first_line(error)}); set HF_TOKEN to a token with write access"
        ) from error
    except (HTTPError, OSError) as error:
        raise ModelError(f"{name}: the Hub cannot be reached ({_first_line(error)}); try again") from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
