"""The experts of a mixture as ordinary linear layers, instead of slices of fused 3-D parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from quantlab.errors import QuantlabError


class UnfusedExperts(nn.Module):
    """The experts of a mixture as linear layers of their own, for hooks, statistics and quantization.

    transformers keeps all experts of a layer in two 3-D parameters. Here expert ``e`` is the child ``"e"``
    with the children ``gate_up_proj`` (``up_proj`` where there is no gate) and ``down_proj``. The forward is
    the eager loop of transformers' experts classes; an expert that no token is routed to is not called.
    """

    num_experts: int
    has_post_expert_norm: bool
    post_expert_norm: Callable[[torch.Tensor], torch.Tensor]
    act_fn: Callable[[torch.Tensor], torch.Tensor]
    _up_name: str
    _between: Callable[[UnfusedExperts, torch.Tensor], torch.Tensor]

    @staticmethod
    def is_fused(module: nn.Module) -> bool:
        """Whether ``module`` keeps several experts' matrices in 3-D parameters."""
        parameters = module._parameters
        up = parameters.get("gate_up_proj", parameters.get("up_proj"))
        down = parameters.get("down_proj")
        return up is not None and down is not None and up.ndim == 3 and down.ndim == 3

    @classmethod
    def from_fused(cls, fused: nn.Module) -> UnfusedExperts:
        """The same experts, their weights views of the fused parameters (or on the meta device).

        Raises:
            QuantlabError: the module does not follow transformers' experts interface
                (``use_experts_implementation``), or has parameters that the interface does not know.
        """
        up_name = _checked_up_name(fused)
        experts = cls()
        for name, value in vars(fused).items():  # the numbers and flags that the gate reads
            if not name.startswith("_") and name not in vars(experts):
                setattr(experts, name, value)
        for name, child in fused.named_children():
            experts.add_module(name, child)
        experts._up_name = up_name
        experts._between = type(fused)._apply_gate if fused.has_gate else _activate  # type: ignore[attr-defined]
        for e in range(experts.num_experts):
            expert = nn.Module()
            for name in (up_name, "down_proj"):
                expert.add_module(name, _expert_linear(fused, name, e))
            experts.add_module(str(e), expert)
        return experts.train(fused.training)

    @staticmethod
    def origin(name: str) -> tuple[str, int]:
        """Where a parameter lies in the fused module: ``"3.down_proj.bias"`` is ``("down_proj_bias", 3)``."""
        expert, _, rest = name.partition(".")
        projection, _, leaf = rest.rpartition(".")
        return (f"{projection}_bias" if leaf == "bias" else projection), int(expert)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Route each token through its experts.

        Args:
            hidden_states: ``[tokens, hidden]``.
            top_k_index: the experts of each token, ``[tokens, k]``; ``num_experts`` marks an unused slot.
            top_k_weights: their weights, ``[tokens, k]``.

        Returns:
            ``[tokens, hidden]`` in the dtype of ``hidden_states``.
        """
        result = torch.zeros_like(hidden_states)
        with torch.no_grad():
            chosen = nn.functional.one_hot(top_k_index, num_classes=self.num_experts + 1).permute(2, 1, 0)
            hit = chosen[: self.num_experts].sum(dim=(-1, -2)).nonzero().flatten().tolist()
        for e in hit:
            position, token = torch.where(chosen[e])
            expert: Any = self._modules[str(e)]
            up = getattr(expert, self._up_name)(hidden_states[token])
            out = expert.down_proj(self._between(self, up))
            if self.has_post_expert_norm:
                out = self.post_expert_norm(out)
            out = out * top_k_weights[token, position, None]
            result.index_add_(0, token, out.to(result.dtype))
        return result


def unfuse_experts(model: nn.Module) -> list[str]:
    """Replace every module of fused experts in ``model`` by :class:`UnfusedExperts`; return their names.

    Raises:
        QuantlabError: one of them cannot be taken apart; names it and its class.
    """
    names = [name for name, module in model.named_modules() if UnfusedExperts.is_fused(module)]
    for name in names:
        parent, _, leaf = name.rpartition(".")
        try:
            experts = UnfusedExperts.from_fused(model.get_submodule(name))
        except QuantlabError as error:
            raise QuantlabError(f"{name}: {error}") from error
        setattr(model.get_submodule(parent), leaf, experts)
    return names


def _activate(experts: UnfusedExperts, up: torch.Tensor) -> torch.Tensor:
    return experts.act_fn(up)


def _checked_up_name(fused: nn.Module) -> str:
    kind = type(fused).__name__
    if not hasattr(fused, "has_gate") or not hasattr(type(fused), "_apply_gate"):
        raise QuantlabError(
            f"the experts of {kind} do not follow transformers' experts interface "
            "(use_experts_implementation), and quantlab cannot take them apart"
        )
    up_name = "gate_up_proj" if fused.has_gate else "up_proj"
    known = {up_name, "down_proj"} | ({f"{up_name}_bias", "down_proj_bias"} if fused.has_bias else set())
    present = {name for name, parameter in fused._parameters.items() if parameter is not None}
    if odd := sorted(present ^ known):
        raise QuantlabError(f"the experts of {kind} have, or lack, parameters unlike others': {', '.join(odd)}")
    return up_name


def _expert_linear(fused: nn.Module, name: str, e: int) -> nn.Linear:
    weight = fused.get_parameter(name).detach()[e]
    if fused.is_transposed:
        weight = weight.T
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bool(fused.has_bias), device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if fused.has_bias:
        linear.bias = nn.Parameter(fused.get_parameter(f"{name}_bias").detach()[e], requires_grad=False)
    return linear
