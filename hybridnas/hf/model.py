"""HybridNASForCausalLM: any architecture as a causal language model of transformers.

Shapes: B batch, L length, D d_model, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from hybridnas.arch.model import HybridLM
from hybridnas.arch.padding import hidden_of_rows
from hybridnas.errors import ConfigError, ExportError
from hybridnas.export.layout import WEIGHTS, make_config, stored_tensors
from hybridnas.hf.cache import HybridNASCache, can_crop, given_cache
from hybridnas.hf.config import HybridNASConfig, check_words
from hybridnas.layers.block import truncated_normal_


class HybridNASForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """A :class:`HybridLM` (``model``) with the interface of transformers; the folder's tensors have no ``model.``.

    Padding (``attention_mask``, on either side or between) is not read: a row gives what it gives alone. What stands
    in a padded column is the row's last result before it. ``position_ids`` must count up; where they start again and
    no cache is used, another document starts, and documents do not see each other. In training the loss has the
    auxiliary losses of routed experts in it.
    """

    config: HybridNASConfig
    config_class = HybridNASConfig
    base_model_prefix = "model"
    _no_split_modules = ("ResidualLayer",)

    def __init__(self, config: HybridNASConfig) -> None:
        super().__init__(config)
        check_words(config)
        self.model = HybridLM(config.to_arch(), seed=torch.initial_seed() % 2**63)
        self._settle()

    @classmethod
    def wrap(cls, model: HybridLM) -> HybridNASForCausalLM:
        """Return a model around one that exists, whose weights it shares."""
        config = HybridNASConfig.from_arch(model.arch)
        config.dtype = model.embedding.weight.dtype
        with torch.device("meta"):
            found = cls(config)
        found.model = model
        found._settle()
        found.train(model.training)
        return found

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **settings: Any) -> Any:
        """Load a folder or a repository as other models of transformers, from safetensors alone: pickles are not read.

        Raises ExportError for tensors that miss.
        """
        settings["use_safetensors"] = True
        try:
            model, info = super().from_pretrained(*args, output_loading_info=True, **settings)
        except SafetensorError as error:
            raise ExportError(
                f"{args[0] if args else WEIGHTS}: {WEIGHTS} cannot be read ({error}); export the model again",
                field=WEIGHTS,
                got=str(error),
            ) from None
        for what, names in (("lacks", info["missing_keys"]), ("has an unknown", info["unexpected_keys"])):
            if names:
                first = min(names).removeprefix("model.")
                raise ExportError(
                    f"{args[0] if args else WEIGHTS} {what} tensor {first!r}; export the model again",
                    field=first,
                    got=sorted(names),
                )
        return (model, info) if output_loading_info else model

    def _settle(self) -> None:
        """Tell transformers what depends on the architecture: tied tensors, those kept in float32, states."""
        self._keep_in_fp32_modules_strict = {
            f"model.{name}.{own}".replace(".", r"\.") + "$"
            for name, block in self.model.named_modules()
            for own in getattr(block, "float32", ())
        }
        self._is_stateful = not can_crop(self.model)
        self.post_init()

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """Return the name of each tensor that is another one too -> the name under which a folder holds it."""
        first: dict[int, str] = {}
        tied = {}
        for name, tensor in self.state_dict(keep_vars=True).items():
            if first.setdefault(id(tensor), name) != name:
                tied[name] = first[id(tensor)]
        return tied

    def _init_weights(self, module: nn.Module) -> None:
        """Do nothing: HybridLM has drawn its weights, and a tensor that a folder lacks is refused."""

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embedding

    def get_output_embeddings(self) -> nn.Module:
        return self.model.head

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.model.embedding = value

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        head = self.model.head
        if type(new_embeddings) is nn.Linear and type(head) is not nn.Linear:  # resized: the cap of logits stays
            head.weight, head.out_features = new_embeddings.weight, new_embeddings.out_features
        else:
            self.model.head = new_embeddings

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Module:
        """Give the model another number of tokens, as other models of transformers; the architecture says so too.

        Rows of embedding and head are cut off or added at the end. Added ones are drawn around the mean of the others,
        or with ``mean_resizing=False`` as in a new model.
        """
        old, config = self.model.arch.vocab_size, self.model.arch.model
        found: nn.Embedding = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        arch = self.model.arch.replace(vocab_size=found.weight.shape[0])
        if not mean_resizing and arch.vocab_size > old:
            fan_in = config.d_model if config.tie_embeddings else 1
            truncated_normal_(found.weight[old:], fan_in, config.init_scale)
            if not config.tie_embeddings:
                truncated_normal_(self.model.head.weight[old:], config.d_model, config.init_scale)
        self.model.arch = arch
        about = make_config(arch, {}, "float32")
        for name in ("arch", "fingerprint", "vocab_size", "cost"):
            setattr(self.config, name, about[name])
        return found

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: HybridNASCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Return logits (B, L, V), the loss [nats] where labels (B, L) are given, and the cache.

        As in transformers: ``attention_mask`` (B, L), or (B, all columns) with a cache; ``labels`` are shifted here and
        count where they are not -100; ``logits_to_keep`` restricts the head to the last columns, or to an index.
        Raises ConfigError for what these models do not have: embeddings as input, attention maps, hidden states.
        """
        for name, got in (
            ("inputs_embeds", inputs_embeds),
            ("output_attentions", output_attentions or None),
            ("output_hidden_states", output_hidden_states or None),
        ):
            if got is not None:
                raise ConfigError(
                    f"{name} is not something that these models take; give input_ids and read logits",
                    field=name,
                    got=type(got).__name__,
                    allowed=None,
                )
        if kwargs.get("segments") is not None:
            raise ConfigError(
                "segments is not something that these models take; give position_ids that start again from 0 with each "
                "document",
                field="segments",
                got=type(kwargs["segments"]).__name__,
                allowed=None,
            )
        if input_ids is None:
            raise ConfigError("forward needs input_ids (B, L), got none", field="input_ids", got=None, allowed="(B, L)")
        cache = given_cache(past_key_values)
        if use_cache is None:
            causal = all(node.config.causal for node in self.model.arch.nodes)
            use_cache = self.config.use_cache and not self.training and causal
            if cache is None and position_ids is not None:
                real_BL = _real(attention_mask, input_ids, 0)
                again_BL = position_ids.expand_as(input_ids)[:, 1:] == 0
                if real_BL is not None:  # positions at padding mean nothing
                    again_BL = again_BL & real_BL[:, 1:] & real_BL[:, :-1]
                use_cache = use_cache and not bool(again_BL.any())  # no state goes on from one document to another
        if use_cache and cache is None:
            cache = HybridNASCache()
        real_BL = _real(attention_mask, input_ids, 0 if cache is None else cache.columns)
        if cache is not None:
            x_BLD, losses = cache.read(self.model, input_ids, real_BL, position_ids), {}
        else:
            document_BL = _documents(input_ids, real_BL, position_ids)
            if document_BL is None:
                x_BLD, _, aux = self.model.hidden(input_ids)
                losses = dict(aux.losses)
            else:
                x_BLD, aux = hidden_of_rows(self.model, input_ids, document_BL)
                losses = dict(aux.losses)
        if real_BL is not None:
            x_BLD = _held(x_BLD, real_BL)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits_BLV = self.model.head(x_BLD[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits_BLV, labels=labels, vocab_size=self.model.arch.vocab_size, **kwargs)
            if self.training:
                loss = loss + sum(losses.values())
        output = CausalLMOutputWithPast(loss=loss, logits=logits_BLV, past_key_values=cache if use_cache else None)
        return output.to_tuple() if return_dict is False else output

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        """Leave out the positions of tokens that were drawn, which transformers counts from a row's last column."""
        found: dict[str, Any] = super().prepare_inputs_for_generation(input_ids, **kwargs)
        cache = found.get("past_key_values")
        if isinstance(cache, HybridNASCache) and cache.columns and found["input_ids"].shape[1] == 1:
            found.pop("position_ids", None)
        return found

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # a DynamicCache holds keys and values alone

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *rest: Any) -> None:
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *rest)
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = HybridNASCache()

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        **settings: Any,
    ) -> None:
        """Write the model as transformers does; without adapters, a folder that ``hybridnas.load`` reads too."""
        if not getattr(self, "_hf_peft_config_loaded", False):
            if state_dict is None:
                state_dict = {f"model.{name}": tensor for name, tensor in stored_tensors(self.model).items()}
            tied = self.get_expanded_tied_weights_keys()
            state_dict = {name.removeprefix("model."): t for name, t in state_dict.items() if name not in tied}
        super().save_pretrained(save_directory, is_main_process=is_main_process, state_dict=state_dict, **settings)


