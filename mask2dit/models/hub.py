"""Models of the Hugging Face Hub by their name, such as "qth/Mask2DiT", wherever a folder is taken.

Only the files that are needed are fetched: configurations, the tokenizer and, of each component, the weights that
`mask2dit.models.loading.choose_weights` selects. They are kept in the cache that all of Hugging Face's libraries share, and
from there on a model is a local folder.
"""

import dataclasses
import fnmatch
import glob
import logging
import os
import re
from collections.abc import Collection, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, Protocol, TypeVar

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from mask2dit.files import write_errors
from mask2dit.models.loading import (
    COMPONENT_NAMES,
    CONFIG_NAME,
    DIFFUSERS_NAMES,
    choose_weights,
    component_variants,
    index_names,
)
from mask2dit.models.lora import FILE_NAMES, PEFT_CONFIG, choose_lora, lora_file

logger = logging.getLogger(__name__)


class ModelConfig(Protocol):
    """A configuration's keys that name a model."""

    model: str
    revision: str | None
    variant: str | None


class LoRAKeys(Protocol):
    """A configuration's keys that name a LoRA."""

    path: str | None
    weight_name: str | None
    revision: str | None


class WithLoRA(Protocol):
    """A configuration with a LoRA."""

    lora: Any
    """`LoRAKeys`."""


C = TypeVar("C", bound=ModelConfig)
D = TypeVar("D", bound=WithLoRA)
PARTS = (*COMPONENT_NAMES, "tokenizer", "scheduler")
# A list of weights is small, and says which files there are.
SMALL_FILES = (CONFIG_NAME, "*.index.json", "*.index.*.json", "scheduler_config.json")
ROOT_FILES = ("*.json", "UNTRAINED.md")
NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]*[\w-]")
NOT_OWNERS = ("models", "datasets", "spaces")  # pages of the hub itself, and usual names of folders
SNAPSHOT = re.compile(r"models--(?P<owner>[^/]+?)--(?P<model>[^/]+)/snapshots/(?P<commit>[0-9a-f]{40})")


def is_hub_name(name: str | os.PathLike) -> bool:
    """Returns True for a name of the form owner/model that no local folder has."""
    name = str(name)
    return bool(NAME.fullmatch(name)) and name.split("/")[0] not in NOT_OWNERS and not Path(name).exists()


def fetch_model(
    name: str | os.PathLike,
    *,
    parts: Collection[str] = PARTS,
    revision: str | None = None,
    variant: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
    local_files_only: bool = False,
    configs_only: bool = False,
) -> Path:
    """Returns the local folder of a model, after fetching what is missing of a model of the hub.

    Without a connection, what was fetched before is used. `HF_ENDPOINT`, `HF_HOME`, `HF_TOKEN` and `HF_HUB_OFFLINE` act as
    in all of Hugging Face's libraries.

    Args:
        name: a local folder, which is returned as it is, or a name on the hub.
        parts: the components to fetch. "" is a transformer whose `config.json` lies in the repository's root or, if there is
            none, in `transformer/`.
        revision: branch, tag or commit. None: the main branch.
        variant: the variant of the weights, as for `choose_weights`; components without it use their plain weights.
        token: token for private and gated models. None: the one of `hf auth login` or `HF_TOKEN`.
        cache_dir: the cache. None: the shared one.
        local_files_only: True never connects.
        configs_only: True fetches no weights.

    Raises:
        FileNotFoundError: if there is no such model, revision or variant, or it was not fetched before an offline run.
        PermissionError: if the model's licence has to be accepted first, or the token is refused.
        ConnectionError: if the hub cannot be reached.
    """
    if not is_hub_name(name):
        return Path(name)
    name = str(name)
    cache = {"cache_dir": cache_dir, "token": token}
    with _explained(name, revision, cache_dir), write_errors(cache_dir or constants.HF_HUB_CACHE):
        files, reason = _list_files(name, revision, token, local_files_only)
        if files is None:
            return _fetched_before(name, parts, revision, configs_only, cache, reason)
        if "" in parts and CONFIG_NAME not in files:
            parts = ["transformer"]
        missing = [part for part in parts if part and not any(file.startswith(f"{part}/") for file in files)]
        if missing:
            raise FileNotFoundError(
                f"{name!r} on the hub has no {', '.join(missing)}: make a local folder of its parts and the missing ones, "
                "for instance those of THUDM/CogVideoX-5b (models/README.md describes it), and name that folder"
            )
        small = [file for file in files if _is_small(file, parts)]
        folder = _download(name, small, revision, cache)
        if not configs_only:
            # Of the same commit, even if the branch has moved meanwhile
            _download(name, _weights(files, folder, parts, variant, name), folder.name, cache)
    logger.info("%s is in %s", name, folder)
    return folder


