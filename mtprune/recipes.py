"""Recipes: published methods and baselines by name. Each returns a `Method`.

A recipe has the published allocation, so that it can stand for its paper in a comparison. For your
own models `best` is the better start.
"""

from dataclasses import replace
from typing import Literal

from mtprune import checks, saliency
from mtprune.allocation import AllocationLike, Erk, PerOutput
from mtprune.methods import LowRank, SigmoidThreshold, SoftThreshold, Vote
from mtprune.schedule import Cubic, Hold, Linear, OneShot, Regrow, Rounds, Schedule

__all__ = [
    "adapmtl",
    "adapmtl_published",
    "best",
    "disparse_dynamic",
    "disparse_pretrained",
    "disparse_static",
    "flop",
    "gradual_magnitude",
    "lamp",
    "magnitude",
    "movement",
    "random",
    "rigl",
    "set_",
    "snip",
    "wanda",
]

Observations = int | Literal["auto"]


def best(
    sparsity: float, steps: int | None = None, *, trained: bool | Literal["elsewhere"] = True
) -> Vote | SoftThreshold:
    """The method to begin with. Which one depends on where the weights come from.

    * Trained on these tasks (``True``): `Vote` with the score `saliency.taylor_magnitude` for each
      task, and `saliency.magnitude` as one more voter.
    * Trained on something else (``"elsewhere"``), such as a pretrained encoder: `Vote` with
      ``|w * g|`` alone. There size tells what the other training needed.
    * From scratch (``False``): `adapmtl` with uniform thresholds, which rise while the network
      trains. Learned ones were ahead where heads are far too wide, and behind or level elsewhere.
      At 98 % zeros uniform ones lost 4 to 24 % on census, where ``True`` with ``steps`` lost .1.

    The votes have a floor under every layer. With ``steps`` they prune in about ten updates over
    the first half of them, in your training loop. Without, they are for ``pruner.prune(batches)``
    before fine-tuning: four rounds, each scored anew.

    For a trained network it rests on the comparisons of docs/results/recipe.md, where rounds were
    ahead of the same vote made while fine-tuning, and both of joint saliency, ``|w * g|`` by vote,
    LAMP and magnitude. The score does that more than the vote: where losses are well scaled, a
    voter for each task is hardly better than one for their sum. For a pretrained encoder it rests
    on the same page: rounds of ``|w * g|`` lost less than half of what gradual pruning does, the
    score for trained networks was clearly worse, and joint saliency (``disentangled=False``) was
    level. Where it loses: at equal steps in all, one training in which weights go may end ahead of
    dense training, rounds and a short fine-tuning.

    Args:
        sparsity: Share of zeros in the end.
        steps: Length of the run to come, in optimizer steps; needed from scratch.
        trained: Where the network's weights come from.

    Example:
        >>> best(0.95, steps=2_000).schedule
        Cubic(begin=1, end=1000, every=100)
        >>> best(0.95).schedule
        Rounds(n=4)
        >>> type(best(0.95, steps=20_000, trained=False)).__name__
        'SoftThreshold'
    """
    if trained not in (True, False, "elsewhere") or not isinstance(trained, (bool, str)):
        must = "must be True (on these tasks), 'elsewhere' or False (from scratch)"
        raise ValueError(checks.message("trained", trained, must))
    if steps is None and not trained:
        raise ValueError(
            "From scratch, `steps` must be given: thresholds rise over three quarters of them."
        )
    schedule: Schedule = Rounds(4)
    every = 4
    if steps is not None:
        checks.whole("steps", steps, least=1)
        if not trained:
            return adapmtl(sparsity, steps, allocation="uniform")
        every = max(1, steps // 20)
        schedule = Cubic(begin=1, end=max(1, steps // 2), every=every)
    vote = Vote(sparsity, schedule=schedule, observations=min(4, every))
    if trained == "elsewhere":
        return vote
    return replace(vote, saliency=saliency.taylor_magnitude, voters=(saliency.magnitude,))


def disparse_static(sparsity: float, *, observations: Observations = 1) -> Vote:
    """DiSparse, static: score a network at initialisation, prune it once, train it.

    Sun et al., "DiSparse: disentangled sparsification for multitask model compression", CVPR 2022.
    The sparsity is exact, where the original needs a hand-tuned ratio for each data set; the
    network that is scored is the one that is trained, where the original draws another for scoring.

    Args:
        sparsity: Share of zeros.
        observations: Batches to score on; the paper uses 50. ``"auto"`` stops when masks are
            stable.
    """
    return Vote(sparsity, saliency=saliency.snip, allocation="global", observations=observations)


def disparse_pretrained(
    sparsity: float,
    *,
    schedule: Schedule | None = None,
    observations: Observations = 1,
    score: saliency.Saliency = saliency.taylor,
) -> Vote:
    """DiSparse, pretrained: score a trained network, prune once or gradually, fine-tune.

    Sun et al., CVPR 2022, with the first-order score of the paper, ``|w * g|``. The released code
    has `saliency.magnitude` for NYU-v2 and Cityscapes, and `saliency.taylor_magnitude` for
    Taskonomy.

    Args:
        sparsity: Share of zeros.
        schedule: When to prune; at once unless given.
        observations: Batches to score on before each update.
        score: The saliency.
    """
    return Vote(
        sparsity,
        saliency=score,
        allocation="global",
        schedule=schedule or OneShot(),
        observations=observations,
    )


def disparse_dynamic(sparsity: float, *, every: int, end: int, fraction: float = 0.5) -> Vote:
    """DiSparse, dynamic: train sparsely from random masks, drop by magnitude, grow by vote.

    Sun et al., CVPR 2022. Densities are ERK with power 0.9, as in the original code. Every layer
    is on its budget after every update, where the original overshoots between updates; gradients
    are those of the masked network, and weights that come back start at zero. Every task ranks
    each layer's gradients by themselves, as in the original, so that one with large gradients in
    its head has as much of a say in the trunk.

    Args:
        sparsity: Share of zeros, at all times.
        every: Steps between updates.
        end: Step from which masks stay; the paper uses three quarters of the run.
        fraction: Share of each layer's weights exchanged at first.
    """
    return Vote(
        sparsity,
        saliency=saliency.gradient,
        allocation=Erk(0.9),
        schedule=Regrow(every=every, end=end, fraction=fraction, within="layer"),
    )


def snip(sparsity: float, *, observations: Observations = 1) -> Vote:
    """SNIP: connection sensitivity of the summed losses, at initialisation.

    Lee et al., "SNIP: single-shot network pruning based on connection sensitivity", ICLR 2019.

    Args:
        sparsity: Share of zeros.
        observations: Batches to score on.
    """
    return Vote(
        sparsity,
        saliency=saliency.snip,
        allocation="global",
        observations=observations,
        disentangled=False,
    )


def rigl(sparsity: float, *, every: int, end: int, fraction: float = 0.3) -> Vote:
    """RigL: sparse training, growth by the gradient of the summed losses.

    Evci et al., "Rigging the lottery: making all tickets winners", ICML 2020.

    Args:
        sparsity: Share of zeros, at all times.
        every: Steps between updates.
        end: Step from which masks stay.
        fraction: Share of each layer's weights exchanged at first.
    """
    return Vote(
        sparsity,
        saliency=saliency.gradient,
        allocation="erk",
        schedule=Regrow(every=every, end=end, fraction=fraction),
        disentangled=False,
    )


def set_(sparsity: float, *, every: int, end: int, fraction: float = 0.3) -> Vote:
    """SET: sparse training, growth at random.

    Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse
    connectivity inspired by network science", Nature Communications 2018.

    Args:
        sparsity: Share of zeros, at all times.
        every: Steps between updates.
        end: Step from which masks stay.
        fraction: Share of each layer's weights exchanged at first.
    """
    return Vote(
        sparsity,
        saliency=saliency.random,
        allocation="erk",
        schedule=Regrow(every=every, end=end, fraction=fraction),
        disentangled=False,
    )


def magnitude(sparsity: float) -> Vote:
    """The smallest weights of the whole network, at once.

    Han et al., "Learning both weights and connections for efficient neural networks", NIPS 2015.

    Args:
        sparsity: Share of zeros.
    """
    return Vote(sparsity, saliency=saliency.magnitude, allocation="global", disentangled=False)


def lamp(sparsity: float) -> Vote:
    """LAMP: magnitude, put so that layers can be ranked together, at once.

    Lee et al., "Layer-adaptive sparsity for the magnitude-based pruning", ICLR 2021.

    Args:
        sparsity: Share of zeros.
    """
    return Vote(sparsity, saliency=saliency.lamp, allocation="global", disentangled=False)


def wanda(sparsity: float, *, observations: Observations = 1) -> Vote:
    """Zero-shot: a vote on ``|w| * ||x||``, each output keeping the same share. No backward at all.

    The inputs x are those of each task's own batches, so what a task feeds a shared layer with
    decides for which weights it votes. Where all tasks share every batch, they agree in shared
    layers. Which task uses which layer is told by the graphs of the losses, so compute each loss on
    its own, not from a stack of all. In ``pruner.prune(batches)`` no activations are kept.

    Sun et al., "A simple and effective pruning approach for large language models", ICLR 2024. They
    leave embedding and output layer dense: pass ``exclude=``.

    Args:
        sparsity: Share of zeros.
        observations: Batches of every task.
    """
    return Vote(
        sparsity,
        saliency=saliency.wanda,
        allocation=PerOutput(),
        observations=observations,
    )


def gradual_magnitude(sparsity: float, *, begin: int, end: int, every: int) -> Vote:
    """The smallest weights of the whole network, ever more of them.

    Zhu & Gupta, "To prune, or not to prune: exploring the efficacy of pruning for model
    compression", 2017.

    Args:
        sparsity: Share of zeros in the end.
        begin: Step of the first update.
        end: Step of the last update.
        every: Steps between updates.
    """
    return Vote(
        sparsity,
        saliency=saliency.magnitude,
        allocation="global",
        schedule=Cubic(begin=begin, end=end, every=every),
        disentangled=False,
    )


def random(sparsity: float) -> Vote:
    """Weights at random, at once.

    Args:
        sparsity: Share of zeros.
    """
    return Vote(sparsity, saliency=saliency.random, allocation="global", disentangled=False)


def movement(
    sparsity: float,
    steps: int,
    *,
    disentangled: bool = True,
    allocation: AllocationLike = "global",
    warmup: float = 0.1,
    cooldown: float = 0.3,
    updates: int = 200,
) -> Vote:
    r"""Movement pruning: keep the weights that fine-tuning moves away from zero.

    Sanh et al., "Movement pruning: adaptive sparsity by fine-tuning", NeurIPS 2020. The score of a
    weight is :math:`S_T = -\sum_{t \le T} w_t \, \partial L_t / \partial w'_t`, signed, over all
    steps so far, where :math:`w' = m w` is the masked weight. Masks keep the highest scores. They
    are straight-through: a pruned weight keeps its value and goes on being scored, so it may come
    back. Several tasks share one encoder as in Xia & Shin, "Pruning pretrained encoders with a
    multitask objective", 2021.

    Masks are final after step ``steps``. All times are fractions of the run, so that a short run
    is a long one in small; the published schedule counts steps and never prunes a short run. Scores
    are summed as by gradient descent with a constant rate; the original's Adam orders them anew.

    In a run that is too short for its net the score is the noise of its gradients, and what goes
    are the weights that matter most, all in one direction: in docs/results/movement.md a net of one
    layer keeps what it can in 240 steps, and deeper ones are at chance.

    Args:
        sparsity: Share of zeros in the end.
        steps: Length of the run, in optimizer steps.
        disentangled: Score every task on its own and vote, so that the scale of a loss has no say.
            False scores the sum of the losses, as published.
        allocation: ``"global"``, or ``"uniform"`` for the same share of every matrix, as published.
        warmup: Share of the run before anything is pruned.
        cooldown: Share of the run at the final sparsity.
        updates: About how many updates of the masks there are; at most one in each step.

    Example:
        >>> [movement(0.9, steps).schedule.schedule for steps in (200, 20_000)]
        [Cubic(begin=20, end=140, every=1), Cubic(begin=2000, end=14000, every=100)]
    """
    _check_run(steps, updates, warmup, cooldown)
    begin, every = round(warmup * steps), max(1, steps // updates)
    rise = Cubic(begin=begin, end=max(begin, round((1 - cooldown) * steps)), every=every)
    return Vote(
        sparsity,
        saliency=saliency.movement,
        schedule=Hold(rise, until=steps, every=every),
        allocation=allocation,
        disentangled=disentangled,
        straight_through=True,
    )


def flop(
    sparsity: float,
    steps: int,
    *,
    gates: Literal["learned", "saliency"] = "learned",
    disentangled: bool = True,
    floor: float = 0.5,
    warmup: float = 0.1,
    cooldown: float = 0.2,
    updates: int | None = None,
) -> LowRank:
    """FLOP: the rank of matrices, pruned by gates on their components.

    Wang et al., "Structured pruning of large language models", EMNLP 2020. The budget is met
    exactly, at the end of the schedule, where the original's is a penalty that short runs do not
    wait for; components are the singular triples of the weights as they come, where the original
    trains a factorisation from scratch; gates have their mean value, where the original draws them.
    Several tasks share one encoder as in Xia & Shin, "Pruning pretrained encoders with a multitask
    objective", 2021, and vote on its components.

    All times are fractions of the run, so that a short run is a long one in small. After the last
    update ranks stay, and the network recovers.

    Args:
        sparsity: Share of the parameters of linear layers and convolutions that is saved in the
            end; `LowRank` says which take part.
        steps: Length of the run, in optimizer steps.
        gates: ``"saliency"`` prunes ever more components by the derivatives in their gates, and
            trains no gate: better in runs of few steps.
        disentangled: Score every task on its own and vote. False scores the sum of the losses, as
            published.
        floor: The share of a uniform budget that every layer is sure of; 0 as published.
        warmup: Share of the run before the first update.
        cooldown: Share of the run after the last update.
        updates: About how many updates there are; 200 for learned gates and 10 for saliency unless
            given.

    Example:
        >>> flop(0.5, 1_000, gates="saliency").schedule
        Cubic(begin=100, end=800, every=70)
    """
    updates = (200 if gates == "learned" else 10) if updates is None else updates
    _check_run(steps, updates, warmup, cooldown)
    begin = round(warmup * steps)
    end = max(begin + 1, round((1 - cooldown) * steps))
    every = max(1, (end - begin) // updates)
    schedule: Schedule = Cubic(begin=begin, end=end, every=every)
    if gates == "learned":  # due at half time, and held there until gates have settled
        schedule = Hold(Linear(begin, (begin + end) // 2, every), until=end, every=every)
    return LowRank(sparsity, gates, schedule=schedule, floor=floor, disentangled=disentangled)


def adapmtl(
    sparsity: float, steps: int, *, allocation: Literal["uniform", "learned"] = "learned"
) -> SoftThreshold:
    """AdapMTL: a soft threshold learned per component, and weights of tasks that adapt to pruning.

    Xiang et al., "AdapMTL: adaptive pruning framework for multitask learning model", ACM MM 2024.
    The sparsity is exact, where the original's follows learning rate and weight decay; tasks weigh
    by how their loss bears the threshold, where the original's weights follow the noise of the
    losses. The weights that are left of a layer are scaled to its norm before, which the original
    lacks. Train on ``pruner.weigh(losses)``.

    Args:
        sparsity: Share of zeros in the end.
        steps: Length of the run; thresholds rise for three quarters of it.
        allocation: ``"uniform"`` does not learn how thresholds differ between components. Where
            heads are far wider than their tasks need, learning is worth a lot: they turn out far
            sparser than what tasks share, as published. Elsewhere it was level or behind. Every
            component keeps at least half of the overall density.
    """
    end = max(1, 3 * steps // 4)
    return SoftThreshold(
        sparsity,
        schedule=Cubic(begin=0, end=end, every=max(1, steps // 200)),
        allocation=allocation,
        max_sparsity=1.0 - (1.0 - sparsity) / 2,  # a small head that is emptied loses its task
        weighting="pruning_sensitivity",
        debias=True,
    )


def adapmtl_published(
    sparsity: float,
    steps: int,
    *,
    init: float = -20.0,
    lr: float = 1e-3,
    weight_decay: float = 1e-4,
) -> SigmoidThreshold:
    """AdapMTL as its original code runs, for comparison: the sparsity is not exact.

    Xiang et al., "AdapMTL: adaptive pruning framework for multitask learning model", ACM MM 2024.
    Thresholds are trained by Adam with weight decay, and rest while the sparsity is reached. The
    sparsity depends on ``init``, ``lr``, ``weight_decay`` and the length of the run.

    Args:
        sparsity: Share of zeros at which thresholds rest.
        steps: Length of the run.
        init: Where the thresholds' logits start; the original advises -20.
        lr: Their learning rate: that of the weights.
        weight_decay: Their weight decay: that of the weights.
    """
    return SigmoidThreshold(sparsity, end=steps, init=init, lr=lr, weight_decay=weight_decay)


def _check_run(steps: int, updates: int, warmup: float, cooldown: float) -> None:
    """Refuse a run that leaves no time to prune."""
    checks.whole("steps", steps, least=1)
    checks.whole("updates", updates, least=1)
    for name, share in (("warmup", warmup), ("cooldown", cooldown)):
        checks.inside(name, share, "[0, 1)", must="is a share of the run, in [0, 1)")
    if warmup + cooldown >= 1.0:
        raise ValueError(
            f"`warmup` {warmup} and `cooldown` {cooldown} leave nothing of the run to prune in. "
            "Together they must be less than 1."
        )
