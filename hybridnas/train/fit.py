"""``hybridnas.fit``: train a module or an architecture on data, in one call."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridnas.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from hybridnas.arch.arch import Arch
    from hybridnas.data.source import Source, SourceConfig
    from hybridnas.train.callbacks import Callback
    from hybridnas.train.distill import Teacher
    from hybridnas.train.records import TrainResult
    from hybridnas.train.start import Lora

log = logging.getLogger("hybridnas.train")


def fit(
    model: Arch | nn.Module,
    data: str | Mapping[str, Any] | SourceConfig | Source = "stdlib",
    *,
    tokens: int | None = None,
    callbacks: Iterable[Callback] = (),
    folder: str | Path | None = None,
    device: str | None = None,
    max_seconds: float | None = None,
    impl: str = "auto",
    labels: Mapping[str, str] | None = None,
    freeze: Sequence[str] = (),
    lora: Lora | Mapping[str, Any] | int | None = None,
    weights: Mapping[str, Any] | None = None,
    teacher: Teacher | None = None,
    moments: Mapping[str, Tensor] | None = None,
    **settings: Any,
) -> TrainResult:
    """Train a model as a language model and return what was measured, with the trained model.

    ``model``: an architecture, whose weights are drawn from ``seed``; or any module from ids (B, L) to logits
    (B, L, V), as a tensor, as an object with ``.logits`` or as the first of a tuple, which is trained in place.
    ``data``: a kind of data by name, its settings as a mapping (``{"kind": "text", "path": "docs/"}``), a config or an
    open source. ``tokens``: training tokens in all. ``callbacks``: see :mod:`hybridnas.train.callbacks`.

    ``folder``: without one nothing is written; with one, the same call again goes on where the last one stopped, to the
    bit on a processor, and a finished run is read back. ``device``: none is where the module's weights lie, and for an
    architecture a GPU where there is one. ``labels`` are kept with the run to name it by, as ``{"preset": "mamba"}``
    does in comparisons.

    ``freeze``: patterns of names of parameters that are not trained (``["embedding.*", "layers.0.*"]``), from here on.
    ``lora``: train adapters of this rank alone, by PEFT (:class:`hybridnas.train.start.Lora` for more settings); a run
    that is completed leaves the model with what they have learnt in its own weights, any other leaves it as it was.
    ``weights``: a name of the weights that a module starts from, which a folder's run must agree with.
    ``teacher``: another model whose logits and hidden states a HybridLM learns from, too
    (:class:`hybridnas.train.distill.Teacher`). ``moments``: of the optimizer at the first step, as a checkpoint has.

    ``settings``: fields of :class:`hybridnas.TrainConfig` (``lr=``,
    ``batch_size=``, ``seq_len=``, ``eval_at=``, ``seed=`` ...).

    A run that diverges raises nothing: its result has ``status="failed"``, the ``reason``, no model, and the
    measurements made before, none where it ended before the first; a warning is logged.

    Raises ConfigError for settings or a model that cannot be trained, DataError for data that does not fit, and what
    :func:`hybridnas.train.run` raises.
    """
    from torch import nn

    from hybridnas.arch.arch import Arch
    from hybridnas.data.source import SourceConfig, open_source, source_config
    from hybridnas.train import start
    from hybridnas.train.config import TrainConfig
    from hybridnas.train.loop import run

    if not isinstance(model, (Arch, nn.Module)):
        raise ConfigError(
            f"fit takes an Arch or a torch module, got {type(model).__name__}; make an Arch by hybridnas.preset(name) "
            f"or hybridnas.Arch.from_pattern(text)",
            field="model",
            got=type(model).__name__,
            allowed=["Arch", "torch.nn.Module"],
        )
    if isinstance(data, str):
        data = source_config({"kind": data})
    elif isinstance(data, Mapping):
        data = source_config(data)
    source: Source = open_source(data) if isinstance(data, SourceConfig) else data
    seq_len = source.context(settings.pop("seq_len", None), TrainConfig().seq_len)
    given = {"seq_len": seq_len, **settings}
    config = TrainConfig.from_dict(given if tokens is None else {**given, "tokens": tokens})
    if (freeze or lora is not None) and not isinstance(model, nn.Module):
        raise ConfigError(
            "fit freeze= and lora= are for weights that exist; give a model, such as hybridnas.load(folder)",
            field="freeze" if freeze else "lora",
            got=list(freeze) or lora,
            allowed=None,
        )
    if device is None:
        weight = next(iter(model.parameters()), None) if isinstance(model, nn.Module) else None
        device = "auto" if weight is None else str(weight.device)
    if isinstance(model, nn.Module):
        start.freeze(model, freeze, some_left=lora is None)
    around: AbstractContextManager[None] = nullcontext()
    if lora is not None and isinstance(model, nn.Module):
        around = start.adapted(model, start.Lora.of(lora), seed=config.seed)
    with around:
        result = run(
            model,
            source,
            config,
            folder=folder,
            device=device,
            callbacks=callbacks,
            max_seconds=max_seconds,
            impl=impl,
            labels=labels,
            start=weights,
            teacher=teacher,
            moments=moments,
        )
        if lora is not None and result.status == "completed" and result.model is not None:
            start.fold(result.model)
    if result.status == "failed":
        log.warning("the run failed after %d measurements: %s", len(result.evals), result.reason)
    return result
