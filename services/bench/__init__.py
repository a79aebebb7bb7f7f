"""`s2t bench`: the figures this project claims, measured side by side in one run on any model
folder.

measure    alternate the sides of a comparison, medians and spread, the table
workload   models, prompts and engine runs that the benchmarks share
decode score kl selector serve    one comparison each; plot draws how cost grows
"""
