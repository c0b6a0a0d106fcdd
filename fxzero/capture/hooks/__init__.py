"""Hooks of modules and tensors: those that only observe run in each step, at their place, on real tensors.

observers.py tells in a trace which hooks observe; operators.py puts a node into the traced graph where one was called;
observer.py is what a step calls there.
"""
