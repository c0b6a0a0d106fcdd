from fxzero.graph.needs import cannot_follow, merge_needs, missing_from
from fxzero.graph.recipe import Need, Needs, Recipe


def forward(*fqns: str) -> Needs:
    return tuple(Need("forward", "all_gather", fqn) for fqn in fqns)


def backward(*words: str) -> Needs:
    """Gathers by name, reductions by a name behind a minus."""
    roles = {True: "reduce_scatter", False: "all_gather"}
    return tuple(Need("backward", roles[word[0] == "-"], word.lstrip("-")) for word in words)


def test_each_rank_finds_its_own_order_in_the_merged_list() -> None:
    lists = [forward("text", "head"), forward("text", "image", "head"), forward("sound", "head")]
    merged = merge_needs(lists)
    assert merged == forward("text", "image", "sound", "head")
    assert all(missing_from(needs, merged) is None for needs in lists)


def test_forward_comes_before_backward() -> None:
    a, b = forward("a") + backward("a", "-a"), forward("a", "b") + backward("b", "-b")
    assert merge_needs([a, b]) == forward("a", "b") + backward("a", "-a", "b", "-b")


def test_orders_that_contradict_each_other_become_gathers_before_reductions() -> None:
    a, b = backward("a", "-a", "b", "-b"), backward("b", "-b", "a", "-a")
    merged = merge_needs([a, b])
    assert merged == backward("a", "b", "-a", "-b")
    assert cannot_follow(b, merged) is None
    assert cannot_follow(b, a) == Need("backward", "all_gather", "a")


def test_what_is_not_in_the_list_is_named() -> None:
    missing = cannot_follow(forward("a", "c"), forward("a", "b"))
    assert str(missing) == "all_gather of c in forward"


def test_a_recipe_keeps_its_needs_as_json() -> None:
    recipe = Recipe(needs=forward("a"))
    assert Recipe.from_json(recipe.to_json()) == recipe
