"""An exported folder as a model of MLflow's ``python_function`` flavor: what ``mlflow.pyfunc.load_model`` returns.

MLflow imports this module by the name in the model's ``MLmodel`` file and calls :func:`_load_pyfunc`. It needs neither
MLflow nor a pickle. A model with a tokenizer continues texts; any other one maps ids to logits.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridnas.errors import ConfigError
from hybridnas.export.layout import TOKENIZER_FILES

if TYPE_CHECKING:
    import numpy.typing as npt


class TextModel:
    """Continues prompts: one string, a list of them, or a table with one column or a column ``prompt``."""

    def __init__(self, folder: Path) -> None:
        from hybridnas.export.load import load, load_tokenizer

        self.model, self.tokenizer = load(folder), load_tokenizer(folder)

    def predict(self, model_input: Any, params: Mapping[str, Any] | None = None) -> list[str]:
        """Return each prompt's continuation; ``params``: ``max_new_tokens``, ``temperature``, ``top_p``, ``seed``."""
        from hybridnas.export.stream import stream_text

        asked = {"max_new_tokens": 64, "temperature": 1.0, "top_p": 1.0, "seed": 0, **(params or {})}
        texts = []
        for prompt in _prompts(model_input):
            pieces: list[str] = []
            stream_text(
                self.model,
                self.tokenizer,
                prompt,
                pieces.append,
                max_new_tokens=int(asked["max_new_tokens"]),
                temperature=float(asked["temperature"]),
                top_k=None,
                top_p=float(asked["top_p"]),
                seed=int(asked["seed"]),
            )
            texts.append("".join(pieces))
        return texts


class TokenModel:
    """Maps ids (B, L) to logits (B, L, V)."""

    def __init__(self, folder: Path) -> None:
        from hybridnas.export.load import load

        self.model = load(folder)

    def predict(self, model_input: Any, params: Mapping[str, Any] | None = None) -> npt.NDArray[Any]:
        """Return the logits of ids, an integer array (B, L)."""
        import numpy
        import torch

        if isinstance(model_input, Mapping):
            model_input = model_input["ids"]
        ids_BL = torch.from_numpy(numpy.ascontiguousarray(model_input, dtype=numpy.int64))
        with torch.no_grad():
            logits_BLV: npt.NDArray[Any] = self.model(ids_BL).logits.float().numpy()
        return logits_BLV


def _load_pyfunc(path: str) -> TextModel | TokenModel:
    """Return the model of a folder; MLflow calls this function by its name."""
    folder = Path(path)
    return TextModel(folder) if (folder / TOKENIZER_FILES[0]).is_file() else TokenModel(folder)


def _prompts(model_input: Any) -> list[str]:
    if isinstance(model_input, str):
        return [model_input]
    if hasattr(model_input, "columns"):  # a DataFrame of pandas
        columns = list(model_input.columns)
        if "prompt" not in columns and len(columns) != 1:
            raise ConfigError(
                f"the model reads one column of prompts, got {columns}; name one 'prompt'",
                field="prompt",
                got=columns,
                allowed="prompt",
            )
        model_input = model_input["prompt" if "prompt" in columns else columns[0]]
    return [str(prompt) for prompt in model_input]
