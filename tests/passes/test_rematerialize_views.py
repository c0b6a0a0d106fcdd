from expecttest import assert_expected_inline

from fxzero.graph.nodes import Role, info, role
from fxzero.graph.step import Phase
from fxzero.passes import RematerializeViews
from tests.helpers.toy_step import toy_step


def backward_reads(step) -> str:
    """Who in backward reads what of forward or of the parameters."""
    phase_of = step.phase_of()
    lines = []
    for node in step.graph.nodes:
        if phase_of.get(node) is Phase.BACKWARD:
            for source in node.all_input_nodes:
                if role(source) is Role.PARAM or phase_of.get(source) is Phase.FORWARD:
                    lines.append(f"{info(node).fqn}: {source.target}")
    return "\n".join(lines)


def test_views_of_params_are_not_saved_when_backward_reads_them() -> None:
    step = toy_step()
    before = backward_reads(step)
    RematerializeViews()(step)
    step.graph.lint()
    assert_expected_inline(
        before,
        """\
layers.2: aten.mm.default
layers.2: aten.t.default
layers.1: aten.mm.default
layers.1: aten.t.default""",
    )
    assert_expected_inline(
        backward_reads(step),
        """\
layers.2: aten.mm.default
layers.2: w2
layers.1: aten.mm.default
layers.1: w1""",
    )


def test_forward_only_step_is_left_alone() -> None:
    step = toy_step(backward=False)
    before = str(step.graph)
    RematerializeViews()(step)
    assert str(step.graph) == before


def test_activations_stay_saved_when_they_are_not_from_params() -> None:
    step = toy_step(num_layers=1)
    before = str(step.graph)
    RematerializeViews()(step)
    assert str(step.graph) == before
