"""`python -m ava_exp.runs`: what there is of runs and jobs, how they fare, what they print, and an end to them."""
