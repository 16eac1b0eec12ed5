"""HybridNASConfig: config.json of an exported folder as a configuration of transformers."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import PreTrainedConfig

from hybridnas.arch.arch import Arch
from hybridnas.errors import ConfigError, ExportError
from hybridnas.export.layout import CONFIG, MODEL_TYPE, make_config
from hybridnas.export.load import arch_of


class HybridNASConfig(PreTrainedConfig):  # type: ignore[misc]
    """The content of config.json, with the architecture under ``arch`` as :meth:`Arch.to_dict` gives it.

    Sizes such as ``vocab_size`` are there for other programs to read; the model is built from ``arch`` alone. Raises
    ExportError for an architecture that cannot be read, or that differs from its fingerprint.
    """

    model_type: ClassVar[str] = MODEL_TYPE
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    has_no_defaults_at_init: ClassVar[bool] = True

    arch: dict[str, Any] | None = None
    vocab_size: int | None = None
    hidden_size: int | None = None
    num_hidden_layers: int | None = None
    tie_word_embeddings: bool = False
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.arch is not None and "fingerprint" in kwargs:
            arch_of({"arch": self.arch, **kwargs}, CONFIG)
        super().__post_init__(**kwargs)

    @classmethod
    def from_arch(cls, arch: Arch) -> HybridNASConfig:
        """Return the configuration of an architecture."""
        fields = make_config(arch, {}, "float32")
        fields.pop("model_type")
        return cls(**fields)

    def to_arch(self) -> Arch:
        """Return the architecture; raises ConfigError where the configuration has none."""
        if self.arch is None:
            raise ConfigError(
                f"a {type(self).__name__} without arch describes no model; give the folder that hybridnas exported, or "
                "use HybridNASConfig.from_arch",
                field="arch",
                got=None,
                allowed="what Arch.to_dict returns",
            )
        return Arch.from_dict(self.arch)


def check_words(config: HybridNASConfig) -> None:
    """Raise ExportError where a size was changed beside the architecture, which would have no effect."""
    arch = config.to_arch()
    for name, allowed in (("vocab_size", arch.vocab_size), ("hidden_size", arch.d_model)):
        got = getattr(config, name)
        if got not in (None, allowed):
            raise ExportError(
                f"{CONFIG} has {name}={got}, but its architecture has {allowed}; change the architecture under 'arch'",
                field=name,
                got=got,
                allowed=allowed,
            )
