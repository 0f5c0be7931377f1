"""Saliency: how much one task needs each weight.

A saliency is a function of a weight and its gradient, elementwise, and only the order of its
values counts. It is called once per observation with the effective weight (zero where masked) and
the dense gradient of one task's loss, both float32, and its results are summed over observations.
A new one is a function of a line or two, passed in::

    def energy(weight, grad):
        return (weight * grad).square()

A saliency whose ``grad`` has a default looks at no data: it is asked once, when masks are made,
with the weights as they are then. By naming them as keyword parameters a saliency is also given

* ``inputs``: those of the layer, float32 ``[rows, columns]``, such that the layer computes
  ``inputs @ weight.flatten(1).T``, for Linear layers and convolutions without groups;
* ``layer``: the layer, with its ``name`` and ``shape``;
* ``task``: the name of the task;
* ``generator``: the pruner's own source of randomness.
"""

import inspect
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = [
    "Saliency",
    "asks",
    "fisher",
    "gradient",
    "lamp",
    "magnitude",
    "movement",
    "random",
    "snip",
    "taylor",
    "taylor_magnitude",
    "wanda",
]

Saliency = Callable[..., Tensor]
"""A function of weight and gradient, or of what else it names (see above)."""


def taylor(weight: Tensor, grad: Tensor) -> Tensor:
    """First-order change of the loss when a weight is removed, ``|w * g|``.

    Args:
        weight: The effective weight ``w``, any shape.
        grad: The gradient ``g`` of one task's loss, same shape.

    Returns:
        The saliency, same shape.

    Example:
        >>> taylor(torch.tensor([2.0, -3.0]), torch.tensor([0.5, 1.0]))
        tensor([1., 3.])
    """
    return (weight * grad).abs()


def taylor_magnitude(weight: Tensor, grad: Tensor) -> Tensor:
    """Sensitivity times size, ``w^2 |g|``: the geometric mean of ``|w g|^2`` and ``|w|^2``.

    The gradient at one point tells what a small change of a weight costs, and removing a large
    weight is no small change. Its size tells what training has made of it, but not for which task.
    So this is a score of each task, like `taylor`, that trusts the gradient only half: of two
    weights that are as sensitive the larger stays. It is for networks that were trained on these
    tasks; of a network that was trained on something else, size tells what that needed.

    Args:
        weight: The effective weight ``w``, any shape.
        grad: The gradient ``g`` of one task's loss, same shape.

    Returns:
        The saliency, same shape.

    Example:
        >>> taylor_magnitude(torch.tensor([2.0, -3.0]), torch.tensor([0.5, 1.0]))
        tensor([2., 9.])
    """
    return (weight * grad * weight).abs()


def snip(weight: Tensor, grad: Tensor) -> Tensor:
    """Connection sensitivity, ``|w * g|``: `taylor`, under the name it has at initialisation.

    Lee et al., "SNIP: Single-shot network pruning based on connection sensitivity", ICLR 2019.
    """
    return taylor(weight, grad)


def fisher(weight: Tensor, grad: Tensor) -> Tensor:
    """Diagonal of the empirical Fisher as a cost of removal, ``(w * g)^2``.

    Over several observations squares are summed, so rare large effects weigh more than in `taylor`.

    Theis et al., "Faster gaze prediction with dense networks and Fisher pruning", 2018.
    """
    return (weight * grad).square()


def gradient(weight: Tensor, grad: Tensor) -> Tensor:
    """Size of the gradient, ``|g|``: defined where the weight is masked, so made for growth.

    Evci et al., "Rigging the lottery: making all tickets winners", ICML 2020.
    """
    return grad.abs()


def movement(weight: Tensor, grad: Tensor) -> Tensor:
    """How fast a weight moves away from zero, ``-w * g``: signed, summed over observations.

    Sanh et al., "Movement pruning: adaptive sparsity by fine-tuning", NeurIPS 2020.
    """
    return -weight * grad


def magnitude(weight: Tensor, grad: Tensor | None = None) -> Tensor:
    """Size of the weight itself, ``|w|``: needs no data and is the same for every task.

    Example:
        >>> magnitude(torch.tensor([2.0, -3.0]))
        tensor([2., 3.])
    """
    return weight.abs()


def lamp(weight: Tensor, grad: Tensor | None = None) -> Tensor:
    r"""Size against the sizes that would be left, layer by layer.

    .. math:: \frac{w^2}{\sum_{j : |w_j| \ge |w|} w_j^2}

    over the layer, so that layers can be ranked together. The largest weight of a layer has 1.

    Lee et al., "Layer-adaptive sparsity for the magnitude-based pruning", ICLR 2021.

    Args:
        weight: The effective weight of a whole layer, any shape.
        grad: Not looked at.

    Returns:
        The saliency, same shape.

    Example:
        >>> lamp(torch.tensor([1.0, -2.0, 2.0]))
        tensor([0.1111, 0.5000, 0.5000])
    """
    squares = weight.double().square().flatten()
    ascending = squares.sort().values
    left = ascending.flip(0).cumsum(0).flip(0)
    first = torch.searchsorted(ascending, squares).clamp_(max=max(len(left) - 1, 0))
    # A layer of zeros has nothing left.
    scores = squares / left[first].clamp_min(torch.finfo(torch.float64).tiny)
    return scores.view(weight.shape).to(torch.float32)


