"""What the model families share: the stack of blocks, the language-model head, and what transformers expects of both.

A family adds its config class and the layer that it puts into a block; everything else is here, once.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Cache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from mambalm.layers import Attention, Block, GatedMLP, Mamba, Mamba2, RMSNorm
from mambalm.layers.block import add_and_normalise
from mambalm.layers.hooks import hooked, hooked_everywhere
from mambalm.layers.state import State
from mambalm.models.arguments import full_precision, kept_positions, one_cache, one_of, refuse_unused
from mambalm.models.cache import StateCache, is_recurrent, new_cache, read_cache, write_cache
from mambalm.models.outputs import BackboneOutput, CausalLMOutput, cache_name
from mambalm.models.padding import Packing, find_packing
from mambalm.models.quantized import plain_projections, require_intact_weights, with_default_skips
from mambalm.models.writing import full_disks_told, initialised, share
from mambalm.ops import linear_cross_entropy

IGNORE_INDEX = -100


class MambaBlock(GradientCheckpointingLayer, Block):
    """`Block` as transformers recomputes, places and shards it."""


class MambalmPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation, for every family."""

    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    # Trainer hands over the number of tokens of all accumulated batches, and the loss is divided by it.
    accepts_loss_kwargs = True
    _no_split_modules = ["MambaBlock"]  # noqa: RUF012, transformers declares it
    _is_stateful = True

    @staticmethod
    def make_block(config: PreTrainedConfig, layer_idx: int) -> MambaBlock:
        """The block of one layer: what makes a family."""
        raise NotImplementedError("a family defines make_block")

    @staticmethod
    def make_norm(config: PreTrainedConfig) -> RMSNorm | nn.LayerNorm:
        """A norm over the residual stream."""
        return RMSNorm(config.hidden_size, config.layer_norm_epsilon)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # transformers' generic values, which a mixer then replaces by its own: it comes after the modules inside it.
        super()._init_weights(module)
        if isinstance(module, Mamba | Mamba2 | Attention | GatedMLP):
            rescale = getattr(self.config, "rescale_prenorm_residual", False)
            module.reset_parameters(self.residual_branches if rescale else 1)

    def _initialize_weights(self, module: nn.Module, *_: Any) -> None:
        # Without the word that this is custom code, for which transformers leaves out modules that have no parameter of
        # their own, Attention and GatedMLP: such code may write over values that were read, which `assign` does not.
        super()._initialize_weights(module)

    @property
    def residual_branches(self) -> int:
        """How many outputs are added up in the residual stream."""
        return self.config.num_hidden_layers

    @classmethod
    def from_pretrained(cls, *args: Any, quantization_config: Any = None, **kwargs: Any) -> Any:
        """transformers' `from_pretrained`; quantisers leave x_proj, dt_proj, conv1d, embeddings and head as they are.

        A quantisation config that names the modules to skip itself is taken as it is.
        """
        if quantization_config is not None:
            kwargs["quantization_config"] = with_default_skips(quantization_config)
        return super().from_pretrained(*args, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """transformers' `save_pretrained`, which writes every tensor in the dtype that it has.

        Raises:
            OSError: the directory cannot be written to, or the disk is full.
            ValueError: 4-bit weights that bitsandbytes would write wrong.
        """
        require_intact_weights(self)
        with full_disks_told(Path(save_directory)), initialised(self.config):
            super().save_pretrained(save_directory, *args, **kwargs)
            share(Path(save_directory), "config.json")


class MambalmModel(MambalmPreTrainedModel):
    """The stack of blocks between the embeddings and the final norm."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.embeddings: nn.Module = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(self.make_block(config, index) for index in range(config.num_hidden_layers))
        self.norm_f: RMSNorm | nn.LayerNorm = self.make_norm(config)
        self.gradient_checkpointing = False
        plain_projections(self)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The token embeddings."""
        return self.embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embeddings."""
        self.embeddings = value

    def init_state(self, batch_size: int, dtype: torch.dtype | None = None, device: Any = None) -> State:
        """The state before the first token; `dtype` is that of the activations, by default the parameters'."""
        blocks: Any = self.layers
        layers = tuple(block.init_state(batch_size, dtype=dtype, device=device) for block in blocks)
        return State(layers, torch.zeros(batch_size, dtype=torch.int64, device=device or self.device))

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        cache_params: State | Cache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        packing: Packing | None = None,
        cache: State | Cache | None = None,
        **unused: Any,
    ) -> tuple[Any, ...] | BackboneOutput:
        """Read tokens on from a state.

        Args:
            input_ids, inputs_embeds: (b, l) or (b, l, d), one of them.
            cache_params: what was read before. A `State` stays as it is and the new one is in the output,
                differentiable; a transformers `Cache` is updated in place, without gradient.
            use_cache: return the state; a cache is made if none was given. By default outside training.
            output_hidden_states: return the residual stream after each block as well.
            attention_mask: (b, m), m ≥ l; 0 marks padding, on any side. A row of padding keeps its state.
            position_ids: (b, l), read only for where documents begin; see `find_packing`.
            cu_seqlens: (s+1), offsets of documents packed into one row; the state then has s rows.
            packing: where the documents are, for a caller that knows; the three before are not read then.
            cache: transformers' name for `cache_params` from 5.24 on.

        Raises:
            TypeError: an argument that has no meaning here.
            ValueError: shapes that do not fit; the message names the tensor.
        """
        refuse_unused(unused)
        cache_params = one_cache(cache_params, cache)
        tokens = one_of(input_ids, inputs_embeds)
        shape = (tokens.shape[0], tokens.shape[1])
        if packing is None:
            packing = find_packing(
                shape, attention_mask=attention_mask, position_ids=position_ids, cu_seqlens=cu_seqlens
            )
        if use_cache is None:
            use_cache = cache_params is not None or (self.config.use_cache and not self.training)
        if use_cache and cache_params is None:
            cache_params = new_cache(self.config)
        state = self._state(cache_params, shape[0] if packing is None else len(packing.cu_seqlens) - 1)
        tokens = tokens if packing is None else packing.gather(tokens)
        x, new_state, streams = self._run(tokens, state, packing, cache_params is not None, output_hidden_states)
        cache = new_state
        if isinstance(cache_params, Cache) and new_state is not None:
            write_cache(cache_params, new_state)
            cache = cache_params
        cache = cache if use_cache else None
        hidden = None if streams is None else (*streams, x)
        if not (self.config.return_dict if return_dict is None else return_dict):
            return tuple(value for value in (x, cache, hidden) if value is not None)
        return BackboneOutput(last_hidden_state=x, cache=cache, hidden_states=hidden)

    def _state(self, given: State | Cache | None, rows: int) -> State | None:
        """The state to read on from, checked against the number of rows (of packed documents)."""
        state = given if given is None or isinstance(given, State) else read_cache(given)
        if state is None:
            return None
        if len(state.layers) != len(self.layers):
            raise ValueError(f"the state has {len(state.layers)} layers, the model {len(self.layers)}")
        if state.batch_size != rows:
            raise ValueError(
                f"the state has {state.batch_size} rows and the input {rows} (packed documents count as rows): "
                "choose rows with state.index(rows), or pass no state"
            )
        return state

    def _run(
        self,
        tokens: torch.Tensor,
        state: State | None,
        packing: Packing | None,
        return_state: bool,
        output_hidden_states: bool | None,
    ) -> tuple[torch.Tensor, State | None, list[torch.Tensor] | None]:
        """The blocks and the final norm, on tokens as they lie packed; the results lie as the batch does."""
        cu_seqlens = None if packing is None else packing.cu_seqlens
        x = tokens if tokens.is_floating_point() else self.embeddings(tokens)
        collect = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        streams: list[torch.Tensor] = []
        after = []
        branch: torch.Tensor | None = None
        apart = not collect and not any(_is_watched(layer) for layer in self.layers)
        for index, layer in enumerate(self.layers):
            before = None if state is None else state.layers[index]
            x = layer(x, before, cu_seqlens, return_state, branch, apart)
            if return_state:
                x, new = x
                after.append(new)
            if apart:
                x, branch = x
            if collect:
                streams.append(x if packing is None else packing.scatter(x))
        x, _ = add_and_normalise(self.norm_f, x, branch)
        new_state = State(tuple(after), _position(tokens, state, packing)) if return_state else None
        return x if packing is None else packing.scatter(x), new_state, streams if collect else None