def fetch_lora(
    name: str | os.PathLike,
    weight_name: str | None = None,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
    local_files_only: bool = False,
) -> Path:
    """Returns the local file of a LoRA, after fetching it if it is one of the hub.

    Args:
        name: a local file or folder, or a name on the hub.
        weight_name: the file, as for `choose_lora`.
        subfolder: the folder of the repository that holds it. None: its root.
        revision, token, cache_dir, local_files_only: as for `fetch_model`.

    Raises:
        FileNotFoundError, ValueError: as `choose_lora`.
        FileNotFoundError, PermissionError, ConnectionError: as `fetch_model`.
    """
    if not is_hub_name(name):
        return lora_file(name, weight_name, subfolder)
    name = str(name)
    cache = {"cache_dir": cache_dir, "token": token}
    with _explained(name, revision, cache_dir), write_errors(cache_dir or constants.HF_HUB_CACHE):
        prefix = f"{subfolder}/" if subfolder else ""

        def choose(files: list[str]) -> str:
            inside = [file.removeprefix(prefix) for file in files if file.startswith(prefix)]
            return prefix + choose_lora(inside, weight_name, name)

        files, reason = _list_files(name, revision, token, local_files_only)
        if files is None:
            wanted = [weight_name] if weight_name else FILE_NAMES
            patterns = [glob.escape(prefix + file) for file in wanted]
            try:
                folder = Path(
                    snapshot_download(name, revision=revision, allow_patterns=patterns, local_files_only=True, **cache)
                )
                file = folder / choose([path.relative_to(folder).as_posix() for path in folder.rglob("*")])
            except FileNotFoundError as error:
                raise _not_here(name, revision, cache, reason, error) from error
            _warn_of_offline(name, file, reason)
            return file
        chosen = choose(files)
        config = str(PurePosixPath(chosen).with_name(PEFT_CONFIG))  # it has the alphas
        folder = _download(name, [chosen, *([config] if config in files else [])], revision, cache)
    return folder / chosen


def local_model(config: C, configs_only: bool = False) -> C:
    """Returns a configuration whose `model` is a local folder, as `fetch_model` with its `revision` and `variant`.

    Args:
        config: a dataclass with `model`, `revision` and `variant`.
        configs_only: True fetches no weights.
    """
    if not is_hub_name(config.model):
        return config
    folder = fetch_model(config.model, revision=config.revision, variant=config.variant, configs_only=configs_only)
    return dataclasses.replace(config, model=str(folder))


def local_lora(config: D) -> D:
    """Returns a configuration whose `lora` names a local file or folder, as `fetch_lora` with its keys."""
    lora = config.lora
    if lora.path is None or not (is_hub_name(lora.path) or lora.weight_name):
        return config
    file = fetch_lora(lora.path, lora.weight_name, revision=lora.revision)
    return dataclasses.replace(config, lora=dataclasses.replace(lora, path=str(file), weight_name=None))


def recorded(config) -> dict[str, Any]:
    """Returns a configuration for a record, in which a fetched model or LoRA has its name and commit instead of its path."""
    record = {**dataclasses.asdict(config), **origin(config.model)}
    lora = record.get("lora", {})
    if of_hub := origin(lora.get("path") or ""):
        _, _, file = Path(lora["path"]).as_posix().partition(f"/snapshots/{of_hub['revision']}/")
        lora |= {"path": of_hub["model"], "revision": of_hub["revision"], "weight_name": file}
    return record


def origin(folder: str | os.PathLike) -> dict[str, str]:
    """Returns `model` and `revision`, the name and the commit of a fetched model; nothing for any other folder."""
    found = SNAPSHOT.search(Path(folder).as_posix())
    return {"model": f"{found['owner']}/{found['model']}", "revision": found["commit"]} if found else {}


def _list_files(
    name: str, revision: str | None, token: str | bool | None, local_files_only: bool
) -> tuple[list[str] | None, Exception | None]:
    """Lists the files of a repository. Returns None, and the reason, where the hub is not to be or cannot be reached."""
    if local_files_only:
        return None, None
    try:
        info = HfApi(token=token).model_info(name, revision=revision)
    except (OfflineModeIsEnabled, HTTPError) as error:
        if isinstance(error, HfHubHTTPError) and error.response.status_code < 500:
            raise
        return None, error
    return [file.rfilename for file in info.siblings], None


def _is_small(file: str, parts: Collection[str]) -> bool:
    part, _, name = file.rpartition("/")
    if not part and any(fnmatch.fnmatch(name, pattern) for pattern in ROOT_FILES):
        return True
    return part in parts and (part == "tokenizer" or any(fnmatch.fnmatch(name, pattern) for pattern in SMALL_FILES))


