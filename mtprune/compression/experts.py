"""Experts whose matrices are layers, so that each can have a form of its own."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from mtprune.compression.forms.base import exporter, linear_of
from mtprune.model.layout import Layout, is_stack, layout_of

__all__ = ["OpenExperts", "can_open_experts"]

_TOLD = ("has_bias", "is_transposed")
_OWN = nn.Module().__dict__.keys()
"""What every module has: hooks, parameters, whether it is in training."""


class OpenExperts(nn.Module):
    r"""Experts of transformers, each with two layers, called as the stacks they come from.

    A token x is sent to experts e with weights :math:`p_e`, and gets
    :math:`\sum_e p_e\, D_e\, g(U_e x)`, with biases where the experts have some; g is what the
    experts' own class has between its two matrices. One expert after the other computes all its
    tokens; those without one compute nothing.

    Args:
        experts: Experts that `can_open_experts` has found fit. The layers share their memory until
            `settle` is called.
    """

    site = ""
    """The name of the experts in their model, set when the model is complete."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.kind: Any = type(experts)
        # Settings and functions that the experts' own code reads, and that of their block.
        self.__dict__.update({k: v for k, v in experts.__dict__.items() if k not in _OWN})
        for name, child in experts.named_children():
            self.add_module(name, child)
        self.is_gated = _is_gated(experts)
        self.ups, self.downs = (_layers(experts, name) for name in _stacks(self.is_gated))
        self.train(experts.training)

    @override
    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        if at_work := exporter():
            raise RuntimeError(
                f"The experts of '{self.site}' run one after the other, which {at_work} cannot "
                "take. Compress again with portable=True."
            )
        chosen, weights = top_k_index.reshape(-1), top_k_weights.reshape(-1, 1)
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        places = chosen.argsort(stable=True)
        counts = chosen.bincount(minlength=len(self.ups)).tolist()
        each, kind = top_k_index.shape[-1], torch.promote_types(tokens.dtype, weights.dtype)
        out = tokens.new_zeros(len(chosen), tokens.shape[1], dtype=kind)
        # A number above the last expert's is sent to none.
        for up, down, mine in zip(self.ups, self.downs, places.split(counts), strict=False):
            if len(mine):
                hidden = self._between(up(tokens[mine // each]))
                out[mine] = (self._after(down(hidden)) * weights[mine]).to(kind)
        summed = out.view(len(tokens), each, tokens.shape[1]).sum(1)
        return summed.to(hidden_states.dtype).view(hidden_states.shape)

    def _between(self, hidden: Tensor) -> Tensor:
        """What the experts' class does with the outputs of their first layers."""
        found: Tensor = (
            self.kind._apply_gate(self, hidden) if self.is_gated else self.act_fn(hidden)  # type: ignore[operator]
        )
        return found

    def _after(self, outputs: Tensor) -> Tensor:
        """What the experts' class does with the outputs of their last layers."""
        normalizes = getattr(self, "has_post_expert_norm", False)
        found: Tensor = self.post_expert_norm(outputs) if normalizes else outputs  # type: ignore[operator]
        return found

    def settle(self) -> None:
        """Give dense layers memory of their own, so that the stacks can go."""
        for layer in (*self.ups, *self.downs):
            if type(layer) is nn.Linear:
                for parameter in layer.parameters():
                    if parameter.untyped_storage().nbytes() > parameter.nbytes:
                        parameter.data = parameter.detach().clone(
                            memory_format=torch.contiguous_format
                        )

    def is_dense(self) -> bool:
        """Whether all matrices are Linear layers."""
        return all(type(layer) is nn.Linear for layer in (*self.ups, *self.downs))

    def closed(self) -> nn.Module:
        """The experts with their matrices in stacks again, if `is_dense`."""
        experts: nn.Module = self.kind.__new__(self.kind)
        nn.Module.__init__(experts)
        own = {"kind", "site", "is_gated"}
        experts.__dict__.update(
            {k: v for k, v in self.__dict__.items() if k not in _OWN and k not in own}
        )
        for name, child in self.named_children():
            if name not in ("ups", "downs"):
                experts.add_module(name, child)
        for name, layers in zip(_stacks(self.is_gated), (self.ups, self.downs), strict=True):
            layout = Layout(stacked=True, transposed=bool(self.is_transposed))
            weights = torch.stack([layer.weight.detach() for layer in layers])  # type: ignore[operator]
            stack = layout.weight(weights).contiguous()
            trained = any(p.requires_grad for p in layers.parameters())
            experts.register_parameter(name, nn.Parameter(stack, trained))
            if self.has_bias:
                biases = torch.stack([layer.bias.detach() for layer in layers])  # type: ignore[operator]
                experts.register_parameter(f"{name}_bias", nn.Parameter(biases, trained))
        return experts.train(self.training)

    def markers(self) -> Iterator[tuple[str, Tensor]]:
        """Stacks of nothing by name: code that expects stacks fails on their shape."""
        for name in _stacks(self.is_gated):
            yield name, torch.empty(len(self.ups), 2, 0)

    @override
    def extra_repr(self) -> str:
        return f"{self.kind.__name__}, one by one"


def can_open_experts(module: nn.Module) -> bool:
    """Whether `OpenExperts` can replace a module.

    It must be one of those of which transformers says what they compute, so that several
    implementations can compute it: its decorator puts what it says into attributes.
    """
    told = all(isinstance(getattr(module, name, None), bool) for name in _TOLD)
    if not told or not hasattr(type(module).forward, "__wrapped__"):
        return False
    parameters = {k: p for k, p in module._parameters.items() if p is not None}
    gated = _is_gated(module)
    stacks = _stacks(gated)
    biases = [f"{name}_bias" for name in stacks] if module.has_bias else []
    between = "_apply_gate" if gated else "act_fn"
    return (
        set(parameters) == {*stacks, *biases}
        and all(is_stack(module, parameters[name].shape) for name in stacks)
        and all(parameters[name].dim() == 2 for name in biases)
        and callable(getattr(module, between, None))
        and not getattr(module, "_is_expert_parallel", False)
        and not any(
            m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in module.modules()
        )
    )


def _is_gated(experts: nn.Module) -> bool:
    """Whether the first matrix of each expert makes gates too."""
    return "gate_up_proj" in experts._parameters


def _stacks(gated: bool) -> tuple[str, str]:
    """The names of the experts' first and last matrices."""
    return "gate_up_proj" if gated else "up_proj", "down_proj"


def _layers(experts: nn.Module, name: str) -> nn.ModuleList:
    """A layer for each expert, in the memory of a stack."""
    stack = experts.get_parameter(name)
    biases = experts._parameters.get(f"{name}_bias")
    layers = []
    for number, matrix in enumerate(layout_of(experts, name, stack.shape).matrices(stack.detach())):
        bias = None if biases is None else biases.detach()[number]
        layers.append(
            linear_of(
                nn.Parameter(matrix, stack.requires_grad),
                None if bias is None else nn.Parameter(bias, stack.requires_grad),
            )
        )
    return nn.ModuleList(layers)
