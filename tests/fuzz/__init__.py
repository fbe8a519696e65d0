"""Mutation campaigns against everything that reads a user's files or flags.

    OMP_NUM_THREADS=1 python -m tests.fuzz --count 300 --seed 1      prints a table of counts, a row for each campaign

An input is a function of campaign, seed and number, so that any of them can be made again. What is right: it is
accepted, or refused by a UserError of one printable line. Everything else is a failure.
"""
