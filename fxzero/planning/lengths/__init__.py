"""Plans for input lengths that were not traced: predicted from the plans of three other lengths.

record.py         the operators of a traced forward, with all their integers
polynomials.py    every integer of three records, and of three graphs, as a polynomial of the length
rehearsal.py      the model's forward at another length, held against what its record must be there
frame.py          a graph with polynomials in the place of integers, and the graph of one length
family.py         three plans of calls that differ in one length alone, and the plan of any other length
"""
