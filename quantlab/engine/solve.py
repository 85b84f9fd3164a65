"""Solve the layers that share one input: stack what can be stacked, hand it to the quantizer, report."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import groupby

import torch

from quantlab.compensation import Compensation, make_compensation
from quantlab.engine.distributed import ALONE, Ranks
from quantlab.engine.memory import return_freed_memory
from quantlab.engine.report import LayerReport
from quantlab.errors import CheckpointError, RecipeError
from quantlab.numerics import QTensor, all_finite, scale_type
from quantlab.numerics.activations import reason_against
from quantlab.problem import InputStatistics, LayerProblem, Solution, Statistic
from quantlab.quantizers import Quantizer, make_quantizer
from quantlab.recipe import Scheme

# Outputs whose error is multiplied with the second moment at once.
_ROWS = 1024


@dataclass(frozen=True)
class PlannedLayer:
    """A layer, the scheme that the recipe gives it, and the methods that will carry it out."""

    name: str
    block: str
    shape: tuple[int, int]
    scheme: Scheme
    quantizer: Quantizer
    compensation: Compensation | None = None

    @property
    def needs(self) -> Statistic:
        """What the methods want to be kept of the layer's inputs."""
        needs = self.quantizer.needs(self.scheme)
        return needs if self.compensation is None else needs | self.compensation.needs(self.scheme)

    @property
    def stands_alone(self) -> bool:
        """Whether the layer cannot be solved stacked on others: what it stores is fitted to it as a whole."""
        return (
            self.scheme.granularity == "tensor"
            or self.compensation is not None
            or (self.scheme.known_format is not None and self.scheme.known_format.fit is not None)
            or scale_type(self.scheme.scale_dtype).blocks_cross_layers
        )

    @property
    def as_stored(self) -> bool:
        """Whether the layer's weight is read as it is stored, so that no copy is made, alone or stacked on others."""
        return self.compensation is None and getattr(self.quantizer, "any_dtype", False)

    @property
    def rows_apart(self) -> bool:
        """Whether some outputs can be solved without the others, with the same result."""
        return not self.stands_alone and getattr(self.quantizer, "rows_apart", False)

    def solve(self, problem: LayerProblem) -> Solution:
        """Round, and repair what is left."""
        if self.compensation is None:
            return self.quantizer.quantize(problem, self.scheme)
        return self.compensation.solve(problem, self.scheme, self.quantizer)


def plan_layer(name: str, block: str, shape: tuple[int, int], scheme: Scheme) -> PlannedLayer:
    """Resolve a layer's methods.

    Raises:
        RecipeError: the scheme names a method or an option that does not exist, two that exclude each other, or
            activations that such a weight cannot be multiplied with.
    """
    form = scheme.known_format
    if form is not None and (reason := reason_against(scheme.activations, form, scheme.granularity, scheme.symmetric)):
        raise RecipeError(
            f"{name}: activations {scheme.activations}: {reason}; or set activations: none for this layer"
        )
    compensation = None
    if scheme.compensation != "none":
        compensation = make_compensation(scheme.compensation, scheme.compensation_options)
    planned = PlannedLayer(name, block, shape, scheme, make_quantizer(scheme.quantizer, scheme.options), compensation)
    planned.needs  # noqa: B018 - methods refuse schemes that they cannot carry out when they are asked for their needs
    return planned


@dataclass(frozen=True, eq=False)
class Answer:
    """A solved layer: its quantized weight, what is to be added to its bias (or None), and its report."""

    qtensor: QTensor
    bias: torch.Tensor | None
    report: LayerReport


def solve(
    layers: Iterable[PlannedLayer],
    weights: Mapping[str, torch.Tensor],
    statistics: InputStatistics | None,
    notes: Mapping[str, str] | None = None,
    ranks: Ranks = ALONE,
) -> list[Answer]:
    """Quantize layers that share their input.

    Layers of one scheme are stacked along their outputs and solved as one, which costs one factorization and one pass;
    but for methods that take a weight as it is stored and have nothing to share.

    Args:
        layers: what to do.
        weights: by layer name, ``[out, in]`` in any dtype.
        statistics: of the shared input, or None if no layer needs any.
        notes: by layer, what was noted of it before.
        ranks: the processes that share the work; all get all answers.

    Returns:
        An answer for each layer, in order.
    """
    layers, notes = list(layers), notes or {}
    check_finite(layers, weights, statistics)
    answers = []
    for _, members in groupby(layers, key=lambda layer: layer.scheme):
        stack = list(members)
        stacks = [[layer] for layer in stack] if stack[0].stands_alone or stack[0].as_stored else [stack]
        for part in stacks:
            answers += _solve_stack(part, [weights[layer.name] for layer in part], statistics, ranks)
    return [_with_note(answer, notes.get(answer.report.layer)) for answer in answers]


def _with_note(answer: Answer, note: str | None) -> Answer:
    if note is None:
        return answer
    return replace(answer, report=replace(answer.report, notes=(note, *answer.report.notes)))


def check_finite(
    layers: list[PlannedLayer], weights: Mapping[str, torch.Tensor], statistics: InputStatistics | None
) -> None:
    """Refuse weights and statistics that are not finite.

    Raises:
        CheckpointError: names the layer.
    """
    for layer in layers:
        if not all_finite(weights[layer.name]):
            raise CheckpointError(
                f"{layer.name}: its weight holds NaN or infinity; the checkpoint is damaged, or overflowed when it was "
                "converted to float16: get it again, or keep this layer as it is with format none"
            )
    if statistics is not None and statistics.diagonal is not None and not all_finite(statistics.diagonal):
        names = ", ".join(layer.name for layer in layers)
        raise CheckpointError(
            f"{names}: the inputs that the calibration data make are not finite; the model overflows in "
            f"{weights[layers[0].name].dtype}: convert it to bfloat16 or float32 first"
        )


