"""A process of its own that loads a folder with transformers and writes its logits: whole, in pieces, token by token.

``python -m hybridnas.export.hf.reload FOLDER IDS OUT [FOLDER IDS OUT ...]``: IDS is a file of safetensors with ``ids``
(B, L), OUT gets ``prefill``, ``chunked`` (L logits each) and ``decoded`` (those of the second half, each token after
the state of all before it). A line of JSON is printed for each folder: the class, and the names of weights that it
lacked or did not know; or the ``error`` that stopped it.
"""

from __future__ import annotations

import json
import sys
import warnings
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


@torch.no_grad()
def write_logits(folder: str, ids_path: str, out: str) -> dict[str, Any]:
    """Load the folder in float32 on the CPU, write the logits, and return the facts."""
    import transformers

    ids_BL = load_file(ids_path)["ids"]
    length = ids_BL.shape[1]
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
    )
    model.eval()
    save_file(
        {
            "prefill": model(ids_BL, use_cache=False).logits.contiguous(),
            "chunked": _continued(model, ids_BL, [length // 3, length - length // 3]),
            "decoded": _continued(model, ids_BL, [length // 2, *[1] * (length - length // 2)])[
                :, length // 2 :
            ].clone(),
        },
        out,
    )
    lacking = {key: sorted(map(str, info[key])) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    return {"class": type(model).__name__, "transformers": transformers.__version__, **lacking}


def main(*paths: str) -> None:
    """Do so for every three of the paths."""
    for i in range(0, len(paths), 3):
        try:
            found = write_logits(*paths[i : i + 3])
        except Exception as error:  # whatever transformers raises is a fact about the folder
            found = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
        print(json.dumps(found), flush=True)


def _continued(model: Any, ids_BL: Tensor, sizes: list[int]) -> Tensor:
    """Return the logits of pieces of a text, each read after the cache of those before it."""
    cache: dict[str, Any] = {}
    found, start = [], 0
    for chunk_BL in torch.split(ids_BL, sizes, dim=1):
        # generate gives positions too; Mamba's classes have none
        places = torch.arange(start, start + chunk_BL.shape[1]).expand(len(ids_BL), -1)
        positions = {} if "cache_params" in cache else {"position_ids": places}
        output = model(chunk_BL, use_cache=True, **cache, **(positions if start else {}))
        key = "past_key_values" if hasattr(output, "past_key_values") else "cache_params"
        cache = {key: getattr(output, key)}
        found.append(output.logits)
        start += chunk_BL.shape[1]
    return torch.cat(found, dim=1)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(*sys.argv[1:])
