"""How parts of tensors are shown to torch.distributed.checkpoint and lie in files; nothing here knows a model.

boxes.py cuts a range of a flattened tensor into boxes; piece.py is such a range as a DTensor; pieces.py makes the
pieces of one model's layout, and cuts what comes back; callers.py says who asks. files.py has the format of
`fxzero.save`, values.py its plain values, safetensors.py the files of Hugging Face, and
export.py what leaves as such files.
"""
