"""Code that looks at the values of traced tensors: checks become part of the step, branches on inputs are guarded."""
