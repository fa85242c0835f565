"""The contestants, a module each. A module has

DISTRIBUTIONS    what is installed for it, for the versions of a row
prepare(setup)   writes the files that it loads, once, in a process of its own
load(setup)      a `generation.protocol.Contestant`
"""
