"""Our models as classes of transformers: ``import hybridnas.hf`` registers them with its Auto classes.

>>> import hybridnas.hf
>>> from transformers import AutoModelForCausalLM, AutoTokenizer
>>> model = AutoModelForCausalLM.from_pretrained("runs/mamba_moe-smoke/best")

``generate`` with all its options, pipelines, Trainer and PEFT then work on any architecture; no code is downloaded.
Needs transformers: ``pip install 'hybridnas[hf]'``.
"""

from hybridnas.hf.cache import HybridNASCache
from hybridnas.hf.config import HybridNASConfig
from hybridnas.hf.model import HybridNASForCausalLM

__all__ = ["HybridNASCache", "HybridNASConfig", "HybridNASForCausalLM"]


def _register() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    AutoConfig.register(HybridNASConfig.model_type, HybridNASConfig, exist_ok=True)
    AutoModelForCausalLM.register(HybridNASConfig, HybridNASForCausalLM, exist_ok=True)


_register()