def _weights(files: list[str], folder: Path, parts: Collection[str], variant: str | None, name: str) -> list[str]:
    """Selects the weights among a repository's files, whose indexes are in `folder`."""
    found: Mapping[str, list[str]] = {
        part: [file.rpartition("/")[2] for file in files if file.rpartition("/")[0] == part]
        for part in parts
        if part in COMPONENT_NAMES or not part
    }
    variants = component_variants(found, variant, name)
    chosen = []
    for part, available in found.items():
        names = COMPONENT_NAMES.get(part, DIFFUSERS_NAMES)

        def read_index(index: str, part: str = part) -> list[str]:
            return index_names(folder / part / index)

        weights = choose_weights(available, variants[part], names, read_index, f"{name}/{part}".rstrip("/"))
        chosen += [f"{part}/{file}".lstrip("/") for file in weights]
    return chosen


def _download(name: str, files: list[str], revision: str | None, cache: dict) -> Path:
    patterns = [glob.escape(file) for file in files]
    return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, **cache))


def _fetched_before(
    name: str, parts: Collection[str], revision: str | None, configs_only: bool, cache: dict, reason: Exception | None
) -> Path:
    """Returns the folder in the cache. Raises `FileNotFoundError` or `ConnectionError` if a part is not in it."""
    patterns = [f"{part}/*{CONFIG_NAME}" for part in parts if part]
    try:
        folder = Path(
            snapshot_download(name, revision=revision, allow_patterns=patterns, local_files_only=True, **cache)
        )
        if "" in parts and not (folder / CONFIG_NAME).is_file():
            parts = ["transformer"]
        for part in parts:
            if not any((folder / part).glob(f"*{CONFIG_NAME}")) and part != "tokenizer":
                raise FileNotFoundError(f"its {part} is missing")
            if not configs_only and (part in COMPONENT_NAMES or not part) and not _has_weights(folder / part):
                raise FileNotFoundError(f"its {part or 'model'} has no weights")
    except FileNotFoundError as error:
        raise _not_here(name, revision, cache, reason, error) from error
    _warn_of_offline(name, folder, reason)
    return folder


def _not_here(
    name: str, revision: str | None, cache: dict, reason: Exception | None, error: FileNotFoundError
) -> Exception:
    """Returns the error for what is neither complete in the cache nor reached: offline by choice, or by `reason`."""
    cause = "it was not fetched before" if isinstance(error, LocalEntryNotFoundError) else str(error)
    where = cache["cache_dir"] or constants.HF_HUB_CACHE
    at = f" at revision {revision}" if revision else ""
    if reason is None or isinstance(reason, OfflineModeIsEnabled):
        return FileNotFoundError(
            f"{name!r}{at} is not a folder here, and not complete in {str(where)!r} ({cause}): this run is offline "
            f"(HF_HUB_OFFLINE or local_files_only); fetch it once with a connection, as by: hf download {name}"
        )
    return ConnectionError(
        f"{name!r} is not a folder here, and the hub at {constants.ENDPOINT} cannot be reached ({_first_line(reason)}), "
        f"nor is it complete in {str(where)!r} ({cause}): check the network, or set HF_ENDPOINT to a mirror"
    )


def _warn_of_offline(name: str, path: Path, reason: Exception | None) -> None:
    if reason is not None:
        logger.warning("%s: the hub cannot be reached, so what was fetched before is used: %s", name, path)


def _has_weights(folder: Path) -> bool:
    return any(path.exists() for pattern in ("*.safetensors", "*.bin") for path in folder.glob(pattern))


@contextmanager
def _explained(name: str, revision: str | None, cache_dir: str | os.PathLike | None) -> Generator[None]:
    """Converts the errors of the hub to errors that say whether name, licence, token or network is at fault."""
    page = f"{constants.ENDPOINT}/{name}"
    try:
        yield
    except GatedRepoError as error:
        raise PermissionError(
            f"{name!r} is gated: accept its licence at {page}, then log in with: hf auth login (or set HF_TOKEN)"
        ) from error
    except RevisionNotFoundError as error:
        raise FileNotFoundError(
            f"{name!r} has no revision {revision!r}: {page}/commits/main lists its branches, tags and commits"
        ) from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"there is neither a folder {name!r} here nor a model of this name at {constants.ENDPOINT}: check the spelling; "
            "if it is private, log in with: hf auth login (or set HF_TOKEN)"
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise PermissionError(
                f"the hub refuses the token for {name!r} ({_first_line(error)}): log in again with: hf auth login"
            ) from error
        raise ConnectionError(
            f"the hub at {constants.ENDPOINT} answers {status} for {name!r} ({_first_line(error)}): try again later"
        ) from error
    except HTTPError as error:
        raise ConnectionError(
            f"the connection to {constants.ENDPOINT} broke while {name!r} was fetched ({_first_line(error)}): run again, "
            "which goes on where it was"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
