import inspect
import re

import pytest

from mtprune import (
    Cubic,
    Erk,
    OneShot,
    PerOutput,
    Regrow,
    Rounds,
    SigmoidThreshold,
    SoftThreshold,
    Vote,
    recipes,
    saliency,
    votes,
)

TIMES = {"every": 100, "end": 1_000}
PUBLISHED = {
    "disparse_static": lambda s: recipes.disparse_static(s),
    "disparse_pretrained": lambda s: recipes.disparse_pretrained(s),
    "disparse_dynamic": lambda s: recipes.disparse_dynamic(s, **TIMES),
    "snip": lambda s: recipes.snip(s),
    "rigl": lambda s: recipes.rigl(s, **TIMES),
    "set_": lambda s: recipes.set_(s, **TIMES),
    "magnitude": lambda s: recipes.magnitude(s),
    "gradual_magnitude": lambda s: recipes.gradual_magnitude(s, begin=10, **TIMES),
    "lamp": lambda s: recipes.lamp(s),
    "random": lambda s: recipes.random(s),
    "movement": lambda s: recipes.movement(s, 1_000),
    "flop": lambda s: recipes.flop(s, 1_000),
    "adapmtl": lambda s: recipes.adapmtl(s, 1_000),
    "wanda": recipes.wanda,
    "adapmtl_published": lambda s: recipes.adapmtl_published(s, 1_000),
}
EVERY = {**PUBLISHED, "best": lambda s: recipes.best(s)}
EVERY_RECIPE = pytest.mark.parametrize("name", EVERY)
GRADUAL = Cubic(begin=10, end=1_000, every=100)


@pytest.mark.parametrize(
    ("name", "score", "allocation", "schedule", "disentangled"),
    [
        ("disparse_static", saliency.snip, "global", OneShot(0), True),
        ("disparse_pretrained", saliency.taylor, "global", OneShot(0), True),
        ("disparse_dynamic", saliency.gradient, Erk(0.9), Regrow(100, 1_000, 0.5, "layer"), True),
        ("snip", saliency.snip, "global", OneShot(0), False),
        ("rigl", saliency.gradient, "erk", Regrow(100, 1_000, 0.3), False),
        ("set_", saliency.random, "erk", Regrow(100, 1_000, 0.3), False),
        ("magnitude", saliency.magnitude, "global", OneShot(0), False),
        ("gradual_magnitude", saliency.magnitude, "global", GRADUAL, False),
        ("lamp", saliency.lamp, "global", OneShot(0), False),
        ("random", saliency.random, "global", OneShot(0), False),
        ("wanda", saliency.wanda, PerOutput(), OneShot(0), True),
    ],
)
def test_each_recipe_is_the_published_method(name, score, allocation, schedule, disentangled):
    assert PUBLISHED[name](0.8) == Vote(
        sparsity=0.8,
        saliency=score,
        vote=votes.unanimous,
        schedule=schedule,
        allocation=allocation,
        disentangled=disentangled,
    )


@pytest.mark.parametrize("allocation", ["uniform", "learned"])
def test_adapmtl_weighs_tasks_by_how_they_bear_pruning(allocation):
    assert recipes.adapmtl(0.8, 1_000, allocation=allocation) == SoftThreshold(
        0.8,
        schedule=Cubic(begin=0, end=750, every=5),
        allocation=allocation,
        max_sparsity=0.9,
        weighting="pruning_sensitivity",
        debias=True,
    )
    assert recipes.adapmtl(0.8, 1_000).allocation == "learned"
    assert recipes.adapmtl(0.8, 1).schedule == Cubic(begin=0, end=1, every=1)


def test_adapmtl_as_published_has_the_defaults_of_its_code():
    assert recipes.adapmtl_published(0.8, 1_000) == SigmoidThreshold(
        0.8, end=1_000, init=-20.0, lr=1e-3, weight_decay=1e-4, rule="adam", weighting="noise"
    )


def test_options_are_passed_on():
    assert recipes.disparse_static(0.9, observations=50).observations == 50
    assert recipes.disparse_pretrained(0.9, observations="auto").observations == "auto"
    assert recipes.disparse_pretrained(0.9, schedule=GRADUAL).schedule == GRADUAL
    assert recipes.snip(0.9, observations=7).observations == 7
    for recipe in (recipes.rigl, recipes.set_):
        assert recipe(0.9, fraction=0.1, **TIMES).schedule == Regrow(100, 1_000, 0.1)
    growth = recipes.disparse_dynamic(0.9, fraction=0.1, **TIMES).schedule
    assert growth == Regrow(100, 1_000, 0.1, within="layer")
    for score in (saliency.magnitude, saliency.taylor_magnitude):
        assert recipes.disparse_pretrained(0.9, score=score).saliency is score


TRAINED = {"saliency": saliency.taylor_magnitude, "voters": (saliency.magnitude,)}


def test_best_prunes_a_trained_network_gradually_or_in_rounds():
    assert recipes.best(0.9) == Vote(0.9, schedule=Rounds(4), observations=4, **TRAINED)
    gradual = Vote(0.9, schedule=Cubic(begin=1, end=500, every=50), observations=4, **TRAINED)
    assert recipes.best(0.9, 1_000) == gradual
    assert recipes.best(0.9, steps=1_000, trained=True) == gradual
    short = Vote(0.9, schedule=Cubic(begin=1, end=1, every=1), observations=1, **TRAINED)
    assert recipes.best(0.9, 1) == short
    assert gradual.allocation == "floor"


def test_best_scores_weights_from_elsewhere_by_what_they_do():
    rounds = Vote(0.9, schedule=Rounds(4), observations=4)
    assert recipes.best(0.9, trained="elsewhere") == rounds
    gradual = Vote(0.9, schedule=Cubic(begin=1, end=500, every=50), observations=4)
    assert recipes.best(0.9, 1_000, trained="elsewhere") == gradual
    for other in ("here", 1, None, 0):
        with pytest.raises(ValueError, match=r"`trained` must be True \(on these tasks\), 'els"):
            recipes.best(0.9, 10, trained=other)


def test_best_from_scratch_is_adapmtl():
    uniform = recipes.adapmtl(0.9, 1_000, allocation="uniform")
    assert recipes.best(0.9, 1_000, trained=False) == uniform
    with pytest.raises(ValueError, match="From scratch, `steps` must be given"):
        recipes.best(0.9, trained=False)
    for steps in (0, 2.5, True):
        for trained in (True, False):
            with pytest.raises(ValueError, match=r"`steps` must be a whole number, at least 1\."):
                recipes.best(0.9, steps, trained=trained)


@EVERY_RECIPE
def test_every_recipe_refuses_a_percentage(name):
    with pytest.raises(ValueError, match=r"Got 90\. Did you mean 0\.9\?"):
        EVERY[name](90)


@EVERY_RECIPE
def test_every_recipe_is_public_and_cites_its_paper(name):
    assert name in recipes.__all__
    citation = re.search(r", (\w+ )*(19|20)\d\d", inspect.getdoc(getattr(recipes, name)))
    assert citation or name in ("best", "random")


def test_every_public_recipe_is_tested_here():
    assert set(EVERY) == set(recipes.__all__)