def _real(attention_mask: Tensor | None, ids_BL: Tensor, columns: int) -> Tensor | None:
    """Return where ids are no padding, bool (B, L), or None where none is."""
    if attention_mask is None:
        return None
    rows, length = ids_BL.shape
    if attention_mask.shape not in ((rows, length), (rows, columns + length)):
        raise ConfigError(
            f"attention_mask must be 0 and 1 for each of the {rows} x {columns + length} tokens read so far, got shape "
            f"{tuple(attention_mask.shape)}; masks of pairs of tokens mean nothing to recurrent blocks",
            field="attention_mask",
            got=tuple(attention_mask.shape),
            allowed=(rows, columns + length),
        )
    real_BL = attention_mask[:, -length:] != 0
    return None if bool(real_BL.all()) else real_BL


def _documents(ids_BL: Tensor, real_BL: Tensor | None, position_ids: Tensor | None) -> Tensor | None:
    """Return the number of each token's document in its row from 1, 0 at padding; None where rows are one whole."""
    if position_ids is None:
        return None if real_BL is None else real_BL.long()
    position_BL = position_ids.expand_as(ids_BL)
    if real_BL is None:
        real_BL = torch.ones_like(ids_BL, dtype=torch.bool)
    row_T, column_T = real_BL.nonzero(as_tuple=True)
    position_T = position_BL[row_T, column_T]
    rises_T = position_T[1:] == position_T[:-1] + 1
    starts_T = (position_T[1:] == 0) | (row_T[1:] != row_T[:-1])
    if not bool((rises_T | starts_T).all()):
        raise ConfigError(
            "position_ids must rise by one from token to token, or start again from 0 with another document",
            field="position_ids",
            got=position_BL.tolist() if position_BL.numel() <= 64 else tuple(position_BL.shape),
            allowed="consecutive numbers",
        )
    if bool(real_BL.all()) and not bool((starts_T & (row_T[1:] == row_T[:-1])).any()):
        return None
    start_BL = (position_BL == 0) & real_BL
    first_B1 = real_BL.long().argmax(dim=1, keepdim=True)
    start_BL = start_BL.scatter(1, first_B1, real_BL.gather(1, first_B1))
    return start_BL.long().cumsum(dim=1) * real_BL


def _held(x_BLD: Tensor, real_BL: Tensor) -> Tensor:
    """Return x with the row's last real result in padded columns, 0 before the first."""
    columns_L = torch.arange(x_BLD.shape[1], device=x_BLD.device)
    last_BL = torch.where(real_BL, columns_L, -1).cummax(dim=1).values
    found_BLD = x_BLD.gather(1, last_BL.clamp(min=0)[..., None].expand_as(x_BLD))
    return found_BLD * (last_BL >= 0)[..., None]
