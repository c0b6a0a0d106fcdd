"""Repeated blocks are traced once: a rehearsal tells which blocks are equal, a trace leaves most of them out, and the
traced ones are stamped in the places of the others.

arguments.py takes the arguments of operators apart; record.py records the operators of a forward by block; find.py
finds runs of equal blocks; compare.py proves that what was traced and what was rehearsed are the same; stamp.py copies
nodes; known_results.py makes results of fake operators again; capture.py does all of it.
"""