def _stacked(weights: list[torch.Tensor]) -> torch.Tensor:
    """The weights one below the other, in float32; a copy, whatever they are."""
    stacked = torch.empty(sum(map(len, weights)), weights[0].shape[1], device=weights[0].device)
    for part, weight in zip(stacked.split([len(weight) for weight in weights]), weights, strict=True):
        part.copy_(weight)
    return stacked


def _solve_stack(
    layers: list[PlannedLayer], weights: list[torch.Tensor], statistics: InputStatistics | None, ranks: Ranks
) -> list[Answer]:
    started = time.perf_counter()
    stacked = weights[0].contiguous() if layers[0].as_stored else _stacked(weights)
    rows = [len(weight) for weight in weights]
    problem = LayerProblem(" + ".join(layer.name for layer in layers), stacked, statistics)
    solution = _shared_solution(layers[0], problem, ranks)
    qtensors = [solution.qtensor] if len(layers) == 1 else solution.qtensor.split(rows)
    losses, energies, metric = _row_errors(stacked, solution, statistics)
    biases = [None] * len(layers) if solution.bias is None else solution.bias.split(rows)
    errors = [
        float(loss.sum() / energy.sum().clamp(min=torch.finfo(torch.float32).tiny))  # waits for a device
        for loss, energy in zip(losses.split(rows), energies.split(rows), strict=True)
    ]
    seconds = (time.perf_counter() - started) / len(layers)
    answers = []
    for layer, qtensor, bias, error in zip(layers, qtensors, biases, errors, strict=True):
        report = LayerReport(
            layer=layer.name,
            block=layer.block,
            quantizer=layer.scheme.quantizer,
            compensation=layer.scheme.compensation,
            scale_dtype=layer.scheme.scale_dtype,
            activations=layer.scheme.activations,
            format=qtensor.grid.name,
            granularity=layer.scheme.granularity,
            shape=qtensor.shape,
            bits=qtensor.bits_per_weight(),
            bytes=qtensor.stored_bits() // 8,
            error=error,
            metric=metric,
            tokens=statistics.tokens if statistics else 0,
            notes=solution.notes,
            seconds=seconds,
        )
        answers.append(Answer(qtensor, bias, report))
    return answers


def _shared_solution(layer: PlannedLayer, problem: LayerProblem, ranks: Ranks) -> Solution:
    """The solution, on every rank: each solves some rows where the method can, else one solves all.

    What one rank tells the others goes over the CPU: their devices have other names.
    """
    if ranks.size == 1:
        return layer.solve(problem)
    device = problem.weight.device
    if not layer.rows_apart or len(problem.weight) < ranks.size:
        return ranks.agreed(lambda: layer.solve(problem).to("cpu")).to(device)
    own = replace(problem, weight=problem.weight[ranks.rows(len(problem.weight))])
    parts = [part.to(device) for part in ranks.gather(layer.solve(own).to("cpu"))]
    loss = None if parts[0].loss is None else torch.cat([part.loss for part in parts if part.loss is not None])
    return Solution(QTensor.joined([part.qtensor for part in parts]), loss, parts[0].notes)


def _row_errors(
    weight: torch.Tensor, solution: Solution, statistics: InputStatistics | None
) -> tuple[torch.Tensor, torch.Tensor, str]:
    """Squared error and energy of each output, and the metric that they are in: the best that is known."""
    target = solution.target_for(weight)
    losses, energies = torch.empty(2, len(weight), device=weight.device)
    known = statistics if statistics is not None and statistics.tokens else InputStatistics(0)
    moment, diagonal = known.second_moment, known.diagonal
    if moment is not None:
        return *_output_errors(weight, target, moment, solution, known.mean), "output"
    if target is weight and (found := solution.qtensor.row_errors(weight, diagonal)):
        return *found, "weight" if diagonal is None else "weighted"
    # The whole error would be as large as the weight.
    for rows, decoded in solution.qtensor.decoded_rows():
        squares = (target[rows] - decoded).square_(), weight[rows].float().square()
        weighted = squares if diagonal is None else [each.mul_(diagonal) for each in squares]
        losses[rows], energies[rows] = (each.sum(1) for each in weighted)
    return losses, energies, "weight" if diagonal is None else "weighted"


def _output_errors(
    weight: torch.Tensor,
    target: torch.Tensor,
    moment: torch.Tensor,
    solution: Solution,
    mean: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared error and energy of each output over the inputs; what the method knows already is not computed again.

    A product with the moment wants many rows at once. Beside a wide moment they are what a run's peak is made of.
    """
    return_freed_memory()  # what the method left behind: holes that these products do not fit into
    losses, energies = torch.empty(2, len(weight), device=weight.device)
    for start in range(0, len(weight), _ROWS):
        rows = slice(start, start + _ROWS)
        own = weight[rows].float()
        energies[rows] = (own @ moment).mul_(own).sum(1)
    if solution.loss is not None:
        return solution.loss, energies
    for rows, decoded in solution.qtensor.decoded_rows(_ROWS):
        error = torch.sub(target[rows], decoded, out=decoded)
        losses[rows] = (error @ moment).mul_(error).sum(1)
        if solution.bias is not None and mean is not None:
            bias = solution.bias[rows]
            losses[rows] += bias * (bias - 2 * (error @ mean))
    return losses, energies