def random(
    weight: Tensor, grad: Tensor | None = None, *, generator: torch.Generator | None = None
) -> Tensor:
    """A uniform draw in [0, 1) for every weight: the baseline every method must beat."""
    # Drawn on the generator's own device, so that masks do not depend on where the model lives.
    device = weight.device if generator is None else generator.device
    return torch.rand(weight.shape, generator=generator, device=device).to(weight.device)


def wanda(weight: Tensor, grad: Tensor | None = None, *, inputs: Tensor) -> Tensor:
    """Size of a weight times that of what it multiplies, ``(|w| * ||x||)^2``: no backward.

    The square orders weights as ``|w| * ||x||`` does, and adds up over batches as the square of the
    norm of all their inputs. Each task has the inputs from batches of its own. They are gathered in
    the forward, and no gradient is computed, so this is for models too large to differentiate.

    Sun et al., "A simple and effective pruning approach for large language models", ICLR 2024.

    Args:
        weight: The effective weight ``w``, any shape.
        grad: Not looked at.
        inputs: Those of the layer, ``[rows, columns]``.

    Returns:
        The saliency, same shape as ``weight``.

    Example:
        >>> wanda(torch.tensor([[2.0, -3.0]]), inputs=torch.tensor([[3.0, 0.0], [4.0, 1.0]]))
        tensor([[100.,   9.]])
    """
    return weight.square() * inputs.square().sum(0).view(weight[:1].shape)


IN_PLACE: dict[Saliency, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    taylor: lambda weight, grad, out: torch.mul(weight, grad, out=out).abs_(),
    snip: lambda weight, grad, out: torch.mul(weight, grad, out=out).abs_(),
    taylor_magnitude: lambda weight, grad, out: (
        torch.mul(weight, grad, out=out).mul_(weight).abs_()
    ),
    fisher: lambda weight, grad, out: torch.mul(weight, grad, out=out).square_(),
    gradient: lambda weight, grad, out: torch.abs(grad, out=out),
    movement: lambda weight, grad, out: torch.mul(weight, grad, out=out).neg_(),
}
"""The saliencies above that look at each weight alone, as functions with an ``out`` argument."""


ASKABLE = ("generator", "inputs", "layer", "task")
"""The arguments besides weight and gradient that a saliency gets if it names them as keywords."""


def asks(saliency: Saliency) -> frozenset[str]:
    """The names of a saliency's arguments besides the weight, ``"grad"`` among them.

    Raises:
        ValueError: If it cannot be called as ``saliency(weight, grad)``.

    Example:
        >>> sorted(asks(taylor)), sorted(asks(random))
        (['grad'], ['generator'])
    """
    try:
        signature = inspect.signature(saliency)
    except (TypeError, ValueError):  # builtins such as torch.mul have none
        return frozenset({"grad"})
    parameters = signature.parameters
    keywords = {name: None for name in ASKABLE if name in parameters}
    try:
        signature.bind(None, None, **keywords)
    except TypeError as error:
        name = getattr(saliency, "__name__", saliency)
        raise ValueError(
            f"`saliency` must be a function of (weight, grad). Got {name}{signature}: {error}."
        ) from None
    second = list(parameters.values())[1:2]
    data_free = bool(second) and second[0].default is not inspect.Parameter.empty
    return frozenset(keywords) | (frozenset() if data_free else {"grad"})


def why_whole(saliency: Saliency) -> str:
    """Why a saliency needs a whole layer; empty if it can be had of some of its rows alone.

    Example:
        >>> why_whole(taylor), why_whole(lamp)
        ('', 'looks at a whole layer at once')
    """
    asked = asks(saliency)
    for name in ("inputs", "layer", "generator"):
        if name in asked:
            return f"asks for `{name}`, of which each rank has its own"
    generator = torch.Generator().manual_seed(0)
    weight, grad = (torch.randn(5, 7, generator=generator) for _ in range(2))
    named = {"task": "task"} if "task" in asked else {}
    args = (weight, grad) if "grad" in asked else (weight,)
    of_all = saliency(*args, **named)
    of_rows = torch.cat([saliency(*(arg[i : i + 1] for arg in args), **named) for i in range(5)])
    return "" if torch.equal(of_all, of_rows) else "looks at a whole layer at once"
