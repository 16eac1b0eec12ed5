"""load(folder): read an exported folder, here or on the Hugging Face Hub, and check all that can be wrong with it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from hybridnas.arch.arch import Arch
from hybridnas.arch.model import HybridLM
from hybridnas.errors import ExportError, HybridNASError, suggest
from hybridnas.export.layout import (
    CONFIG,
    FORMAT_VERSION,
    LINEAGE,
    MODEL_TYPE,
    OWN_FILES,
    TOKENIZER_FILES,
    WEIGHTS,
    home,
    stored_tensors,
)
from hybridnas.hardware import Impl, pick_device
from hybridnas.registry import BLOCKS
from hybridnas.study.folder import completed

if TYPE_CHECKING:
    from hybridnas.data.tokenizers import Tokenizer


def load(
    folder: str | Path,
    device: str | torch.device | None = None,
    *,
    impl: str | Impl = Impl.AUTO,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> HybridLM:
    """Return the exported model in evaluation mode; needs nothing but the folder.

    ``folder``: a folder here, or where there is none of that name a repository ``user/name`` on the Hugging Face Hub;
    ``revision`` and what follows it are those of ``huggingface_hub.snapshot_download``. ``device``: None is torch's
    default device, as in ``build``; ``"auto"`` takes a GPU where there is one.

    Raises ExportError for a folder that is missing, not ours, newer than this hybridnas, damaged or incomplete.
    """
    if device is None:
        target = torch.get_default_device()
    else:
        target = pick_device(device) if isinstance(device, str) else device
    download = {
        "revision": revision,
        "token": token,
        "cache_dir": cache_dir,
        "local_files_only": local_files_only,
        "force_download": force_download,
    }
    where = local_folder(folder, **download)
    config = read_config(where)
    model = HybridLM(arch_of(config, where / CONFIG), impl=impl, device="cpu")
    assign(model, read_tensors(where), where)
    model.lineage = lineage_of(config, where / CONFIG)
    return model.to(target).eval()


def local_folder(folder: str | Path, **download: Any) -> Path:
    """Return the folder itself, or where a repository of the Hugging Face Hub was downloaded to.

    Raises ExportError for a repository that cannot be had.
    """
    where = completed(home(folder))
    if where.exists() or not isinstance(folder, str) or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", folder):
        return where
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return Path(huggingface_hub.snapshot_download(folder, allow_patterns=list(OWN_FILES), **download))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise ExportError(
            f"{folder!r} is no folder here, and no repository that the Hugging Face Hub gives "
            f"({' '.join(str(error).split())[:200]}); give a folder that 'python -m hybridnas.export' wrote",
            field="folder",
            got=folder,
            allowed="a folder, or a repository user/name",
        ) from None


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Return the tokenizer that was exported with the model; raises ExportError when there is none.

    ``folder`` as in :func:`load`.
    """
    from hybridnas.data import tokenizers

    where = local_folder(folder)
    read_config(where)
    if not (where / TOKENIZER_FILES[0]).is_file():
        raise ExportError(
            f"{where} has no {TOKENIZER_FILES[0]}: the model was exported without its data source",
            field=TOKENIZER_FILES[0],
        )
    return tokenizers.load_tokenizer(where)


def read_json(folder: Path) -> Any:
    """Return the content of a folder's config.json; raises ExportError for anything else."""
    if not folder.is_dir():
        raise ExportError(
            f"{folder} is not a folder; give the folder that 'python -m hybridnas.export' wrote",
            field="folder",
            got=str(folder),
        )
    path = folder / CONFIG
    if not path.is_file():
        raise ExportError(f"{folder} has no {CONFIG}, so it is not an exported model", field=CONFIG)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ExportError(f"{path} cannot be read as JSON ({error}); export the model again", field=CONFIG) from None


def read_ours(folder: Path) -> dict[str, Any]:
    """Return config.json of one of our folders, of whatever version; raises ExportError for anything else."""
    config, path = read_json(folder), folder / CONFIG
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind != MODEL_TYPE:
        raise ExportError(
            f"{path} is not ours: its model_type is {kind!r}, hybridnas reads {MODEL_TYPE!r}",
            field="model_type",
            got=kind,
            allowed=MODEL_TYPE,
        )
    return dict(config)


