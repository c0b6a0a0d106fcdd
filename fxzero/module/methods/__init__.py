"""Methods of the model beside forward, called on the compiled module: `zero.encode(x)`, `zero.generate(ids)`.

a method that                                        runs
computes nothing with parameters                     as it is
calls the model (`self(x)`), with gradients          as it is; each of these calls is one of the compiled module
computes with parameters that get gradients          as a kind of call of its own, traced and planned like forward
computes with parameters, without gradients          as it is, on parameters that are gathered until it returns

Which it is shows in its first call of a kind: call.py. watch.py sees a method touch a shard; undo.py takes back what it
had done until then; gathered.py gathers parameters.
"""
