"""The architecture that ``preset=`` or ``pattern=`` with ``arch.*`` ask for, the same in every command."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hybridnas.errors import ConfigError

if TYPE_CHECKING:
    from hybridnas.arch.arch import Arch


def wanted_arch(config: dict[str, Any], vocab_size: int | None = None) -> Arch | None:
    """Return the architecture, or None when neither is given; ``vocab_size`` is the data's, where data is read.

    Raises ConfigError when both are given or a pattern lacks its width.
    """
    from hybridnas.arch.arch import Arch
    from hybridnas.arch.presets import preset

    chosen, pattern = config.get("preset"), config.get("pattern")
    fields = {key: value for key, value in (config.get("arch") or {}).items() if value is not None}
    if vocab_size is not None:
        fields.setdefault("vocab_size", vocab_size)
    if chosen and pattern:
        raise ConfigError(f"give preset={chosen['name']} or pattern={pattern!r}, not both")
    if chosen:
        own = {key: value for key, value in chosen.items() if key != "name" and value is not None}
        if vocab_size is not None:
            own["vocab_size"] = fields["vocab_size"]
        return preset(chosen["name"], **{**own, **fields})
    if not pattern:
        return None
    if "d_model" not in fields:
        raise ConfigError(f"pattern={pattern!r} needs a width: arch.d_model=64")
    fields.setdefault("vocab_size", 256)
    return Arch.from_pattern(pattern, **fields)
