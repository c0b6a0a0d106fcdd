"""Islands: submodules that cannot be traced, and run as they are, each call as one node of the step.

    handle, *outputs = island_forward(site, again, inputs, params, buffers)
    gradients = island_backward(site, handle, gradients of outputs, saved inputs, params, buffers)

find.py finds them; marks.py puts them into a trace; probe.py learns what such a call gives; site.py runs it in a step;
saved.py keeps what its autograd graph saves; operators.py has the two operators of a trace.
"""
