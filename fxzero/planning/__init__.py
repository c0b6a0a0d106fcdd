"""What decides: a traced step becomes a plan, with its passes run, its proof, its memory, its events and its code."""