def read_config(folder: Path) -> dict[str, Any]:
    """Return config.json of one of our folders that this version reads; raises ExportError for anything else."""
    config = read_ours(folder)
    path = folder / CONFIG
    version = config.get("format_version")
    if not isinstance(version, int) or version < 1:
        raise ExportError(
            f"{path} has format_version {version!r}, expected 1 to {FORMAT_VERSION}; the file is damaged",
            field="format_version",
            got=version,
            allowed=f"1 to {FORMAT_VERSION}",
        )
    if version > FORMAT_VERSION:
        raise ExportError(
            f"{path} has format_version {version}, written by a newer hybridnas "
            f"({config.get('hybridnas_version', 'unknown')}); this one reads up to {FORMAT_VERSION}: upgrade hybridnas",
            field="format_version",
            got=version,
            allowed=f"1 to {FORMAT_VERSION}",
        )
    return config


def read_arch(folder: Path) -> Arch:
    """Return the architecture of an exported folder, checked against its fingerprint."""
    return arch_of(read_config(folder), folder / CONFIG)


def arch_of(config: Mapping[str, Any], path: str | Path) -> Arch:
    """Return the architecture that a config.json holds, checked against its fingerprint; ``path`` is for messages."""
    try:
        arch = Arch.from_dict(config["arch"])
    except (HybridNASError, KeyError, TypeError, AttributeError) as error:
        missing = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
        for letter, plugin in (config.get("plugins") or {}).items():
            if letter not in BLOCKS:
                raise ExportError(
                    f"{path} needs block {letter} of the plugin {plugin['name']} (SHA-256 {plugin['sha256'][:12]}...): "
                    f"put that file there and call hybridnas.load_plugins(FOLDER), or give a command plugins=true",
                    field="plugins",
                    got=letter,
                    allowed=plugin,
                ) from None
        raise ExportError(f"{path} does not describe an architecture: {missing}", field="arch") from None
    if arch.fingerprint() != config.get("fingerprint"):
        raise ExportError(
            f"{path} describes architecture {arch.short}, but its fingerprint is "
            f"{str(config.get('fingerprint'))[:12]}: the file was edited or damaged, or written by another version "
            f"of hybridnas ({config.get('hybridnas_version', 'unknown')}); export the model again",
            field="fingerprint",
            got=config.get("fingerprint"),
            allowed=arch.fingerprint(),
        )
    return arch


def lineage_of(config: Mapping[str, Any], path: str | Path) -> tuple[Mapping[str, Any], ...]:
    """Return the grafts that a config.json records, the oldest first; ``path`` is for messages."""
    found = config.get(LINEAGE, [])
    if not isinstance(found, list) or not all(isinstance(record, dict) for record in found):
        raise ExportError(f"{path} has a {LINEAGE} that is no list of grafts; export the model again", field=LINEAGE)
    return tuple(found)


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Return all tensors of model.safetensors on the CPU; raises ExportError for a missing or truncated file."""
    path = folder / WEIGHTS
    if not path.is_file():
        raise ExportError(
            f"{folder} has no {WEIGHTS}; copy the whole exported folder, or export the model again", field=WEIGHTS
        )
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ExportError(f"{path} is truncated or damaged ({error}); export the model again", field=WEIGHTS) from None


@torch.no_grad()
def assign(model: HybridLM, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Give the model the stored tensors, in their stored dtype; raises ExportError naming the first that disagrees."""
    path = folder / WEIGHTS
    expected = stored_tensors(model)
    for name in expected:
        if name not in tensors:
            raise ExportError(
                f"{path} lacks tensor {name!r} of shape {_shape(expected[name])}; export the model again", field=name
            )
    for name, tensor in tensors.items():
        if name not in expected:
            raise ExportError(
                f"{path} has tensor {name!r} that the architecture does not{suggest(name, expected)}",
                field=name,
                allowed=list(expected),
            )
        if tensor.shape != expected[name].shape:
            raise ExportError(
                f"{path} has tensor {name!r} of shape {_shape(tensor)}, config.json asks for {_shape(expected[name])}",
                field=name,
                got=tuple(tensor.shape),
                allowed=tuple(expected[name].shape),
            )
        if tensor.is_floating_point() != expected[name].is_floating_point():
            raise ExportError(
                f"{path} has tensor {name!r} of dtype {tensor.dtype}, expected {expected[name].dtype}",
                field=name,
                got=tensor.dtype,
                allowed=expected[name].dtype,
            )
    for name, tensor in tensors.items():
        # A copy and not the file's mapped pages: those may be unaligned, which changes the last bits of a matmul.
        expected[name].data = tensor.clone()
    for block in model.blocks():
        block.widen()  # an older version could store what stays in float32 in a narrower dtype


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"
