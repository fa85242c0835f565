"""What `bench_generate.py` is made of: the plan, the contest, its worker processes, and the table."""