class MambalmForCausalLM(MambalmPreTrainedModel, GenerationMixin):
    """A backbone with a language-model head, tied to the embeddings if the config says so."""

    backbone_class: type[MambalmModel]
    _tied_weights_keys = {"lm_head.weight": "backbone.embeddings.weight"}  # noqa: RUF012, transformers declares it

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.backbone = self.backbone_class(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The token embeddings."""
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embeddings."""
        self.backbone.set_input_embeddings(value)

    def init_state(self, batch_size: int, dtype: torch.dtype | None = None, device: Any = None) -> State:
        """The state before the first token; `dtype` is that of the activations, by default the parameters'."""
        return self.backbone.init_state(batch_size, dtype=dtype, device=device)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        cache_params: State | Cache | None = None,
        labels: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        position_ids: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        num_items_in_batch: int | torch.Tensor | None = None,
        skip_logits: bool = False,
        targets: torch.Tensor | None = None,
        z_loss: float = 0.0,
        cache: State | Cache | None = None,
        **unused: Any,
    ) -> tuple[Any, ...] | CausalLMOutput:
        """Logits of the next tokens; see `MambalmModel.forward` for the arguments that are not listed.

        Args:
            labels: (b, l), the tokens themselves: they are shifted here. -100 and padding are ignored, and so is each
                document's first token, which nothing before it predicts.
            logits_to_keep: compute the logits of the last so many positions (0: all), or of these positions.
            num_items_in_batch: divide the sum of the losses by this instead of by the number of labels.
            skip_logits: with labels, return the loss alone: tokens x vocabulary logits are never held in memory.
            targets: (b, l), instead of labels: what each position predicts, as a data loader has shifted it.
            z_loss: weight of the squared log-normaliser in the loss, as in `mambalm.ops.linear_cross_entropy`.

        Raises:
            TypeError, ValueError: arguments that exclude each other, or see `MambalmModel.forward`.
        """
        if labels is not None and targets is not None:
            raise ValueError("labels and targets exclude each other: give the tokens, or what each one predicts")
        if skip_logits and labels is None and targets is None:
            raise ValueError("skip_logits leaves nothing to compute without labels: give labels, or do not skip")
        tokens = one_of(input_ids, inputs_embeds)
        shape = (tokens.shape[0], tokens.shape[1])
        packing = find_packing(shape, attention_mask=attention_mask, position_ids=position_ids, cu_seqlens=cu_seqlens)
        outputs = self.backbone(
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            cache_params=one_cache(cache_params, cache),
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            packing=packing,
            **unused,
        )
        hidden = outputs.last_hidden_state
        logits = None
        if not skip_logits:
            logits = full_precision(self.lm_head(kept_positions(hidden, logits_to_keep)))
        loss = None
        if targets is not None:
            if targets.shape != hidden.shape[:2]:
                raise ValueError(f"targets is {tuple(targets.shape)}, expected {tuple(hidden.shape[:2])}")
            loss = self._loss(hidden, targets, num_items_in_batch, z_loss)
        elif labels is not None:
            loss = self._loss(*_shifted(hidden, labels, packing), num_items_in_batch, z_loss)
        if not (self.config.return_dict if return_dict is None else return_dict):
            rest = (outputs.cache, outputs.hidden_states)
            return tuple(value for value in (loss, logits, *rest) if value is not None)
        return CausalLMOutput(loss=loss, logits=logits, cache=outputs.cache, hidden_states=outputs.hidden_states)

    def _loss(
        self,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        num_items_in_batch: int | torch.Tensor | None,
        z_loss: float,
    ) -> torch.Tensor:
        """The loss of hidden (b, l, d), each position of which predicts its target (b, l)."""
        targets = targets.to(hidden.device)
        if num_items_in_batch is None:
            # Of nothing to learn the loss is 0, not NaN: a batch of padding or prompts must not destroy the weights.
            num_items_in_batch = (targets != IGNORE_INDEX).sum().clamp(min=1)
        options: Any = {"ignore_index": IGNORE_INDEX, "reduction": "sum"}
        if type(self.lm_head) is nn.Linear and not hooked(self.lm_head):
            weight, bias = self.lm_head.weight, self.lm_head.bias
            loss = linear_cross_entropy(hidden, weight, targets, bias=bias, z_loss=z_loss, **options)
        else:
            # An adapted or quantised head computes with more than its weight, an offloaded one brings it when called.
            logits = full_precision(self.lm_head(hidden)).flatten(0, 1)
            loss = F.cross_entropy(logits, targets.flatten(), **options)
            if z_loss:
                loss = loss + z_loss * logits[targets.flatten() != IGNORE_INDEX].logsumexp(-1).square().sum()
        return loss / num_items_in_batch

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """transformers' own, but a step behind the prompt gets no mask: its one token is real in every row."""
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(*args, **kwargs)
        if kwargs.get("use_cache") and not kwargs.get("is_first_iteration"):
            inputs["attention_mask"] = None
        return inputs

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        # `generate` keeps one cache object and reorders it in place, which a State, being a value, is not for.
        cache = one_cache(model_kwargs.pop("cache_params", None), model_kwargs.pop("cache", None))
        if isinstance(cache, State):
            cache = StateCache(cache)
            cache.batch_repeat_interleave(
                max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
            )
        elif cache is None and generation_config.use_cache is not False and not is_recurrent(self.config):
            cache = StateCache()
        if cache is not None:
            model_kwargs[cache_name()] = cache
        return super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)  # type: ignore[misc]


