"""Floor 0: the nouns, their errors and the ports. Frozen dataclasses, standard library only.

A noun that travels is checked when it is made: a `ValueError` from here names the field that is wrong, so whatever
decodes bytes into a noun refuses bad ones without further code.
"""
