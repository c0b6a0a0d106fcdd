"""Islands: submodules that cannot be traced, and run as they are, each call as one node of the step.

    handle, *outputs = island_forward(site, again, inputs, params, buffers)
    gradients = island_backward(site, handle, gradients of outputs, saved inputs, params, buffers, older sums)

find.py finds them; marks.py puts them into a trace, where the operators of operators.py stand for them; probe.py learns
what such a call gives (facts.py, geometry.py). In a step site.py runs it: run.py is one forward until its backward, and
saved.py what its autograd graph saves.
"""