def _is_watched(layer: nn.Module) -> bool:
    """Whether someone else sees or keeps what a block takes and gives: hooks, checkpointing. FSDP's only pass it on."""
    all_hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    hooks = (hook for hooks in all_hooks for hook in hooks.values())
    if hooked_everywhere() or any(
        not getattr(hook, "__module__", "").startswith("torch.distributed.") for hook in hooks
    ):
        return True
    return hasattr(layer, "_hf_hook") or (layer.training and getattr(layer, "gradient_checkpointing", False))


def _shifted(hidden: torch.Tensor, labels: torch.Tensor, packing: Packing | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states as they lie packed, and what each position predicts: the label of the next."""
    if labels.shape != hidden.shape[:2]:
        raise ValueError(f"labels is {tuple(labels.shape)}, expected the input's {tuple(hidden.shape[:2])}")
    labels = labels.to(hidden.device)
    if packing is not None:
        hidden, labels = packing.gather(hidden), packing.targets(labels, IGNORE_INDEX)
    return hidden, torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORE_INDEX)], dim=1)


def _position(tokens: torch.Tensor, state: State | None, packing: Packing | None) -> torch.Tensor:
    """Tokens that each row has read after these."""
    if packing is not None:
        read = packing.lengths
    else:
        read = torch.full((tokens.shape[0],), tokens.shape[1], dtype=torch.int64, device=tokens.device)
    return read if state is None else state.position.to(read.device) + read
