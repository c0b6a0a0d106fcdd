"""In-place operators of a traced graph become functional: temporaries.py has simple ones, functional.py the rest."""
